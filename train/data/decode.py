"""Image and video files to the frames that are trained on: which, how large, cut where."""
# Shapes: S windows of a sample, T frames, H × W pixels; frames are uint8 (T, H, W, 3).

import io
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from gentron_fast.media import ShownFrames, over_white
from gentron_train.data.broken import BrokenSample, broken_by

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
CLIP_ENDINGS = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "gif")
ENDINGS = {"images": IMAGE_ENDINGS, "clips": CLIP_ENDINGS}
MOST_PIXELS = 2**27  # of a frame before it is cut: a line of a pixel's height would fill the memory
PNG_BIT_DEPTH = 24  # where the byte lies in the file
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
    with broken_by("unreadable caption"):
        if "txt" in sample:
            captions = [sample["txt"].decode("utf-8-sig")]
        else:
            facts = json.loads(sample.get("json", b"{}"))
            if not isinstance(facts, dict):
                raise BrokenSample("unreadable caption", f"{type(facts).__name__}, not an object")
            captions = [facts[key] for key in CAPTION_KEYS if facts.get(key) is not None]
    failures = []
    for caption in captions:
        try:
            return _check_caption(caption)
        except BrokenSample as error:
            failures.append(error)
    raise failures[0] if failures else _lacking("no caption", sample)


def _check_caption(caption: object) -> str:
    with broken_by("unreadable caption"):
        if not isinstance(caption, str):
            raise BrokenSample("unreadable caption", f"{type(caption).__name__}, not text")
        caption.encode()  # half a surrogate pair cannot be
    if not caption.strip():
        raise BrokenSample("empty caption")
    return caption


def read_frames(
    sample: Mapping[str, bytes],
    sampling: Sampling,
    generator: torch.Generator,
    window: int | None = None,
    kind: str | None = None,
) -> Tensor:
    """Frames (S, T, H, W, 3) of a sample's windows, T = 1 for an image; or of one window only.

    `sample` holds its files by ending; of "images" or "clips" the kind is read, else the clip if
    there is one: an image beside it is its thumbnail. The windows are drawn from the generator in
    order, so that each is the same, alone or among all. Raises BrokenSample.
    """
    for one in (kind,) if kind else ("clips", "images"):
        for ending in ENDINGS[one]:
            if ending in sample:
                return READERS[one](sample[ending], sampling, generator, window)
    raise _lacking(f"no {kind[:-1]}" if kind else "no image or clip", sample)


def _lacking(cause: str, sample: Mapping[str, bytes]) -> BrokenSample:
    """What a sample has not, and why: a name "v1.0.jpg" is file 0.jpg of the sample v1."""
    known = {"txt", "json", *IMAGE_ENDINGS, *CLIP_ENDINGS}
    if any("." in name and name.rpartition(".")[2] in known for name in sample):
        cause += " (a sample's name ends at its first dot)"
    return BrokenSample(cause, f"files: {', '.join(sorted(sample))}")


def decode_image(content: bytes) -> Tensor:
    """An image file's bytes -> uint8 (H, W, 3). Raises BrokenSample."""
    with broken_by("unreadable image"):
        return _to_tensor(_open_image(content))


def decode_clip(content: bytes) -> tuple[Tensor, float]:
    """A video file's bytes -> all frames, uint8 (T, H, W, 3), and frames per second.

    Raises BrokenSample.
    """
    with broken_by("unreadable video"), _open_clip(content) as (container, stream):
        shown, frames = None, []
        for frame in container.decode(stream):
            shown = shown or ShownFrames(stream, frame)
            frames.append(torch.from_numpy(shown(frame)))
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

    with broken_by("unreadable image"):
        image = _open_image(content)
        target, scaled = _sizes(image.height, image.width, sampling)
        if scaled != (image.height, image.width):
            image = image.resize(scaled[::-1], Image.Resampling.BICUBIC)
        frames = _to_tensor(image)[None]
    crops = [_crop(scaled, target, sampling, generator) for _ in range(sampling.windows("images"))]
    chosen = crops if window is None else [crops[window]]
    return torch.stack([_cut(frames, corner, target) for corner in chosen])


