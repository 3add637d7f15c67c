"""Where a denoiser's step is replayed as a CUDA graph, and what is in the graph."""

from dataclasses import replace

import pytest
import torch

from gentron_fast import PRESETS
from gentron_fast.diffusion import SCHEDULER_CONFIG
from gentron_fast.guidance import GuidedDenoiser, cuda_graph, denoiser, steps
from gentron_fast.solvers import make_table


@pytest.mark.parametrize(
    "preset, frames, side, batch, replayed",
    [
        ("small", 1, 8, 4, True),
        ("small-T2V", 8, 8, 1, True),
        ("small-T2V", 8, 8, 16, True),
        ("XL/2", 1, 64, 1, True),  # an image of 512²
        ("XL/2", 1, 64, 8, False),
        ("XL/2-T2V", 8, 32, 1, False),
        ("G/2", 1, 64, 1, True),
        ("G/2-T2V", 8, 64, 1, False),
    ],
)
def test_tokens_and_width_choose_and_not_image_or_clip(preset, frames, side, batch, replayed):
    config = PRESETS[preset]
    branches = 3 if config.temporal else 2
    tokens = branches * batch * frames * side * side // config.patch_size**2
    assert cuda_graph.is_bound_by_launches(tokens, config.width) == replayed


MADE = []


class Recorded:
    """A CUDA graph that runs again what it captured, on its own buffers, as a replay would."""

    def __init__(self, run, inputs):
        self.run, self.buffers = run, [tensor.clone() for tensor in inputs]
        self.results = run(*self.buffers)
        MADE.append(self)

    def __call__(self, *inputs):
        for buffer, tensor in zip(self.buffers, inputs, strict=True):
            buffer.copy_(tensor)
        for kept, new in zip(self.results, self.run(*self.buffers), strict=True):
            kept.copy_(new)
        return self.results


@pytest.mark.parametrize("solver, learned, rescale", [
    ("dpm++", False, 0.0), ("ddim", False, 0.7), ("ddpm", True, 0.0),
])  # fmt: skip
def test_a_replayed_step_is_the_step(
    tiny_config, make_model, make_text, monkeypatch, solver, learned, rescale
):
    """Guidance and the solver's update within, one graph for each set of branches."""
    monkeypatch.setattr(denoiser, "ReplayedGraph", Recorded)
    MADE.clear()
    config = replace(tiny_config, learned_range=learned)
    text, null_text = make_text(config, 2), make_text(config, 2, clip=2, t5=1, seed=2)
    variance = {"variance_type": "learned_range"} if learned else {}
    table = make_table(solver, SCHEDULER_CONFIG | variance, 4)
    lambda_m = torch.tensor([[1.2], [1.2], [1.0], [1.0]])  # three branches, then two
    inputs = make_model(config), text, null_text, table, 7.5, lambda_m, (4, 3, 8, 8)
    replayed, plain = (
        GuidedDenoiser(*inputs, rescale=rescale, cuda_graph=graph) for graph in (True, False)
    )
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 3, 8, 8, generator=generator)
    x0, seen = None, []
    for step in range(4):
        draws = table.rows[step, 5] != 0
        noise = torch.randn(latents.shape, generator=generator) if draws else None
        found = replayed.step(latents, step, x0, noise)
        expected = plain.step(latents, step, x0, noise)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        seen.append((found, [tensor.clone() for tensor in found]))
        latents, x0 = expected
    assert len(MADE) == 2
    for found, as_returned in seen:  # what a caller keeps is not written over
        assert all(torch.equal(a, b) for a, b in zip(found, as_returned, strict=True))

    def outside(*_, **__):
        raise AssertionError("the update runs outside the graph")

    for graph in MADE:
        results = graph.results
        monkeypatch.setattr(graph, "run", lambda *_, results=results: results)
    monkeypatch.setattr(steps, "guided_step", outside)
    replayed.step(latents, 3, x0)


@pytest.mark.parametrize("reuse, steps, asks", [(1, 12, True), (1, 11, False), (2, 12, False)])
def test_the_largest_step_counts_where_captures_pay(
    tiny_config, make_model, make_text, monkeypatch, reuse, steps, asks
):
    """A graph for each kind of step, of which there are two: a capture costs three steps."""
    asked = []
    monkeypatch.setattr(denoiser, "is_bound_by_launches", lambda *size: asked.append(size))
    text, table = make_text(tiny_config, 2), make_table("dpm++", SCHEDULER_CONFIG, steps)
    lambda_m = torch.full((steps, 1), 1.2)
    lambda_m[0] = 1.0  # two branches, then three
    shape = 4, 3, 8, 8
    inputs = make_model(tiny_config), text, text, table, 7.5, lambda_m, shape
    GuidedDenoiser(*inputs, reuse=reuse)._pays_for_graphs()
    patches = 8 * 8 // tiny_config.patch_size**2
    assert asked == asks * [(3 * 2 * 3 * patches, tiny_config.width)]
