"""A pipeline folder's model_index.json: what its model samples with unless told otherwise.

Nothing here needs torch, so that --help can tell it at once.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from gentron_fast.config import (
    DEFAULTS_SCHEMA,
    LEARNT,
    MAX_FRAMES,
    MAX_SIDE,
    SCALE,
    SamplingDefaults,
)
from gentron_fast.files import read_json
from gentron_fast.schema import Kind, several, whole

ASSETS = Path(__file__).parent / "assets"
INDEX_NAME = "model_index.json"
FAST = "fast"  # folder in a pipeline folder: a distilled transformer, with a few steps by default
SHARED_PARTS = "shared_parts"  # the folder that has all parts but the transformer
INDEX_SCHEMA = DEFAULTS_SCHEMA | {
    SHARED_PARTS: Kind("..", lambda value: value == ".."),
    "default_frames": whole(1, MAX_FRAMES),
    "default_size": several(whole(1, MAX_SIDE), 2, 2),
}
INDEX_SCHEMA |= dict.fromkeys(LEARNT.values(), several(SCALE, 2, 2))


def read_index(folder: Path) -> dict:
    """FileNotFoundError or ValueError that names the file."""
    return read_json(folder / INDEX_NAME, INDEX_SCHEMA)


def sampling_defaults(folder: Path) -> SamplingDefaults:
    """What a pipeline folder samples with unless told otherwise."""
    return SamplingDefaults.from_index(read_index(folder))


def parts_folder(folder: Path) -> Path:
    """Where a pipeline folder's parts but its transformer are: there, or where it says."""
    return folder / read_index(folder).get(SHARED_PARTS, ".")


def chosen(args: argparse.Namespace, defaults: SamplingDefaults) -> dict[str, int | float | str]:
    """The values of `defaults`, but for those that a command line gives."""
    given = {name: getattr(args, name) for name in asdict(defaults)}
    return asdict(defaults) | {name: v for name, v in given.items() if v is not None}


def told(values: Mapping[str, int | float | str]) -> str:
    """In one line, such as "steps 50, solver dpm++, lambda_t 7.5"."""
    return ", ".join(f"{name} {text}" for name, text in _as_text(values).items())


def in_force(argv: Sequence[str]) -> dict[str, str]:
    """The values of `SamplingDefaults` as text, for a --help, of the pipeline folder that a command
    line names, else of the model that ships; with --fast of the distilled model in it. "?" where
    they cannot be read."""
    words = [Path(word.rpartition("=")[2]) for word in argv if word]
    folder = next((word for word in words if (word / INDEX_NAME).is_file()), ASSETS)
    try:
        return _as_text(asdict(sampling_defaults(folder / FAST if "--fast" in argv else folder)))
    except (OSError, ValueError):
        return dict.fromkeys(asdict(SamplingDefaults()), "?")


def _as_text(values: Mapping[str, int | float | str]) -> dict[str, str]:
    return {name: v if isinstance(v, str) else f"{v:g}" for name, v in values.items()}
