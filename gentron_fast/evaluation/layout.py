"""Which image or clip of a benchmark is made of which prompt, and under which name it lies.

T2I-CompBench: CATEGORY/samples/PROMPT_NUMBER.png, 10 images a prompt, numbered through a category
by six digits. VBench: videos/PROMPT-INDEX.mp4, 5 clips a prompt, 25 for temporal flickering.
"""

import re
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from gentron_fast.files import read_json, write_json
from gentron_fast.schema import OBJECT, TEXT, Kind, several, whole

CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
COMPLEX_KINDS = ("spatial", "action")  # the lists that say how a complex prompt is scored
IMAGES, CLIPS, FLICKER_CLIPS = 10, 5, 25  # of a prompt
FLICKER = "temporal_flickering"  # the prompt list of that dimension of VBench
MANIFEST = "manifest.json"
MOST_BYTES = 255  # of a file name
IMAGE_NAME = re.compile(r"(?s)(.*)_(\d+)\.(?:png|jpe?g|webp|mp4)")


def by_name(kind: Kind) -> Kind:
    """An object of any names, each with a value of that kind."""
    return Kind(
        f"an object, each value {kind.words}",
        lambda value: isinstance(value, dict) and all(map(kind.fits, value.values())),
    )


MANIFEST_SCHEMA = {
    "benchmark": TEXT,
    "count": whole(1, 10**6),
    "prompts": by_name(several(TEXT, 0, 10**7)),
    "kinds": by_name(several(TEXT, 0, 10**7)),
    "renamed": by_name(TEXT),
    "settings": OBJECT,
}


class Sample(NamedTuple):
    """One image or clip to make: its prompt, what is added to the seed, and its place in a run."""

    prompt: str
    number: int
    name: str


