"""Measures of clips that need no network: flicker, motion, and whether first frames are the same.

python -m gentron_fast.evaluation.video CLIPS [--against FOLDER] [--out FILE]
"""
# Shapes: T frames of H × W pixels, RGB, uint8.

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gentron_fast.commandline import check_writable, refuse, run
from gentron_fast.evaluation.pairs import VIDEOS, media_files, same_names
from gentron_fast.files import write_json
from gentron_fast.media import read_video

NAME = "gentron_fast.evaluation.video"
BLOCK, REACH = 8, 8  # pixels: a block's side, and how far it is looked for
LEAST_GAIN = 1.0  # of 255: a place that is better by less is chance
WAY_COST = 0.25  # of 255, a pixel: of 0, 0.25, 0.5, 1 and 2 the closest to the small world's speeds
MOVING = (*VIDEOS, ".gif")

HELP = f"""\
usage: python -m {NAME} CLIPS [--against FOLDER] [--out FILE]

CLIPS                 a folder of clips ({", ".join(MOVING)})
--against FOLDER      clips or images of the same names: are the first frames the same?
--out FILE            every clip's values, as JSON

temporal flickering   1 - |difference of neighbouring frames| / 255, as VBench has it,
                      which takes it of clips in which nothing is to move; 1 is still
block motion          which share of blocks of {BLOCK} x {BLOCK} pixels moves, and how far in
                      pixels a frame, up to {REACH} along each axis: each is looked for
                      in the next frame (VBench asks RAFT instead)
first frames          PSNR in dB against the first frame of the same name
"""


def temporal_flickering(frames: np.ndarray) -> float:
    """VBench's temporal flickering of a clip, uint8 (T, H, W, 3): 1 - mean difference / 255.

    The difference is the absolute one between neighbouring frames, over all values. ValueError for
    fewer than two frames.
    """
    _check_clip(frames)
    return 1 - float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean()) / 255


class BlockMotion(NamedTuple):
    """How far the blocks that move do so, in pixels a frame (0.0 where none does); their share."""

    speed: float
    share: float


def block_motion(frames: np.ndarray) -> BlockMotion:
    """The motion of 8 × 8 blocks in a clip, uint8 (T, H, W, 3), T ≥ 2, found by their pixels.

    Each block of a frame is looked for in the next one, up to 8 pixels away along each axis: the
    place of the least mean absolute difference of luma, to which a quarter of a grey level is added
    for each pixel of the way, as plain places are all alike. A block has moved where that place has
    at most half the difference of where it was, and a grey level less: what is covered, or changes
    in place, is at rest. Blocks within 8 pixels of the edge, which may leave, do not count.
    ValueError for fewer than two frames, or a frame without other blocks.
    """
    _check_clip(frames)
    rows, columns = ((side - 2 * REACH) // BLOCK for side in frames.shape[1:3])
    if min(rows, columns) < 1:
        raise ValueError(f"frames of {_size(frames)} pixels: wanted at least {BLOCK + 2 * REACH}")
    luma = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)

    def window(clip: np.ndarray, dy: int, dx: int) -> np.ndarray:
        clip = clip[:, REACH + dy :, REACH + dx :]
        return clip[:, : rows * BLOCK, : columns * BLOCK]

    def difference(dy: int, dx: int) -> np.ndarray:
        pixels = np.abs(window(luma[1:], dy, dx) - window(luma[:-1], 0, 0))
        return pixels.reshape(-1, rows, BLOCK, columns, BLOCK).mean((2, 4))

    rest = difference(0, 0)
    enough, moved = np.minimum(rest / 2, rest - LEAST_GAIN), np.zeros_like(rest)
    cost = enough.copy()
    steps = range(-REACH, REACH + 1)
    for dy, dx in itertools.product(steps, steps):
        there, way = difference(dy, dx), math.hypot(dy, dx)
        closer = (there < enough) & (there + WAY_COST * way < cost)
        moved = np.where(closer, way, moved)
        cost = np.where(closer, there + WAY_COST * way, cost)
    moving = moved > 0
    return BlockMotion(float(moved[moving].mean()) if moving.any() else 0.0, float(moving.mean()))


