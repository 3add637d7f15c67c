"""One guided step of the whole G/2-T2V on the CPU, bf16, tiny latents: plain against shared.

python bench/large.py
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_step import LAMBDA_M, LAMBDA_T, STEP, TABLE, Step, plain_operators
from records import append_row, environment
from safetensors.torch import load_file, save_file

from gentron_fast import PRESETS
from gentron_fast.cores import all_cores
from gentron_fast.guidance import guided_prediction
from gentron_fast.solvers import solver_step

PRESET = "G/2-T2V"
SHAPE = 1, 4, 8, 8, 8


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(mode: str, out: Path) -> None:
    """One process's part: the step in one mode, its result and figures into a file."""
    step = Step(PRESETS[PRESET], SHAPE, torch.bfloat16, "cpu")
    latents, x0_previous = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    weights = peak_gib()

    def plain():
        with plain_operators(), torch.no_grad():
            inputs = step.model, latents.bfloat16(), step.timestep(STEP), step.text, step.null_text
            noise = guided_prediction(*inputs, LAMBDA_T, LAMBDA_M)
        return solver_step(TABLE.rows[STEP], latents, noise, x0_previous)

    if mode == "plain":
        function = plain
    else:
        ours = step.ours()

        def function():
            return ours(latents, x0_previous)

    function()
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    figures = torch.tensor([seconds, weights, peak_gib()])
    save_file({"latents": result[0], "figures": figures}, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("plain", "shared"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        run(args.mode, args.out)
        return
    results = {}
    with all_cores(), tempfile.TemporaryDirectory() as folder:
        for mode in ("plain", "shared"):
            out = Path(folder, f"{mode}.safetensors")
            subprocess.run([sys.executable, __file__, "--mode", mode, "--out", out], check=True)
            results[mode] = load_file(out)
            seconds, weights, peak = results[mode]["figures"].tolist()
            print(f"{mode:<7} {seconds:6.1f} s a step, peak {peak:.2f} GiB ({weights:.2f} loaded)")
    plain, shared = (results[mode]["latents"] for mode in ("plain", "shared"))
    difference = ((plain - shared).norm() / plain.norm()).item()
    print(f"difference of the latents {difference:.1e}")
    if os.environ.get("RESULTS"):
        figures = {mode: results[mode]["figures"].tolist() for mode in results}
        row = {"operator": f"whole {PRESET}", "shape": list(SHAPE), "dtype": "bfloat16"}
        row |= environment("cpu") | {"difference": difference}
        row |= {"seconds, GiB loaded, GiB peak": figures}
        append_row(os.environ["RESULTS"], "large", row)


if __name__ == "__main__":
    main()
