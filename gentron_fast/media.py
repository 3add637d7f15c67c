"""Frames to files and back: mp4 by PyAV, gif and png by Pillow."""
# Shapes: T frames of H × W pixels, RGB, uint8.

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from gentron_fast.files import whole_file

ENDINGS = (".mp4", ".gif", ".png")
Frames = np.ndarray | torch.Tensor


def write_media(path: str | os.PathLike, frames: Frames, fps: float) -> None:
    """Write frames, uint8 (T, H, W, 3), as the ending of `path` says: .mp4, .gif or .png.

    An mp4 is H.264 with 4:2:0 colour and takes even sizes only; a gif counts time in hundredths of
    a second; a png is a single frame. Missing folders are made. The file appears under its name
    only when it is complete.
    """
    path = Path(path)
    ending = check_ending(path)
    frames = _as_array(frames)
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive number, not {fps}")
    if ending == ".png" and len(frames) != 1:
        raise ValueError(f"a png holds one frame, not {len(frames)}; join them by contact_sheet")
    with whole_file(path) as partial:
        if ending == ".png":
            _write_png(str(partial), frames[0])
        elif ending == ".gif":
            _write_gif(str(partial), frames, fps)
        else:
            _write_mp4(str(partial), frames, fps)


def check_ending(path: str | os.PathLike) -> str:
    """The ending of a path that `write_media` can write; ValueError for any other."""
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"cannot write {str(path)!r}: its ending must be {_either(ENDINGS)}")
    return ending


