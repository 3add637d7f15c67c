"""Checkpoints of any size, read and written tensor by tensor; folders that appear whole or not."""

import json
import math
import pickle
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gentron_fast.files import read_json, write_json

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
# What a file begins with that torch.save wrote before its zip format.
OLD_TORCH = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
WRAPPERS = ("state_dict", "ema", "model")  # where training scripts keep the weights, best first


class Spec(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors in `path`: their specs by name, and `read`, which brings one into memory."""

    path: Path
    specs: dict[str, Spec]
    read: Callable[[str], Tensor]


def open_weights(folder: Path, *stems: str) -> Checkpoint:
    """The weights STEM.safetensors in a folder, else STEM.bin of torch.save; whole or sharded.

    FileNotFoundError where there are none or a shard is missing, ValueError for damaged files.
    """
    opened, files = find_weights(folder, *stems)
    return opened(folder, files)


def find_weights(folder: Path, *stems: str) -> tuple[Callable, list[Path]]:
    """What opens the weights in a folder, and their files."""
    for ending, opened in ((".safetensors", open_safetensors), (".bin", open_torch)):
        for stem in stems:
            if files := weight_files(folder, stem + ending):
                return opened, files
    raise FileNotFoundError(f"no weights in {folder}: wanted {stems[0]}.safetensors or its index")


def weight_files(folder: Path, name: str) -> list[Path]:
    """The file NAME, or the shards that NAME.index.json lists, or nothing."""
    if (folder / name).is_file():
        return [folder / name]
    index = folder / f"{name}.index.json"
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


def open_safetensors(path: Path, files: list[Path]) -> Checkpoint:
    """Safetensors files, each opened for one tensor at a time: no shard stays mapped."""
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    specs, where = {}, {}
    for file in files:
        with _opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                header = opened.get_slice(key)
                if header.get_dtype() not in dtypes:
                    raise ValueError(f"tensor {key} in {file} is {header.get_dtype()}")
                specs[key] = Spec(dtypes[header.get_dtype()], tuple(header.get_shape()))
                where[key] = file

    def read(key: str) -> Tensor:
        with _opened(where[key]) as opened:
            return opened.get_tensor(key)

    return Checkpoint(path, specs, read)


@contextmanager
def _opened(file: Path):
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def open_torch(path: Path, files: list[Path]) -> Checkpoint:
    """Files of torch.save, mapped and not read; ValueError for one that needs pickle code."""
    # One file at a time: what was read of a mapped file stays in memory.
    mapped = lru_cache(maxsize=1)(_torch_tensors)
    specs, where = {}, {}
    for file in files:
        for key, tensor in mapped(file).items():
            specs[key], where[key] = Spec(tensor.dtype, tuple(tensor.shape)), file
    return Checkpoint(path, specs, lambda key: mapped(where[key])[key].detach())


def _torch_tensors(file: Path) -> dict[str, Tensor]:
    try:
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{file} needs pickle code to be read: only tensors are taken") from None
    except (RuntimeError, EOFError) as error:
        with file.open("rb") as opened:
            if opened.read(len(OLD_TORCH)) == OLD_TORCH:
                raise ValueError(
                    f"{file} is in torch's old format: load it and save it with torch >= 1.6"
                ) from None
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} is no whole file of torch.save: {reason}") from None
    for name in WRAPPERS:
        if isinstance(values, dict) and isinstance(values.get(name), dict):
            values = values[name]
            break
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{file} holds no tensors by name, it holds a {type(values).__name__}")
    for key, tensor in values.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{file} holds not only tensors: {key} is a {type(tensor).__name__}")
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
            raise ValueError(f"tensor {key} in {file} is {tensor.dtype}, {tensor.layout}")
    return values


def write_tensors(path: Path, specs: dict[str, Spec], make: Callable[[str], Tensor]) -> None:
    """A safetensors file, its tensors made one at a time, in the order safetensors gives them."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    for name in names:
        dtype, shape = specs[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = make(name)
            assert Spec(tensor.dtype, tuple(tensor.shape)) == specs[name], name
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def copy_weights(source: Path, target: Path, *stems: str) -> None:
    """The weights of one folder into another, file by file, under the first stem.

    Safetensors files of that name stay as they are, others become such.
    """
    name = f"{stems[0]}.safetensors"
    if files := weight_files(source, name):
        if files != [source / name]:
            files.append(source / f"{name}.index.json")
        for file in files:
            shutil.copyfile(file, target / file.name)
        return
    opened, files = find_weights(source, *stems)
    where, size = {}, 0
    for number, file in enumerate(files, 1):
        checkpoint = opened(file, [file])
        shard = f"{stems[0]}-{number:05}-of-{len(files):05}.safetensors" if files[1:] else name
        write_tensors(target / shard, checkpoint.specs, checkpoint.read)
        where |= dict.fromkeys(checkpoint.specs, shard)
        size += sum(math.prod(shape) * dtype.itemsize for dtype, shape in checkpoint.specs.values())
    if files[1:]:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        write_json(target / f"{name}.index.json", index)
