"""What is compiled for a GPU goes through Inductor to its machine code: the graphs of compiled
samplers, and blocks under torch.compile, in sampling and in training."""

import itertools
import os
from dataclasses import replace
from typing import NamedTuple

import pretended_gpu
import pytest
import torch
from pretended_gpu import models
from torch._inductor.codecache import PyCodeCache

from gentron_fast import PRESETS, GenTronConfig
from gentron_fast.compiled.graphs import Graph, sampling_graphs
from gentron_fast.diffusion import SCHEDULER_CONFIG
from gentron_fast.guidance import GuidedDenoiser
from gentron_fast.guidance.contexts import mark_length_dynamic
from gentron_fast.solvers import make_table


class Sampler(NamedTuple):
    """A compiled sampler: its model, cut to two blocks, the latents (C, T, h, w), the most clips
    at once, the solver, and the dtype of its weights."""

    config: GenTronConfig
    shape: tuple[int, ...]
    max_batch: int
    solver: str = "dpm++"
    dtype: torch.dtype = torch.bfloat16


PIXART = {
    "encoders": ("t5",),
    "pooled_text": False,
    "caption_projection": True,
    "size_embedding": True,
    "final_table": True,
    "cross_norm": False,
    "learned_range": True,
}
SAMPLERS = {
    "small, clips": Sampler(PRESETS["small-T2V"], (4, 8, 8, 8), 16),
    "small, images": Sampler(PRESETS["small"], (4, 1, 8, 8), 3, "ddim", torch.float32),
    "XL/2, images, learned range": Sampler(
        replace(PRESETS["XL/2"], learned_range=True), (4, 1, 32, 32), 3, "ddpm"
    ),
    "XL/2, clips": Sampler(PRESETS["XL/2-T2V"], (4, 32, 64, 64), 64),
    "G/2, clips": Sampler(PRESETS["G/2-T2V"], (4, 8, 64, 64), 3),
    "PixArt-α": Sampler(replace(PRESETS["XL/2"], **PIXART), (4, 1, 64, 64), 64, "dpm++"),
}
TOKENS = {"clip": 77, "t5": 256}
# Each kind of graph once, and each sampler; blocks of G/2 sample and of the small model train.
# FULL=1, as `make pretend` has it, takes all graphs, and blocks of batch 1, 3 and 64, PixArt's too.
FULL = bool(os.environ.get("FULL"))
FEW = {
    "small, clips": ["embed", "modulation", "fold-128"],
    "small, images": ["block-101-projected"],
    "XL/2, images, learned range": ["step-101"],
    "XL/2, clips": ["project-768", "block-111-projected"],
    "G/2, clips": ["block-011-folded", "step-111"],
    "PixArt-α": ["condition", "caption-t5"],
}


def graphs(sampler: Sampler) -> list[Graph]:
    """All graphs of a sampler, with weights that take no memory."""
    config, shape, max_batch, solver, dtype = sampler
    table = make_table(solver, SCHEDULER_CONFIG | {"variance_type": "learned_range"}, 20)
    with pretended_gpu.Host():
        model = models.on_gpu(replace(config, depth=2), dtype).requires_grad_(False)
        tokens = {name: TOKENS[name] for name in config.encoders}
        return list(sampling_graphs(model, shape, table, max_batch, tokens))


def test_in_a_process_of_its_own(run_pretended):
    run_pretended(__file__)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_graphs_compile(name, tmp_path):
    of_sampler = {graph.name: graph for graph in graphs(SAMPLERS[name])}
    wanted = of_sampler if FULL else FEW[name]
    for kind in wanted:
        of_sampler[kind].compile(tmp_path / f"{kind}.pt2")
        kernels = pretended_gpu.cubins(tmp_path / f"{kind}.pt2")
        assert set(kernels.values()) <= {pretended_gpu.ARCHITECTURE}
        ours = {"block": "_forward_kernel", "step": "_guided_step_kernel"}.get(kind.split("-")[0])
        assert ours is None or ours in kernels, kind
        # Attention over many clips, in parts, transposes what it joins.
        joins = [own for own in kernels if "cat" in own and "transpose" not in own]
        assert not joins or not kind.startswith("block"), f"{kind} copies what it joins: {joins}"


@pytest.fixture
def loaded():
    """The kernels that the test's compiled functions load."""
    torch._dynamo.reset()
    PyCodeCache.cache_clear()  # else a kernel of a test before is not loaded again
    pretended_gpu.loaded.clear()
    return pretended_gpu.loaded


CONFIGS = {name: SAMPLERS[name].config for name in ("small, clips", "G/2, clips", "PixArt-α")}


@pytest.mark.parametrize(
    "name, batch",
    list(itertools.product(CONFIGS, [1, 3, 64])) if FULL else [("G/2, clips", 1)],
)
def test_compiled_blocks_sample(name, batch, loaded):
    config = replace(CONFIGS[name], depth=2)
    shape = config.in_channels, 8 if config.temporal else 1, 8, 8
    table = make_table("dpm++", SCHEDULER_CONFIG, 4)
    with pretended_gpu.Host() as host, torch.no_grad():
        model = models.on_gpu(config)
        text, null_text = (
            models.texts(config, *sizes).to("cuda", torch.bfloat16)
            for sizes in ((batch, 20, 120), (1, 2, 1))
        )
        denoiser = GuidedDenoiser(
            *(model, text, null_text, table, 7.5, 1.2, shape), cuda_graph=False
        )
        calls = []  # Dynamo compiles nothing under a mode that is not torch's
        hooks = [
            block.register_forward_pre_hook(lambda *call: calls.append(call))
            for block in model.blocks
        ]
        denoiser.step(torch.rand(batch, *shape).to("cuda"), 0)
        for hook in hooks:
            hook.remove()
    model.compile_blocks()
    with host.fakes, torch.no_grad():
        for block, inputs in calls:
            for context in inputs[4].parts:
                mark_length_dynamic(context)
            block(*inputs)
    assert len(calls) == config.depth
    assert set(loaded.values()) == {pretended_gpu.ARCHITECTURE}
    assert "_forward_kernel" in loaded
    assert not config.temporal or "_temporal_attention_fwd_kernel" in loaded


@pytest.mark.parametrize("name", CONFIGS if FULL else ["small, clips"])
def test_a_compiled_block_trains(name, loaded):
    config = replace(CONFIGS[name], depth=2)
    with pretended_gpu.Host() as host:
        model = models.on_gpu(config, torch.float32)
        model.compile_blocks()
        block, frames = model.blocks[1], 8 if config.temporal else 1
        x, y = (torch.rand(2, frames, 16, config.width).to("cuda") for _ in range(2))
        gate, modulation = (torch.rand(2, *s, config.width).to("cuda") for s in ((), (6,)))
        inputs = [tensor.requires_grad_() for tensor in (x, y, gate, modulation)]
        text = model.project_captions(models.texts(config, 2).to("cuda"))
        motion_free = torch.tensor([True, False]).to("cuda") if config.temporal else None
        context = block.context(text)
    with host.fakes, torch.autocast("cuda", torch.bfloat16):
        x, y, gate = block(*inputs, context, motion_free)
        (x + gate[:, None, None] * y).square().mean().backward()
    assert set(loaded.values()) == {pretended_gpu.ARCHITECTURE}
    assert {"_forward_kernel", "_backward_kernel"} <= set(loaded)
    assert not config.temporal or "_temporal_attention_bwd_kernel" in loaded
    assert all(tensor.grad.shape == tensor.shape for tensor in inputs)
