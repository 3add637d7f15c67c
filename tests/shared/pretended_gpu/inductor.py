"""Inductor for the H200: it writes and compiles as ever, and times and runs nothing."""

import functools
import os
import struct
import zipfile

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
    torch._C._dynamo.guards._empty_strided_cuda = _empty_strided


def _empty_strided(size, stride, dtype):
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def cubins(package: str | os.PathLike) -> dict[str, int]:
    """The kernels in a package of AOTInductor: name → architecture, 90 for sm_90."""
    with zipfile.ZipFile(package) as file:
        names = [name for name in file.namelist() if name.endswith(".cubin")]
        return {
            os.path.basename(name)[: -len(".cubin")]: _architecture(file.read(name))
            for name in names
        }


def _architecture(cubin: bytes) -> int:
    """Of an ELF file of NVIDIA's: the second byte of its flags, or the first of older versions."""
    (flags,) = struct.unpack_from("<I", cubin, 48)
    return flags >> 8 & 0xFF if cubin[8] >= 8 else flags & 0xFF
