"""Samples and shards that the tests of training data share, and settings to read them by."""

import io
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy
import torch
from PIL import Image

from gentron_train.data.loader import DataSettings
from gentron_train.small_world.architecture import small_vae

SIDE = 64 // small_vae().factor  # of the latents


def picture(height: int, width: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom: a pixel says where it was."""
    rows, columns = numpy.mgrid[:height, :width]
    colours = (255 * columns / (width - 1), 255 * rows / (height - 1), 0 * rows)
    return Image.fromarray(numpy.stack(colours, -1).round().astype(numpy.uint8))


def decoded(content: bytes) -> numpy.ndarray:
    """A video's frames: uint8 (T, H, W, 3)."""
    with av.open(io.BytesIO(content)) as container:
        return numpy.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def as_file(image: Image.Image, ending: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, {"jpg": "jpeg"}.get(ending, ending), **options)
    return file.getvalue()


def video(
    times,
    time_base=Fraction(1, 24),
    size=(32, 32),
    file=None,
    container="mp4",
    codec="libx264",
    gop=12,
    aspect=None,
    **options,
) -> bytes:
    """A clip whose nth frame, shown at times[n], is a picture with blue at 5·n."""
    file = file or io.BytesIO()
    with av.open(file, "w", format=container, options=options) as container:
        stream = container.add_stream(codec, rate=24, options={"crf": "1", "g": str(gop)})
        if aspect is not None:  # of a pixel
            stream.codec_context.sample_aspect_ratio = aspect
        stream.height, stream.width = size
        stream.pix_fmt, stream.codec_context.time_base = "yuv444p", time_base
        for number, time in enumerate(times):
            pixels = numpy.array(picture(*size))
            pixels[..., 2] = 5 * number % 256
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.read_bytes() if isinstance(file, Path) else file.getvalue()


def write_tar(path, samples: list[dict[str, bytes]]):
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                entry = tarfile.TarInfo(f"{path.stem}-{number:04d}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


CAPTION = {"txt": b"a red circle"}

CLIP = list(range(48))  # two seconds at 24 FPS

BROKEN = {
    "video without its index": "unreadable video",
    "video cut in the middle": "unreadable video",
    "video of nothing": "unreadable video",
    "short clip": "short clip",
    "image cut in the middle": "unreadable image",
    "image of nothing": "unreadable image",
    "no caption": "no caption",
    "empty caption": "empty caption",
    "caption alone": "no image or clip",
}


def settings(shards, log, **options) -> DataSettings:
    both = {"kinds": ("images", "clips"), "p_motion_free": 0.5, "p_null": 0.2, "size": (32, 32)}
    both |= {"images": f"{shards}/images-*.tar", "clips": f"{shards}/clips-*.tar"}
    both |= {"batch": 3, "workers": 0, "max_broken": 1.0, "log": log / "broken.jsonl"}
    both |= {"windows_per_clip": 2}
    return DataSettings(**both | options)


def assert_same(some, others):
    for name in ("latents", "noise", "timestep", "motion_free"):
        assert torch.equal(getattr(some, name), getattr(others, name)), name
    for name, (ids, mask) in some.text.items():
        assert torch.equal(ids, others.text[name][0]) and torch.equal(mask, others.text[name][1])


def texts(encoder, batch) -> list[str]:
    ids, mask = batch.text["t5"]
    tokenizer = encoder.tokenizers["t5"]
    return [
        tokenizer.decode(row[kept], skip_special_tokens=True)
        for row, kept in zip(ids, mask, strict=True)
    ]
