"""The distilled model that ships: a step of one branch and a clip of few, beside its teacher's.

pytest bench/bench_distilled.py --benchmark-only [--full]
"""

from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_generate import sampled
from bench_step import STEP, Step, plainly
from contest import DTYPES, OURS, Contender

from gentron_fast import GenTronPipeline
from gentron_fast.compiled import CompiledSampler, export_sampler
from gentron_fast.diffusion import portable_noise
from gentron_fast.guidance import GuidedDenoiser, guided_prediction
from gentron_fast.index import ASSETS, FAST
from gentron_fast.solvers import make_table, solver_step

EAGER = "one eager forward"
PROMPT, LAMBDA_M = "a red circle moving left", 1.2  # the paper's, which needs all three branches


class Guided(Step):
    """The step of a pipeline's model, distilled or its teacher, at guidance of its own."""

    def __init__(self, pipeline: GenTronPipeline, dtype, device, steps: int, lambda_m: float):
        pipeline.to(device, dtype)
        self.pipeline = pipeline
        self.scales = pipeline.defaults.lambda_t, lambda_m
        model, side = pipeline.transformer, pipeline.default_size[0] // pipeline.vae.factor
        shape = 1, model.config.in_channels, pipeline.default_frames, side, side
        texts = [pipeline.encode([prompt]) for prompt in (PROMPT, "")]
        if model.config.guidance_embedding:
            texts[1] = None
        table = make_table(pipeline.defaults.solver, pipeline.scheduler, steps)
        super().__init__(model.config, shape, dtype, device, model, texts, table)

    def denoiser(self, **options) -> GuidedDenoiser:
        texts, rescale = (self.text, self.null_text), self.pipeline.defaults.rescale
        inputs = self.model, *texts, self.table, *self.scales, self.shape[1:]
        return GuidedDenoiser(*inputs, rescale=rescale, **options)

    def definition(self, latents, x0_previous, step=STEP, dtype=None):
        """One forward of a distilled model, in the dtype of the latents unless told, and the
        solver's step."""
        dtype = dtype or latents.dtype
        model = self.model if dtype == self.dtype else self.copy(dtype)
        with torch.no_grad():
            inputs = model, latents.to(dtype), self.timestep(step), self.text.to(dtype=dtype), None
            noise = guided_prediction(*inputs, *self.scales)
        return solver_step(self.table.rows[step], latents, noise, x0_previous)

    def clip(self, steps: int, whole: bool = False):
        """From noise to latents, or of a prompt to pixels."""
        if not whole:
            return sampled(self.ours(), steps)

        @torch.no_grad()
        def run(latents):
            self.text = self.pipeline.encode([PROMPT])
            if self.null_text is not None:
                self.null_text = self.pipeline.encode([""])
            latents = sampled(self.ours(), steps)(latents)
            return self.pipeline.vae.decode(latents.to(self.dtype))

        return run


