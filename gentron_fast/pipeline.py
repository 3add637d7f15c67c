"""GenTronPipeline: text → latents → frames, and the folder it is kept in (diffusers layout)."""

# Shapes: N clips (prompts × clips per prompt), C channels, T frames, H × W pixels, h × w latents.

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gentron_fast import arguments
from gentron_fast.config import (
    LEARNT,
    MAX_FRAMES,
    MOST_CLIPS,
    GenTronConfig,
    SamplingDefaults,
)
from gentron_fast.diffusion import SCHEDULER_CONFIG, SCHEDULER_SCHEMA, portable_noise
from gentron_fast.files import read_json, whole_folder, write_json
from gentron_fast.guidance import (
    GuidedDenoiser,
    check_one_branch,
    check_rescale,
    guidance_schedule,
)
from gentron_fast.index import ASSETS, INDEX_NAME, parts_folder, read_index
from gentron_fast.model import GenTron, TextCondition
from gentron_fast.schema import MOST_TIMESTEPS
from gentron_fast.solvers import SolverTable, make_table
from gentron_fast.text import SUBFOLDERS, TextEncoder
from gentron_fast.transfer import on_device
from gentron_fast.vae import REASONS, VideoVAE, check_finite, to_frames

SCHEDULER_PATH = Path("scheduler", "scheduler_config.json")
COMPONENTS = {  # folder → library and class, as model_index.json names them
    "transformer": ["gentron_fast", "GenTron"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
}
PARTS = (INDEX_NAME, *COMPONENTS, *itertools.chain(*SUBFOLDERS.values()))  # of a pipeline folder
TEXT_COMPONENTS = {
    "clip": (["transformers", "CLIPTextModel"], ["transformers", "CLIPTokenizer"]),
    "t5": (["transformers", "T5EncoderModel"], ["transformers", "AutoTokenizer"]),
}


@dataclass(frozen=True)
class PipelineOutput:
    """frames uint8 (N, T, H, W, 3), None for output_type "latent"; latents fp32 (N, C, T, h, w);
    guidance: how the branches ran, in one line (GuidedDenoiser.describe)."""

    frames: Tensor | None
    latents: Tensor
    guidance: str


@dataclass(frozen=True)
class Sampling:
    """What N clips are sampled with, one a seed, those of a prompt next to each other.

    prompts; negatives, one or one a prompt; seeds (N); shape (C, T, h, w) of a clip's latents;
    table, the solver's, of S steps; lambda_t and lambda_m (S, 1) or (S, N); rescale (1,) or (N,).
    """

    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    shape: tuple[int, int, int, int]
    table: SolverTable
    lambda_t: Tensor
    lambda_m: Tensor
    rescale: Tensor


class GenTronPipeline:
    """A GenTron model with its text encoders, its autoencoder and its noise schedule.

    default_frames and default_size (height, width in pixels) are what a call makes unless told
    otherwise.
    """

    def __init__(
        self,
        transformer: GenTron,
        text_encoder: TextEncoder,
        vae: VideoVAE,
        scheduler: dict | None = None,
        default_frames: int = 8,
        default_size: tuple[int, int] = (512, 512),
        defaults: SamplingDefaults | None = None,
        learnt: Mapping[str, Sequence[float]] | None = None,
    ):
        self.transformer = transformer.eval()
        self.text_encoder = text_encoder.eval()
        self.vae = vae.eval()
        self.scheduler = dict(scheduler or SCHEDULER_CONFIG)
        self.default_frames = default_frames if transformer.config.temporal else 1
        self.default_size = tuple(default_size)
        self.defaults = defaults or SamplingDefaults()
        self.learnt = {name: tuple(scales) for name, scales in (learnt or {}).items()}
        self.device = transformer.patch_embed.weight.device
        self._offloads = False
        self._encoded: dict[str, TextCondition] = {}
        if vae.latent_channels != transformer.config.in_channels:
            raise ValueError(
                f"the VAE makes {vae.latent_channels} latent channels, "
                f"the transformer takes {transformer.config.in_channels}"
            )
        counted = transformer.config.pixels_per_latent
        if transformer.config.size_embedding and counted != vae.factor:
            raise ValueError(
                f"the transformer's size embedding counts {counted} pixels a latent, "
                f"the VAE makes a latent of {vae.factor}"
            )
        text_encoder.check_widths(transformer.config)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "GenTronPipeline":
        """Load a pipeline folder; without a path, the small model that ships.

        A folder whose model_index.json has shared_parts ".." holds a transformer alone, and lies in
        the pipeline folder that has the other parts: so does `fast`, a distilled model, in that of
        the model that ships. FileNotFoundError or ValueError, in one line, where a part is missing
        or does not fit.
        """
        folder = ASSETS if path is None else Path(path)
        index = read_index(folder)
        transformer = GenTron.from_pretrained(folder / "transformer", dtype)
        shared = parts_folder(folder)
        text_folders = {
            name: tuple(shared / subfolder for subfolder in SUBFOLDERS[name])
            for name in transformer.config.encoders
        }
        pipeline = cls(
            transformer,
            TextEncoder.from_pretrained(**text_folders, dtype=dtype),
            VideoVAE.from_pretrained(shared / "vae", dtype),
            read_json(shared / SCHEDULER_PATH, SCHEDULER_SCHEMA),
            index.get("default_frames", 8),
            index.get("default_size", (512, 512)),
            SamplingDefaults.from_index(index),
            {name: index[key] for name, key in LEARNT.items() if key in index},
        )
        return pipeline.to(device)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the folder; a pipeline that was written there before is replaced whole.

        A pipeline that was saved and loaded is saved to the same bytes. ValueError, before anything
        is written, where the folder holds a file that was not written so, a download among them.
        """
        with whole_folder(Path(folder), PARTS) as partial:
            self.transformer.save_pretrained(partial / "transformer")
            self.text_encoder.save_pretrained(partial)
            self.vae.save_pretrained(partial / "vae")
            write_json(partial / SCHEDULER_PATH, self.scheduler)
            for path in partial.rglob("*.safetensors"):
                path.chmod(0o644)  # safetensors keeps its files from other users
            own = self.default_frames, self.default_size, self.defaults, self.learnt
            index = model_index(self.transformer.config, *own)
            write_json(partial / INDEX_NAME, index)

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "GenTronPipeline":
        """Move every part and cast its weights."""
        for part in self._parts():
            part.to(device, dtype and part.computed_in(dtype) if part is self.vae else dtype)
        self.device = self.device if device is None else torch.device(device)
        self._offloads = False
        return self

    def enable_offload(self, device: str | torch.device) -> None:
        """Keep every part on the CPU and bring it to the device only while it runs."""
        self.to("cpu")
        self.device = torch.device(device)
        self._offloads = True

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Iterable[str],
        *,
        negative_prompt: str | Iterable[str] | None = None,
        frames: int | None = None,
        size: int | tuple[int, int] | None = None,
        steps: int | None = None,
        solver: str | None = None,
        lambda_t: float | Iterable[float] | None = None,
        lambda_m: float | Iterable[float] | None = None,
        rescale: float | Iterable[float] | None = None,
        guidance_range: tuple[float, float] = (0.0, 1.0),
        eta: float = 0.0,
        reuse: int = 1,
        clips: int = 1,
        seed: int | Iterable[int] = 0,
        output_type: str = "frames",
        callback_on_step_end: Callable[[int, int, Tensor], None] | None = None,
        progress: bool = True,
    ) -> PipelineOutput:
        """Sample `clips` clips of each prompt, the clips of one prompt next to each other.

        negative_prompt takes the place of the null text, one or one a prompt, and is refused by a
        distilled model, as are rescale and reuse; size in pixels, one
        side or (height, width); lambda_t, lambda_m the guidance of text and motion (paper: 7.5, and
        1.0 … 1.3), a number or one a clip, within guidance_range of the steps and 1 outside;
        rescale, 0 to 1, likewise: diffusers' guidance_rescale (Lin et al. 2024, arXiv 2305.08891).
        Guidance, steps and solver are the folder's own where None (`defaults`). eta the noise of
        DDIM; reuse k > 1: an approximation, in which all branches run on every k-th step only; seed
        a number, clip k of each prompt then has seed + k, or one a clip. The callback gets (step,
        timestep, latents) behind each step. output_type "frames" or "latent".
        ValueError for anything that does not fit the model, before any work is done.
        """
        sampling = self.sampling(
            prompt,
            negative_prompt=negative_prompt,
            frames=frames,
            size=size,
            steps=steps,
            solver=solver,
            lambda_t=lambda_t,
            lambda_m=lambda_m,
            rescale=rescale,
            guidance_range=guidance_range,
            eta=eta,
            clips=clips,
            seed=seed,
        )
        reuse = arguments.whole("reuse", reuse, 1, MOST_TIMESTEPS)
        if output_type not in ("frames", "latent"):
            raise ValueError(f'output_type must be "frames" or "latent", got {output_type!r}')
        self.warn_of(sampling.shape, sampling.lambda_t, sampling.lambda_m)
        text = self.encode(sampling.prompts)
        distilled = self.transformer.config.guidance_embedding
        null_text = None if distilled else self.encode(sampling.negatives)
        self._bring(self.transformer)
        denoiser = GuidedDenoiser(
            *(self.transformer, text, null_text, sampling.table),
            *(sampling.lambda_t, sampling.lambda_m, sampling.shape),
            rescale=sampling.rescale,
            clips=clips,
            reuse=reuse,
        )
        timesteps = sampling.table.timesteps.tolist()
        with tqdm(total=len(timesteps), unit="step", disable=not progress) as bar:

            def step_done(step: int, latents: Tensor) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(step, timesteps[step], latents)

            latents = self._denoise(denoiser, sampling.seeds, step_done)
        self._send_back(self.transformer)
        frames = None if output_type == "latent" else self.decode(latents)
        return PipelineOutput(frames, latents, denoiser.describe())

    def sampling(
        self,
        prompt: str | Iterable[str],
        *,
        negative_prompt: str | Iterable[str] | None = None,
        frames: int | None = None,
        size: int | tuple[int, int] | None = None,
        steps: int | None = None,
        solver: str | None = None,
        lambda_t: float | Iterable[float] | None = None,
        lambda_m: float | Iterable[float] | None = None,
        rescale: float | Iterable[float] | None = None,
        guidance_range: tuple[float, float] = (0.0, 1.0),
        eta: float = 0.0,
        clips: int = 1,
        seed: int | Iterable[int] = 0,
    ) -> Sampling:
        """What a call with these arguments samples: checked, and complete with the folder's own.

        ValueError as of a call; no work is done.
        """
        prompts = arguments.texts("a prompt", prompt)
        if not prompts:
            raise ValueError("no prompt was given")
        negatives = arguments.texts(
            "a negative prompt", "" if negative_prompt is None else negative_prompt
        )
        distilled = self.transformer.config.guidance_embedding
        if distilled:
            check_one_branch(negatives)
        if len(negatives) not in (1, len(prompts)):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts")
        frames = self.default_frames if frames is None else frames
        frames = arguments.whole("frames", frames, 1, MAX_FRAMES)
        steps = self.defaults.steps if steps is None else steps
        steps = arguments.whole("steps", steps, 1, MOST_TIMESTEPS)
        clips = arguments.whole("clips per prompt", clips, 1, MOST_CLIPS)
        solver = self.defaults.solver if solver is None else solver
        lambda_t = self.defaults.lambda_t if lambda_t is None else lambda_t
        lambda_m = self.defaults.lambda_m if lambda_m is None else lambda_m
        rescale = self.defaults.rescale if rescale is None else rescale
        height, width = arguments.size(self.default_size if size is None else size)
        seeds = arguments.seeds(seed, len(prompts) * clips)
        if isinstance(seeds, int):
            seeds = [seeds + clip for clip in range(clips)] * len(prompts)
        within = arguments.numbers("the guidance range", guidance_range).flatten().tolist()
        if len(within) != 2:
            raise ValueError(f"the guidance range must be two numbers, got {within}")
        if frames > 1 and not self.transformer.config.temporal:
            raise ValueError(f"this model makes images: {frames} frames were asked for")
        self.vae.check_size(height, width, self.transformer.config.patch_size)
        table = make_table(solver, self.scheduler, steps, arguments.real("eta", eta))
        scales = [
            guidance_schedule(_clip_scales(name, scale, len(seeds)), steps, *within)
            for name, scale in (("lambda_t", lambda_t), ("lambda_m", lambda_m))
        ]
        rescale = check_rescale(_clip_scales("rescale", rescale, len(seeds)), distilled)
        h, w = height // self.vae.factor, width // self.vae.factor
        shape = (self.transformer.config.in_channels, frames, h, w)
        return Sampling(prompts, negatives, seeds, shape, table, *scales, rescale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, T, h, w) → frames uint8 (N, T, H, W, 3) on the CPU."""
        self._bring(self.vae)
        pixels = self.vae.decode(latents.to(self.vae.dtype), clamp=False)
        self._send_back(self.vae)
        check_finite(pixels, f"the pixels of the VAE in {self.vae.dtype} are")
        return to_frames(pixels).cpu()

    def _denoise(self, denoiser: GuidedDenoiser, seeds, step_done) -> Tensor:
        """Noise of the seeds → latents (N, C, T, h, w) fp32, one guided step a row of the table."""
        shape = denoiser.latent_shape
        latents, x0 = on_device(portable_noise(shape, seeds, 0), self.device), None
        finite = []  # on the device: read once, behind the last step
        for step, draws in enumerate((denoiser.table.rows[:, -1] != 0).tolist()):
            noise = (
                on_device(portable_noise(shape, seeds, step + 1), self.device) if draws else None
            )
            latents, x0 = denoiser.step(latents, step, x0, noise)
            finite.append(latents.isfinite().all())
            step_done(step, latents)
        if not all(finite := torch.stack(finite).tolist()):
            step = finite.index(False) + 1
            raise ValueError(
                f"the latents of step {step} of {len(finite)} are not finite: {REASONS}"
            )
        return latents

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextCondition:
        """The condition of prompts or negative prompts, in the transformer's dtype."""
        text = self._texts(prompts)
        for name in self.transformer.config.encoders:
            check_finite(getattr(text, name).tokens, f"the tokens of the {name} encoder are")
        return text.to(self.device, self.transformer.patch_embed.weight.dtype)

    def encode_ahead(self, prompts: Sequence[str], batch: int = 16) -> None:
        """Encode all prompts of a run, negative ones too, then release the text encoders.

        For long runs beside a large encoder (T5-XXL takes 9.5 GB in bf16). "" is always among them;
        a later prompt that is not raises RuntimeError.
        """
        prompts = sorted({"", *prompts})
        self._bring(self.text_encoder)
        for start in range(0, len(prompts), batch):
            chunk = prompts[start : start + batch]
            text = self.text_encoder.encode(chunk).to("cpu")
            self._encoded |= zip(chunk, text.split(), strict=True)
        self.text_encoder.release()

    def _texts(self, prompts: list[str]) -> TextCondition:
        if all(prompt in self._encoded for prompt in prompts):
            return TextCondition.cat([self._encoded[prompt] for prompt in prompts])
        self._bring(self.text_encoder)
        text = self.text_encoder.encode(prompts)
        self._send_back(self.text_encoder)
        return text

    def remarks(self, sampling: Sampling) -> list[str]:
        """What a call warns of, a line each: a shape unlike the folder's own, guidance outside of
        what was learnt, prompts that are cut, words that the model has never seen."""
        texts = dict.fromkeys((*sampling.prompts, *sampling.negatives))
        told = [line for text in texts for line in self.text_encoder.remarks(text)]
        return self._remarks_on(sampling.shape, sampling.lambda_t, sampling.lambda_m) + told

    def warn_of(
        self,
        shape: tuple[int, int, int, int],
        lambda_t: float | Tensor,
        lambda_m: float | Tensor,
    ) -> None:
        """A warning where the model was trained with others, and makes worse clips: latents
        (C, T, h, w) of more frames than the folder's own, or more than twice or less than half as
        large; guidance outside of the ranges that a distilled model has learnt."""
        for remark in self._remarks_on(shape, lambda_t, lambda_m):
            warnings.warn(remark, stacklevel=1)

    def _remarks_on(self, shape, lambda_t, lambda_m) -> list[str]:
        scales = {"lambda_t": lambda_t, "lambda_m": lambda_m}
        if shape[1] == 1:  # nothing moves
            del scales["lambda_m"]
        told = self._remarks_on_shape(shape[1], *(side * self.vae.factor for side in shape[2:]))
        return told + arguments.not_learnt(self.learnt, scales)

    def _remarks_on_shape(self, frames: int, height: int, width: int) -> list[str]:
        own_height, own_width = self.default_size
        told = []
        if frames > max(self.default_frames, 1):
            told.append(f"{frames} frames, where its own are {self.default_frames}")
        if not 1 / 2 <= height * width / (own_height * own_width) <= 2:
            told.append(f"{height}x{width} pixels, where its own are {own_height}x{own_width}")
        return [f"the model may not know {' and '.join(told)}"] if told else []

    def _parts(self) -> tuple[nn.Module, ...]:
        return self.transformer, self.text_encoder, self.vae

    def _bring(self, part: nn.Module) -> None:
        if self._offloads:
            part.to(self.device)

    def _send_back(self, part: nn.Module) -> None:
        if self._offloads:
            part.to("cpu")


def shared_folder(pipeline: Path) -> Path:
    """`parts_folder` of what may be no whole pipeline folder."""
    return parts_folder(pipeline) if (pipeline / INDEX_NAME).is_file() else pipeline


def stored_encoders(pipeline: Path) -> dict[str, tuple[Path, Path]]:
    """Model and tokenizer folders of the text encoders that a pipeline folder has."""
    folder = shared_folder(pipeline)
    folders = {name: [folder / part for part in parts] for name, parts in SUBFOLDERS.items()}
    return {name: tuple(pair) for name, pair in folders.items() if pair[0].is_dir()}


def model_index(
    config: GenTronConfig,
    default_frames: int,
    default_size: tuple[int, int],
    defaults: SamplingDefaults,
    learnt: Mapping[str, Sequence[float]] | None = None,
) -> dict:
    """The model_index.json of a pipeline folder; learnt: lowest and highest lambda_t and lambda_m
    that a distilled model was trained with."""
    index = {"_class_name": "GenTronPipeline"} | COMPONENTS
    for name in config.encoders:
        index |= dict(zip(SUBFOLDERS[name], TEXT_COMPONENTS[name], strict=True))
    index |= {"default_frames": default_frames, "default_size": list(default_size)}
    index |= {LEARNT[name]: list(scales) for name, scales in (learnt or {}).items()}
    return index | defaults.to_index()


def _clip_scales(name: str, scale: float | Sequence[float], clips: int) -> Tensor:
    scales = arguments.numbers(name, scale).reshape(-1)
    if len(scales) not in (1, clips):
        raise ValueError(f"{len(scales)} values of {name} for {clips} clips")
    return scales
