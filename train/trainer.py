"""The trainer: DeepSpeed ZeRO-3 on CUDA or the CPU, for T2I and T2V alike."""

import contextlib
import math
import os
import sys
import time
from collections import Counter
from copy import deepcopy
from datetime import timedelta
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from gentron_fast.transfer import on_device
from gentron_train.assembly import (
    Parts,
    build_loader,
    build_parts,
    check_start,
    gather_persistent,
    make_missing,
    objective_engine,
)
from gentron_train.checkpoint import Checkpoints, Resumed, latest_checkpoint
from gentron_train.data.broken import in_words
from gentron_train.data.loader import Batch, Loader, TooManyBroken
from gentron_train.data.sources import MemorySource
from gentron_train.ema import ShardedEMA
from gentron_train.log import RunLog
from gentron_train.memory import report
from gentron_train.metrics import Metrics
from gentron_train.objective import checkpoint_activations
from gentron_train.process import Launcher, StopRequest, say, start_distributed
from gentron_train.sample_pictures import SamplePictures
from gentron_train.saving import RunState, Saver, check_run
from gentron_train.settings import Settings, parse_settings

BAD_STEPS = 10  # without a finite loss, one after the other, end the run


def learning_rate(settings: Settings, step: int, progress: float) -> float:
    """Rate of step `step` (from 0) when `progress` of the run, 0 … 1, is behind it."""
    rate = settings.lr * min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.decay_ratio:
        rate *= min(1.0, max(0.0, (1 - progress) / settings.decay_ratio))
    return rate


class Agreed(NamedTuple):
    """What all ranks know after a step."""

    progress: float  # share of the run, 0 … 1, as rank 0 measures it
    stop: bool  # a rank was told to stop
    broken: bool  # a rank met too many broken samples


