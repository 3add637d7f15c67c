"""Denoisers in one batch, which come and go, against each of them alone."""

import gc
import random
from dataclasses import replace

import pytest
import torch
from families import FAMILY, relative
from torch.utils._python_dispatch import TorchDispatchMode

from gentron_fast import PRESETS, GenTron
from gentron_fast.diffusion import SCHEDULER_CONFIG, portable_noise
from gentron_fast.guidance import (
    GuidedBatch,
    GuidedDenoiser,
    PreparedText,
    SharedWork,
    guidance_schedule,
    guided_prediction,
)
from gentron_fast.solvers import SOLVERS, make_table, solver_step

LEARNED = SCHEDULER_CONFIG | {"variance_type": "learned_range"}
PLACES = 5


class Requests:
    """Requests drawn at random, each with everything of its own; half share the null text."""

    def __init__(self, model, make_text, seed, dtype=torch.float32, shape=(4, 3, 8, 8)):
        self.model, self.make_text, self.dtype, self.shape = model, make_text, dtype, shape
        self.random = random.Random(seed)
        null_text = make_text(model.config, 1, 2, 1, dtype, seed=2)
        self.null_text = PreparedText.of(model, null_text)
        self.shared = SharedWork(model, 2, 6, PLACES)
        self.count = 0

    def draw(self):
        """(denoiser with shared work, the same alone, seed)."""
        pick, config = self.random.choice, self.model.config
        self.count += 1
        solver = pick(SOLVERS)
        steps, eta = pick((1, 2, 3, 6)), pick((0.0, 1.0)) if solver == "ddim" else 0.0
        table = make_table(
            solver, LEARNED if config.learned_range else SCHEDULER_CONFIG, steps, eta
        )
        text = self.make_text(config, 1, pick((3, 9, 20)), pick((4, 30)), self.dtype, self.count)
        null_text = self.null_text
        if pick((False, True)):
            lengths = pick((2, 9)), pick((1, 5))
            null_text = self.make_text(config, 1, *lengths, self.dtype, 100 + self.count)
        lambdas = pick(((7.5, 1.2), (3.0, 1.0), (1.0, 1.0), (1.2, 1.2), (0.0, 1.2), (0.0, 1.0)))
        stop = pick((0.5, 1.0))
        scales = [guidance_schedule(scale, steps, 0.0, stop) for scale in lambdas]
        inputs = self.model, text, null_text, table, *scales, self.shape
        options = {"rescale": pick((0.0, 0.7))}
        together = GuidedDenoiser(*inputs, shared=self.shared, **options)
        return together, GuidedDenoiser(*inputs, **options), self.count


def noise_of(denoiser, seed, step):
    if denoiser.table.rows[step, -1] == 0:
        return torch.full((1, *denoiser.latent_shape), torch.nan)  # is not read
    return portable_noise(denoiser.latent_shape, [seed], step + 1)


def alone(denoiser, seed, steps, dtype):
    latents, x0 = portable_noise(denoiser.latent_shape, [seed], 0).to(dtype), None
    for step in range(steps):
        latents, x0 = denoiser.step(latents, step, x0, noise_of(denoiser, seed, step))
    return latents