def read_video(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """Read a video: its frames as shown, uint8 (T, H, W, 3), and its frames per second."""
    av = _import_av()
    if not Path(path).is_file():
        raise FileNotFoundError(f"no video at {path}")
    try:
        with av.open(_local(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video")
            stream, shown, frames = container.streams.video[0], None, []
            for frame in container.decode(stream):
                shown = shown or ShownFrames(stream, frame)
                frames.append(shown(frame))
            rate = stream.average_rate
    except av.FFmpegError as error:
        raise ValueError(f"{path} is no readable video: {error.strerror}") from error
    if not frames:
        raise ValueError(f"{path} holds no frames")
    return np.stack(frames), float(rate)


def video_format(path: str | os.PathLike) -> tuple[str, str]:
    """The names that FFmpeg gives a video's codec and pixels: ("h264", "yuv420p")."""
    with _import_av().open(_local(path)) as container:
        context = container.streams.video[0].codec_context
        return context.codec.canonical_name, context.pix_fmt


class ShownFrames:
    """A video stream's decoded frames to pictures as a player shows them.

    They are turned and mirrored as the display matrix says, their pixels are square, and what is
    transparent is laid over white. size is (H, W) of a picture, from the first frame.
    """

    def __init__(self, stream, first):
        av = _import_av()
        # One converter for all: a new one for each frame costs ten times a small clip's decoding.
        self._reformatter = av.video.reformatter.VideoReformatter()
        a, b, _, c, d = _display_matrix(first)
        self._is_turned = abs(b) > abs(a)
        down, right = (b, c) if self._is_turned else (d, a)
        self._steps = (
            slice(None, None, -1 if down < 0 else 1),
            slice(None, None, -1 if right < 0 else 1),
        )
        aspect = stream.sample_aspect_ratio or 1
        self.size = self._turn(
            first.height if aspect >= 1 else round(first.height / aspect),
            first.width if aspect <= 1 else round(first.width * aspect),
        )

    def _turn(self, height: int, width: int) -> tuple[int, int]:
        return (width, height) if self._is_turned else (height, width)

    def __call__(self, frame, size: tuple[int, int] | None = None) -> np.ndarray:
        """A frame as uint8 (H, W, 3), scaled to `size`, which is `self.size` where it is None."""
        height, width = self._turn(*(size or self.size))
        if any(component.is_alpha for component in frame.format.components):
            rgba = self._reformatter.reformat(frame, format="rgba", threads=1).to_ndarray()
            frame = type(frame).from_ndarray(over_white(rgba), "rgb24")
        scaling = {"height": height, "width": width, "interpolation": "BICUBIC"}
        if (frame.height, frame.width) == (height, width):
            scaling = {}
        picture = self._reformatter.reformat(frame, format="rgb24", threads=1, **scaling)
        array = picture.to_ndarray()
        array = array.swapaxes(0, 1) if self._is_turned else array
        return np.ascontiguousarray(array[self._steps])


def over_white(rgba: np.ndarray) -> np.ndarray:
    """Pictures with transparency, uint8 (…, 4), over white: uint8 (…, 3)."""
    alpha = rgba[..., 3:].astype(np.uint16)
    mixed = rgba[..., :3] * alpha + 255 * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def _display_matrix(frame) -> list[int]:
    """The first five of its nine numbers, from (x, y) to (a·x + c·y, b·x + d·y): a b _ c d."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return np.frombuffer(bytes(data), np.int32)[:5].tolist()
    return [1, 0, 0, 0, 1]


def contact_sheet(clips: Sequence[Frames], padding: int = 2) -> np.ndarray:
    """All frames of several clips in one picture, uint8 (H', W', 3): a row for each clip.

    Every clip is uint8 (T, H, W, 3), all of one H and W; white lies between the frames and after
    the last one of a shorter clip. A single clip of more than 8 frames folds into a near square.
    """
    arrays = [_as_array(clip) for clip in clips]
    if not arrays:
        raise ValueError("a contact sheet needs at least one clip")
    sizes = {array.shape[1:3] for array in arrays}
    if len(sizes) > 1:
        raise ValueError(f"clips of one size fit a contact sheet, not {sorted(sizes)}")
    if len(arrays) == 1 and len(arrays[0]) > 8:
        columns = math.ceil(math.sqrt(len(arrays[0])))
        arrays = [arrays[0][first : first + columns] for first in range(0, len(arrays[0]), columns)]
    (height, width), columns = sizes.pop(), max(map(len, arrays))
    sheet = np.full(
        (
            len(arrays) * (height + padding) - padding,
            columns * (width + padding) - padding,
            3,
        ),
        255,
        dtype=np.uint8,
    )
    for row, array in enumerate(arrays):
        for column, frame in enumerate(array):
            top, left = row * (height + padding), column * (width + padding)
            sheet[top : top + height, left : left + width] = frame
    return sheet


def _as_array(frames: Frames) -> np.ndarray:
    array = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not array.size:
        raise ValueError(
            f"frames must be uint8 (T, H, W, 3), not {array.dtype} {tuple(array.shape)}"
        )
    return np.ascontiguousarray(array)


def encode_image(frame: Frames, kind: str, quality: int = 90) -> bytes:
    """A picture, uint8 (H, W, 3), as the bytes of a "png", "jpeg" or "webp"; quality 0 … 100."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.asarray(frame)).save(file, kind, quality=quality)
    return file.getvalue()


def _write_png(name: str, frame: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(frame).save(name)


def _write_gif(name: str, frames: np.ndarray, fps: float) -> None:
    from PIL import Image

    # Each frame ends at the nearest hundredth of a second, so that rounding does not add up.
    ends = [round(100 * (index + 1) / fps) for index in range(len(frames))]
    durations = [10 * (end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(name, save_all=True, append_images=rest, duration=durations, loop=0)


def _write_mp4(name: str, frames: np.ndarray, fps: float) -> None:
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"an mp4 takes even sizes, not {height}x{width}")
    av = _import_av()
    with av.open(_local(name), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # With B frames x264 wrote other bytes for the same small frames, by what lay in memory.
        stream.options = {"crf": "18", "bf": "0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _local(path: str | os.PathLike) -> str:
    """A path as FFmpeg takes it, which reads what stands before a colon as a protocol."""
    return f"file:{os.fspath(path)}"


def _import_av():
    try:
        import av
    except ImportError as error:
        raise ImportError("videos are read and written by PyAV: pip install av") from error
    return av


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
