"""Image and video files to the frames that are trained on: which, how large, cut where."""
# Shapes: S windows of a sample, T frames, H × W pixels; frames are uint8 (T, H, W, 3).

import io
import json
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from gentron_train.data.broken import BrokenSample

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
CLIP_ENDINGS = ("mp4",)
CAPTION_KEYS = ("caption", "text")  # of a .json without a .txt beside it


@dataclass(frozen=True)
class Sampling:
    """How frames are taken from a sample. Paper: 8 frames at 4 FPS from clips at 24 FPS.

    A window is a random first frame of a clip and a crop; `starts` of them belong to each clip, and
    to each image if crops are random. They depend on the seed and on the sample's place only.
    """

    frames: int = 8
    fps: float = 4.0
    starts: int = 2
    seed: int = 0
    size: tuple[int, int] | None = None  # pixels (H, W); None: as they are
    buckets: tuple[tuple[int, int], ...] = ()  # sizes instead: the one nearest in aspect ratio
    crop: str = "center"  # or "random"

    def windows(self, kind: str) -> int:
        """S, of "images" or "clips"."""
        return 1 if kind == "images" and self.crop == "center" else max(self.starts, 1)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) that a sample of height × width pixels is brought to."""
        if not self.buckets:
            return self.size or (height, width)
        ratio = math.log(height / width)
        return min(self.buckets, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))


def read_caption(sample: Mapping[str, bytes]) -> str:
    """The .txt of a sample, else "caption" or "text" of its .json; BrokenSample without either."""
    try:
        if "txt" in sample:
            caption = sample["txt"].decode()
        else:
            facts = json.loads(sample.get("json", b"{}"))
            caption = next((facts[key] for key in CAPTION_KEYS if key in facts), None)
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise BrokenSample("unreadable caption", str(error)) from error
    if caption is None:
        raise BrokenSample("no caption", f"files: {', '.join(sorted(sample))}")
    if not isinstance(caption, str):
        raise BrokenSample("unreadable caption", f"{type(caption).__name__}, not text")
    if not caption.strip():
        raise BrokenSample("empty caption")
    return caption


def read_frames(
    sample: Mapping[str, bytes],
    sampling: Sampling,
    generator: torch.Generator,
    window: int | None = None,
) -> Tensor:
    """Frames (S, T, H, W, 3) of a sample's windows, T = 1 for an image; or of one window only.

    `sample` holds its files by ending. The windows are drawn from the generator in order, so that
    each is the same, alone or among all. Raises BrokenSample.
    """
    for ending in IMAGE_ENDINGS:
        if ending in sample:
            return _image_windows(sample[ending], sampling, generator, window)
    for ending in CLIP_ENDINGS:
        if ending in sample:
            return _clip_windows(sample[ending], sampling, generator, window)
    raise BrokenSample("no image or clip", f"files: {', '.join(sorted(sample))}")


def decode_image(content: bytes) -> Tensor:
    """An image file's bytes -> uint8 (H, W, 3)."""
    return _to_tensor(_open_image(content))


def decode_clip(content: bytes) -> tuple[Tensor, float]:
    """An mp4 file's bytes -> all frames, uint8 (T, H, W, 3), and frames per second."""
    import av

    with av.open(io.BytesIO(content)) as container:
        stream, convert = _open_stream(container)
        frames = [convert(frame) for frame in container.decode(stream)]
        return torch.stack(frames), float(stream.average_rate)


def pick_frames(
    times: list[int], time_base: Fraction, sampling: Sampling, generator: torch.Generator
) -> list[int]:
    """Indices of T frames at `sampling.fps` from a random start, by the time of each frame.

    times ascend, in units of time_base seconds. Each pick is the frame nearest to its moment, the
    earlier of two; from 24 FPS that is every 6th. Raises BrokenSample if the clip is too short.
    """
    step = 1 / (time_base * Fraction(sampling.fps))
    span = (sampling.frames - 1) * step
    # The last frame stands for half a frame's time on either side, as every other does.
    half = Fraction(times[-1] - times[-2], 2) if len(times) > 1 else Fraction(0)
    starts = bisect_right(times, times[-1] + half - span)
    if starts < 1:
        seconds = float((times[-1] - times[0]) * time_base)
        raise BrokenSample(
            "short clip",
            f"{len(times)} frames in {seconds:.3f} s; {sampling.frames} frames at "
            f"{sampling.fps:g} FPS need {float(span * time_base):.3f} s",
        )
    first = times[int(torch.randint(starts, (), generator=generator))]
    return [_nearest(times, first + n * step) for n in range(sampling.frames)]


def _nearest(times: list[int], moment: Fraction) -> int:
    after = bisect_left(times, moment)
    if after == 0 or after == len(times):
        return min(after, len(times) - 1)
    return after if times[after] - moment < moment - times[after - 1] else after - 1