@pytest.mark.parametrize(
    "family,frames,dtype",
    [
        ("both encoders", 3, torch.float32),
        ("both encoders", 1, torch.float64),
        ("PixArt", 1, torch.float64),
        ("adaLN-zero", 2, torch.float64),
    ],
    ids=str,
)
def test_a_clip_among_others_is_the_clip_alone(
    tiny_config, make_model, make_text, family, frames, dtype
):
    """Denoisers join at random steps, leave when they are done or at random before."""
    model = make_model(replace(tiny_config, **FAMILY[family]), dtype)
    with torch.no_grad():  # weights at random would let the latents grow without bound
        model.final.linear.weight.mul_(0.1)
    requests = Requests(model, make_text, 7, dtype, (4, frames, 8, 8))
    running, compared, mixed = [], 0, set()
    while compared < 10:
        while len(running) < PLACES and requests.random.random() < 0.7:
            together, single, seed = requests.draw()
            latents = portable_noise(requests.shape, [seed], 0).to(dtype)
            running.append(
                [together, single, seed, latents, torch.full_like(latents, torch.nan), 0]
            )
        requests.random.shuffle(running)
        if not running:
            continue
        denoisers, _, seeds, latents, x0, steps = zip(*running, strict=True)
        of_steps = zip(denoisers, seeds, steps, strict=True)
        noise = torch.cat([noise_of(*one) for one in of_steps])
        batch = GuidedBatch(denoisers)
        mixed.add(len({d.active(step) for d, step in zip(denoisers, steps, strict=True)}))
        parts = batch.step(torch.cat(latents), steps, torch.cat(x0), noise)
        for entry, *own in zip(running, *(part.split(1) for part in parts), strict=True):
            entry[3:] = *own, entry[-1] + 1
        for entry in list(running):
            single, seed, latents, _, step = entry[1:]
            if step == len(single.table.timesteps) or requests.random.random() < 0.05:
                running.remove(entry)
                entry[0].release()
                error = relative(latents, alone(single, seed, step, dtype))
                assert error <= (1e-10 if dtype == torch.float64 else 1e-5)
                compared += 1
    assert max(mixed) >= 3  # steps in which three sets of branches ran


def test_bf16_among_others_is_no_worse_than_plain_bf16(make_text):
    config = replace(PRESETS["small-T2V"], depth=3)
    torch.manual_seed(0)
    model = GenTron(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1)
    model = model.bfloat16()
    exact = GenTron(config).double().eval()
    exact.load_state_dict(model.state_dict())
    for block, rounded in zip(exact.blocks, model.blocks, strict=True):
        block.temporal_attention.positions = rounded.temporal_attention.positions.double()
    null_text = make_text(config, 1, 2, 1, torch.bfloat16, seed=2)
    shared, prepared = SharedWork(model, 2, 4, 4), PreparedText.of(model, null_text)
    table, shape = make_table("ddim", SCHEDULER_CONFIG, 4), (4, 4, 8, 8)
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(2):
        texts = [
            make_text(config, 1, clip, t5, torch.bfloat16, 10 * seed + clip)
            for clip, t5 in ((20, 40), (9, 30), (5, 8), (20, 12))
        ]
        scales = [(7.5, 1.2), (7.5, 1.0), (7.5, 1.2), (7.5, 1.0)]
        denoisers = [
            GuidedDenoiser(model, text, prepared, table, *own, shape, shared=shared)
            for text, own in zip(texts, scales, strict=True)
        ]
        latents = portable_noise(shape, [seed, seed + 10, seed + 20, seed + 30], 0)
        _, x0 = GuidedBatch(denoisers).step(latents, (1, 0, 2, 1))
        for i, (text, own, step) in enumerate(zip(texts, scales, (1, 0, 2, 1), strict=True)):
            x, timestep = latents[i : i + 1], table.timesteps[step : step + 1]
            wide = [part.to(dtype=torch.float64) for part in (text, null_text)]
            expected = guided_prediction(exact, x.double(), timestep, *wide, *own)
            plain = guided_prediction(model, x.bfloat16(), timestep, text, null_text, *own)
            wanted = solver_step(table.rows[step], x.double(), expected)[1]
            of_plain = solver_step(table.rows[step], x, plain)[1]
            errors += torch.tensor([relative(x0[i : i + 1], wanted), relative(of_plain, wanted)])
        del denoisers
    assert errors[0] <= 1.1 * errors[1]