@dataclass(frozen=True)
class Layout:
    """What a run folder is to hold.

    prompts: by category, as they stand in the benchmark's files; count: samples of a prompt;
    kinds: "spatial" and "action", the complex prompts of each list; renamed: the prompt of each
    file whose name cannot hold it.
    """

    benchmark: str
    samples: list[Sample]
    prompts: dict[str, list[str]]
    count: int
    kinds: dict[str, list[str]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    def manifest(self) -> dict:
        """What the run folder keeps of it."""
        return {name: value for name, value in asdict(self).items() if name != "samples"}


def compbench(folder: Path, images: int = IMAGES, first: int | None = None) -> Layout:
    """T2I-CompBench's layout of the prompt files in a folder; `first`: of each file that many."""
    prompts = {}
    for category in CATEGORIES:
        path = folder / f"{category}_val.txt"
        if path.is_file():
            prompts[category] = read_lines(path)[:first]
    if not prompts:
        raise ValueError(f"no {CATEGORIES[0]}_val.txt in {folder}, nor another category's prompts")
    layout = image_layout("t2i-compbench", prompts, images, ".png")
    layout.kinds.update(read_kinds(folder))
    missing = [f"{category}_val.txt" for category in CATEGORIES if category not in prompts]
    missing += [f"complex_val_{kind}.txt" for kind in COMPLEX_KINDS if kind not in layout.kinds]
    if missing:
        warnings.warn(f"{folder} has no {', '.join(missing)}", stacklevel=2)
    return layout


def read_kinds(folder: Path) -> dict[str, list[str]]:
    """The lists of complex prompts that are in a folder of prompt files."""
    paths = {kind: folder / f"complex_val_{kind}.txt" for kind in COMPLEX_KINDS}
    return {kind: read_lines(path) for kind, path in paths.items() if path.is_file()}


def image_layout(benchmark: str, prompts: dict[str, list[str]], count: int, ending: str) -> Layout:
    """CATEGORY/samples/PROMPT_NUMBER: `count` of each prompt, numbered through a category."""
    layout = Layout(benchmark, [], prompts, count)
    for category, lines in prompts.items():
        for number in range(len(lines) * count):
            prompt = lines[number // count]
            end = f"_{number:06d}{ending}"
            # The official code takes what stands before the first underscore for the prompt.
            text = without_stop(prompt)
            stem = fit_name(text, "/\0_", end)
            name = f"{category}/samples/{stem}{end}"
            layout.samples.append(Sample(prompt, number, name))
            if stem != text:
                layout.renamed[name] = prompt
    return layout


def vbench(path: Path, clips: int | None = None, first: int | None = None) -> Layout:
    """VBench's layout of one prompt file or of a folder of them; a prompt of several stands once.

    clips: of each prompt, where it is not VBench's number.
    """
    paths = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"no prompt files (.txt) in {path}")
    prompts = {file.stem: read_lines(file)[:first] for file in paths}
    counts: dict[str, int] = {}
    for dimension, lines in prompts.items():
        own = clips or (FLICKER_CLIPS if dimension.startswith(FLICKER) else CLIPS)
        for prompt in lines:
            counts[prompt] = max(own, counts.get(prompt, 0))
    layout = Layout("vbench", [], prompts, clips or CLIPS)
    for prompt, count in counts.items():
        end = f"-{FLICKER_CLIPS}.mp4"
        stem = fit_name(prompt, "/\0", end)
        if stem != prompt:  # another prompt may have that very name
            check = f" {zlib.crc32(prompt.encode()):08x}"
            stem = fit_name(prompt, "/\0", check + end) + check
        for index in range(count):
            name = f"videos/{stem}-{index}.mp4"
            layout.samples.append(Sample(prompt, len(layout.samples), name))
            if stem != prompt:
                layout.renamed[name] = prompt
    return layout


def read_lines(path: Path) -> list[str]:
    """The prompts of a file, one a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise ValueError(f"no prompt file {path}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the prompt file {path} is not UTF-8 text") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"the prompt file {path} holds no prompt")
    return prompts


def without_stop(prompt: str) -> str:
    """A prompt as the official names hold it: without the full stop at its end."""
    return prompt.removesuffix(".")


def fit_name(text: str, forbidden: str, end: str) -> str:
    """`text`, or the closest that can stand in a file name before `end`."""
    for character in forbidden:
        text = text.replace(character, " ")
    room = MOST_BYTES - len(end.encode())
    return text.encode()[:room].decode(errors="ignore")


def write_manifest(run: Path, layout: Layout, settings: dict) -> None:
    """Write the run's manifest, or check that it was begun with the same prompts and settings."""
    path = run / MANIFEST
    wanted = {**layout.manifest(), "settings": settings}
    if not path.is_file():
        return write_json(path, wanted)
    found = read_manifest(run)
    for name in ("benchmark", "count", "prompts"):
        if found.get(name) != wanted[name]:
            raise ValueError(f"{run} was begun with other prompts ({name}): choose another --out")
    begun = found.get("settings", {})
    for name, value in settings.items():
        if name in begun and begun[name] != value:
            raise ValueError(
                f"{run} was begun with {name} {begun[name]}, this call has {value}: "
                "choose another --out"
            )


def read_manifest(run: Path) -> dict:
    """A run's manifest; an empty one where `run` was not made here."""
    path = run / MANIFEST
    if not path.is_file():
        return {}
    return read_json(path, MANIFEST_SCHEMA)


class Entry(NamedTuple):
    """A file that is to be scored: its place, its prompt, and its number in its name."""

    path: Path
    prompt: str
    number: int


def list_entries(run: Path, category: str, renamed: dict[str, str]) -> list[Entry]:
    """The images or clips of a category in the order of their numbers, as the official code reads
    them: a prompt is what stands before the first underscore, but for names in the manifest."""
    entries = []
    folder = run / category / "samples"
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(".") or not (match := IMAGE_NAME.fullmatch(path.name)):
            continue
        known = renamed.get(f"{category}/samples/{path.name}")
        prompt = path.name.partition("_")[0] if known is None else without_stop(known)
        entries.append(Entry(path, prompt, int(match[2])))
    return sorted(entries, key=lambda entry: (entry.number, entry.path.name))


def tell_renamed(layout: Layout) -> Iterable[str]:
    """A line for each prompt that file names cannot hold."""
    for prompt in dict.fromkeys(layout.renamed.values()):
        name = next(name for name, own in layout.renamed.items() if own == prompt)
        yield f"no file name can hold {prompt!r}: {MANIFEST} maps {Path(name).name} to it"
