"""The teacher of a distillation: a frozen model's guided noise, for a student to learn in one
branch (Meng et al. 2023, arXiv 2210.03142; with λ_M beside λ_T that is ours)."""

# Shapes: B samples, C channels, T frames, h × w latents.

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gentron_fast.config import SamplingDefaults
from gentron_fast.diffusion import SCHEDULER_CONFIG, SCHEDULER_SCHEMA, NoiseSchedule
from gentron_fast.files import read_json
from gentron_fast.guidance import GuidedBatch, GuidedDenoiser, PreparedText, SharedWork
from gentron_fast.guidance.definition import guidance_inputs
from gentron_fast.index import INDEX_NAME, sampling_defaults
from gentron_fast.model import GenTron, TextCondition
from gentron_fast.pipeline import SCHEDULER_PATH, shared_folder, stored_encoders
from gentron_fast.solvers import SolverTable, make_table
from gentron_fast.text import TextEncoder
from gentron_fast.transfer import on_device
from gentron_train.data.loader import Batch
from gentron_train.data.options import DTYPES, flag, parse_sizes
from gentron_train.data.sources import Point, folder_digest
from gentron_train.settings import Settings, stored_config

SOLVER = "dpm++"  # of the trajectories: it draws no noise
# What a student has of its teacher, whatever its size.
SHARED_FIELDS = "in_channels", "temporal", "encoders", "clip_width", "t5_width"
LAMBDAS = "min_lambda_t", "max_lambda_t", "min_lambda_m", "max_lambda_m"


class Targets(NamedTuple):
    """What a student learns from: noisy latents and the teacher's guided noise, (B, C, T, h, w)
    fp32; timestep (B,); text of B prompts; guidance (B, 2), λ_T and λ_M."""

    latents: Tensor
    timestep: Tensor
    text: TextCondition
    guidance: Tensor
    noise: Tensor


@dataclass
class Run:
    """A sample that the teacher denoises: latents and x0 of the step before, (1, C, T, h, w)."""

    denoiser: GuidedDenoiser
    text: TextCondition
    guidance: Tensor
    latents: Tensor
    x0: Tensor
    step: int = 0

    @property
    def row(self) -> Tensor:
        """alpha, sigma, a, b, c, d of its step."""
        return self.denoiser.table.rows[self.step]

    @property
    def timestep(self) -> Tensor:
        return self.denoiser.table.timesteps[self.step]

    @property
    def is_over(self) -> bool:
        return self.step == len(self.denoiser.table.timesteps)


