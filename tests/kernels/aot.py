"""Ahead-of-time compilation of the Triton kernels, without a GPU: what the compiler says of them.

python tests/kernels/aot.py [--json] [OPERATOR ...]    a row for each operator's compile_cases()

Exits 1 where a kernel spills (SPILL_LIMIT names the exceptions) or wants more shared memory than a
block can have.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

OPERATORS = "layernorm_modulate", "temporal_attention", "guided_step"
ARCHITECTURES = 80, 90, 100
# Of one block, in bytes (CUDA C++ programming guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Bytes of a thread in local memory, by shape: with 1024 threads a block each has 64 registers.
SPILL_LIMIT = {"widest bf16 without dy_sum": 160, "widest fp32 without dy_sum": 160}
CUOBJDUMP = Path(triton.__path__[0], "backends/nvidia/bin/cuobjdump")


def compiled(
    kernel,
    signature: dict[str, str],
    constexprs: dict,
    num_warps: int = 4,
    num_stages: int = 3,
    arch: int = 90,
):
    """Compile for sm_<arch>.

    signature: the type of each argument that is no constant, "*bf16", "i32", or "i32:16" for one
    that 16 divides, as Triton sees it at a call; pointers are taken to be aligned to 16 bytes, as
    PyTorch's allocations are.
    """
    names = kernel.arg_names
    signature = {name: signature.get(name, "constexpr") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or kind.endswith(":16")
    }
    signature = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    return triton.compile(
        ASTSource(
            kernel, signature, {(names.index(n),): v for n, v in constexprs.items()}, aligned
        ),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )


def usage(compiled) -> dict[str, int]:
    """Registers and spills of a thread, shared memory of a block."""
    text = dump(compiled, "-res-usage")
    reported = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": reported["REG"],
        "spills": reported["STACK"] + reported["LOCAL"],
        "shared": compiled.metadata.shared,
    }


def dump(compiled, option: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def table(operators: list[str]) -> list[dict]:
    """The figures of the operators' cases on every architecture, compiled in two processes."""
    jobs = [
        (operator, index, arch)
        for operator in operators
        for index in range(len(_cases(operator)))
        for arch in ARCHITECTURES
    ]
    with ProcessPoolExecutor(min(2, os.cpu_count())) as pool:
        return list(pool.map(_row, jobs))


def _cases(operator: str) -> list[tuple]:
    return list(importlib.import_module(f"gentron_kernels.{operator}").compile_cases())


def _row(job: tuple[str, int, int]) -> dict:
    operator, index, arch = job
    shape, kernel, signature, constexprs, num_warps = _cases(operator)[index]
    found = usage(compiled(kernel, signature, constexprs, num_warps, arch=arch))
    name = {"kernel": kernel.__name__.strip("_"), "shape": shape, "arch": arch}
    limits = {"limit": SHARED_LIMIT[arch], "spill_limit": SPILL_LIMIT.get(shape, 0)}
    return name | found | limits


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time.")
    parser.add_argument("operators", nargs="*", default=OPERATORS)
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    args = parser.parse_args()
    rows = table(args.operators)
    if args.json:
        print(json.dumps(rows))
    else:
        columns = "{:<40}  {:<28}{:>6}{:>11}{:>8}{:>9}{:>9}{:>13}"
        print(columns.format(*rows[0]))
        for row in rows:
            print(columns.format(*row.values()))
    spilled = any(row["spills"] > row["spill_limit"] for row in rows)
    return int(spilled or any(row["shared"] > row["limit"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