class Trainer:
    """One run: the DeepSpeed engine, its EMA, the loader, and what is kept and told of them."""

    def __init__(
        self,
        settings: Settings,
        parts: Parts,
        loader: Loader,
        device: torch.device,
        launcher: Launcher,
        checkpoints: Checkpoints,
        resumed: Resumed | None,
    ):
        """settings: with the accumulation that fits the ranks (`Settings.on`)."""
        self.settings, self.loader, self.device = settings, loader, device
        self.launcher, self.state = launcher, RunState()
        # The engine takes an encoder's weights apart; a copy keeps its tokenizers and its shape.
        self.text_encoder = deepcopy(parts.text_encoder) if parts.train_text else parts.text_encoder
        self.frozen_text = None
        if parts.text_encoder is not None and not parts.train_text:
            self.frozen_text = parts.text_encoder.to(device).eval()
            finished = resumed is not None and resumed.info["step"] >= settings.steps
            if isinstance(loader.source, MemorySource) and not finished:
                loader.source.embed(self.frozen_text, hidden=dist.get_rank() != 0)
                checkpoints.barrier()
        self.teacher = parts.teacher
        self._broken: TooManyBroken | None = None
        self._batch: Batch | None = None
        config = parts.transformer.config
        checkpoint_activations(parts.transformer, settings.checkpoint_activations)
        if resumed is not None:
            resumed.check_model(config)
        resharded = resumed is not None and resumed.resharded
        self.engine = objective_engine(parts, settings, device, resharded)
        self.ema = ShardedEMA(self.engine.module, settings.ema_decay)
        # Which generators the checkpoint restores, if it was written by as many ranks.
        torch.manual_seed(settings.seed * 1_000_003 + 7919 * dist.get_rank())
        self.log = RunLog(
            settings.run,
            settings.to_dict(),
            main=dist.get_rank() == 0,
            tensorboard=settings.tensorboard,
            wandb=settings.wandb,
            resumed_at=resumed and resumed.info["step"],
        )
        self.metrics = Metrics(settings, config, self.log, device)
        trained_text = self.text_encoder if parts.train_text else None
        self.saver = Saver(
            settings, self.state, checkpoints, self.engine, self.ema, loader, trained_text
        )
        self._cpu_group = dist.new_group(
            backend="gloo", timeout=timedelta(seconds=settings.timeout)
        )
        self._bad_steps = 0  # one after the other
        if resumed is not None:
            self.saver.load(resumed)
        self._began = time.monotonic() - self.state.seconds

    def train(self) -> None:
        """Train to the end of the steps or of the time, or to a signal; then save and export."""
        settings, state, stop = self.settings, self.state, StopRequest(self.launcher)
        self._began = time.monotonic() - state.seconds
        self.metrics.start(state.step)
        agreed = self._agree(stop=False)
        say(settings.batch_line(dist.get_world_size()))
        hidden = dist.get_rank() != 0
        with tqdm(total=settings.steps, initial=state.step, unit="step", disable=hidden) as bar:
            while state.step < settings.steps and agreed.progress < 1:
                rate = learning_rate(settings, state.step, agreed.progress)
                self.loader.narrow = agreed.progress < settings.timestep_range_portion
                loss = self.train_step(rate)
                agreed = self._agree(bool(stop))
                self._count(loss)
                bar.update()
                if self._due(settings.log_every) or state.step == settings.steps:
                    norm = float(self.engine.get_global_grad_norm())
                    bar.write(self.metrics.log(state, rate, norm), file=sys.stdout)
                if agreed.broken:
                    break
                self._save_and_show()
                if agreed.stop:
                    break
        self._end(agreed)

    def train_step(self, rate: float) -> Tensor:
        """One optimizer step; the mean loss of this rank's micro-steps."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        gather_persistent(self.engine)
        total = torch.zeros((), device=self.device)
        for _ in range(self.settings.accumulation):
            total += self.forward_backward(self._next_batch()) / self.settings.accumulation
            self.engine.step()
        if self.engine.was_step_applied():
            self.ema.update()
        self.state.step += 1
        return total

    def forward_backward(self, batch: Batch) -> Tensor:
        """The gradients of a micro-batch; its loss, without a graph."""
        text = batch.text
        if self.frozen_text is not None and isinstance(text, dict):
            with torch.no_grad():
                text = self.frozen_text(text)
        self.metrics.count_flops(batch.latents, text)
        if self.teacher is not None:
            own = self.teacher.targets(batch, text)
            timestep = on_device(own.timestep, self.device)
            loss = self.engine(
                own.latents, timestep, own.text, guidance=own.guidance, target=own.noise
            )
        else:
            motion_free = batch.motion_free
            loss = self.engine(
                on_device(batch.latents, self.device),
                on_device(batch.timestep, self.device),
                text,
                None if motion_free is None else on_device(motion_free, self.device),
                on_device(batch.noise, self.device),
            )
        # A loss that is not finite makes every gradient NaN, and DeepSpeed skips the step.
        good = torch.isfinite(loss.detach()) & (self._broken is None)
        self.engine.backward(loss * torch.where(good, 1.0, math.nan))
        return loss.detach()

    def _next_batch(self) -> Batch:
        """The next micro-batch; the last one again once too many samples are broken, so that this
        rank goes through the step, which is then skipped, with the others."""
        if self._broken is None:
            try:
                self._batch = next(self.loader)
            except TooManyBroken as error:
                if self._batch is None:
                    raise
                self._broken = error
        return self._batch

    def _progress(self) -> float:
        """The share of the steps, or of the time, that is behind."""
        settings = self.settings
        share = self.state.step / settings.steps
        if settings.minutes:
            share = max(share, (time.monotonic() - self._began) / (60 * settings.minutes))
        return share

    def _agree(self, stop: bool) -> Agreed:
        """What all ranks know together; keeps the number of their broken samples.

        On the CPU: a GPU goes on with what it has to do.
        """
        progress = self._progress() if dist.get_rank() == 0 else 0.0
        own = [progress, stop, self._broken is not None, sum(self.loader.broken().values())]
        values = torch.tensor(own, dtype=torch.float64)
        if dist.get_world_size() > 1:
            dist.all_reduce(values, group=self._cpu_group)
        progress, stops, broken, samples = values.tolist()
        self.state.broken = int(samples)
        return Agreed(progress, stops > 0, broken > 0)

    def _count(self, loss: Tensor) -> None:
        """Keep the loss of a step, or count one that was skipped; ten in a row are an error."""
        self.state.seconds = time.monotonic() - self._began
        if self.engine.was_step_applied():
            self.metrics.add(loss)
            self._bad_steps = 0
            return
        self.state.skipped += 1
        self._bad_steps += 1
        if self._bad_steps == BAD_STEPS:
            last = latest_checkpoint(self.settings.run) or "none"
            raise ValueError(
                f"{BAD_STEPS} steps in a row without a finite loss and gradient, up to step "
                f"{self.state.step}; last good checkpoint: {last}"
            )

    def _due(self, every: int) -> bool:
        """Whether what happens every so many steps (0: never) happens after this one."""
        return every > 0 and self.state.step % every == 0

    def _save_and_show(self) -> None:
        """The checkpoint, the sample pictures and the export that are due after this step."""
        settings = self.settings
        if self._due(settings.save_every):
            self.saver.save()
        if self._due(settings.sample_every):
            self.sample()
        if self._due(settings.export_every):
            self.saver.export()

    def sample(self) -> None:
        """Keep a picture of the fixed prompts, where there are text encoders and autoencoder."""
        frozen = self.frozen_text is not None
        shape = self.loader.sizes
        pictures = SamplePictures(self.settings, shape, self.text_encoder, frozen, self.device)
        if not pictures.possible:
            return
        latents = pictures.latents(self.engine)
        if self.log.main:
            try:
                self.log.picture(self.state.step, "samples", pictures.picture(latents))
            except ValueError as error:  # training goes on, and tells of its own losses
                say(f"step {self.state.step}: no sample picture: {error}")
        self.saver.checkpoints.barrier()

    def _end(self, agreed: Agreed) -> None:
        """The last checkpoint, the loss curve, and the pipeline of a run that came to its end."""
        if failure := self.saver.save():
            raise OSError(f"the last checkpoint could not be written: {failure}")
        self.log.close()
        if self.state.broken:
            say(self._broken_line())
        if agreed.broken:
            raise self._broken or TooManyBroken("another rank met too many broken samples")
        if agreed.stop:
            say(f"stopped at step {self.state.step}; go on with --resume")
            sys.exit(130)
        self.saver.export()

    def _broken_line(self) -> str:
        """All ranks' broken samples by cause."""
        causes: list = [None] * dist.get_world_size()
        dist.all_gather_object(causes, self.loader.broken())
        total = in_words(sum(map(Counter, causes), Counter()))
        return f"broken samples, skipped: {total}; {self.loader.log.path} names them"


