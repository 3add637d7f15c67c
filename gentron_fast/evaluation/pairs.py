"""Two folders of images or clips as pairs of one name, and the prompts that the names tell."""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tqdm import tqdm

from gentron_fast.evaluation.layout import read_manifest
from gentron_fast.generate import file_name, read_prompts_file
from gentron_fast.media import read_video, video_format

VIDEOS = (".mp4", ".webm")
# A name with several endings counts once: generate writes a clip as .mp4, .gif and a sheet, .png.
ENDINGS = (*VIDEOS, ".gif", ".webp", ".png", ".jpg", ".jpeg")
BROWSER_IMAGES = ("PNG", "JPEG", "MPO", "WEBP", "GIF")  # whatever the ending says
BROWSER_CODECS, BROWSER_PIXELS = ("h264", "vp8", "vp9", "av1"), ("yuv420p", "yuvj420p")
# What stands behind the prompt: T2I-CompBench's _000012, VBench's -3, generate's -seed7.
NUMBERING = re.compile(r"(_\d+|-\d+|-seed\d+)$")


class Prompt(NamedTuple):
    """A prompt with its PartiPrompts category and challenge, None where the file names none."""

    text: str
    category: str | None = None
    challenge: str | None = None


class Pair(NamedTuple):
    """Two files of one name, of model A and of model B, and what they were made from."""

    name: str
    prompt: Prompt
    files: tuple[Path, Path]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of PartiPrompts.tsv (columns Prompt, Category, Challenge), or one a line."""
    if path.suffix.lower() != ".tsv" or not path.is_file():
        return [Prompt(text) for text in read_prompts_file(path)]
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if "Prompt" not in (rows.fieldnames or ()):
            raise ValueError(f"{path} has no column Prompt in its first line")
        prompts = [
            Prompt(row["Prompt"].strip(), row.get("Category") or None, row.get("Challenge") or None)
            for row in rows
            if row["Prompt"]
        ]
    if not prompts:
        raise ValueError(f"the prompts file {path} holds no prompt")
    return prompts


def media_files(folder: Path) -> dict[str, Path]:
    """The images or clips in a folder by their names without the ending, in the names' order."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    paths = [path for path in folder.iterdir() if path.name[0] != "." and _ending(path) in ENDINGS]
    if not paths:
        raise ValueError(f"{folder} holds no image and no clip ({', '.join(ENDINGS)})")
    paths.sort(key=lambda path: (path.stem, -ENDINGS.index(_ending(path))))
    return {path.stem: path for path in paths}


def same_names(a: Path, b: Path) -> list[tuple[str, Path, Path]]:
    """The files of two folders, each name with both; ValueError where one folder lacks a name."""
    files_a, files_b = media_files(a), media_files(b)
    missing = [f"{b} has no {name!r}" for name in files_a if name not in files_b]
    missing += [f"{a} has no {name!r}" for name in files_b if name not in files_a]
    if missing:
        raise ValueError(f"a pair is two files of one name: {_some(missing)}")
    return [(name, files_a[name], files_b[name]) for name in files_a]


def pair_folders(a: Path, b: Path, prompts: Sequence[Prompt]) -> list[Pair]:
    """Every name that two folders hold, with its prompt, checked so far that each can be shown.

    ValueError, before anything is shown, where a folder is missing or empty, where one lacks a
    name, where a name tells none of the prompts, and where a file is broken or of another kind
    than its partner.
    """
    files = same_names(a, b)
    names = [name for name, *_ in files]
    found = prompts_of(names, prompts, renamed_files(a) | renamed_files(b))
    mixed = [name for name, one, other in files if _is_video(one) != _is_video(other)]
    if mixed:
        raise ValueError(f"a clip and an image are no pair: {_some(map(repr, mixed))}")
    paths = [path for _, *both in files for path in both]
    bar = tqdm(paths, desc="decoding", unit="file", leave=False, disable=None)
    broken = [fault for path in bar if (fault := fault_of(path))]
    if broken:
        raise ValueError(f"not every file can be shown: {_some(broken)}")
    return [Pair(name, found[name], (one, other)) for name, one, other in files]


def renamed_files(folder: Path) -> dict[str, str]:
    """In a folder of an `evaluate generate` run: the prompts that file names could not hold."""
    folder = folder.absolute()
    run = {"samples": folder.parents[1:2], "videos": folder.parents[:1]}.get(folder.name, ())
    return {
        Path(file).stem: prompt
        for parent in run
        for file, prompt in read_manifest(parent).get("renamed", {}).items()
        if parent / Path(file).parent == folder
    }


def prompts_of(
    names: Sequence[str],
    prompts: Sequence[Prompt],
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Prompt]:
    """The prompt of each file name, which is one of

    - the prompt, with T2I-CompBench's number behind it (`a red car_000003`) or VBench's
      (`a red car-3`), a full stop at its end left out or not;
    - generate's name of the prompt (`a-red-car-seed3`);
    - in `renamed`, with the prompt;
    - its line in the prompts file: 0 … N - 1 or 1 … N, where all N are there.

    ValueError where a name is none of these.
    """
    known = {}
    for prompt in prompts:
        for name in (prompt.text, prompt.text.rstrip("."), file_name(prompt.text)):
            known.setdefault(name, prompt)
    if not any(name in known for name in names) and all(name.isdecimal() for name in names):
        lines = sorted(map(int, names))
        for first in (0, 1):
            if lines == list(range(first, first + len(prompts))):
                return {name: prompts[int(name) - first] for name in names}
    found = {
        name: known.get(renamed.get(name, name)) or known.get(NUMBERING.sub("", name))
        for name in names
    }
    unknown = [repr(name) for name, prompt in found.items() if prompt is None]
    if unknown:
        raise ValueError(f"names that tell none of the {len(prompts)} prompts: {_some(unknown)}")
    return found


def fault_of(path: Path) -> str | None:
    """Why a browser cannot show an image or a clip, after decoding all of it; None if it can."""
    from PIL import Image

    try:
        if not _is_video(path):
            with Image.open(path) as image:
                if image.format not in BROWSER_IMAGES:
                    return f"{path} ({image.format}, which not every browser shows)"
                for frame in range(getattr(image, "n_frames", 1)):
                    image.seek(frame)
                    image.load()
            return None
        read_video(path)
        codec, pixels = video_format(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"{path} ({error})"
    except (IndexError, EOFError):  # what Pillow makes of a GIF that breaks off
        return f"{path} (image file is truncated)"
    if codec in BROWSER_CODECS and pixels in BROWSER_PIXELS:
        return None
    return f"{path} ({codec} in {pixels}, which not every browser plays; wanted H.264 in yuv420p)"


def _ending(path: Path) -> str:
    return path.suffix.lower()


def _is_video(path: Path) -> bool:
    return _ending(path) in VIDEOS


def _some(faults: Iterable[str], most: int = 3) -> str:
    faults = list(faults)
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more
