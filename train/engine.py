"""The training engine: DeepSpeed ZeRO-3 on CUDA or the CPU, for T2I and T2V alike."""

import argparse
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import deepspeed
import psutil
import torch
from deepspeed import comm as dist
from torch import Tensor, nn
from tqdm import tqdm

from gentron_fast.config import PRESETS
from gentron_fast.diffusion import SCHEDULER_CONFIG, NoiseSchedule, diffusion_loss, vlb_loss
from gentron_fast.model import GenTron, TextCondition
from gentron_fast.pipeline import GenTronPipeline
from gentron_fast.text import SUBFOLDERS, TextEncoder, Tokens
from gentron_fast.vae import VideoVAE
from gentron_train.data import Sampling, Stream, load_latents, precompute, select_tokens
from gentron_train.ema import ShardedEMA
from gentron_train.shapes import ensure_shards
from gentron_train.vae import main as train_vae

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WHOLE_MODEL = 50_000_000  # parameters up to which gathers cost more than the memory they save
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a frozen rank ends the run after this


def option(default, text: str, **keywords):
    """A field of Settings with its line of --help."""
    return field(default=default, metadata={"help": text, **keywords})


# ruff: noqa: RUF009 (each default is a dataclasses.field)
@dataclass(frozen=True)
class Settings:
    """A training run. Each field is a command-line option of the same name."""

    run: Path = option(Path("runs/t2i"), "folder of this run")
    data: Path = option(Path("data/shapes"), "WebDataset shards images-*.tar, clips-*.tar")
    images: int = option(20000, "images to make if the data folder has no shards")
    clips: int = option(6000, "clips to make if the data folder has no shards")
    vae: Path = option(Path("runs/vae"), "autoencoder folder; trained if missing")
    init: Path | None = option(None, "pipeline folder to start from")
    clip: str | None = option(None, "pretrained CLIP, frozen: folder or hub name")
    t5: str | None = option(None, "pretrained T5, frozen: folder or hub name")
    preset: str = option("small", "model size", choices=[n for n in PRESETS if "T2V" not in n])
    steps: int = option(1500, "optimizer steps")
    minutes: float | None = option(None, "stop, with checkpoint and export, after this time")
    batch: int = option(32, "samples per rank and micro-step")
    accumulation: int = option(1, "micro-steps per optimizer step")
    lr: float = option(
        1e-3, "AdamW learning rate; the paper's models take 1e-4, the small one more"
    )
    warmup: int = option(100, "steps of linear warm-up")
    decay_last: float = option(0.3, "share of the run at whose end the rate falls linearly to 0")
    clip_norm: float = option(1.0, "largest gradient norm")
    ema: float = option(0.999, "decay of the weights' moving average, which is what is exported")
    draws: int = option(1, "noises and timesteps per sample; they share its text encoding")
    weight_cap: float = option(50.0, "weight of a timestep: 1 / ᾱ up to this; 1: the plain ε loss")
    p_null: float = option(0.1, "probability of the empty caption")
    p_motion_free: float = option(0.2, "share of image-text pairs in T2V training")
    frames: int = option(8, "frames of a clip, at 4 FPS")
    starts: int = option(2, "random starts of each clip that are encoded")
    seed: int = option(0, "seed of the weights and of the data")
    dtype: str = option("bf16", "compute in; parameters stay fp32", choices=["fp32", "bf16"])
    checkpoint_activations: bool = option(False, "recompute each block in the backward pass")
    log_every: int = option(20, "steps between log lines")
    save_every: int = option(500, "steps between checkpoints")
    keep: int = option(2, "checkpoints to keep")
    export_every: int = option(0, "steps between exports; 0: at the end only")
    export_dtype: str = option("fp16", "weights of the exported pipeline", choices=sorted(DTYPES))
    resume: bool = option(False, "go on from the last checkpoint of this run")

    def __post_init__(self):
        for name in (
            "steps",
            "batch",
            "accumulation",
            "draws",
            "log_every",
            "save_every",
            "keep",
            "frames",
            "starts",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{_flag(name)} is {getattr(self, name)}, must be at least 1")
        for name in ("decay_last", "p_null", "p_motion_free"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{_flag(name)} is {getattr(self, name)}, must be in 0 … 1")
        if not self.lr > 0:
            raise ValueError(f"--lr is {self.lr}, must be above 0")
        if not self.weight_cap >= 1:
            raise ValueError(f"--weight-cap is {self.weight_cap}, must be at least 1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema is {self.ema}, must be at least 0 and below 1")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def parse_settings(defaults: Settings, description: str, argv: list[str] | None = None) -> Settings:
    """Settings from the command line over `defaults`; wrong input ends with exit code 2."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher's
    for item in dataclasses.fields(Settings):
        default, keywords = getattr(defaults, item.name), dict(item.metadata)
        if item.type is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            known = {Path | None: Path, float | None: float, str | None: str}
            keywords["type"] = known.get(item.type, item.type)
        parser.add_argument(f"--{_flag(item.name)}", default=default, **keywords)
    values = vars(parser.parse_args(argv))
    del values["local_rank"]
    try:
        return Settings(**values)
    except ValueError as error:
        parser.error(str(error))


class Objective(nn.Module):
    """Noise-prediction loss of a batch: the one module that DeepSpeed wraps.

    With a text encoder it takes tokens, and the encoder trains too; without, a TextCondition. Each
    text stands for as many latents in a row as there are more of these.
    """

    def __init__(
        self,
        transformer: GenTron,
        text_encoder: TextEncoder | None,
        schedule: NoiseSchedule,
        dtype: torch.dtype,
        weight_cap: float = 1.0,
    ):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.schedule = schedule
        self.dtype = dtype
        # x0 = (x - σ·ε) / α: an error of ε is an error of x0, 1 / ᾱ times as large in square.
        self.weights = (1 / schedule.alphas_cumprod).clamp(max=weight_cap).float()

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timestep: Tensor,
        text: Tokens | TextCondition,
        motion_free: Tensor | None,
    ) -> Tensor:
        """latents and noise (B, C, T, h, w) fp32, timestep (B,), motion_free (B,) bool → scalar."""
        noisy = self.schedule.add_noise(latents, noise, timestep)
        if self.text_encoder is not None:
            text = self.text_encoder(text)
        text = text.repeat(len(latents) // text.batch)
        with torch.autocast(latents.device.type, self.dtype, enabled=self.dtype != torch.float32):
            prediction = self.transformer(noisy, timestep, text, motion_free)
        weight = self.weights.to(timestep.device)[timestep]
        loss = diffusion_loss(prediction, noise, weight)
        if self.transformer.config.learned_range:
            loss = loss + vlb_loss(self.schedule, prediction, noise, timestep)
        return loss


class StopRequest:
    """Whether SIGTERM or Ctrl-C came, or the launcher's own launcher was ended."""

    def __init__(self):
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        # SIGTERM to the `deepspeed` command leaves deepspeed.launcher.launch and the ranks running.
        launcher = psutil.Process(os.getppid())
        under_deepspeed = any("deepspeed.launcher.launch" in part for part in launcher.cmdline())
        self._launcher = launcher if under_deepspeed else None
        self._started_by = launcher.ppid()

    def _handle(self, number, frame) -> None:
        self._signalled = True

    def __bool__(self) -> bool:
        return self._signalled or self._orphaned()

    def _orphaned(self) -> bool:
        if self._launcher is None:
            return False
        try:
            return self._launcher.ppid() != self._started_by
        except psutil.NoSuchProcess:
            return True


def start_distributed() -> torch.device:
    """Join the process group of the `deepspeed` launcher; returns the device of this rank."""
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("start this with the launcher: deepspeed train/t2i.py")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        deepspeed.init_distributed("nccl", timeout=COLLECTIVE_TIMEOUT)
        return device
    deepspeed.ops.__compatible_ops__ = {}  # or it builds an operator of its own for minutes
    deepspeed.init_distributed("gloo", timeout=COLLECTIVE_TIMEOUT)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_SIZE"])))
    return torch.device("cpu")


def latest_checkpoint(run: Path) -> str | None:
    """Name of the last whole checkpoint of a run folder."""
    path = run / "checkpoints" / "latest"
    return path.read_text().strip() if path.exists() else None


def check_run_folder(settings: Settings) -> None:
    """Raise ValueError, before any work, unless --resume and the run folder go together."""
    latest = latest_checkpoint(settings.run)
    if settings.resume and latest is None:
        raise ValueError(f"no checkpoint in {settings.run} to resume from")
    if latest is not None and not settings.resume:
        raise ValueError(
            f"{settings.run} holds checkpoints: add --resume, or name another --run folder"
        )


def prepare_data(settings: Settings, kinds: tuple[str, ...], device: torch.device) -> Stream:
    """Make what is missing (shards, autoencoder, latents) and load the latents of `kinds`.

    Rank 0 makes shards and autoencoder; all ranks share the latents' encoding.
    """
    # Data may take hours, in which the others wait: not to be taken for a frozen rank.
    patient = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=2))
    if dist.get_rank() == 0:
        ensure_shards(settings.data, settings.images, settings.clips)
        if not (settings.vae / "config.json").exists():
            train_vae(["--data", str(settings.data), "--out", str(settings.vae), "--resume"])
    torch.distributed.barrier(patient)
    sampling = Sampling(frames=settings.frames, starts=settings.starts)
    paths = {}
    for kind in kinds:
        shards = sorted(settings.data.glob(f"{kind}-*.tar"))
        ranks = dist.get_rank(), dist.get_world_size()
        paths[kind] = precompute(shards, settings.vae, sampling, *ranks, device)
    torch.distributed.barrier(patient)
    return Stream(
        load_latents(paths["images"]) if "images" in kinds else None,
        load_latents(paths["clips"]) if "clips" in kinds else None,
        seed=settings.seed,
        p_null=settings.p_null,
        p_motion_free=settings.p_motion_free,
        draws=settings.draws,
    )