def train(stage: str, description: str, argv: list[str] | None = None) -> None:
    """The whole of train/t2i.py, t2v.py and distill.py: settings, parts, and the run."""
    settings = parse_settings(stage, description, argv)
    if settings.dry_run:
        if stage == "distill" or settings.teacher is not None:  # whose report needs a teacher
            check_start(settings, stage)
        if int(os.environ.get("RANK", 0)) == 0:
            print("\n".join(report(settings, stage)))
        return
    trainer = trainer_of(settings, stage)
    try:
        trainer.train()
    except RuntimeError:  # of a collective that waited in vain, among others
        with contextlib.suppress(psutil.NoSuchProcess):
            trainer.launcher.end_ranks()
        raise


def trainer_of(settings: Settings, stage: str) -> Trainer:
    """The trainer of a stage, one of STAGES, on this rank."""
    launcher = Launcher()
    device = start_distributed(settings.timeout)
    settings = settings.on(dist.get_world_size())
    check_start(settings, stage)  # before data are made for it
    checkpoints = Checkpoints(settings.run, settings.save_total_limit, device)
    checkpoints.on_main(check_run, settings.run)
    resumed, line = checkpoints.open(settings.resume)
    if line is not None:
        say(line)
    checkpoints.on_main(make_missing, settings, stage)
    data = settings.data_settings(stage)
    parts = build_parts(settings, stage, data, device)
    loader = build_loader(settings, data, parts, device)
    return Trainer(settings, parts, loader, device, launcher, checkpoints, resumed)
