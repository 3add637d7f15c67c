"""What the host sends to the GPU and waits for: nothing in a step but what is named here."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pretended_gpu
import pytest
import torch
from pretended_gpu import models

from gentron_fast import PRESETS, GenTronPipeline
from gentron_fast.diffusion import SCHEDULER_CONFIG, NoiseSchedule
from gentron_fast.guidance import GuidedDenoiser
from gentron_fast.solvers import make_table
from gentron_train.data.loader import Batch
from gentron_train.objective import Objective, checkpoint_activations
from gentron_train.small_world.architecture import small_text_encoder
from gentron_train.trainer import Trainer

SMALL = replace(PRESETS["small-T2V"], depth=2)
LEARNED = replace(PRESETS["small"], depth=2, learned_range=True)
PIXART = replace(PRESETS["small"], depth=2, size_embedding=True, caption_projection=True)
DDPM = SCHEDULER_CONFIG | {"variance_type": "learned_range"}


def test_in_a_process_of_its_own(run_pretended):
    run_pretended(__file__)


def crossings(host: pretended_gpu.Host) -> Counter:
    """Events by kind and the function that asked for them."""
    return Counter((event.kind, event.function) for event in host.events)


@pytest.mark.parametrize(
    "config, solver, rescale, reuse, cuda_graph",
    [
        (SMALL, "dpm++", 0.0, 1, False),
        (LEARNED, "ddpm", 0.7, 2, False),
        (PIXART, "dpm++", 0.0, 1, True),
    ],
    ids=["T2V", "learned range", "PixArt"],
)
def test_the_guided_loop(config, solver, rescale, reuse, cuda_graph):
    frames, steps = 8 if config.temporal else 1, 4
    table = make_table(solver, DDPM, steps)
    shape = config.in_channels, frames, 8, 8
    with pretended_gpu.Host() as host:
        model = models.on_gpu(config)
        text, null_text = (
            models.texts(config, *sizes).to("cuda", torch.bfloat16)
            for sizes in ((2, 20, 120), (1, 2, 1))
        )
        host.events.clear()
        denoiser = GuidedDenoiser(
            *(model, text, null_text, table, 7.5, 1.2, shape),
            **{"clips": 2, "rescale": rescale, "reuse": reuse, "cuda_graph": cuda_graph},
        )
        made = crossings(host)
        host.events.clear()
        pipeline = SimpleNamespace(device=torch.device("cuda"))
        GenTronPipeline._denoise(pipeline, denoiser, range(4), lambda step, latents: None)
    # Before the first step: a table of the timesteps and one of the rest, how long each text is.
    lengths = 2 * len(config.encoders)
    assert made == {
        ("pinned copy", "GuidedDenoiser._take_coefficients"): 2,
        ("wait", "EncodedText.trim"): lengths,
        ("wait", "_trimmed"): lengths,
    }
    # In the loop: which text each row has, for each set of branches; the noise, which is drawn on
    # the CPU; and at its end whether all was finite.
    draws = 1 + int((table.rows[:, -1] != 0).sum())
    # What a graph's capture waits for; the steps are of one kind.
    captures = {("wait", "ReplayedGraph.__init__"): 1} if cuda_graph else {}
    assert crossings(host) == captures | {
        ("pinned copy", "make_plan"): 1 + (reuse > 1),
        ("pinned copy", "GenTronPipeline._denoise"): draws,
        ("copy to the host", "GenTronPipeline._denoise"): 1,
    }


class Engine:
    """What `Trainer.forward_backward` asks of DeepSpeed's engine."""

    def __init__(self, objective: Objective):
        self.objective = objective

    def __call__(self, *inputs) -> torch.Tensor:
        return self.objective(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


@pytest.mark.parametrize(
    "config, encoder, checkpointing",
    [
        (SMALL, "frozen", "full"),
        (LEARNED, "precomputed", "none"),
        (PIXART, "trained", "attention"),
    ],
    ids=["T2V", "learned range", "PixArt"],
)
def test_a_micro_step_of_training(config, encoder, checkpointing):
    frames = 4 if config.temporal else 1
    with pretended_gpu.Host() as host:
        device = torch.device("cuda")
        model = models.on_gpu(config, torch.float32)
        checkpoint_activations(model, checkpointing)
        text_encoder = small_text_encoder(["circle"]).to(device)
        text = text_encoder.tokenize(["a circle"] * 2)
        if encoder == "precomputed":
            text = models.texts(config, 2)
        trained = text_encoder if encoder == "trained" else None
        objective = Objective(
            model, trained, NoiseSchedule.from_config(DDPM).to(device), torch.bfloat16
        )
        trainer = SimpleNamespace(
            engine=Engine(objective),
            device=device,
            frozen_text=text_encoder if encoder == "frozen" else None,
            metrics=SimpleNamespace(count_flops=lambda *_: None),
            teacher=None,
            _broken=None,
        )
        latents = torch.rand(4, config.in_channels, frames, 8, 8)
        motion_free = torch.tensor([True, False, True, False]) if config.temporal else None
        batch = Batch(latents, torch.rand_like(latents), torch.arange(4), motion_free, text)
        host.events.clear()
        Trainer.forward_backward(trainer, batch)
    read = sum(part is not None for part in (latents, batch.noise, batch.timestep, motion_free))
    own = crossings(host)
    assert own.pop(("pinned copy", "Trainer.forward_backward")) == read
    # Token ids and their mask, or what precomputed data holds of each text.
    of_text = {("pinned copy", "TextEncoder._encode_with"): 2 * len(config.encoders)}
    if encoder == "precomputed":
        of_text = {("pinned copy", "TextCondition.map"): 3 * len(config.encoders)}
    assert own == of_text
