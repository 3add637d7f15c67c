"""What a run reads and draws: the settings that training and its loader share."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gentron_train.data.shards import CACHE

TIMESTEPS = 1000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def option(default, text: str, **keywords):
    """A field that is a command-line option too, with its line of --help."""
    return field(default=default, metadata={"help": text, **keywords})


# ruff: noqa: RUF009 (each default is a dataclasses.field)
@dataclass(frozen=True)
class DataOptions:
    """Fields of DataSettings and of a run's Settings; ValueError, naming the option, for a value
    out of range."""

    in_memory: bool = option(
        False, "keep latents, encoded once, beside the shards; frozen texts in RAM"
    )
    crop: str = option("center", "which part of a picture is kept", choices=["center", "random"])
    frames: int = option(8, "frames of a clip")
    fps: float = option(4.0, "their rate")
    windows_per_clip: int = option(
        0, "random windows of each clip that are encoded; 0: a new one at every reading"
    )
    workers: int = option(2, "processes that read data, a rank")
    allow_pipes: bool = option(False, "shards by URLs pipe:COMMAND, which a shell runs")
    cache: Path = option(CACHE, "folder for copies of the shards that are no local files")
    cache_gib: float | None = option(None, "GiB of them to keep (all); 64 shards are read at once")
    max_broken: float = option(0.05, "share of broken samples that ends the run")
    p_null: float = option(0.1, "probability of the empty caption")
    p_motion_free: float = option(
        0.2, "share of image-text pairs in T2V training, repeated to the clip's frames, motion-free"
    )
    p_image: float = option(
        0.0, "share of images of one frame in T2V training, in their own batches"
    )
    batch: int = option(32, "samples per rank and micro-step")
    draws: int = option(1, "noises and timesteps per sample; they share its text encoding")
    min_timestep: int = option(0, "smallest timestep drawn")
    max_timestep: int = option(TIMESTEPS - 1, "largest timestep drawn")
    seed: int = option(0, "seed of the weights and of the data")

    def __post_init__(self):
        check_least(self, 1, "frames", "batch", "draws")
        check_least(self, 0, "windows_per_clip", "workers")
        check_share(self, "p_null", "p_motion_free", "p_image", "max_broken")
        if self.p_motion_free + self.p_image > 1:
            raise ValueError(
                f"--p-motion-free {self.p_motion_free} and --p-image {self.p_image} are shares of "
                "one run, must be at most 1 together"
            )
        check_positive(self, "fps", "cache_gib")
        check_choices(self, "crop")
        if not 0 <= self.min_timestep <= self.max_timestep < TIMESTEPS:
            raise ValueError(
                f"--min-timestep {self.min_timestep} and --max-timestep {self.max_timestep} "
                f"must be a range within 0 … {TIMESTEPS - 1}"
            )


def flag(name: str) -> str:
    """The option of a field."""
    return f"--{name.replace('_', '-')}"


def check_least(settings, least: int, *names: str) -> None:
    """ValueError where one of these fields is below `least`; None passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{flag(name)} is {value}, must be at least {least}")


def check_share(settings, *names: str) -> None:
    """ValueError where one of these fields is no share of a whole."""
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"{flag(name)} is {getattr(settings, name)}, must be in 0 … 1")


def check_positive(settings, *names: str) -> None:
    """ValueError where one of these fields is 0, below, infinite or NaN; None passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{flag(name)} is {value}, must be above 0 and finite")


def parse_sizes(option: str, text: str) -> tuple[tuple[int, int], ...]:
    """Pixels (H, W) of "256", of "256x320", or of several with commas between them.

    ValueError that names the option.
    """
    sizes = []
    for part in text.replace(" ", "").split(","):
        sides = part.split("x")
        if not re.fullmatch(r"\d{1,9}(x\d{1,9})?", part) or not all(map(int, sides)):
            raise ValueError(f"{option} is {text!r}, wanted a side or HxW in pixels")
        sizes.append((int(sides[0]), int(sides[-1])))
    return tuple(sizes)


def check_choices(settings, *names: str) -> None:
    """ValueError where one of these fields is none of its choices."""
    for name in names:
        choices = type(settings).__dataclass_fields__[name].metadata["choices"]
        if (value := getattr(settings, name)) not in choices:
            raise ValueError(f"{flag(name)} is {value!r}, must be one of {', '.join(choices)}")