def load_text_encoder(settings: Settings) -> TextEncoder:
    """The text encoders named by --clip and --t5, else those of the --init pipeline."""
    sources = {"clip": settings.clip, "t5": settings.t5}
    pairs = {name: (source, source) for name, source in sources.items() if source is not None}
    if not pairs:
        folders = {name: [settings.init / part for part in SUBFOLDERS[name]] for name in sources}
        pairs = {name: tuple(pair) for name, pair in folders.items() if pair[0].exists()}
    return TextEncoder.from_pretrained(**pairs)


def learning_rate(settings: Settings, step: int, progress: float) -> float:
    """Rate of step `step` (from 0) when `progress` of the run, 0 … 1, is behind it."""
    rate = settings.lr * min(1.0, (step + 1) / max(settings.warmup, 1))
    if settings.decay_last:
        rate *= min(1.0, max(0.0, (1 - progress) / settings.decay_last))
    return rate


def deepspeed_config(settings: Settings, parameters: int, device: torch.device) -> dict:
    """DeepSpeed's configuration: ZeRO stage 3; small models stay gathered between uses."""
    zero = {"stage": 3}
    if device.type == "cpu":
        zero |= {"reduce_bucket_size": 5_000_000, "stage3_prefetch_bucket_size": 1_000_000}
        zero["stage3_param_persistence_threshold"] = 10_000
    else:
        zero["overlap_comm"] = True
    if parameters <= WHOLE_MODEL:
        zero["stage3_param_persistence_threshold"] = WHOLE_MODEL
        zero["memory_efficient_linear"] = False
    return {
        "train_micro_batch_size_per_gpu": settings.batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.clip_norm,
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }


class Trainer:
    """One run: the DeepSpeed engine, its EMA, the data stream, checkpoints, log and export."""

    def __init__(
        self,
        settings: Settings,
        transformer: GenTron,
        text_encoder: TextEncoder,
        stream: Stream,
        device: torch.device,
        train_text: bool,
    ):
        """The text encoder trains too, or is frozen and stays out of the engine."""
        self.settings, self.stream, self.device = settings, stream, device
        self.checkpoints = settings.run / "checkpoints"
        self.step = self.position = 0
        self.seconds = 0.0  # that earlier parts of a resumed run took
        self.config = transformer.config
        self.tokens = text_encoder.tokenize(stream.captions)
        self.frozen_text = None if train_text else text_encoder.to(device).eval()
        self.exported_text = deepcopy(text_encoder) if train_text else text_encoder
        transformer.gradient_checkpointing = settings.checkpoint_activations
        objective = Objective(
            transformer,
            text_encoder if train_text else None,
            NoiseSchedule.from_config(SCHEDULER_CONFIG),
            DTYPES[settings.dtype],
            settings.weight_cap,
        )
        parameters = sum(p.numel() for p in objective.parameters())
        self.engine, *_ = deepspeed.initialize(
            model=objective.to(device).train(),
            optimizer=torch.optim.AdamW(
                objective.parameters(), lr=settings.lr, weight_decay=0.0, fused=True
            ),
            config=deepspeed_config(settings, parameters, device),
        )
        self.ema = ShardedEMA(self.engine.module, settings.ema)
        if settings.resume:
            self._load()

    @property
    def is_main(self) -> bool:
        return dist.get_rank() == 0

    def train(self) -> None:
        """Train to the end of the steps or of the time, or to a signal; then save and export."""
        settings, stop = self.settings, StopRequest()
        first, start, logged = self.step, time.monotonic() - self.seconds, time.monotonic()
        ranks = dist.get_world_size()
        samples = settings.batch * settings.draws * settings.accumulation * ranks
        progress, losses, interrupted = self.step / settings.steps, [], False
        settings.run.mkdir(parents=True, exist_ok=True)
        with tqdm(
            total=settings.steps, initial=first, unit="step", disable=not self.is_main
        ) as bar:
            while self.step < settings.steps and progress < 1 and not interrupted:
                rate = learning_rate(settings, self.step, progress)
                loss = self._step(rate)
                progress = self.step / settings.steps
                if settings.minutes:
                    progress = max(progress, (time.monotonic() - start) / (60 * settings.minutes))
                loss, progress, interrupted = self._agree(loss, progress, bool(stop))
                self.seconds = time.monotonic() - start
                losses.append(loss)
                bar.update()
                if self.step % settings.log_every == 0 or self.step == settings.steps:
                    now = time.monotonic()
                    seconds = (now - logged) / len(losses)
                    left = (settings.steps - self.step) * seconds
                    if settings.minutes:
                        left = min(left, 60 * settings.minutes - (now - start))
                    self._log(
                        bar,
                        step=self.step,
                        loss=round(sum(losses) / len(losses), 5),
                        lr=rate,
                        grad_norm=round(float(self.engine.get_global_grad_norm()), 4),
                        samples_per_s=round(samples / seconds, 2),
                        captions=self.position,
                        seconds=round(now - start, 1),
                        minutes_left=round(max(left, 0) / 60, 1),
                    )
                    logged, losses = now, []
                if self.step % settings.save_every == 0:
                    self.save()
                if settings.export_every and self.step % settings.export_every == 0:
                    self.export()
        self.save()
        if interrupted:
            self._say(f"stopped at step {self.step}; go on with --resume")
            sys.exit(130)
        self.export()

    def _step(self, rate: float) -> Tensor:
        settings, rank, ranks = self.settings, dist.get_rank(), dist.get_world_size()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        for _ in range(settings.accumulation):
            batch = self.stream.batch(self.position + rank * settings.batch, settings.batch)
            # Dropout in a text encoder draws from the global generator: made a function of the
            # position too, so that resuming needs no generator state.
            torch.manual_seed(settings.seed * 1_000_003 + self.position + rank)
            text = select_tokens(self.tokens, batch.caption)
            if self.frozen_text is not None:
                with torch.no_grad():
                    text = self.frozen_text(text)
            motion_free = batch.motion_free
            loss = self.engine(
                batch.latents.to(self.device),
                batch.noise.to(self.device),
                batch.timestep.to(self.device),
                text,
                None if motion_free is None else motion_free.to(self.device),
            )
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / settings.accumulation
            self.position += settings.batch * ranks
        self.ema.update()
        self.step += 1
        return total

    def _agree(self, loss: Tensor, progress: float, stop: bool) -> tuple[float, float, bool]:
        """Mean loss of all ranks, rank 0's progress, and whether any rank was told to stop."""
        values = torch.tensor(
            [float(loss), progress if self.is_main else 0.0, float(stop)],
            dtype=torch.float64,
            device=self.device,
        )
        if dist.get_world_size() > 1:
            dist.all_reduce(values)
        loss, progress, stops = values.tolist()
        if not math.isfinite(loss):
            last = latest_checkpoint(self.settings.run) or "none"
            raise ValueError(f"the loss is {loss} at step {self.step}; last checkpoint: {last}")
        return loss / dist.get_world_size(), progress, stops > 0

    def _log(self, bar: tqdm, **values) -> None:
        if not self.is_main:
            return
        bar.write(
            f"step {values['step']}/{self.settings.steps}  loss {values['loss']:.4f}  "
            f"{values['samples_per_s']:.1f} samples/s  {values['minutes_left']:.1f} min left"
        )
        with open(self.settings.run / "log.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")

    def _say(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def save(self) -> None:
        """Write a checkpoint aside, rename it, let `latest` name it, remove those too old."""
        name = f"step-{self.step:08d}"
        if latest_checkpoint(self.settings.run) == name:
            return
        aside = self.checkpoints / ".partial"
        if self.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        state = {
            "step": self.step,
            "position": self.position,
            "ema_updates": self.ema.updates,
            "seconds": self.seconds,
        }
        self.engine.save_checkpoint(str(aside), tag=name, client_state=state, save_latest=False)
        self.ema.save(aside / name / f"ema-rank{dist.get_rank()}.safetensors")
        dist.barrier()
        if self.is_main:
            shutil.rmtree(self.checkpoints / name, ignore_errors=True)
            os.replace(aside / name, self.checkpoints / name)
            pointer = aside / "latest"
            pointer.write_text(name + "\n")
            os.replace(pointer, self.checkpoints / "latest")
            shutil.rmtree(aside)
            # Later ones than `latest` are of a run that stopped before it named them.
            whole = sorted(p for p in self.checkpoints.glob("step-*") if p.name <= name)
            for old in whole[: -self.settings.keep]:
                shutil.rmtree(old)
        dist.barrier()

    def _load(self) -> None:
        name = latest_checkpoint(self.settings.run)
        ranks = len(list((self.checkpoints / name).glob("ema-rank*.safetensors")))
        if ranks != dist.get_world_size():
            raise ValueError(
                f"{name} was written by {ranks} ranks, this run has {dist.get_world_size()}: "
                f"resume it with --num_gpus {ranks}"
            )
        _, state = self.engine.load_checkpoint(str(self.checkpoints), tag=name)
        self.step, self.position = state["step"], state["position"]
        self.seconds = state["seconds"]
        shards = self.checkpoints / name / f"ema-rank{dist.get_rank()}.safetensors"
        self.ema.load(shards, state["ema_updates"])
        if self.is_main:
            self._cut_log()
        self._say(f"going on at step {self.step}")

    def _cut_log(self) -> None:
        """Remove the lines of steps that will run again."""
        log = self.settings.run / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))

    def export(self) -> None:
        """Write the pipeline folder with the averaged weights, one parameter gathered at a time."""
        weights = {"transformer": {}, "text_encoder": {}}
        dtype = DTYPES[self.settings.export_dtype]
        for name in self.ema.parameters:
            part, key = name.split(".", 1)
            tensor = self.ema.full(name)
            if tensor is not None:
                weights[part][key] = tensor.to(dtype)
        if self.is_main:
            self._write_pipeline(weights, dtype)
        dist.barrier()

    def _write_pipeline(self, weights: dict[str, dict[str, Tensor]], dtype: torch.dtype) -> None:
        transformer = GenTron(self.config).to(dtype)
        transformer.load_state_dict(weights["transformer"])
        text_encoder = deepcopy(self.exported_text).to("cpu", dtype)
        # Tied weights have one name here and two in the encoder: not strict.
        report = text_encoder.load_state_dict(weights["text_encoder"], strict=False)
        assert not report.unexpected_keys
        vae = VideoVAE.from_pretrained(self.settings.vae, dtype)
        latents = (self.stream.images or self.stream.clips).mean
        pipeline = GenTronPipeline(
            transformer,
            text_encoder,
            vae,
            SCHEDULER_CONFIG,
            default_frames=self.settings.frames,
            default_size=tuple(side * vae.factor for side in latents.shape[-2:]),
        )
        folder, aside = self.settings.run / "pipeline", self.settings.run / ".pipeline.part"
        shutil.rmtree(aside, ignore_errors=True)
        pipeline.save_pretrained(aside)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        self._say(f"pipeline in {folder}")


def run(main: Callable[[], None]) -> None:
    """Call an entry point; wrong input ends it with one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"rank {os.environ.get('RANK', 0)}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
