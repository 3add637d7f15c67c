"""The training engine: DeepSpeed ZeRO-3 on CUDA or the CPU, for T2I and T2V alike."""

import contextlib
import ctypes
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import deepspeed
import numpy as np
import psutil
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor
from tqdm import tqdm

from gentron_fast.config import GenTronConfig
from gentron_fast.diffusion import SCHEDULER_CONFIG, NoiseSchedule, portable_noise
from gentron_fast.guidance import guided_prediction
from gentron_fast.media import contact_sheet
from gentron_fast.model import GenTron, TextCondition
from gentron_fast.solvers import make_table, solver_step
from gentron_fast.text import TextEncoder, Tokens
from gentron_fast.vae import VideoVAE
from gentron_train.checkpoint import (
    PATIENCE,
    Checkpoints,
    check_run_folder,
    latest_checkpoint,
    read_info,
)
from gentron_train.data.broken import in_words
from gentron_train.data.loader import Batch, DataSettings, Loader, TooManyBroken, make_loader
from gentron_train.ema import ShardedEMA
from gentron_train.export_pipeline import DTYPES, export_pipeline
from gentron_train.flops import parameter_count, peak_flops, training_flops
from gentron_train.log import RunLog, memory_gib
from gentron_train.memory import WHOLE_MODEL, model_config, report
from gentron_train.objective import Objective, checkpoint_activations
from gentron_train.settings import Settings, parse_settings, stored_config
from gentron_train.sharding import (
    Source,
    fresh_weights,
    restore_masters,
    sharded_model,
    stored_weights,
)
from gentron_train.small_world.renderer import ensure_shards, vocabulary

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
BAD_STEPS = 10  # without a finite loss, one after the other, end the run
SAMPLE_STEPS, LAMBDA_T, LAMBDA_M = 20, 7.5, 1.2
PROMPTS = ("a red circle moving left", "a large blue star", "a green square above a yellow cross")


class Launcher:
    """The process that started this rank, looked at before anything that takes long.

    SIGTERM to the `deepspeed` command leaves deepspeed.launcher.launch and the ranks running.
    """

    def __init__(self):
        launcher = psutil.Process(os.getppid())
        under_deepspeed = any("deepspeed.launcher.launch" in part for part in launcher.cmdline())
        self._launcher = launcher if under_deepspeed else None
        self._started_by = launcher.ppid()

    def ended(self) -> bool:
        """Whether the launcher's own launcher was ended since."""
        if self._launcher is None:
            return False
        try:
            return self._launcher.ppid() != self._started_by
        except psutil.NoSuchProcess:
            return True

    def end(self) -> None:
        """Kill the launcher once the `deepspeed` command is gone, as a signal to all of them leaves
        it: 30 seconds after the signal it would kill ranks that still write.

        A command that goes on waits for the launcher, and would take its death for success.
        """
        for _ in range(100):
            if self.ended():
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._launcher.kill()
                return
            time.sleep(0.1)

    def end_ranks(self) -> None:
        """Kill the other ranks of this node: the launcher gives a frozen one 30 seconds."""
        ranks = [] if self._launcher is None else self._launcher.children()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                if rank.pid != os.getpid():
                    rank.kill()


class StopRequest:
    """Whether SIGTERM or Ctrl-C came, or the launcher's own launcher was ended."""

    def __init__(self, launcher: Launcher):
        self._launcher, self._signalled = launcher, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number, frame) -> None:
        if not self._signalled:
            threading.Thread(target=self._launcher.end, daemon=True).start()
        self._signalled = True

    def __bool__(self) -> bool:
        return self._signalled or self._launcher.ended()


def start_distributed(timeout: float) -> torch.device:
    """Join the process group of the `deepspeed` launcher; returns the device of this rank.

    timeout: seconds after which a rank that waits for another ends the run.
    """
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("start this with the launcher: deepspeed train/t2i.py")
    limit = timedelta(seconds=timeout)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        deepspeed.init_distributed("nccl", timeout=limit)
        return device
    keep_freed_memory()
    deepspeed.ops.__compatible_ops__ = {}  # or it builds an operator of its own for minutes
    deepspeed.init_distributed("gloo", timeout=limit)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_SIZE"])))
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation; elsewhere nothing changes.

    By default it returns a large buffer to the system, which hands out every page of the next one
    anew and zeroed: of a step with 60 million parameters on a CPU that took a fifth.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


