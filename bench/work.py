"""FLOPs of a guided step by source of saving, counted by torch on meta tensors.

RESULTS=DIR python bench/work.py   8 frames at 512², prompt of 20 CLIP and 40 T5 tokens, null 2, 1
"""

import os
from contextlib import ExitStack
from unittest.mock import patch

import torch
from bench_step import LAMBDA_T, STEP, TABLE, Step, flops_of
from records import append_row, environment

from gentron_fast import PRESETS
from gentron_fast.guidance import GuidedDenoiser, contexts, shared
from gentron_fast.layers import Block

SHAPE = 1, 4, 8, 64, 64
SOURCES = (
    "branches that weigh nothing",
    "no q and k without motion, text and modulation once",
    "text folded into the projections",
    "value and output projection merged",
)


def work(preset: str, lambda_m: float) -> dict:
    """FLOPs of three separate forwards, and the share of them that each source saves."""
    step = Step(PRESETS[preset], SHAPE, torch.bfloat16, "meta")
    latents = torch.empty(SHAPE, device="meta")
    mask = torch.ones(1, dtype=torch.bool, device="meta")
    x = latents.to(step.dtype)
    runs = (step.null_text, mask), (step.null_text, None), (step.text, None)
    branches = [flops_of(step.model, x, step.timestep(STEP), *run) for run in runs]
    plain = sum(branches)
    counts = [plain, plain - (branches[0] if lambda_m == 1 else 0)]
    no_folds = patch.object(contexts, "shared_context", Block.context)
    no_merge = patch.object(shared, "merged_values", lambda layer: None)
    for left_out in ((no_folds, no_merge), (no_merge,), ()):
        inputs = step.model, step.text, step.null_text, TABLE, LAMBDA_T, lambda_m, SHAPE[1:]
        with ExitStack() as stack:
            for patched in left_out:
                stack.enter_context(patched)
            denoiser = GuidedDenoiser(*inputs)
        denoiser.branches(latents, 0)  # makes the modulation rows of all steps
        counts.append(flops_of(denoiser.branches, latents, 0))
    steps = zip(SOURCES, counts[:-1], counts[1:], strict=True)
    shares = {source: (before - after) / plain for source, before, after in steps}
    return {"flops": plain, "saved": shares | {"altogether": 1 - counts[-1] / plain}}


def main() -> None:
    for preset in ("XL/2-T2V", "G/2-T2V"):
        for lambda_m in (1.2, 1.0):
            row = {"operator": "work saved", "direction": f"λ_M {lambda_m}", "preset": preset}
            row |= {"shape": list(SHAPE), "dtype": "bfloat16"} | work(preset, lambda_m)
            row |= environment("cpu")
            print(preset, row["direction"], f"{row['flops'] / 1e12:.2f} TFLOP plain", end=" ")
            print({source: f"{share:.2%}" for source, share in row["saved"].items()})
            if os.environ.get("RESULTS"):
                append_row(os.environ["RESULTS"], "work", row)


if __name__ == "__main__":
    main()