class Teacher:
    """Guided noise of a frozen model, by the batched step that samples with it.

    Of each micro-batch the share p_trajectory are latents along the teacher's own sampling, each
    run at a step of its own: the student meets there what it will meet (arXiv 2503.07274). The
    others are noised data. Each sample has its own λ_T and λ_M, uniform in the ranges.
    """

    def __init__(
        self,
        model: GenTron,
        null_text: TextCondition,
        scheduler: dict,
        settings: Settings,
        rescale: float,
    ):
        """null_text: the empty prompt, encoded; rescale: of what is learnt."""
        self.model = model.eval().requires_grad_(False)
        self.settings, self.rescale = settings, rescale
        self.scheduler, self.schedule = scheduler, NoiseSchedule.from_config(scheduler)
        weight = model.patch_embed.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.null_text = PreparedText.of(model, null_text.to(self.device, self.dtype))
        # The samples of noised data, and runs of clips and of images among them, of each size.
        sizes = 1 if settings.buckets is None else len(parse_sizes("--buckets", settings.buckets))
        places = (1 + 2 * sizes) * settings.batch
        self.shared = SharedWork(model, 2, settings.max_trajectory_steps, places)
        self._runs: dict[torch.Size, list[Run]] = {}  # by the shape of their latents
        self._owed = 0.0  # of a latent, that the shares of the micro-batches so far left out

    @classmethod
    def from_pretrained(cls, settings: Settings, device: torch.device) -> "Teacher":
        """The model of `settings.teacher`, which is a whole pipeline. FileNotFoundError or
        ValueError where a part is missing or does not fit."""
        folder, dtype = settings.teacher, DTYPES[settings.dtype]
        model = GenTron.from_pretrained(folder / "transformer", dtype, device)
        encoder = TextEncoder.from_pretrained(
            **stored_encoders(folder), dtype=DTYPES[settings.parameters]
        )
        encoder.check_widths(model.config)
        with torch.no_grad():
            null_text = encoder.eval().encode([""])
        scheduler = read_json(folder / SCHEDULER_PATH)
        return cls(model, null_text, scheduler, settings, own_rescale(settings))

    @torch.no_grad()
    def targets(self, batch: Batch, text: TextCondition) -> Targets:
        """What the student learns of a micro-batch of B latents; text of B prompts. The latents of
        the last of them, p_trajectory · B a micro-batch on average, but for a run's first one, make
        way for the runs', or for those of trajectories that were stored."""
        text = text.to(self.device, self.dtype)
        latents, noise = (on_device(t, self.device) for t in (batch.latents, batch.noise))
        texts = [text.select(slice(i, i + 1)) for i in range(len(latents))]
        samples = list(zip(texts, latents, noise, batch.timestep, strict=True))
        along = self._places(len(samples))
        fresh = len(samples) - along
        begun = [self._noised(*sample) for sample in samples[:fresh]]
        if batch.points is not None and along:
            stored = stored_targets(
                batch.points[fresh:], text.select(slice(fresh, None)), self.device
            )
            return stored if not begun else _joined(self._advance(begun), stored)
        if not along:
            return self._advance(begun)
        is_first = latents.shape[1:] not in self._runs
        waiting = self._runs.setdefault(latents.shape[1:], [])
        own = waiting[:along]
        for *sample, _ in samples[fresh + len(own) :]:
            own.append(self._begun(*sample, anywhere=is_first))
        targets = self._advance(begun + own)
        waiting[:] = waiting[along:] + [run for run in own if not run.is_over]
        return targets

    def _places(self, samples: int) -> int:
        """How many of a micro-batch's latents lie along trajectories."""
        share = self._owed + self.settings.p_trajectory * samples
        places = math.floor(share + 1e-6)
        self._owed = share - places
        return places

    @torch.no_grad()
    def sample(
        self, texts: list[TextCondition], shape: Sequence[int], seeds: Sequence[int], count: int
    ) -> list[list[Point]]:
        """Whole samplings of prompts, to latents of `shape` (C, T, h, w): of each `count` points
        that were passed, all where it has fewer steps. seeds: of each one's noise, steps, λ and
        what is kept, so that these do not depend on what is sampled beside it."""
        runs, kept = [], []
        with torch.random.fork_rng(devices=[]):
            for text, seed in zip(texts, seeds, strict=True):
                torch.manual_seed(seed)
                noise = on_device(torch.randn(*shape), self.device)
                own = text.to(self.device, self.dtype)
                runs.append(self._begun(own, noise, noise, anywhere=False))
                length = len(runs[-1].denoiser.table.timesteps)
                kept.append(set(torch.randperm(length)[:count].tolist()))
        points: list[list[Point]] = [[] for _ in runs]
        while left := [n for n, run in enumerate(runs) if not run.is_over]:
            places = [runs[n].step for n in left]
            made = self._advance([runs[n] for n in left])
            for row, (n, place) in enumerate(zip(left, places, strict=True)):
                if place in kept[n]:
                    fields = (made.latents, made.noise, made.timestep, made.guidance)
                    points[n].append(Point(*(field[row].cpu() for field in fields)))
        return points

    def _advance(self, runs: list[Run]) -> Targets:
        """A step of each run; what was met and given there."""
        together = GuidedBatch([run.denoiser for run in runs])
        steps = [run.step for run in runs]
        x, before = (torch.cat([getattr(run, name) for run in runs]) for name in ("latents", "x0"))
        after, x0 = together.step(x, steps, before)
        alpha, sigma = (
            on_device(torch.stack(column).float(), self.device).reshape(-1, 1, 1, 1, 1)
            for column in zip(*(run.row[:2] for run in runs), strict=True)
        )
        targets = Targets(
            x,
            torch.stack([run.timestep for run in runs]),
            TextCondition.cat([run.text for run in runs]),
            torch.cat([run.guidance for run in runs]),
            (x - alpha * x0) / sigma,
        )
        for i, run in enumerate(runs):
            run.latents, run.x0 = after[i : i + 1], x0[i : i + 1]
            run.step += 1
            if run.is_over:
                run.denoiser.release()
        return targets

    def _noised(self, text: TextCondition, latents: Tensor, noise: Tensor, timestep: Tensor) -> Run:
        """A single step, at the timestep of the data's noise."""
        alpha, sigma = self._levels(timestep)
        row = torch.tensor([alpha, sigma, 0, 1, 0, 0], dtype=torch.float64)
        table = SolverTable(timestep.reshape(1), row[None])
        return self._run(text, table, alpha * latents + sigma * noise)

    def _begun(self, text: TextCondition, latents: Tensor, noise: Tensor, anywhere: bool) -> Run:
        """A trajectory from its first step, or from the data's latents anywhere on it: so the first
        runs are not all in step."""
        low, high = self.settings.min_trajectory_steps, self.settings.max_trajectory_steps
        table = make_table(SOLVER, self.scheduler, int(torch.randint(low, high + 1, ())))
        if not anywhere:
            return self._run(text, table, noise)
        run = self._run(text, table, noise)
        run.step = int(torch.randint(len(table.timesteps), ()))
        alpha, sigma = run.row[:2].tolist()
        run.latents = (alpha * latents + sigma * noise)[None]
        run.x0 = latents[None]
        return run

    def _levels(self, timestep: Tensor) -> tuple[float, float]:
        signal = float(self.schedule.alphas_cumprod[timestep])
        return signal**0.5, (1 - signal) ** 0.5

    def _run(self, text: TextCondition, table: SolverTable, latents: Tensor) -> Run:
        settings = self.settings
        lambda_t = _uniform(settings.min_lambda_t, settings.max_lambda_t)
        lambda_m = _uniform(settings.min_lambda_m, settings.max_lambda_m)
        denoiser = GuidedDenoiser(
            *(self.model, text, self.null_text, table, lambda_t, lambda_m, latents.shape),
            rescale=self.rescale,
            cuda_graph=False,
            shared=self.shared,
        )
        guidance = guidance_inputs(lambda_t, lambda_m, denoiser.has_motion)
        latents = latents.float()[None]
        return Run(denoiser, text, on_device(guidance, self.device), latents, latents)


