"""Triton for a GPU that is not there: kernels are compiled for sm_90, and a launch is noted."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gentron_kernels import launch


class Launch(NamedTuple):
    grid: tuple[int, int, int]
    kernel: str
    arguments: tuple


@contextlib.contextmanager
def stubbed_launches(*modules, note: bool = True) -> Iterator[list[Launch]]:
    """Tensors of the CPU count as a GPU's for the operators of these modules of kernels, which
    launch into the list and write nothing. Without `note` nothing is listed."""
    launches: list[Launch] = []

    class Launcher:
        def __init__(self, source, metadata):
            self.name = metadata.name

        def __call__(self, *arguments) -> None:
            if note:  # behind the grid: the stream, the handles and the hooks
                launches.append(Launch(arguments[:3], self.name, arguments[9:]))

    class Utils:
        load_binary = staticmethod(lambda *_: (1, 1, 64, 0, 1024))
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 227 << 10})

    class Driver:
        utils, launcher_cls = Utils, Launcher
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda _: 0)

    kernels = [k for module in modules for k in vars(module).values() if isinstance(k, JITFunction)]
    before = driver._active, launch.backend, launch.LAUNCHES_ON, torch.cuda.device_count
    kept = [value for m in modules for value in vars(m).values() if isinstance(value, launch.Kept)]
    driver._active, launch.backend, launch.LAUNCHES_ON = Driver(), lambda *_: "cuda", "cpu"
    torch.cuda.device_count = lambda: 1
    _forget(kernels, kept)
    try:
        yield launches
    finally:
        driver._active, launch.backend, launch.LAUNCHES_ON, torch.cuda.device_count = before
        _forget(kernels, kept)


def _forget(kernels: list, kept: list) -> None:
    for kernel in kernels:
        kernel.device_caches.clear()
    for calls in kept:
        calls._calls.clear()