def make_missing(settings: Settings, data: DataSettings) -> None:
    """Shards, autoencoder and text encoders of the small model, where there are none and the data
    holds no output of theirs; rank 0 makes them."""
    # Either may take hours, in which the others wait: not to be taken for a frozen rank.
    patient = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    if dist.get_rank() == 0 and settings.preset == "small":
        if settings.images is None and settings.clips is None:
            ensure_shards(settings.data, settings.make_images, settings.make_clips)
        if not (data.precomputed or (settings.vae / "config.json").exists()):
            from gentron_train.small_world.autoencoder import main as train_vae

            train_vae(["--data", str(settings.data), "--out", str(settings.vae), "--resume"])
        text = settings.text
        if not (data.has_text or text is None or (text / "t5").is_dir()):
            from gentron_train.small_world.text_encoders import main as train_text_encoders

            train_text_encoders(["--out", str(text), "--resume"])
    torch.distributed.barrier(patient)


def load_text_encoder(settings: Settings, config: GenTronConfig, dtype: torch.dtype) -> TextEncoder:
    """The text encoders that a model reads; ValueError where the settings do not name one, or one
    that does not fit."""
    sources = settings.text_sources(config.encoders)
    if missing := [name for name in config.encoders if name not in sources]:
        raise ValueError(
            f"the model needs its text encoders, no {' and no '.join(missing)} found: "
            "--clip, --t5, --text or a whole pipeline as --init"
        )
    encoder = TextEncoder.from_pretrained(**sources, dtype=dtype)
    encoder.check_widths(config)
    return encoder


def learning_rate(settings: Settings, step: int, progress: float) -> float:
    """Rate of step `step` (from 0) when `progress` of the run, 0 … 1, is behind it."""
    rate = settings.lr * min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.decay_last:
        rate *= min(1.0, max(0.0, (1 - progress) / settings.decay_last))
    return rate


def deepspeed_config(
    settings: Settings, parameters: int, device: torch.device, resharded: bool = False
) -> dict:
    """DeepSpeed's configuration: ZeRO stage 3; small models stay gathered between uses.

    resharded: the checkpoint that will be loaded was written by another number of ranks.
    """
    zero = {"stage": 3}
    if device.type == "cpu":
        zero |= {"reduce_bucket_size": 5_000_000, "stage3_prefetch_bucket_size": 1_000_000}
        zero["stage3_param_persistence_threshold"] = 10_000
    else:
        zero["overlap_comm"] = True
    if parameters <= WHOLE_MODEL:
        zero["stage3_param_persistence_threshold"] = WHOLE_MODEL
        zero["memory_efficient_linear"] = False
    config = {
        "train_micro_batch_size_per_gpu": settings.batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.clip_norm,
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }
    if settings.parameters == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if resharded:
        config["checkpoint"] = {"load_universal": True}
    return config


def zero_engine(
    objective: Objective, settings: Settings, device: torch.device, resharded: bool = False
) -> deepspeed.DeepSpeedEngine:
    """The DeepSpeed engine of an objective on `device`, with AdamW; `gather_persistent` comes
    before every forward pass."""
    parameters = parameter_count(objective.config)
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=torch.optim.AdamW(
            objective.parameters(), lr=settings.lr, weight_decay=0.0, fused=True
        ),
        config=deepspeed_config(settings, parameters, device, resharded),
    )
    if parameters <= WHOLE_MODEL:
        # What is never shared out between steps needs no hook that fetches and releases it.
        engine.optimizer.parameter_offload._remove_module_hooks()
    return engine


def gather_persistent(engine: deepspeed.DeepSpeedEngine) -> None:
    """Gather what stays whole between steps, where a load or a skipped step took it apart."""
    parameters = engine.optimizer.persistent_parameters
    if parameters and parameters[0].ds_status == ZeroParamStatus.NOT_AVAILABLE:
        parameters[0].all_gather(parameters)


@dataclass(frozen=True)
class Parts:
    """What a run trains: the transformer, its weights once more, and the text encoder.

    source: of a transformer that is ZeRO-3's already, its fp32 weights once more. train_text: the
    encoder trains too, else it is frozen and stays out of the engine; None where the data holds its
    output.
    """

    transformer: GenTron
    source: Source | None
    text_encoder: TextEncoder | None
    train_text: bool


