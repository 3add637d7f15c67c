"""Every Triton kernel, as the models of the presets call it: it compiles, does not spill, and fits
the shared memory of a block. Types, strides and alignment are those of the calls."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pretended_gpu
import pytest
import torch
from pretended_gpu import models

from gentron_fast import PRESETS
from gentron_fast.diffusion import SCHEDULER_CONFIG
from gentron_fast.guidance import GuidedDenoiser
from gentron_fast.solvers import make_table
from gentron_kernels import launch

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import aot

# FULL=1, as `make pretend` has it, takes every width, dtype and architecture; `make test` every
# width in bf16 for the H200; what aot.py compiles for its own tests is of every architecture.
FULL = bool(os.environ.get("FULL"))
CASES = [
    (name, dtype, arch)
    for name in ("small-T2V", "XL/2-T2V", "G/2-T2V")
    for dtype in (torch.bfloat16, torch.float32)
    for arch in aot.ARCHITECTURES
    if FULL or (dtype == torch.bfloat16 and arch == 90)
]


def test_in_a_process_of_its_own(run_pretended):
    run_pretended(__file__)


@pytest.mark.parametrize("name, dtype, arch", CASES, ids=str)
def test_the_kernels_of_real_calls(name, dtype, arch, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    compiled, seen = {}, set()

    class Compiling:
        """In place of a launch."""

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def compile_for(*arguments, **named):
                if self.kernel not in seen:  # it keeps what it was compiled for
                    self.kernel.device_caches.clear()
                    seen.add(self.kernel)
                made = self.kernel.warmup(*arguments, grid=grid, **named)
                compiled.setdefault(made.hash, (self.kernel.__name__, made))

            return compile_for

    monkeypatch.setattr(launch, "launcher", Compiling)
    monkeypatch.setattr(driver.active, "get_current_target", lambda: GPUTarget("cuda", arch, 32))
    sample_and_train(name, dtype)
    wanted = {"_forward_kernel", "_backward_kernel", "_temporal_attention_fwd_kernel"}
    wanted |= {"_temporal_attention_bwd_kernel", "_guided_step_kernel", "_moments_kernel"}
    assert wanted <= {kernel for kernel, _ in compiled.values()}
    for kernel, made in compiled.values():
        used = aot.usage(made)
        assert pretended_gpu.architecture(made.asm["cubin"]) == arch
        assert used["spills"] == 0, f"{kernel} spills {used['spills']} bytes a thread"
        assert used["shared"] <= aot.SHARED_LIMIT[arch], f"{kernel} takes {used['shared']} bytes"


def sample_and_train(name: str, dtype: torch.dtype) -> None:
    """A guided step with motion, rescale and noise, and a training block with its backward."""
    config = replace(PRESETS[name], depth=2)
    shape, table = (config.in_channels, 8, 8, 8), make_table("ddim", SCHEDULER_CONFIG, 4, eta=1.0)
    with pretended_gpu.Host():
        model = models.on_gpu(config, dtype)
        text, null_text = (
            models.texts(config, *sizes).to("cuda", dtype) for sizes in ((3, 20, 120), (1, 2, 1))
        )
        denoiser = GuidedDenoiser(model, text, null_text, table, 7.5, 1.2, shape, rescale=0.7)
        latents = torch.rand(3, *shape).to("cuda")
        denoiser.step(latents, 0, noise=latents)
        motion_free = torch.tensor([True, False, True]).to("cuda")
        timesteps = torch.arange(3).to("cuda")
        model(latents.to(dtype), timesteps, text, motion_free).square().mean().backward()
