"""A clip of the model that ships: from noise to latents, from its prompt to pixels; its decoding.

pytest bench/bench_generate.py --benchmark-only
"""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from bench_step import Step, plainly
from contest import DTYPES, OPENVINO, OURS, Contender, absent
from engines import engine, openvino_forward
from records import told
from torch import nn

from gentron_fast import GenTronPipeline
from gentron_fast.fp8 import use_fp8
from gentron_fast.solvers import make_table

PROMPT = "a red circle moving left"
STEPS, WHOLE_STEPS = 10, 20


@pytest.fixture(scope="module")
def pipeline():
    return GenTronPipeline.from_pretrained()


def sampled(step, steps=STEPS):
    """All steps of the table, from (latents, x0 of the step before, step) → the next."""

    def run(latents):
        x0 = None
        for number in range(steps):
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
    if contest.device == "cpu":
        contenders += contest.engines(partial(step.engines, sampled))
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


class Decoder(nn.Module):
    """A VAE's decoding as a module of tensors alone."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, latents):
        return self.vae.decode(latents)


class WholeClip:
    """Ways from noise to the pixels of a prompt, each of which encodes the prompt, makes ahead what
    a clip makes ahead, runs all steps and decodes."""

    def __init__(self, dtype, steps=WHOLE_STEPS):
        self.pipeline = GenTronPipeline.from_pretrained(dtype=dtype)
        self.dtype, self.steps, self.vae = dtype, steps, self.pipeline.vae
        model, side = self.pipeline.transformer, self.pipeline.default_size[0] // self.vae.factor
        self.shape = 1, model.config.in_channels, self.pipeline.default_frames, side, side
        self.table = make_table("dpm++", self.pipeline.scheduler, steps)
        self.step = self.step_of(model)

    def texts(self):
        return [self.pipeline.encode([prompt]) for prompt in (PROMPT, "")]

    def step_of(self, model) -> Step:
        return Step(model.config, self.shape, self.dtype, "cpu", model, self.texts(), self.table)

    def by(self, step: Step, make_step, decode=None):
        """make_step: called for each clip, with the step's texts in place; decode: the VAE's."""
        decode = decode or self.vae.decode

        @torch.no_grad()
        def run(latents):
            step.text, step.null_text = self.texts()
            latents = sampled(make_step(), self.steps)(latents)
            return decode(latents.to(self.dtype))

        return run

    def compiled(self):
        model = self.step.copy(self.dtype)
        model.compile_blocks()
        step = self.step_of(model)
        return self.by(step, step.ours)

    def openvino(self):
        """The steps and the decoding by OpenVINO, the text encoders as they are."""
        run, threads = self.step.batched_openvino()
        decoder = Decoder(deepcopy(self.vae).float())
        decode, _ = openvino_forward(decoder, (torch.zeros(self.shape),), self.dtype)
        return self.by(self.step, lambda: run, lambda x: decode(x.float()).clone()), told(threads)

    def definition(self, latents):
        vae = deepcopy(self.vae).to(latents.dtype)
        with torch.no_grad():
            latents = sampled(self.step.definition, self.steps)(latents)
            return vae.decode(latents.to(vae.dtype))


@pytest.mark.skipif(torch.cuda.is_available(), reason="beside engines for the CPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_clip(measure, contest, dtype):
    """From the prompt to pixels: text encoders, 20 steps at the paper's guidance, VAE."""
    clip = WholeClip(dtype, 2 if contest.smoke else WHOLE_STEPS)
    plain = clip.by(clip.step, lambda: clip.step.batched)
    contenders = [
        Contender(OURS, clip.by(clip.step, clip.step.ours)),
        Contender("one batched forward", plainly(plain)),
    ]
    if contest.smoke:
        contenders.append(absent("ours, compiled", "not compiled in a dry run"))
    else:
        contenders.append(Contender("ours, compiled", clip.compiled()))
    contenders += contest.engines(lambda: [engine(OPENVINO, clip.openvino)])
    # Guidance lets the rounding of bf16 grow over a clip.
    is_exact = dtype == torch.float32
    measure(
        f"clip of a prompt, {clip.steps} guided steps, small",
        clip.shape,
        dtype,
        make=lambda randn: (randn(*clip.shape, dtype=torch.float32),),
        definition=clip.definition,
        contenders=[replace(contender, exact=is_exact) for contender in contenders],
        times_launch=True,
    )


def test_decode_clip(benchmark, pipeline):
    pipeline.to("cpu")
    side = pipeline.default_size[0] // pipeline.vae.factor
    latents = torch.randn(1, pipeline.vae.latent_channels, pipeline.default_frames, side, side)
    with torch.no_grad():
        benchmark(pipeline.vae.decode, latents)