def test_a_learned_variance_is_the_samples_own(tiny_config, make_model, make_text):
    """Beside one whose text has no weight, and one whose solver draws no noise."""
    model = make_model(replace(tiny_config, learned_range=True))
    tables = [make_table(solver, LEARNED, 4) for solver in ("ddpm", "ddpm", "dpm++")]
    shared, shape = SharedWork(model, 2, 4, 6), (4, 3, 8, 8)
    null_text = make_text(model.config, 1, 2, 1, seed=2)
    latents, x0, noise = torch.randn(3, 3, *shape, dtype=torch.float64).unbind()
    inputs = [
        (model, make_text(model.config, 1, 5, 9, seed=i), null_text, table, lambda_t, 1.2, shape)
        for i, (table, lambda_t) in enumerate(zip(tables, (7.5, 0.0, 7.5), strict=True))
    ]
    batch = GuidedBatch([GuidedDenoiser(*one, shared=shared) for one in inputs])
    found = batch.step(latents, (1, 2, 1), x0, noise)
    for i, (one, step) in enumerate(zip(inputs, (1, 2, 1), strict=True)):
        own = (part[i : i + 1] for part in (latents, x0, noise))
        x, x0_own, noise_own = own
        expected = GuidedDenoiser(*one).step(x, step, x0_own, noise_own)
        for part, wanted in zip(found, expected, strict=True):
            assert relative(part[i : i + 1], wanted) <= 1e-12
    one = inputs[1]
    both = torch.tensor([0.0, 7.5], dtype=torch.float64)
    prediction = guided_prediction(
        model,
        latents[:2],
        tables[0].timesteps[:1].expand(2),
        one[1].repeat(2),
        null_text.repeat(2),
        both,
        1.2,
    )
    single = guided_prediction(model, latents[:1], tables[0].timesteps[:1], *one[1:3], 0.0, 1.2)
    assert relative(prediction[:1], single) <= 1e-12


def test_a_denoisers_texts_and_rows_live_as_long_as_it(tiny_config, make_model, make_text):
    model = make_model(tiny_config, torch.float32)
    requests = Requests(model, make_text, 1)
    gc.disable()  # what is let go is free at once, not when it is collected
    try:
        for _ in range(2):
            kept = [requests.draw()[0] for _ in range(PLACES)]
            batch = GuidedBatch(kept)
            batch.step(torch.zeros(PLACES, *requests.shape), [0] * PLACES)
            with pytest.raises(RuntimeError, match="no place for another denoiser"):
                requests.draw()
            del kept, batch
        one = requests.draw()[0]
        one.release()
        one.release()  # nothing more
        assert one.shared.claim(model)[0] >= 0
    finally:
        gc.enable()


def test_what_cannot_be_one_batch_is_named(tiny_config, make_model, make_text):
    model = make_model(tiny_config)
    text, null_text = make_text(tiny_config, 1, 5, 9), make_text(tiny_config, 1, 2, 1, seed=2)
    table, shared = make_table("ddim", SCHEDULER_CONFIG, 4), SharedWork(model, 2, 4, 3)

    def denoiser(frames=3, shared=shared, **options):
        inputs = model, text, null_text, table, 7.5, 1.2, (4, frames, 8, 8)
        return GuidedDenoiser(*inputs, shared=shared, **options)

    one = denoiser()
    with pytest.raises(ValueError, match=r"\(4, 3, 8, 8\) and \(4, 2, 8, 8\) in one batch"):
        GuidedBatch([one, denoiser(frames=2)])
    with pytest.raises(ValueError, match="share one SharedWork"):
        GuidedBatch([one, denoiser(shared=None)])
    with pytest.raises(ValueError, match="reuses its guidance steps alone"):
        GuidedBatch([one, denoiser(reuse=2)])
    with pytest.raises(ValueError, match="2 conditions, shared rows for 3"):
        denoiser(shared=SharedWork(model, 3, 4))


def test_the_numbers_of_the_frames_are_made_once(tiny_config, make_model, make_text):
    """Not in every block of every step: each is a launch of its own."""

    class Aranges(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function.name().startswith("aten::arange")
            return function(*args, **(kwargs or {}))

    model, table = make_model(tiny_config), make_table("dpm++", SCHEDULER_CONFIG, 2)
    text, null_text = make_text(tiny_config, 1), make_text(tiny_config, 1, clip=2, t5=1)
    denoiser = GuidedDenoiser(model, text, null_text, table, 7.5, 1.2, (4, 3, 8, 8))
    latents, x0 = denoiser.step(torch.randn(1, 4, 3, 8, 8), 0)
    with Aranges() as aranges:
        denoiser.step(latents, 1, x0)
    assert aranges.count == 0