def make_teacher(
    settings: Settings, trajectories: dict | None, device: torch.device
) -> "Teacher | StoredTeacher":
    """What gives a run's targets; trajectories: what its shards say of those stored in them.

    ValueError where these are of another teacher, or where captions would be dropped again.
    """
    if trajectories is not None:
        digest = folder_digest(settings.teacher / "transformer")
        if trajectories.get("teacher") != digest:
            raise ValueError(
                f"the trajectories in the shards are not of {settings.teacher}, or of other weights"
            )
        wanted = asdict(settings) | {"teacher_rescale": own_rescale(settings)}
        for name in ("teacher_rescale", *LAMBDAS):
            if (found := trajectories.get(name)) != wanted[name]:
                raise ValueError(
                    f"the trajectories in the shards were sampled with {flag(name)} {found}, this "
                    f"run has {wanted[name]}"
                )
        if settings.p_null:
            raise ValueError(
                f"--p-null is {settings.p_null}, must be 0: captions were dropped when the "
                f"trajectories were stored, {trajectories.get('p_null')} of them"
            )
        if settings.p_trajectory == 1:
            return StoredTeacher(device, DTYPES[settings.dtype])
    return Teacher.from_pretrained(settings, device)


class StoredTeacher:
    """What a teacher gave along samplings that were stored (gentron_train.trajectories), in the
    place of one that runs."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def targets(self, batch: Batch, text: TextCondition) -> Targets:
        """As of a Teacher whose every latent lies on a sampling."""
        return stored_targets(batch.points, text.to(self.device, self.dtype), self.device)


def stored_targets(points: Sequence[Point], text: TextCondition, device: torch.device) -> Targets:
    """What a student learns of stored points; text of their prompts."""
    latents, noise, timestep, guidance = map(torch.stack, zip(*points, strict=True))
    latents, noise, guidance = (on_device(t.float(), device) for t in (latents, noise, guidance))
    return Targets(latents, timestep, text, guidance, noise)


def _joined(first: Targets, second: Targets) -> Targets:
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in Targets._fields}
    text = TextCondition.cat(list(pairs.pop("text")))
    return Targets(text=text, **{name: torch.cat(pair) for name, pair in pairs.items()})


def own_rescale(settings: Settings) -> float:
    """Of what is learnt: as asked for, else the teacher's own."""
    asked = settings.teacher_rescale
    return sampling_defaults(settings.teacher).rescale if asked is None else asked


def exported_defaults(settings: Settings) -> SamplingDefaults:
    """What the pipeline of a run samples with: the paper's values, of a student its teacher's, but
    for the rescale, which is in its one branch."""
    if settings.teacher is None:
        return SamplingDefaults()
    return replace(sampling_defaults(settings.teacher), rescale=0.0)


