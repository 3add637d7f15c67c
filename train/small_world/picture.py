"""Twelve fixed prompts, seed 0, no choosing, as one picture: docs/clips.png (make picture)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gentron_fast.commandline import (
    check_writable,
    choose_device,
    refuse,
    run,
    silence_libraries,
    usable_device,
)
from gentron_fast.files import whole_file
from gentron_fast.media import contact_sheet

NAME = "gentron_train.small_world.picture"
PROMPTS = (
    "a red circle moving left",
    "a blue square moving right",
    "a green triangle moving up",
    "a yellow star moving down",
    "a red star is rotating",
    "a purple cross growing",
    "a cyan circle shrinking",
    "a large blue star",
    "a green square above a yellow cross",
    "a small red triangle moving left",
    "a striped blue circle moving right",
    "a dotted yellow square spinning",
)
COLUMNS, LINE = 2, 14  # clips beside one another; pixels of a prompt's line


def labelled(picture: np.ndarray, title: str) -> np.ndarray:
    """A picture, uint8 (H, W, 3), below a line of text."""
    from PIL import Image, ImageDraw

    height, width, _ = picture.shape
    whole = Image.new("RGB", (width, height + LINE), "white")
    whole.paste(Image.fromarray(picture), (0, LINE))
    ImageDraw.Draw(whole).text((1, 1), title, fill="black")
    return np.asarray(whole)


def strip(clips: Sequence[np.ndarray], title: str) -> np.ndarray:
    """Clips, each uint8 (T, H, W, 3) a row of frames, beside one another below a title."""
    return labelled(np.concatenate([contact_sheet([clip]) for clip in clips], 1), title)


def picture(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 (12, T, H, W, 3) → every clip as a row of frames below its prompt."""
    clips = [
        labelled(contact_sheet([clip]), prompt)
        for prompt, clip in zip(PROMPTS, frames, strict=True)
    ]
    rows = [np.concatenate(clips[i : i + COLUMNS], 1) for i in range(0, len(clips), COLUMNS)]
    return np.concatenate(rows)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 after wrong input, which is told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "stopped; nothing was written")


def _command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__)
    parser.error = refuse
    parser.add_argument("pipeline", nargs="?", help="pipeline folder (the model that ships)")
    parser.add_argument("--out", type=Path, default=Path("docs/clips.png"))
    parser.add_argument("--device", type=usable_device, help="(a GPU where there is one)")
    args = parser.parse_args(argv)
    check_writable([args.out])
    silence_libraries()
    from PIL import Image

    from gentron_fast import GenTronPipeline
    from gentron_fast.threads import settle_threads

    settle_threads()
    pipeline = GenTronPipeline.from_pretrained(
        args.pipeline, device=args.device or choose_device(None)
    )
    frames = pipeline(list(PROMPTS), seed=[0] * len(PROMPTS)).frames.numpy()
    with whole_file(args.out) as partial:
        Image.fromarray(picture(frames)).save(partial)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main())
