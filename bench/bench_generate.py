"""A clip of the model that ships, from noise to latents, and its decoding.

pytest bench/bench_generate.py --benchmark-only
"""

from copy import deepcopy

import pytest
import torch
from bench_step import Step, plainly
from contest import OURS, Contender, absent

from gentron_fast import GenTronPipeline
from gentron_fast.fp8 import use_fp8
from gentron_fast.solvers import make_table

PROMPT = "a red circle moving left"
STEPS = 10


@pytest.fixture(scope="module")
def pipeline():
    return GenTronPipeline.from_pretrained()


def sampled(step):
    """All steps of the table, from (latents, x0 of the step before, step) → the next."""

    def run(latents):
        x0 = None
        for number in range(STEPS):
            latents, x0 = step(latents, x0, number)
        return latents

    return run


def test_clip(measure, contest, pipeline):
    """Ten steps at the paper's guidance; the errors of reuse=2 and fp8 are of the whole clip."""
    model = pipeline.to(contest.device).transformer
    texts = [pipeline.text_encoder.encode([prompt]) for prompt in (PROMPT, "")]
    texts = [text.to(contest.device) for text in texts]
    side = pipeline.default_size[0] // pipeline.vae.factor
    shape = 1, model.config.in_channels, pipeline.default_frames, side, side
    table = make_table("dpm++", pipeline.scheduler, STEPS)
    step = Step(model.config, shape, torch.float32, contest.device, model, texts, table)
    contenders = [
        Contender(OURS, sampled(step.ours())),
        Contender("three eager forwards", plainly(sampled(step.separate))),
        Contender("one batched forward", plainly(sampled(step.batched))),
        Contender("ours, reuse=2", sampled(step.ours(reuse=2)), exact=False),
    ]
    if contest.smoke:
        contenders.append(absent("batched, torch.compile", "not compiled in a dry run"))
        contenders.append(absent("ours, compiled", "not compiled in a dry run"))
    else:
        compiled = sampled(step.batched_compiled), sampled(step.ours_compiled())
        contenders.append(Contender("batched, torch.compile", plainly(compiled[0])))
        contenders.append(Contender("ours, compiled", compiled[1]))
    row = measure(
        f"clip, {STEPS} guided steps, small",
        shape,
        torch.float32,
        make=lambda randn: (randn(*shape, dtype=torch.float32),),
        definition=sampled(step.definition),
        contenders=contenders,
        times_launch=True,
        preset=None,
    )
    rounded = deepcopy(model)
    use_fp8(rounded, emulate=True)
    in_fp8 = Step(rounded.config, shape, torch.float32, contest.device, rounded, texts, table)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(contest.device)
    exact, off = (sampled(one.ours())(latents) for one in (step, in_fp8))
    error = float((off - exact).norm() / exact.norm())
    reuse = row["contenders"]["ours, reuse=2"]["error"]
    print(f"\noff the definition's latents: reuse=2 {reuse:.1%}, fp8, emulated {error:.1%}")


def test_decode_clip(benchmark, pipeline):
    pipeline.to("cpu")
    side = pipeline.default_size[0] // pipeline.vae.factor
    latents = torch.randn(1, pipeline.vae.latent_channels, pipeline.default_frames, side, side)
    with torch.no_grad():
        benchmark(pipeline.vae.decode, latents)
