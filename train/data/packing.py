"""How a worker process hands over what it has read: the tensors of a sample in one piece of memory.

Alone each would go by a file descriptor of its own: 0.6 ms a tensor, and a precomputed sample has
eight. Measured: a T2I run of 1.6 M parameters on precomputed shards, two workers and two cores,
takes 205 samples a second in place of 130.
"""

import io
import math
import pickle
from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 2**16  # bytes that are cheaper to copy through the pipe than to share
ALIGNMENT = 8


class Packed(NamedTuple):
    """pickled: the value with numbers for its tensors; kinds: their dtypes and shapes; memory:
    their bytes one after another, shared where they are many."""

    pickled: bytes
    kinds: list[tuple[torch.dtype, torch.Size]]
    memory: bytes | Tensor


class _Packer(pickle.Pickler):
    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, pickled: bytes, tensors: list[Tensor]):
        super().__init__(io.BytesIO(pickled))
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def packed(value: object) -> Packed:
    """A value that can be pickled, with any CPU tensors in it, for another process of ours."""
    stream = io.BytesIO()
    packer = _Packer(stream)
    packer.dump(value)
    kinds = [(tensor.dtype, tensor.shape) for tensor in packer.tensors]
    memory = torch.empty(sum(map(_room, kinds)), dtype=torch.uint8)
    for place, tensor in zip(_views(memory, kinds), packer.tensors, strict=True):
        place.copy_(tensor)
    return Packed(
        stream.getvalue(), kinds, memory.numpy().tobytes() if len(memory) <= SMALL else memory
    )


def unpacked(value: Packed) -> object:
    """What `packed` was given."""
    memory = value.memory
    if isinstance(memory, bytes):
        memory = torch.frombuffer(bytearray(memory or b"\0"), dtype=torch.uint8)
    return _Unpacker(value.pickled, _views(memory, value.kinds)).load()


def _room(kind: tuple[torch.dtype, torch.Size]) -> int:
    dtype, shape = kind
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def _views(memory: Tensor, kinds: list[tuple[torch.dtype, torch.Size]]) -> list[Tensor]:
    views, start = [], 0
    for dtype, shape in kinds:
        length = math.prod(shape) * dtype.itemsize
        views.append(memory[start : start + length].view(dtype).view(shape))
        start += _room((dtype, shape))
    return views
