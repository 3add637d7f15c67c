"""The H200: its properties, its streams and its Triton driver, in place of those of torch.cuda."""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor

from pretended_gpu.inductor import architecture, pretend_inductor

NVIDIA = "backends/nvidia"  # of Triton
GUARD = Path(__file__).with_name("guard.cpp")
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=60 << 20,
    total_memory=139 << 30,
    clock_rate=1_980_000,  # kHz, as is the memory's
    memory_clock_rate=3_201_000,
    memory_bus_width=6144,
    is_integrated=False,
    is_multi_gpu_board=False,
    gcnArchName="sm_90",
    uuid="pretended",
)
CAPABILITY = PROPERTIES.major, PROPERTIES.minor
ARCHITECTURE = 10 * PROPERTIES.major + PROPERTIES.minor

# The kernels that were loaded to be launched, and the architecture that each is for: 90 is sm_90.
loaded: dict[str, int] = {}

# Called with a name for each wait of the host for the device that torch.cuda is asked for.
on_wait: list[Callable[[str], None]] = []


def pretend() -> None:
    """Let this process see an H200, for as long as it lives: a process of its own.

    Tensors "on cuda" are then possible under torch's FakeTensorMode, and Triton and Inductor
    compile for the device. RuntimeError where there is a CUDA device, or where Inductor has been
    imported before: it notes at its import what torch.cuda has.
    """
    if torch.version.cuda or torch.cuda.is_available():
        raise RuntimeError("a GPU is pretended only where PyTorch is built for the CPU alone")
    if "torch._dynamo.device_interface" in sys.modules:
        raise RuntimeError("a GPU must be pretended before anything imports torch._dynamo")
    torch.ops.load_library(_guard())
    for module, values in _replacements().items():
        for name, value in values.items():
            setattr(module, name, value)
    with contextlib.suppress(ImportError):
        _pretend_driver()
        # Its headers are those of a toolkit, by which AOTInductor names where it would look.
        os.environ.setdefault("CUDA_HOME", str(Path(sys.modules["triton"].__path__[0], NVIDIA)))
    pretend_inductor()


def is_pretended() -> bool:
    """Whether this process sees the H200."""
    return torch.cuda.is_available() and torch.cuda.get_device_properties(0) is PROPERTIES


def _guard() -> str:
    """The library that guard.cpp makes, built once for each torch and kept."""
    torch_folder = Path(torch.__file__).parent
    key = GUARD.read_bytes() + torch.__version__.encode() + str(torch_folder).encode()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gentron-tests")
    library = folder / f"guard-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch, library.name)
            paths = f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"
            command = [
                "g++",
                "-shared",
                "-fPIC",
                "-std=c++20",
                str(GUARD),
                *paths,
                "-o",
                str(built),
            ]
            subprocess.run(command, check=True)
            built.rename(library)  # whole, also where two processes build it at once
    return str(library)


