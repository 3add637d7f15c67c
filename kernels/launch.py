"""What the operators share: which backend tensors get, and how a Triton kernel is reached."""

import contextlib
import functools
import os
import types
from pathlib import Path

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # kernels are still defined, and their arguments annotated
    triton, tl = None, types.SimpleNamespace(constexpr=None)

CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def jit(function=None, /, **options):
    """triton.jit, which leaves the function alone where Triton is not installed."""
    if function is None:
        return functools.partial(jit, **options)
    return function if triton is None else triton.jit(function, **options)


def triton_op(name: str):
    """torch.library.triton_op, which warns where Triton is missing: there an operator that no
    tensor reaches, since `backend` never says "cuda"."""
    register = torch.library.custom_op if triton is None else torch.library.triton_op
    return register(name, mutates_args=())


def launcher(kernel):
    """A kernel as a triton_op launches it; wrap_triton does not take interpreted ones."""
    interpreted = not isinstance(kernel, triton.runtime.JITFunction)
    return kernel if interpreted else torch.library.wrap_triton(kernel)


def check_tensors(**values) -> None:
    """ValueError, naming it, where one of these is no tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got a {type(value).__name__}")


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Where Triton launches, which is the current device: x's, where there are several."""
    if x.device.type == "cuda" and torch.cuda.device_count() > 1:
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def constant(function):
    """Mark a function whose answer torch.compile takes as it is, without tracing what leads to it.

    torch.compiler.assume_constant_result does no more, but imports all of torch._dynamo.
    """
    function._dynamo_marked_constant = True
    return function


@functools.cache
def _load_cpu_library() -> bool:
    path = Path(os.environ.get("GENTRON_LIBRARY") or Path(__file__).with_name("libgentron.so"))
    if not path.exists():
        return False
    torch.ops.load_library(path)
    return True


@constant
def cpu_library() -> bool:
    """Load the C++ operators, once; False where they were not built.

    GENTRON_LIBRARY names another file than the one beside this module. Operator files call it when
    they are imported, since fakes are registered on operators that exist.
    """
    return _load_cpu_library()


def has_triton() -> bool:
    """Whether Triton can be imported; the CUDA operators need it."""
    return triton is not None


def backend(*tensors: Tensor) -> str:
    """The implementation that tensors of one device get: "cuda", "cpu", or "ref", the definition.

    Picked before the operator: one operator for both would make torch.compile inline the Triton
    kernel on the CPU. The C++ operators take the CPU's own dtypes, fp16 is not among them.
    """
    device = tensors[0].device.type
    if device == "cuda" and has_triton():
        return "cuda"
    if device == "cpu" and all(x.dtype in CPU_DTYPES for x in tensors) and cpu_library():
        return "cpu"
    return "ref"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a CUDA device has; an H100's number where it is not at hand."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