def compiled(folder: Path, dtype, device, steps: int, path: Path):
    """A compiled sampler's clip of seed 0, from noise to latents, whatever it is given."""
    pipeline = GenTronPipeline.from_pretrained(folder).to(device, dtype)
    encoder, defaults = pipeline.text_encoder, pipeline.defaults
    distilled, side = pipeline.transformer.config.guidance_embedding, pipeline.default_size[0]
    export_sampler(
        *(path, pipeline.transformer, None if distilled else pipeline.encode([""])),
        pipeline.scheduler,
        frames=pipeline.default_frames,
        latent_size=(side // pipeline.vae.factor,) * 2,
        steps=steps,
        solver=defaults.solver,
        rescale=defaults.rescale,
        max_batch=2,
        max_tokens={name: encoder.max_tokens(name) for name in encoder.tokenizers},
    )
    sampler, text = CompiledSampler.load(path), pipeline.encode([PROMPT])
    scales = {"lambda_t": defaults.lambda_t, "lambda_m": LAMBDA_M}
    return lambda _: sampler(text, seed=0, **scales).latents


def pair(dtype, device, steps: int, of_teacher: int, lambda_m: float = LAMBDA_M):
    """The distilled model and its teacher, in so many steps each."""
    fast, teacher = (GenTronPipeline.from_pretrained(path) for path in (ASSETS / FAST, ASSETS))
    return (
        Guided(fast, dtype, device, steps, lambda_m),
        Guided(teacher, dtype, device, of_teacher, lambda_m),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step(measure, contest, dtype):
    one, three = pair(dtype, contest.device, 50, 50)
    is_exact = dtype == torch.float32  # in bf16 held against plain torch's own error
    row = measure(
        "guided step, small, distilled",
        one.shape,
        dtype,
        make=lambda randn: tuple(randn(*one.shape, dtype=torch.float32) for _ in range(2)),
        definition=one.definition,
        contenders=[
            Contender(OURS, one.ours(), exact=is_exact),
            Contender(EAGER, plainly(partial(one.definition, dtype=dtype)), exact=is_exact),
            Contender("the teacher's three branches", three.ours(), checked=False),
        ],
        times_launch=True,
        work=one.denoiser().describe(),
    )
    own, plain = (row["contenders"][name]["error"] for name in (OURS, EAGER))
    assert is_exact or own <= 1.1 * plain, f"ours is off by {own:.1e}, plain torch by {plain:.1e}"


@pytest.mark.parametrize("whole", [False, True], ids=["latents", "of a prompt"])
def test_clip(measure, contest, whole):
    """Eight steps of one branch; the teacher's fifty of three, and of two at its own λ_M."""
    dtype, steps = torch.float32, (2, 3) if contest.smoke else (8, 50)
    one, three = pair(dtype, contest.device, *steps)
    _, own = pair(dtype, contest.device, *steps, lambda_m=three.pipeline.defaults.lambda_m)

    def defined(latents):
        latents = sampled(one.definition, steps[0])(latents)
        vae = deepcopy(one.pipeline.vae).to(latents.dtype)
        return vae.decode(latents) if whole else latents

    teacher = f"the teacher's {steps[1]} steps of"
    measure(
        f"clip{' of a prompt' if whole else ''}, {steps[0]} steps, small, distilled",
        one.shape,
        dtype,
        make=lambda randn: (randn(*one.shape, dtype=torch.float32),),
        definition=torch.no_grad()(defined),
        contenders=[
            Contender(OURS, one.clip(steps[0], whole)),
            Contender(f"{teacher} three branches", three.clip(steps[1], whole), checked=False),
            Contender(f"{teacher} two", own.clip(steps[1], whole), checked=False),
        ],
        times_launch=True,
    )


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_clip(measure, contest, tmp_path, dtype):
    """The same by compiled samplers, whose steps run outside of Python: eight of one branch, as
    many as the teacher's, and the teacher's fifty of three."""
    few, many = (2, 3) if contest.smoke else (8, 50)
    one, _ = pair(dtype, contest.device, few, many)

    def made(folder: Path, steps: int):
        return compiled(folder, dtype, contest.device, steps, tmp_path / f"{folder.name}{steps}")

    def defined(latents):
        noise = portable_noise(one.shape[1:], [0], 0).to(latents.device, latents.dtype)
        return sampled(one.definition, few)(noise)

    measure(
        f"compiled clip, {few} steps, small, distilled",
        one.shape,
        dtype,
        make=lambda randn: (randn(*one.shape, dtype=torch.float32),),
        definition=torch.no_grad()(defined),
        contenders=[
            Contender(OURS, made(ASSETS / FAST, few)),
            Contender(f"{many} steps of one branch", made(ASSETS / FAST, many), checked=False),
            Contender(f"the teacher's {many} of three", made(ASSETS, many), checked=False),
        ],
        times_launch=True,
    )