def exported_scheduler(settings: Settings) -> dict:
    """The scheduler_config.json of a run's pipeline: of a student its teacher's, with the timesteps
    that were fitted to that."""
    if settings.teacher is None:
        return SCHEDULER_CONFIG
    return read_json(settings.teacher / SCHEDULER_PATH, SCHEDULER_SCHEMA)


def shares_line(settings: Settings, trajectories: dict | None) -> str:
    """What a student learns from, in one line; trajectories: what its shards say of those stored
    in them."""
    share, told = settings.p_trajectory, trajectories or vars(settings)
    low, high = (told.get(f"{end}_trajectory_steps") for end in ("min", "max"))
    return (
        f"the student learns from noised data ({1 - share:.0%}) and from its teacher's own "
        f"sampling in {low} to {high} steps ({share:.0%}, "
        f"{'stored' if trajectories else 'sampled beside it'})"
    )


def learnt_guidance(settings: Settings) -> dict[str, tuple[float, float]]:
    """The ranges of lambda_t and lambda_m that a student is trained with; of no other run."""
    if settings.teacher is None:
        return {}
    return {
        name: (getattr(settings, f"min_{name}"), getattr(settings, f"max_{name}"))
        for name in ("lambda_t", "lambda_m")
    }


def check_teacher(settings: Settings) -> None:
    """ValueError or FileNotFoundError where the pipeline `settings.teacher` cannot teach."""
    folder = settings.teacher
    if not (folder / INDEX_NAME).is_file():
        raise FileNotFoundError(f"{folder} is no whole pipeline: no {INDEX_NAME}")
    if stored_config(folder / "transformer").guidance_embedding:
        raise ValueError(f"{folder} is distilled already: a teacher has three branches")
    _check_student(settings)
    if settings.p_motion_free:
        raise ValueError(
            f"--p-motion-free is {settings.p_motion_free}, must be 0: the teacher's motion-free "
            "branch is in what it gives"
        )
    if settings.draws > 1:
        raise ValueError(f"--draws is {settings.draws}, must be 1: each sample has its own text")
    for name, (low, high) in learnt_guidance(settings).items():
        own = getattr(sampling_defaults(folder), name)
        if not low <= own <= high:
            raise ValueError(
                f"{folder} samples at {name} {own} unless told otherwise, outside of "
                f"{flag(f'min_{name}')} {low} … {flag(f'max_{name}')} {high}: a student would not "
                "learn it"
            )
    schedules = [
        NoiseSchedule.from_config(values).alphas_cumprod
        for values in (read_json(folder / SCHEDULER_PATH, SCHEDULER_SCHEMA), SCHEDULER_CONFIG)
    ]
    if not torch.equal(*schedules):
        raise ValueError(
            f"{folder / SCHEDULER_PATH} is another noise schedule than that of training, DiT's "
            "1000 timesteps of linear β: such a teacher is not taken"
        )


def _check_student(settings: Settings) -> None:
    """ValueError where what a student starts from does not read and write what its teacher does."""
    if settings.fresh_temporal:
        raise ValueError("--fresh-temporal would take its teacher's motion from a student")
    teacher, init = settings.teacher, settings.init
    if init is not None:
        own, wanted = (vars(stored_config(folder / "transformer")) for folder in (init, teacher))
        for name in SHARED_FIELDS:
            if own[name] != wanted[name]:
                raise ValueError(
                    f"{init} has {name} {own[name]}, its teacher {teacher} {wanted[name]}: a "
                    "student takes its teacher's latents and texts"
                )
    encoders = stored_encoders(teacher)
    sources = settings.text_sources(tuple(encoders))
    parts = {shared_folder(teacher) / "vae": settings.vae}
    parts |= {encoders[name][0]: Path(source[0]) for name, source in sources.items()}
    for wanted, own in parts.items():
        folders = wanted.resolve(), own.resolve()
        if own.is_dir() and len(set(folders)) > 1 and len(set(map(folder_digest, folders))) > 1:
            raise ValueError(
                f"{own} is another {wanted.name} than that of the teacher, {wanted}; where none "
                "is named, that is taken"
            )


def _uniform(low: float, high: float) -> Tensor:
    """(1,) fp64."""
    return low + (high - low) * torch.rand(1, dtype=torch.float64)
