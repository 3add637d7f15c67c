"""Parts of a folder that transformers and diffusers read: checked before, told of in one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gentron_fast.files import read_json
from gentron_fast.schema import Schema
from gentron_fast.weights import find_weights

REASON_LENGTH = 300  # letters of a library's message


def read_part_config(path: Path, schema: Schema) -> dict:
    """The configuration of a part. ValueError, naming the file, for a field of another kind, and
    where it wants code of its own to be run."""
    values = read_json(path, schema)
    if "auto_map" in values:
        raise ValueError(f"{path} wants code of its own to be run (auto_map): it is never run")
    return values


@contextmanager
def told_as(words: str) -> Iterator[None]:
    """What a library raises within becomes a ValueError of one line that begins with `words`.

    OSError and what tells of too little memory pass as they are.
    """
    try:
        yield
    except (OSError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception
        reason = " ".join(str(error).split())[:REASON_LENGTH]
        raise ValueError(f"{words}: {type(error).__name__}: {reason}") from error


def check_parameters(what: str, folder: Path, stem: str, make: Callable[[], nn.Module]) -> None:
    """ValueError where the model of a configuration has far more parameters than the folder's
    weights: a library would make them all, for hours, and fill them with random numbers.

    what: the part, in words; stem: of its files, as for `find_weights`; make: makes the model.
    """
    held = 0
    for file in find_weights(folder, (stem,)):
        try:
            with safe_open(file, "pt") as opened:
                shapes = [opened.get_slice(key).get_shape() for key in opened.keys()]  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"the weights at {file} are damaged: {error}") from error
        held += sum(torch.Size(shape).numel() for shape in shapes)
    with torch.device("meta"), told_as(f"no {what} at {folder}"):
        wanted = sum(parameter.numel() for parameter in make().parameters())
    if wanted > 2 * held:  # tied parameters are there once
        raise ValueError(
            f"{folder} is no {what}: its config.json tells of {wanted:,} parameters, "
            f"its weights hold {held:,}"
        )