def check_start(settings: Settings, stage: str) -> None:
    """ValueError or FileNotFoundError where a stage has no model to start from."""
    if settings.init is not None:
        stored_config(settings.init / "transformer")
    elif stage == "t2v":
        raise ValueError("T2V starts from a T2I pipeline: --init T2I_FOLDER")


def build_parts(settings: Settings, stage: str, data: DataSettings, device: torch.device) -> Parts:
    """The model of a stage, fresh or from --init, and its text encoder."""
    folder = None if settings.init is None else settings.init / "transformer"
    config = model_config(settings, stage)
    torch.manual_seed(settings.seed)
    if (parameters := parameter_count(config)) > WHOLE_MODEL:
        source = fresh_weights(config, settings.seed)
        if folder is not None:
            source = stored_weights(folder, config, settings.seed)
        zero = deepspeed_config(settings, parameters, device)
        dtype = DTYPES[settings.parameters]
        transformer = sharded_model(config, source, zero, dtype, device)
    else:
        if folder is None:
            transformer = GenTron(config)
        else:
            transformer = GenTron.from_pretrained(folder, torch.float32)
            if config.temporal and not transformer.config.temporal:
                transformer = GenTron.from_t2i(transformer)
        source = None
    pretrained = settings.clip is not None or settings.t5 is not None
    train_text = stage == "t2i" and settings.preset == "small" and settings.train_text
    train_text = train_text and not pretrained and not data.precomputed
    text_encoder = None
    if train_text and settings.init is settings.text is None:
        from gentron_train.small_world.architecture import small_text_encoder

        text_encoder = small_text_encoder(vocabulary())
    elif not data.has_text:
        dtype = torch.float32 if train_text else DTYPES[settings.parameters]
        text_encoder = load_text_encoder(settings, config, dtype)
    return Parts(transformer, source, text_encoder, train_text)


