"""Settings and trainers of tiny runs, for the tests beside."""

from dataclasses import replace
from pathlib import Path

import torch

from gentron_train.config import Settings, parse_settings
from gentron_train.engine import Trainer, build_parts, prepare_data, start_distributed

STEPS = 10


def settings_of(world: Path, init: Path, run: Path, stage: str = "t2i", **changes) -> Settings:
    argv = [f"--data={world / 'data'}", f"--vae={world / 'vae'}", f"--init={init}"]
    argv += [f"--run={run}", "--starts=1", "--batch=2", "--draws=2", "--no-tensorboard"]
    argv += ["--warmup=2", f"--steps={STEPS}", "--dtype=fp32", "--log-every=1"]
    return replace(parse_settings(stage, "", argv), **changes)


def trainer_of(settings: Settings, stage: str) -> Trainer:
    device = start_distributed(settings.timeout)
    settings = settings.on(torch.distributed.get_world_size())
    data = settings.data_settings(stage)
    parts = build_parts(settings, stage, data, device)
    return Trainer(
        settings, parts, prepare_data(settings, data, parts.text_encoder, device), device
    )