def _clip_windows(content, sampling, generator, window) -> Tensor:
    with broken_by("unreadable video"):
        if is_cut_off(content):
            raise BrokenSample("unreadable video", "the file is cut off")
        timing = _read_timing(content)
        with _open_clip(content) as (container, stream):
            first = next(container.decode(stream), None)
            if first is None:
                raise BrokenSample("unreadable video", "no frame decodes")
            shown = ShownFrames(stream, first)
            target, scaled = _sizes(*shown.size, sampling)
            windows = [
                (
                    pick_frames(timing.times, stream.time_base, sampling, generator),
                    _crop(scaled, target, sampling, generator),
                )
                for _ in range(sampling.windows("clips"))
            ]
            chosen = windows if window is None else [windows[window]]
            wanted = {timing.times[pick] for picks, _ in chosen for pick in picks}

            def convert(frame) -> Tensor:
                return torch.from_numpy(shown(frame, scaled))

            frames = (
                {} if timing.by_order else _decode_at(container, stream, wanted, timing, convert)
            )
        if len(frames) < len(wanted):
            frames = _decode_all(content, wanted, timing, convert)
        return torch.stack(
            [
                _cut(torch.stack([frames[timing.times[pick]] for pick in picks]), corner, target)
                for picks, corner in chosen
            ]
        )


READERS = {"images": _image_windows, "clips": _clip_windows}


@contextmanager
def _open_clip(content: bytes):
    """A video file and its stream; the picture of a cover is no video."""
    import av

    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise BrokenSample("unreadable video", "holds no video stream")
        stream.codec_context.thread_count = 1
        yield container, stream


class Timing(NamedTuple):
    """When the frames of a clip are shown, in units of the stream's time base.

    keyframes: when each is shown and when it is decoded, ascending. by_order: the frames themselves
    do not say their time, as in an AVI whose frames are reordered; the nth has the nth time.
    """

    times: list[int]
    keyframes: list[tuple[int, int]]
    by_order: bool


def _read_timing(content: bytes) -> Timing:
    """From the packets, without decoding.

    What an edit list hides, as in a clip cut without encoding it anew, is not shown, whatever the
    header counts.
    """
    times, keyframes, by_order = set(), [], False
    with _open_clip(content) as (container, stream):
        for packet in container.demux(stream):
            time = packet.dts if packet.pts is None else packet.pts
            if not packet.size or time is None:
                continue
            by_order |= packet.pts is None
            if packet.is_keyframe:
                keyframes.append((time, time if packet.dts is None else packet.dts))
            if not packet.is_discard:
                times.add(time)
        by_order |= container.format.name == "avi" and stream.codec_context.has_b_frames
    if not times:
        raise BrokenSample("unreadable video", "holds no frames")
    return Timing(sorted(times), sorted(keyframes), by_order)


def _decode_at(container, stream, wanted: set[int], timing: Timing, convert) -> dict[int, Tensor]:
    """The wanted frames, by time, each decoded from the keyframe before it.

    Those that this does not find, as where a file tells no keyframes, are left out.
    """
    groups: dict[int, list[int]] = {}
    for time in sorted(wanted):
        nth = bisect_right(timing.keyframes, time, key=lambda keyframe: keyframe[0])
        groups.setdefault(max(nth - 1, 0), []).append(time)
    frames = {}
    for nth, times in groups.items():
        # Where a demuxer seeks by the times of decoding, the first of them may lead too far.
        for origin in dict.fromkeys(timing.keyframes[nth] if timing.keyframes else ()):
            container.seek(origin, stream=stream)
            for frame in container.decode(stream):
                if frame.pts in times and not frame.is_corrupt:
                    frames[frame.pts] = convert(frame)
                if frame.pts is not None and frame.pts >= times[-1]:
                    break
            if frames.keys() >= set(times):
                break
    return frames


