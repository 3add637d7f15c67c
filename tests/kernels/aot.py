"""Ahead-of-time compilation of the Triton kernels, without a GPU: what the compiler says of them.

python tests/kernels/aot.py    the table of every operator's cases
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

OPERATORS = "layernorm_modulate", "temporal_attention", "guided_step"
ARCHITECTURES = 80, 90, 100
# Of one block, in bytes (CUDA C++ programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CUOBJDUMP = Path(triton.__path__[0], "backends/nvidia/bin/cuobjdump")


def figures(
    kernel,
    signature: dict[str, str],
    constexprs: dict,
    num_warps: int = 4,
    num_stages: int = 3,
    arch: int = 90,
) -> dict[str, int]:
    """Compile for sm_<arch>: {"registers": of a thread, "spills": bytes of a thread in local
    memory, "shared": bytes of a block}.

    signature: the type of each argument that is no constant, "*bf16", "i32", ...; pointers are
    taken to be aligned to 16 bytes, as PyTorch's allocations are.
    """
    names = kernel.arg_names
    signature = {name: signature.get(name, "constexpr") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, {(names.index(n),): v for n, v in constexprs.items()}, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    reported = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": reported["REG"],
        "spills": reported["STACK"] + reported["LOCAL"],
        "shared": compiled.metadata.shared,
    }


@cache
def table(operator: str) -> list[dict]:
    """The figures of an operator's cases on every architecture, compiled in two processes."""
    module = importlib.import_module(f"gentron_kernels.{operator}")
    count = len(list(module.compile_cases())) if hasattr(module, "compile_cases") else 0
    jobs = [(operator, index, arch) for index in range(count) for arch in ARCHITECTURES]
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count())) as pool:
        return list(pool.map(_compile, jobs))


def _compile(job: tuple[str, int, int]) -> dict:
    operator, index, arch = job
    module = importlib.import_module(f"gentron_kernels.{operator}")
    name, kernel, signature, constexprs, num_warps = list(module.compile_cases())[index]
    row = {"kernel": kernel.__name__.strip("_"), "shape": name, "arch": arch}
    row |= figures(kernel, signature, constexprs, num_warps, arch=arch)
    return row | {"limit": SHARED_LIMIT[arch]}


def main() -> int:
    print(f"{'kernel':<42}{'shape':<26}{'arch':>7}{'registers':>11}{'spills':>8}{'shared':>9}  limit")
    failed = 0
    for operator in OPERATORS:
        for row in table(operator):
            print(
                f"{row['kernel']:<42}{row['shape']:<26}{'sm_' + str(row['arch']):>7}"
                f"{row['registers']:>11}{row['spills']:>8}{row['shared']:>9}  {row['limit']}"
            )
            failed += row["spills"] > 0 or row["shared"] > row["limit"]
    return failed


if __name__ == "__main__":
    sys.exit(main())