def _replacements() -> dict[object, dict[str, object]]:
    """What stands where in torch; a function for each name, since Dynamo has a table of them."""

    def constant(value=None):
        return lambda *_, **__: value

    seeds = {name: constant() for name in ("set_rng_state", "manual_seed", "manual_seed_all")}
    seeds["get_rng_state"] = lambda *_: torch.zeros(16, dtype=torch.uint8)
    memory = "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"
    make, tolist = torch.tensor, FakeTensor.tolist

    def tensor(data, *, dtype=None, device=None, requires_grad=False, pin_memory=False):
        """PyTorch's own would make a tensor on the device even where fake ones are asked for."""
        made = make(data, dtype=dtype)
        if device is not None:
            if isinstance(made, FakeTensor):
                made.constant = None  # a fake tensor that knows its values copies them, too
            made = made.to(device)
        return made.requires_grad_(requires_grad)

    def pin_memory(self, *_):
        """A copy that is marked."""
        pinned = self.clone()
        pinned.pinned = True
        return pinned

    return {
        torch: {"tensor": tensor},
        FakeTensor: {"tolist": lambda self: tolist(self.cpu())},  # one copy, not one an element
        torch.Tensor: {
            "pin_memory": pin_memory,
            "is_pinned": lambda self, *_: getattr(self, "pinned", False),
        },
        torch._C: {
            "_cuda_getDeviceCount": constant(1),
            "_cuda_getDevice": constant(0),
            "_cuda_setDevice": constant(),
            "_cuda_exchangeDevice": constant(0),
            "_cuda_maybeExchangeDevice": constant(0),
            "_cuda_getCurrentRawStream": constant(0),
            "_cuda_isCurrentStreamCapturing": constant(False),
            "_cuda_getCompiledVersion": constant(13000),
            "_cuda_getArchFlags": constant(f"sm_{ARCHITECTURE}"),
            "_cuda_getAllocatorBackend": constant("native"),
            "_StaticCudaLauncher": _StaticLauncher,
        },
        torch.cuda: {
            "_initialized": True,
            "is_available": constant(True),
            "device_count": constant(1),
            "get_device_properties": constant(PROPERTIES),
            "get_device_capability": constant(CAPABILITY),
            "get_device_name": constant(PROPERTIES.name),
            "_exchange_device": constant(0),
            "_maybe_exchange_device": constant(0),
            "synchronize": _wait("torch.cuda.synchronize"),
            "current_stream": lambda *_: _Stream(),
            "default_stream": lambda *_: _Stream(),
            "stream": lambda _: contextlib.nullcontext(),
            "set_stream": constant(),
            "Stream": _Stream,
            "Event": _Event,
            "empty_cache": constant(),
            "reset_peak_memory_stats": constant(),
            "mem_get_info": constant((PROPERTIES.total_memory, PROPERTIES.total_memory)),
            "graph": _capture,
            "CUDAGraph": _Graph,
        }
        | {name: constant(0) for name in memory}
        | seeds,
        torch.cuda.random: seeds,
        torch.version: {"cuda": "13.0"},
        torch.backends.cudnn: {"is_available": constant(True), "version": constant(91900)},
    }


def _wait(name: str) -> Callable:
    """A function that does nothing, and tells `on_wait` its name."""

    def wait(*_, **__) -> None:
        for tell in on_wait:
            tell(name)

    return wait


def _capture(*_, **__) -> contextlib.AbstractContextManager:
    """torch.cuda.graph, which synchronises and empties the cache before it captures."""
    return _Capture()


class _Capture(contextlib.nullcontext):
    __enter__ = _wait("torch.cuda.graph")


class _Stream:
    cuda_stream, stream_id, device_index = 0, 0, 0

    def __init__(self, device=None, priority=0):
        self.device = torch.device("cuda" if device is None else device)

    def wait_stream(self, stream) -> None:
        """On the device alone, as `wait_event` and `record_event`."""

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None) -> "_Event":
        return event or _Event()

    def query(self) -> bool:
        return True

    synchronize = _wait("Stream.synchronize")


class _Event:
    def __init__(self, *_, **__):
        pass

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end) -> float:
        """Milliseconds; nothing ran."""
        return 1.0

    synchronize = _wait("Event.synchronize")


class _Graph:
    def replay(self) -> None:
        pass

    def reset(self) -> None:
        pass


class _StaticLauncher:
    """Inductor's own way to launch a kernel."""

    @staticmethod
    def _load_kernel(path, name, shared, device) -> tuple:
        loaded[name] = architecture(Path(path).read_bytes())
        return 1, 1, 64, 0  # module, function, registers, spills

    @staticmethod
    def _unload_kernel(module) -> None:
        pass

    @staticmethod
    def _launch_kernel(*_) -> None:
        pass


def _pretend_driver() -> None:
    """Triton's own driver for CUDA, but for what the device would have to do."""
    import triton.backends.nvidia.driver as nvidia

    class Utils:
        @staticmethod
        def load_binary(name, kernel, shared, device) -> tuple:
            loaded[name] = architecture(kernel)
            return 1, 1, 64, 0, 1024  # module, function, registers, spills, most threads

        @staticmethod
        def get_device_properties(device) -> dict[str, int]:
            return {
                "max_shared_mem": PROPERTIES.shared_memory_per_block_optin,
                "max_num_regs": PROPERTIES.regs_per_multiprocessor,
                "multiprocessor_count": PROPERTIES.multi_processor_count,
                "warpSize": PROPERTIES.warp_size,
                "sm_clock_rate": PROPERTIES.clock_rate,
                "mem_clock_rate": PROPERTIES.memory_clock_rate,
                "mem_bus_width": PROPERTIES.memory_bus_width,
            }

    class Launcher:
        def __init__(self, source, metadata):
            self.launch = self

        def __call__(self, *_, **__) -> None:
            pass

    nvidia.CudaUtils, nvidia.CudaLauncher = Utils, Launcher
