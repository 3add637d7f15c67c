"""The figures of a run's steps: loss, throughput, share of the device's peak, memory, time left."""

import math
import time

import torch
from torch import Tensor
from torch import distributed as dist

from gentron_fast.config import GenTronConfig
from gentron_fast.model import TextCondition
from gentron_fast.text import Tokens
from gentron_train.data.options import DTYPES
from gentron_train.flops import peak_flops, training_flops
from gentron_train.log import RunLog, memory_gib
from gentron_train.saving import RunState
from gentron_train.settings import Settings


class Metrics:
    """What is measured between two lines of the log."""

    def __init__(
        self, settings: Settings, config: GenTronConfig, log: RunLog, device: torch.device
    ):
        self.settings, self.config, self.run_log, self.device = settings, config, log, device
        self._flops: dict[tuple[int, ...], int] = {}  # of a sample's step, by its latents' shape
        self.start(0)

    def start(self, step: int) -> None:
        """The next line covers the steps after `step`, from now on."""
        self._since, self._since_step = time.monotonic(), step
        self._losses: list[Tensor] = []
        self._computed = 0  # FLOPs of this rank

    def add(self, loss: Tensor) -> None:
        """This rank's loss of a step that was applied; it is read when it is logged."""
        self._losses.append(loss)

    def count_flops(self, latents: Tensor, text: Tokens | TextCondition) -> None:
        """Add what a batch costs; what a sample costs is counted on the first one of its shape."""
        shape = tuple(latents.shape[1:])
        if shape not in self._flops:
            own = training_flops(self.config, shape, _lengths(text), self.settings.draws)
            self._flops[shape] = own
        self._computed += len(latents) * self._flops[shape]

    def log(self, state: RunState, rate: float, grad_norm: float) -> str:
        """Keep the figures of the steps since `start`; their line, empty on all ranks but the
        first. Collective."""
        settings, ranks = self.settings, dist.get_world_size()
        seconds = (time.monotonic() - self._since) / (state.step - self._since_step)
        captions = settings.batch * settings.accumulation * ranks
        samples = captions * settings.draws
        peak = peak_flops(self.device, DTYPES[settings.dtype])
        left = (settings.steps - state.step) * seconds
        if settings.minutes:
            left = min(left, 60 * settings.minutes - state.seconds)
        losses = mean_over_ranks(self._losses)
        unit = "clips_per_s" if self.config.temporal else "samples_per_s"
        values = {
            "step": state.step,
            "loss": sum(losses) / len(losses) if losses else None,
            "lr": rate,
            "grad_norm": round(grad_norm, 4) if math.isfinite(grad_norm) else None,
            unit: round(samples / seconds, 2),
            "mfu": round(self._computed / (state.step - self._since_step) / seconds / peak, 4),
            "memory_gib": round(memory_gib(self.device), 3),
            "captions": state.step * captions,
            "skipped": state.skipped,
            "broken": state.broken,
            "seconds": round(state.seconds, 1),
            "minutes_left": round(max(left, 0) / 60, 1),
        }
        self.start(state.step)
        return self.run_log.step(settings.steps, values) if self.run_log.main else ""


def mean_over_ranks(losses: list[Tensor]) -> list[float]:
    """Scalars that every rank has as many of, each averaged; they leave the device together."""
    if not losses:
        return []
    values = torch.stack(losses).double()
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return (values / dist.get_world_size()).tolist()


def _lengths(text: Tokens | TextCondition) -> dict[str, int]:
    """Text tokens of each encoder."""
    if isinstance(text, dict):
        return {name: ids.shape[1] for name, (ids, _) in text.items()}
    parts = zip(text._fields, text, strict=True)
    return {name: encoded.tokens.shape[1] for name, encoded in parts if encoded is not None}