def first_frame_psnr(clip: np.ndarray, other: np.ndarray) -> float:
    """PSNR in dB between the first frames of two clips, uint8 (T, H, W, 3); infinite if the same.

    ValueError where the frames are not of one size.
    """
    if clip.shape[1:] != other.shape[1:]:
        raise ValueError(f"frames of {_size(clip)} and {_size(other)} pixels: wanted one size")
    error = np.square(clip[0].astype(np.float64) - other[0]).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / float(error))


def _check_clip(frames: np.ndarray) -> None:
    if len(frames) < 2:
        raise ValueError(f"a clip of {len(frames)} frame shows no motion: wanted two or more")


def _size(frames: np.ndarray) -> str:
    return f"{frames.shape[1]} x {frames.shape[2]}"


def read_frames(path: Path) -> np.ndarray:
    """A clip or an image as frames, uint8 (T, H, W, 3)."""
    if path.suffix.lower() in MOVING:
        return read_video(path)[0]
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))[None]


def measure_folder(folder: Path, against: Path | None = None) -> dict[str, dict[str, float | None]]:
    """Each clip's measures by its name; a PSNR of equal frames, which is infinite, is None."""
    partners = {}
    if against is not None:
        partners = {name: other for name, _, other in same_names(folder, against)}
    files = media_files(folder)
    still = [path.name for path in files.values() if path.suffix.lower() not in MOVING]
    if still:
        raise ValueError(f"{folder} holds {still[0]}, which is no clip ({', '.join(MOVING)})")
    values = {}
    for name, path in files.items():
        try:
            frames = read_frames(path)
            motion = block_motion(frames)
            values[name] = {
                "temporal_flickering": temporal_flickering(frames),
                "block_speed": motion.speed,
                "moving_share": motion.share,
            }
            if partners:
                psnr = first_frame_psnr(frames, read_frames(partners[name]))
                values[name]["first_frame_psnr"] = None if math.isinf(psnr) else psnr
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return values


def report_lines(values: dict[str, dict[str, float | None]]) -> list[str]:
    """The means over the clips, in words."""
    clips = list(values.values())

    def mean(name: str) -> float:
        known = [clip[name] for clip in clips if clip[name] is not None]
        return sum(known) / len(known) if known else math.inf

    lines = [
        f"clips                {len(clips)}",
        f"temporal flickering  {mean('temporal_flickering'):.4f}",
        f"block motion         {mean('block_speed'):.2f} pixels a frame,"
        f" {100 * mean('moving_share'):.1f} % of blocks",
    ]
    if "first_frame_psnr" in clips[0]:
        same = sum(clip["first_frame_psnr"] is None for clip in clips)
        line = f"first frames         {same} of {len(clips)} the same"
        others = f", the others {mean('first_frame_psnr'):.2f} dB" if same < len(clips) else ""
        lines.append(line + others)
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 after wrong input (told in one line), 130 after SIGINT."""
    argv = sys.argv[1:] if argv is None else argv
    return run(
        NAME, lambda: command(parse_arguments(argv)), argv, "interrupted; nothing is written"
    )


def command(args: argparse.Namespace) -> None:
    if args.out is not None:
        check_writable([args.out])
    values = measure_folder(args.clips, args.against)
    if args.out is not None:
        write_json(args.out, values)
    print("\n".join(report_lines(values)))


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raises ValueError where argparse would print its usage and exit."""
    parser = argparse.ArgumentParser(prog=NAME, allow_abbrev=False)
    parser.format_help, parser.error = lambda: HELP, refuse
    parser.add_argument("clips", type=Path, metavar="CLIPS")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
