"""Frames to files and back: mp4 by PyAV, gif and png by Pillow."""
# Shapes: T frames of H × W pixels, RGB, uint8.

from __future__ import annotations

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
    """Read a video: its frames, uint8 (T, H, W, 3), and its frames per second."""
    av = _import_av()
    if not Path(path).is_file():
        raise FileNotFoundError(f"no video at {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video")
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            rate = stream.average_rate
    except av.FFmpegError as error:
        raise ValueError(f"{path} is no readable video: {error.strerror}") from error
    if not frames:
        raise ValueError(f"{path} holds no frames")
    return np.stack(frames), float(rate)


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
    with av.open(name, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "18"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _import_av():
    try:
        import av
    except ImportError as error:
        raise ImportError("videos are read and written by PyAV: pip install av") from error
    return av


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
