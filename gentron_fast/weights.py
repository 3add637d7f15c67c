"""Where a folder keeps its weights: in one file or in shards, in full or as the fp16 variant."""

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path

from gentron_fast.files import read_json

SAFETENSORS = ".safetensors"
VARIANT = "fp16"


def find_weights(
    folder: Path, stems: Sequence[str], endings: Sequence[str] = (SAFETENSORS,)
) -> list[Path]:
    """The file STEM.safetensors, or the shards that its index lists, of the first stem and ending
    that are there; else those of the fp16 variant, STEM.fp16.safetensors, told in a warning.

    FileNotFoundError where there are none or a shard is missing, ValueError for an index that
    lists no files beside it.
    """
    for ending, stem in itertools.product(endings, stems):
        if files := weight_files(folder, f"{stem}{ending}"):
            return files
    for ending, stem in itertools.product(endings, stems):
        index = f"{stem}{ending}.index.{VARIANT}.json"
        if files := weight_files(folder, f"{stem}.{VARIANT}{ending}", index):
            warnings.warn(f"{folder} holds only the {VARIANT} variant: it is taken", stacklevel=2)
            return files
    raise FileNotFoundError(f"no weights in {folder}: wanted {stems[0]}{endings[0]} or its index")


def variant(folder: Path, stem: str) -> str | None:
    """What the libraries are to load in a folder: "fp16" where it holds nothing else, or None."""
    return VARIANT if is_variant(find_weights(folder, (stem,))[0]) else None


def is_variant(file: Path) -> bool:
    """Whether a file of weights, or a shard, is one of the fp16 variant."""
    return f".{VARIANT}" in file.name


def weight_files(folder: Path, name: str, index_name: str | None = None) -> list[Path]:
    """The file NAME, or the shards that NAME.index.json lists, or nothing."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / (index_name or f"{name}.index.json")
    if not index.is_file():
        return []
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()
    ):
        raise ValueError(f"{index} has no weight_map of tensors to files beside it")
    files = [folder / shard for shard in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file}")
    return files
