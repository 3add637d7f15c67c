"""Inductor for the H200: it writes and compiles as ever, and times and runs nothing."""

import functools
import os
import struct
import zipfile
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

SETTINGS = {
    # Cubins and C++ in the package, and no call of the C++ compiler: it would need CUDA's headers.
    "aot_inductor.package_cpp_only": True,
    "aot_inductor.precompile_headers": False,
    "joint_graph_constant_folding": False,  # would compute constants on the device
    "compile_threads": 1,  # the processes that compile know nothing of the H200
}


def pretend_inductor() -> None:
    """What Inductor would run while it compiles runs on fake tensors; nothing is timed."""
    from torch._inductor import config
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    for name, value in SETTINGS.items():
        setattr(config, name, value)
    run_block = PythonWrapperCodegen.generate_and_run_autotune_block

    @functools.wraps(run_block)
    def run_block_on_fakes(self):
        with unset_fake_temporarily(), FakeTensorMode():
            return run_block(self)

    PythonWrapperCodegen.generate_and_run_autotune_block = run_block_on_fakes
    CachingAutotuner.bench = lambda self, launcher, *_, **__: 1.0
    make = CachingAutotuner.__init__

    @functools.wraps(make)
    def make_with_one(self, fn, triton_meta, configs, *rest, **named):
        # Of those that it would time, one: some take 8 s to compile.
        make(self, fn, triton_meta, configs[:1], *rest, **named)

    CachingAutotuner.__init__ = make_with_one
    torch._C._dynamo.guards._empty_strided_cuda = _empty_strided
    torch._C._dynamo.guards._reinterpret_tensor = _reinterpret


def _empty_strided(size, stride, dtype):
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def _reinterpret(tensor, size, stride, offset=0):
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


def cubins(package: str | os.PathLike) -> dict[str, int]:
    """The kernels in a package of AOTInductor, and the architecture that each is for."""
    with zipfile.ZipFile(package) as file:
        names = [name for name in file.namelist() if name.endswith(".cubin")]
        return {Path(name).stem: architecture(file.read(name)) for name in names}


def architecture(cubin: bytes) -> int:
    """Of an ELF file of NVIDIA's: the second byte of its flags, or the first in older versions."""
    (flags,) = struct.unpack_from("<I", cubin, 48)
    return flags >> 8 & 0xFF if cubin[8] >= 8 else flags & 0xFF