def _image_windows(content, sampling, generator, window) -> Tensor:
    from PIL import Image

    try:
        image = _open_image(content)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise BrokenSample("unreadable image", _one_line(error)) from error
    target, scaled = _sizes(image.height, image.width, sampling)
    if scaled != (image.height, image.width):
        image = image.resize(scaled[::-1], Image.Resampling.BICUBIC)
    frames = _to_tensor(image)[None]
    crops = [_crop(scaled, target, sampling, generator) for _ in range(sampling.windows("images"))]
    chosen = crops if window is None else [crops[window]]
    return torch.stack([_cut(frames, corner, target) for corner in chosen])


def _clip_windows(content, sampling, generator, window) -> Tensor:
    import av

    try:
        with av.open(io.BytesIO(content)) as container:
            stream, _ = _open_stream(container)
            times = _frame_times(container, stream)
            size = stream.codec_context.height, stream.codec_context.width
            target, scaled = _sizes(*size, sampling)
            windows = [
                (
                    pick_frames(times, stream.time_base, sampling, generator),
                    _crop(scaled, target, sampling, generator),
                )
                for _ in range(sampling.windows("clips"))
            ]
            chosen = windows if window is None else [windows[window]]
            wanted = {times[pick] for picks, _ in chosen for pick in picks}
            frames = _decode_at(container, wanted, scaled if scaled != size else None)
            return torch.stack(
                [
                    _cut(torch.stack([frames[times[pick]] for pick in picks]), corner, target)
                    for picks, corner in chosen
                ]
            )
    except BrokenSample:
        raise
    except Exception as error:  # a damaged file can fail anywhere
        raise BrokenSample("unreadable video", _one_line(error)) from error


def _open_stream(container, size: tuple[int, int] | None = None):
    """The video stream, and a function from its frames to uint8 (H, W, 3), scaled to `size`."""
    import av

    if not container.streams.video:
        raise BrokenSample("unreadable video", "holds no video stream")
    stream = container.streams.video[0]
    # Threads and a new colour converter for each frame cost ten times a small clip's decoding.
    stream.codec_context.thread_count = 1
    converter = av.video.reformatter.VideoReformatter()
    scaling = {"height": size[0], "width": size[1], "interpolation": "BICUBIC"} if size else {}

    def convert(frame) -> Tensor:
        picture = converter.reformat(frame, format="rgb24", threads=1, **scaling)
        return torch.from_numpy(picture.to_ndarray())

    return stream, convert


def _frame_times(container, stream) -> list[int]:
    """When each frame is shown, ascending; read from the packets, without decoding."""
    times = {
        packet.pts
        for packet in container.demux(stream)
        if packet.size and packet.pts is not None and not packet.is_discard
    }
    if len(times) < stream.frames:
        raise BrokenSample("unreadable video", f"{len(times)} of its {stream.frames} frames")
    if not times:
        raise BrokenSample("unreadable video", "holds no frames")
    return sorted(times)


def _decode_at(container, wanted: set[int], size: tuple[int, int] | None) -> dict[int, Tensor]:
    stream, convert = _open_stream(container, size)
    frames = {}
    # A seek goes by the order of decoding: it can miss a frame shown before its keyframe.
    for origin in dict.fromkeys((min(wanted), 0)):
        container.seek(origin, stream=stream)
        for frame in container.decode(stream):
            if frame.pts in wanted and frame.pts not in frames:
                if frame.is_corrupt:
                    raise BrokenSample("unreadable video", f"damaged at {frame.time:.3f} s")
                frames[frame.pts] = convert(frame)
            if len(frames) == len(wanted):
                return frames
    raise BrokenSample("unreadable video", f"{len(wanted) - len(frames)} frames do not decode")


def _open_image(content: bytes):
    from PIL import Image, ImageOps

    return ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")


def _to_tensor(image) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.array(image))


def _sizes(height: int, width: int, sampling: Sampling) -> tuple[tuple[int, int], tuple[int, int]]:
    """What is cut out, (H, W), and the size before the cut: the smallest that covers it."""
    target = sampling.target(height, width)
    scale = max(Fraction(target[0], height), Fraction(target[1], width))
    return target, (round(height * scale), round(width * scale))


def _crop(scaled, target, sampling: Sampling, generator: torch.Generator) -> tuple[int, int]:
    """Top and left edge of the cut."""
    room = [whole - part for whole, part in zip(scaled, target, strict=True)]
    if sampling.crop == "center":
        return room[0] // 2, room[1] // 2
    return tuple(int(torch.randint(side + 1, (), generator=generator)) for side in room)


def _cut(frames: Tensor, corner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    (top, left), (height, width) = corner, size
    return frames[:, top : top + height, left : left + width]


def _one_line(error: Exception) -> str:
    text = re.sub(r" ?<[^<>]* at 0x[0-9a-f]+>", "", str(error))  # another in every process
    return " ".join(text.split()) or type(error).__name__