def _decode_all(content: bytes, wanted: set[int], timing: Timing, convert) -> dict[int, Tensor]:
    """The wanted frames, by time, decoded from the clip's start."""
    frames = {}
    with _open_clip(content) as (container, stream):
        for nth, frame in enumerate(container.decode(stream)):
            time = timing.times[nth] if timing.by_order else frame.pts
            if time in wanted:
                if frame.is_corrupt:
                    raise BrokenSample("unreadable video", f"damaged at {frame.time:.3f} s")
                frames[time] = convert(frame)
            if len(frames) == len(wanted):
                return frames
    raise BrokenSample("unreadable video", f"{len(wanted) - len(frames)} frames do not decode")


def is_cut_off(content: bytes) -> bool:
    """Whether a video file ends before the end that its outermost parts tell."""
    length, at = len(content), 0
    if content[:3] == b"GIF":
        return not content.rstrip(b"\0").endswith(b";")
    if content[:4] == b"RIFF":  # AVI
        while content[at : at + 4] == b"RIFF":
            at += 8 + int.from_bytes(content[at + 4 : at + 8], "little")
    elif content[:4] == b"\x1a\x45\xdf\xa3":  # Matroska, WebM: a header, then a segment
        size, at = _vint(content, 4)
        size, at = _vint(content, at + (size or 0) + 4)
        at += size or 0
    else:  # the boxes of an MP4
        while at + 8 <= length:
            size, name, start = int.from_bytes(content[at : at + 4]), content[at + 4 : at + 8], at
            if size == 1:
                size = int.from_bytes(content[at + 8 : at + 16])
            if size < 8:  # 0: to the end
                return False
            at = start + size
            if at > length:
                return name in (b"moov", b"moof", b"mdat")
    return at > length


def _vint(content: bytes, at: int) -> tuple[int | None, int]:
    """Matroska's integer of variable length, None for "unknown", and where it ends."""
    length = 9 - content[at].bit_length()
    mask = (1 << 7 * length) - 1
    value = int.from_bytes(content[at : at + length]) & mask
    return None if value == mask else value, at + length


def _open_image(content: bytes):
    """As it is shown: upright, 8 bits a channel, over white where it is transparent."""
    import numpy
    from PIL import Image, ImageOps

    opened = Image.open(io.BytesIO(content))
    image, hidden = ImageOps.exif_transpose(opened), opened.info.get("transparency")
    if image.mode.startswith("I"):  # 16 bits of grey
        grey = numpy.array(image)
        shown = (grey >> 8).clip(0, 255).astype("uint8")
        if hidden is not None:
            shown[grey == hidden] = 255
        return Image.fromarray(shown).convert("RGB")
    if opened.format == "PNG" and hidden is not None:
        # The colour of a PNG that is transparent comes in the file's bits, the pixels in 8.
        bits = content[PNG_BIT_DEPTH]
        if image.mode == "L" and bits < 8:
            image.info["transparency"] = hidden * 255 // (2**bits - 1)
        elif image.mode == "RGB" and bits == 16:
            image.info["transparency"] = tuple(value >> 8 for value in hidden)
    if image.has_transparency_data:
        return Image.fromarray(over_white(numpy.array(image.convert("RGBA"))))
    return image.convert("RGB")


def _to_tensor(image) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.array(image))


def _sizes(height: int, width: int, sampling: Sampling) -> tuple[tuple[int, int], tuple[int, int]]:
    """What is cut out, (H, W), and the size before the cut: the smallest that covers it."""
    target = sampling.target(height, width)
    scale = max(Fraction(target[0], height), Fraction(target[1], width))
    scaled = round(height * scale), round(width * scale)
    if scaled[0] * scaled[1] > MOST_PIXELS:
        raise BrokenSample("extreme size", f"{height}x{width} pixels, scaled to {scaled}")
    return target, scaled


def _crop(scaled, target, sampling: Sampling, generator: torch.Generator) -> tuple[int, int]:
    """Top and left edge of the cut."""
    room = [whole - part for whole, part in zip(scaled, target, strict=True)]
    if sampling.crop == "center":
        return room[0] // 2, room[1] // 2
    return tuple(int(torch.randint(side + 1, (), generator=generator)) for side in room)


def _cut(frames: Tensor, corner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    (top, left), (height, width) = corner, size
    return frames[:, top : top + height, left : left + width]
