"""What the operators share: which backend a tensor gets, and device properties for launches."""

import functools
import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@functools.cache
def cpu_library() -> bool:
    """Load the C++ operators, once; False where they were not built.

    GENTRON_LIBRARY names another file than the one beside this module.
    """
    path = Path(os.environ.get("GENTRON_LIBRARY") or Path(__file__).with_name("libgentron.so"))
    if not path.exists():
        return False
    torch.ops.load_library(path)
    return True


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported; the CUDA operators need it."""
    return importlib.util.find_spec("triton") is not None


def backend(x: Tensor) -> str:
    """The implementation that a tensor gets: "cuda", "cpu", or "ref", the definition.

    Picked before the operator: one operator for both would make torch.compile inline the Triton
    kernel on the CPU.
    """
    if x.device.type == "cuda" and has_triton():
        return "cuda"
    if x.device.type == "cpu" and x.dtype in CPU_DTYPES and cpu_library():
        return "cpu"
    return "ref"
