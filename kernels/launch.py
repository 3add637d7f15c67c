"""What the operators share: which backend tensors get, and how a Triton kernel is reached."""

import contextlib
import functools
import os
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # kernels are still defined, and their arguments annotated
    triton, tl = None, types.SimpleNamespace(constexpr=None)

LAUNCHES_ON = "cuda"  # the type of device whose launches are kept
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


class Kept:
    """An operator's launches, by what its checks and its launch depend on: a call like one before
    is neither checked nor prepared again. An operator, with its dispatch and Triton's own search
    for the compiled kernel, costs a small model more than its kernel runs.
    """

    MOST = 1024  # forgotten at once where a process has seen more kinds of call

    def __init__(self):
        self._calls: dict[tuple, Callable] = {}

    def find(self, *arguments) -> tuple[tuple | None, Callable | None]:
        """(key, call) for the arguments of an operator: tensors, pairs of them, None and numbers.
        The key is None where the call must go through the operator: where it is traced, or a mode
        or a subclass of Tensor is to see it."""
        if torch.compiler.is_compiling():
            return None, None
        key = _key(arguments)
        if key is None or not _plain():
            return None, None
        return key, self._calls.get(key)

    def keep(self, key: tuple, call: Callable) -> None:
        if len(self._calls) >= self.MOST:
            self._calls.clear()
        self._calls[key] = call


def _plain() -> bool:
    """Whether nothing but PyTorch itself looks at a call."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def wants_gradient(*arguments) -> bool:
    """Whether a gradient of one of these, or of a tensor in a pair, is wanted."""
    if not torch.is_grad_enabled():
        return False
    return any(
        wants_gradient(*value) if type(value) is tuple else value.requires_grad
        for value in arguments
        if value is not None
    )


def _key(arguments) -> tuple | None:
    key = []
    for value in arguments:
        kind = type(value)
        if kind is Tensor or kind is torch.nn.Parameter:
            if value.device.type != LAUNCHES_ON:
                return None
            # Triton compiles a kernel of its own for pointers that 16 divides.
            aligned = value.data_ptr() % 16 == 0
            key.append((value.shape, value.stride(), value.dtype, value.device, aligned))
        elif kind is tuple:
            key.append(_key(value))
            if key[-1] is None:
                return None
        elif value is None or kind is float or kind is bool:
            key.append(value)
        else:
            return None
    return tuple(key)


def prepare(kernel, grid: tuple, pointers: tuple, constants: dict) -> Callable[[tuple], None]:
    """What launches a kernel for pointers like these: on the same device, aligned the same.

    The kernel takes pointers first; constants: its other arguments and Triton's options.
    """
    if not isinstance(kernel, triton.runtime.JITFunction):  # interpreted
        return lambda pointers: kernel[grid](*pointers, **constants)
    device = pointers[0].device
    with device_of(pointers[0]):
        compiled = kernel.warmup(*pointers, grid=grid, **constants)
        run = compiled[(*grid, 1, 1)[:3]]
    rest = tuple(constants[name] for name in kernel.arg_names[len(pointers) :])

    def launch(pointers: tuple) -> None:
        run(*pointers, *rest)

    def launch_there(pointers: tuple) -> None:
        with torch.cuda.device(device):
            run(*pointers, *rest)

    return launch_there if torch.cuda.device_count() > 1 else launch


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
