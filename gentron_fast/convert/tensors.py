"""Checkpoints of any size, read and written tensor by tensor; folders that appear whole or not."""

import json
import math
import pickle
import pickletools
import shutil
import zipfile
from collections.abc import Callable, Collection
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gentron_fast.files import write_json
from gentron_fast.weights import SAFETENSORS, find_weights, weight_files

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
# What a file begins with that torch.save wrote before its zip format.
OLD_TORCH = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
ENDINGS = (SAFETENSORS, ".bin")
# Where training scripts keep the averaged weights and the others, and what they put before names.
AVERAGED = ("state_dict_ema", "ema_state_dict", "model_ema", "ema")
WRAPPERS = ("state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.", "model.")
SAVE_ALONE = (
    "python -c \"import torch; w = torch.load({file!r}, 'cpu', weights_only=False); "
    "torch.save({weights}, 'weights.pth')\""
)


class Spec(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors in `path`: their specs by name, and `read`, which brings one into memory.

    notes: lines of a report on what was chosen among the content of the file.
    """

    path: Path
    specs: dict[str, Spec]
    read: Callable[[str], Tensor]
    notes: tuple[str, ...] = ()


def open_weights(folder: Path, *stems: str) -> Checkpoint:
    """The weights STEM.safetensors in a folder, else STEM.bin of torch.save; whole or sharded.

    FileNotFoundError where there are none or a shard is missing, ValueError for damaged files.
    """
    files = find_weights(folder, stems, ENDINGS)
    return _opener(files[0])(folder, files)


def _opener(file: Path) -> Callable[[Path, list[Path]], Checkpoint]:
    return open_safetensors if file.suffix == SAFETENSORS else open_torch


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


def open_torch(path: Path, files: list[Path], averaged: bool = True) -> Checkpoint:
    """Files of torch.save, mapped and not read; ValueError for one that needs pickle code.

    averaged: where a file holds averaged weights beside others, whether they are taken.
    """
    # One file at a time: what was read of a mapped file stays in memory.
    mapped = lru_cache(maxsize=1)(lambda file: _torch_tensors(file, averaged))
    specs, where, notes = {}, {}, []
    for file in files:
        tensors, note = mapped(file)
        notes += note
        for key, tensor in tensors.items():
            specs[key], where[key] = Spec(tensor.dtype, tuple(tensor.shape)), file
    read = lambda key: mapped(where[key])[0][key].detach()  # noqa: E731
    return Checkpoint(path, specs, read, tuple(notes))


def without_prefix(checkpoint: Checkpoint) -> Checkpoint:
    """The same tensors without what wrappers of a model, such as DDP, put before all names."""
    prefix = ""
    while own := next((p for p in PREFIXES if _all_begin(checkpoint.specs, prefix + p)), None):
        prefix += own
    if not prefix:
        return checkpoint
    specs = {key.removeprefix(prefix): spec for key, spec in checkpoint.specs.items()}
    note = f"stripped     {prefix} before every name"
    return replace(
        checkpoint,
        specs=specs,
        read=lambda key: checkpoint.read(prefix + key),
        notes=(*checkpoint.notes, note),
    )


def _all_begin(names: Collection[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)


def _torch_tensors(file: Path, averaged: bool) -> tuple[dict[str, Tensor], list[str]]:
    try:
        values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{file} needs pickle code to be read: only tensors are taken. If you trust it, save "
            f"the weights alone: {_save_alone(file, averaged)}"
        ) from None
    except (RuntimeError, EOFError) as error:
        with file.open("rb") as opened:
            if opened.read(len(OLD_TORCH)) == OLD_TORCH:
                raise ValueError(
                    f"{file} is in torch's old format: load it and save it with torch >= 1.6"
                ) from None
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} is no whole file of torch.save: {reason}") from None
    values, notes = _unwrapped(file, values, averaged)
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{file} holds no tensors by name, it holds a {type(values).__name__}")
    for key, tensor in values.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{file} holds not only tensors: {key} is a {type(tensor).__name__}")
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
            raise ValueError(f"tensor {key} in {file} is {tensor.dtype}, {tensor.layout}")
    return values, notes


def _unwrapped(file: Path, values, averaged: bool) -> tuple[object, list[str]]:
    """The weights among what a training script saved, and a note where it saved several."""
    if not isinstance(values, dict):
        return values, []
    found = [name for name in _wrappers(averaged) if isinstance(values.get(name), dict)]
    if not found:
        return values, []
    kinds = [" (averaged)" * (name in AVERAGED) for name in found]
    told, *others = map("".join, zip(found, kinds, strict=True))
    note = f"took         {told} of {file.name}, not {', '.join(others)}"
    return values[found[0]], [note] if others else []


def _wrappers(averaged: bool) -> tuple[str, ...]:
    return AVERAGED + WRAPPERS if averaged else WRAPPERS + AVERAGED


def _save_alone(file: Path, averaged: bool) -> str:
    """The command that saves the weights of a file without what needs pickle code."""
    strings = set()
    with suppress(Exception), zipfile.ZipFile(file) as archive:  # told is what can be read
        (content,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(content) as opened:
            strings = {value for _, value, _ in pickletools.genops(opened)}
    found = [name for name in _wrappers(averaged) if name in strings]
    return SAVE_ALONE.format(file=str(file), weights=f"w[{found[0]!r}]" if found else "w")


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
    name = f"{stems[0]}{SAFETENSORS}"
    files = find_weights(source, stems, ENDINGS)
    if weight_files(source, name) == files:
        if files != [source / name]:
            files.append(source / f"{name}.index.json")
        for file in files:
            shutil.copyfile(file, target / file.name)
        return
    where, size = {}, 0
    for number, file in enumerate(files, 1):
        checkpoint = _opener(file)(file, [file])
        shard = f"{stems[0]}-{number:05}-of-{len(files):05}{SAFETENSORS}" if files[1:] else name
        write_tensors(target / shard, checkpoint.specs, checkpoint.read)
        where |= dict.fromkeys(checkpoint.specs, shard)
        size += sum(math.prod(shape) * dtype.itemsize for dtype, shape in checkpoint.specs.values())
    if files[1:]:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        write_json(target / f"{name}.index.json", index)