class Trainer:
    """One run: the DeepSpeed engine, its EMA, the loader, checkpoints, log and export."""

    def __init__(
        self,
        settings: Settings,
        parts: Parts,
        loader: Loader,
        device: torch.device,
        launcher: Launcher,
    ):
        """settings: with the accumulation that fits the ranks (`Settings.on`)."""
        self.launcher = launcher
        self._saved_step: int | None = None  # the same on every rank
        self.settings, self.loader, self.device = settings, loader, device
        self.step = self.skipped = self.broken = 0
        self.seconds = 0.0  # that earlier parts of a resumed run took
        self.config = parts.transformer.config
        self.checkpoints = Checkpoints(settings.run, settings.keep, device)
        self.trains_text = parts.train_text
        # The engine takes an encoder's weights apart; a copy keeps its tokenizers and its shape.
        self.text_encoder = deepcopy(parts.text_encoder) if parts.train_text else parts.text_encoder
        self.frozen_text = None
        if parts.text_encoder is not None and not parts.train_text:
            self.frozen_text = parts.text_encoder.to(device).eval()
        self._broken: TooManyBroken | None = None
        self._batch: Batch | None = None
        self._flops = 0
        checkpoint_activations(parts.transformer, settings.checkpoint_activations)
        self._resumed = latest_checkpoint(settings.run) if settings.resume else None
        self._written_by = self._check_checkpoint() if settings.resume else 0
        self._start_engine(parts)
        self.ema = ShardedEMA(self.engine.module, settings.ema)
        # Which generators the checkpoint restores, if it was written by as many ranks.
        torch.manual_seed(settings.seed * 1_000_003 + 7919 * dist.get_rank())
        self.log = RunLog(
            settings.run,
            settings.to_dict(),
            main=self.is_main,
            tensorboard=settings.tensorboard,
            wandb=settings.wandb,
            resumed_at=read_info(self._resumed)["step"] if settings.resume else None,
        )
        if settings.resume:
            self._load()

    def _start_engine(self, parts: Parts) -> None:
        settings = self.settings
        objective = Objective(
            parts.transformer,
            parts.text_encoder if parts.train_text else None,
            NoiseSchedule.from_config(SCHEDULER_CONFIG),
            DTYPES[settings.dtype],
            settings.weight_cap,
        ).train()
        weights = {}
        if rounded := settings.parameters == "bf16":
            weights = {
                name: parameter.detach().clone()
                for name, parameter in objective.named_parameters()
                if not hasattr(parameter, "ds_id")  # not ZeRO-3's yet
            }
        resharded = bool(self._written_by) and self._written_by != dist.get_world_size()
        objective.to(self.device, DTYPES[settings.parameters])
        self.engine = zero_engine(objective, settings, self.device, resharded)
        if rounded:
            restore_masters(objective, [("", weights)])
            if parts.source is not None:
                restore_masters(objective.transformer, parts.source())

    @property
    def is_main(self) -> bool:
        return dist.get_rank() == 0

    def train(self) -> None:
        """Train to the end of the steps or of the time, or to a signal; then save and export."""
        settings, stop = self.settings, StopRequest(self.launcher)
        first, start = self.step, time.monotonic() - self.seconds
        logged, logged_step = time.monotonic(), self.step
        losses, interrupted, bad = [], False, 0

        def progress_now() -> float:
            share = self.step / settings.steps
            if settings.minutes:
                share = max(share, (time.monotonic() - start) / (60 * settings.minutes))
            return share

        progress = self._agree(torch.zeros(()), progress_now(), stop=False)[1]
        self._say(settings.batch_line(dist.get_world_size()))
        with tqdm(
            total=settings.steps, initial=first, unit="step", disable=not self.is_main
        ) as bar:
            while self.step < settings.steps and progress < 1 and not interrupted:
                rate = learning_rate(settings, self.step, progress)
                self.loader.narrow = progress < settings.narrow_first
                loss = self._step(rate)
                agreed = self._agree(loss, progress_now(), bool(stop))
                loss, progress, interrupted, broken = agreed
                if self.engine.was_step_applied():
                    losses.append(loss)
                    bad = 0
                else:
                    self.skipped += 1
                    bad += 1
                self.seconds = time.monotonic() - start
                bar.update()
                if bad == BAD_STEPS:
                    last = latest_checkpoint(settings.run) or "none"
                    raise ValueError(
                        f"{bad} steps in a row without a finite loss and gradient, up to step "
                        f"{self.step}; last good checkpoint: {last}"
                    )
                if self.step % settings.log_every == 0 or self.step == settings.steps:
                    now = time.monotonic()
                    seconds = (now - logged) / (self.step - logged_step)
                    bar.write(self._log(rate, losses, seconds, now - start), file=sys.stdout)
                    logged, logged_step, losses = now, self.step, []
                if broken:
                    break
                if self.step % settings.save_every == 0:
                    self.save()
                if settings.sample_every and self.step % settings.sample_every == 0:
                    self.sample()
                if settings.export_every and self.step % settings.export_every == 0:
                    self.export()
        if failure := self.save():
            raise OSError(f"the last checkpoint could not be written: {failure}")
        self.log.close()
        if self.broken:
            self._say(self._broken_line())
        if broken:
            raise self._broken or TooManyBroken("another rank met too many broken samples")
        if interrupted:
            self._say(f"stopped at step {self.step}; go on with --resume")
            sys.exit(130)
        self.export()

    def _step(self, rate: float) -> Tensor:
        """One optimizer step; the mean loss of this rank's micro-steps."""
        settings = self.settings
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        gather_persistent(self.engine)
        total = torch.zeros((), device=self.device)
        for _ in range(settings.accumulation):
            batch = self._next_batch()
            text = batch.text
            if self.frozen_text is not None and isinstance(text, dict):
                with torch.no_grad():
                    text = self.frozen_text(text)
            if not self._flops:
                shape, lengths = batch.latents.shape[1:], _lengths(text)
                self._flops = training_flops(self.config, shape, lengths, settings.draws)
            motion_free = batch.motion_free
            loss = self.engine(
                batch.latents.to(self.device, non_blocking=True),
                batch.timestep.to(self.device),
                text,
                None if motion_free is None else motion_free.to(self.device),
                batch.noise.to(self.device, non_blocking=True),
            )
            # A loss that is not finite makes every gradient NaN, and DeepSpeed skips the step.
            good = torch.isfinite(loss.detach()) & (self._broken is None)
            self.engine.backward(loss * torch.where(good, 1.0, math.nan))
            self.engine.step()
            total += loss.detach() / settings.accumulation
        if self.engine.was_step_applied():
            self.ema.update()
        self.step += 1
        return total

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

    def _agree(self, loss: Tensor, progress: float, stop: bool) -> tuple[float, float, bool, bool]:
        """Mean loss of all ranks, rank 0's progress, and whether any rank was told to stop or met
        too many broken samples; keeps the number of all ranks' broken samples."""
        own = [float(loss), progress if self.is_main else 0.0, stop, self._broken is not None]
        own.append(sum(self.loader.broken().values()))
        values = torch.tensor(own, dtype=torch.float64, device=self.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(values)
        loss, progress, stops, broken, self.broken = values.tolist()
        return loss / dist.get_world_size(), progress, stops > 0, broken > 0

    def _log(self, rate: float, losses: list[float], seconds: float, elapsed: float) -> str:
        """Keep the figures of the last steps; returns their line."""
        settings, ranks = self.settings, dist.get_world_size()
        captions = settings.batch * settings.accumulation * ranks
        samples = captions * settings.draws
        peak = ranks * peak_flops(self.device, DTYPES[settings.dtype])
        left = (settings.steps - self.step) * seconds
        if settings.minutes:
            left = min(left, 60 * settings.minutes - elapsed)
        norm = float(self.engine.get_global_grad_norm())
        unit = "clips_per_s" if self.config.temporal else "samples_per_s"
        values = {
            "step": self.step,
            "loss": sum(losses) / len(losses) if losses else None,
            "lr": rate,
            "grad_norm": round(norm, 4) if math.isfinite(norm) else None,
            unit: round(samples / seconds, 2),
            "mfu": round(samples / seconds * self._flops / peak, 4),
            "memory_gib": round(memory_gib(self.device), 3),
            "captions": self.step * captions,
            "skipped": self.skipped,
            "broken": int(self.broken),
            "seconds": round(elapsed, 1),
            "minutes_left": round(max(left, 0) / 60, 1),
        }
        return self.log.step(settings.steps, values) if self.is_main else ""

    def _broken_line(self) -> str:
        """All ranks' broken samples by cause."""
        causes: list = [None] * dist.get_world_size()
        dist.all_gather_object(causes, self.loader.broken())
        total = in_words(sum(map(Counter, causes), Counter()))
        return f"broken samples, skipped: {total}; {self.loader.log.path} names them"

    def _say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def save(self) -> str | None:
        """Write a checkpoint, if there is none of this step; why it could not be written, or None.

        The run goes on after one that failed: the checkpoints before are whole.
        """
        name = f"step-{self.step:08d}"
        if self._saved_step == self.step:
            return None
        info = {
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "ema_updates": self.ema.updates,
            "settings": self.settings.to_dict(),
            "model": self.config.to_dict(),
            "latents": list(self.loader.sizes),
        }
        failure = self.checkpoints.save(
            self.engine, self.ema, name, info, self.loader.state_dict(), self._save_text
        )
        if failure:
            self._say(f"no checkpoint at step {self.step}: {failure}; whole ones stay as they are")
        else:
            self._saved_step = self.step
        return failure

    def _save_text(self, folder: Path) -> None:
        if self.trains_text:
            self.text_encoder.save_pretrained(folder / "text")

    def _check_checkpoint(self) -> int:
        """How many ranks wrote the checkpoint to resume; ValueError if it is of another model."""
        info = read_info(self._resumed)
        model = GenTronConfig.from_dict(info["model"])
        if model != self.config:
            raise ValueError(f"{self._resumed} holds another model than this run's: {model}")
        return info["ranks"]

    def _load(self) -> None:
        checkpoint, ranks = self._resumed, self._written_by
        info = read_info(checkpoint)
        resharded = ranks != dist.get_world_size()
        self.checkpoints.load_engine(self.engine, checkpoint, resharded)
        shards = [checkpoint / f"ema-rank{rank}.safetensors" for rank in range(ranks)]
        self.ema.load(shards, info["ema_updates"])
        self.loader.load_state_dict(self.checkpoints.load_state(checkpoint, ranks))
        self.step, self.seconds = info["step"], info["seconds"]
        self._saved_step = self.step
        self.skipped = info["skipped"]
        was, own = info["settings"], self.settings.to_dict()
        changed = [
            f"{name} {was.get(name)} → {value}"
            for name, value in own.items()
            if was.get(name) != value and name != "resume"
        ]
        if resharded:
            changed.append(f"ranks {ranks} → {dist.get_world_size()}")
        self._say(f"going on at step {self.step}" + f" with {', '.join(changed)}" * bool(changed))

    def export(self) -> None:
        """Write the pipeline folder with the averaged weights, from a checkpoint of this step."""
        if failure := self.save():
            raise OSError(f"no export without a checkpoint: {failure}")
        if self.is_main:
            folder = self.settings.run / "pipeline"
            aside = folder.with_name(".pipeline.part")
            shutil.rmtree(aside, ignore_errors=True)
            dtype = DTYPES[self.settings.export_dtype]
            told = export_pipeline(
                latest_checkpoint(self.settings.run), aside, ema=True, dtype=dtype
            )
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(aside, folder)
            self._say(told.replace(str(aside), f"pipeline in {folder}"))
        self.checkpoints.barrier()

    @torch.no_grad()
    def sample(self) -> None:
        """A picture of the fixed prompts as the weights of this step draw them, a row a prompt.

        Nothing happens without text encoders or autoencoder, which precomputed data needs not.
        """
        if self.text_encoder is None or not (self.settings.vae / "config.json").exists():
            return
        settings = self.settings
        prompts = PROMPTS if settings.prompts is None else settings.prompts.read_text().splitlines()
        count, shape = len(prompts), self.loader.sizes
        texts = [self.text_encoder.tokenize(list(part)) for part in (prompts, [""] * count)]
        if self.frozen_text is not None:
            texts = [self.frozen_text(tokens) for tokens in texts]
        state = torch.get_rng_state()
        self.engine.eval()
        gather_persistent(self.engine)
        table = make_table("dpm++", SCHEDULER_CONFIG, SAMPLE_STEPS)
        x = portable_noise(shape, [settings.seed + row for row in range(count)], 0).to(self.device)
        x0 = None
        for row, timestep in zip(table.rows, table.timesteps, strict=True):
            timestep = timestep.to(self.device).expand(count)
            noise = guided_prediction(self.engine.module, x, timestep, *texts, LAMBDA_T, LAMBDA_M)
            x, x0 = solver_step(row, x, noise[:, : shape[0]], x0)
        self.engine.train()
        torch.set_rng_state(state)
        if self.is_main:
            vae = VideoVAE.from_pretrained(settings.vae).to(self.device)
            self.log.picture(self.step, "samples", _sheet(vae.decode(x)))
        self.checkpoints.barrier()


def _sheet(pixels: Tensor) -> np.ndarray:
    """Clips (B, 3, T, H, W) in [-1, 1] → one picture, a row each."""
    frames = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
    return contact_sheet(list(frames.permute(0, 2, 3, 4, 1)))


def _lengths(text: Tokens | TextCondition) -> dict[str, int]:
    """Text tokens of each encoder."""
    if isinstance(text, dict):
        return {name: ids.shape[1] for name, (ids, _) in text.items()}
    parts = zip(text._fields, text, strict=True)
    return {name: encoded.tokens.shape[1] for name, encoded in parts if encoded is not None}


def train(stage: str, description: str, argv: list[str] | None = None) -> None:
    """The whole of train/t2i.py and train/t2v.py: settings, parts, and the run."""
    settings = parse_settings(stage, description, argv)
    if settings.dry_run:
        if int(os.environ.get("RANK", 0)) == 0:
            print("\n".join(report(settings, stage)))
        return
    check_run_folder(settings.run, settings.resume)
    trainer = trainer_of(settings, stage)
    try:
        trainer.train()
    except RuntimeError:  # of a collective that waited in vain, among others
        with contextlib.suppress(psutil.NoSuchProcess):
            trainer.launcher.end_ranks()
        raise


def trainer_of(settings: Settings, stage: str) -> Trainer:
    """The trainer of a stage, "t2i" or "t2v", on this rank."""
    launcher = Launcher()
    device = start_distributed(settings.timeout)
    settings = settings.on(dist.get_world_size())
    data = settings.data_settings(stage)
    check_start(settings, stage)  # before data are made for it
    make_missing(settings, data)
    parts = build_parts(settings, stage, data, device)
    loader = make_loader(
        data,
        settings.vae,
        None if parts.text_encoder is None else parts.text_encoder.tokenize,
        rank=dist.get_rank(),
        ranks=dist.get_world_size(),
        device=device,
    )
    return Trainer(settings, parts, loader, device, launcher)


def run(main: Callable[[], None]) -> None:
    """Call an entry point; wrong input ends it with one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"rank {os.environ.get('RANK', 0)}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
