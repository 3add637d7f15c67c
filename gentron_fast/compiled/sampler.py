"""A compiled sampler in this process: loaded, called, and called as a pipeline is."""

# Shapes: B clips, T frames, H × W pixels, h × w latents.

import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gentron_fast import arguments
from gentron_fast.compiled.package import part_digests
from gentron_fast.config import LEARNT, MAX_FRAMES, SamplingDefaults
from gentron_fast.guidance import guidance_schedule
from gentron_fast.model import TextCondition
from gentron_fast.text import SUBFOLDERS, TextEncoder
from gentron_fast.vae import VideoVAE, check_finite, to_frames
from gentron_kernels import launch

SCALES = "lambda_t", "lambda_m", "rescale"  # of guidance, in a file's metadata


class CompiledOutput(NamedTuple):
    """As PipelineOutput: frames uint8 (B, T, H, W, 3), None where the file has no VAE; latents fp32
    (B, C, T, h, w); guidance, in one line."""

    frames: Tensor | None
    latents: Tensor
    guidance: str


class CompiledSampler:
    """A compiled sampler in this process: the C++ runtime, with no compilation and no pipeline."""

    def __init__(self, runtime):
        self._runtime = runtime
        self.metadata = json.loads(runtime.header)["metadata"]
        self._tokenizers: TextEncoder | None = None
        keys = {name: key for name, key in LEARNT.items() if key in self.metadata}
        self._learnt = {name: self.metadata[key][0] for name, key in keys.items()}

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, device: str | None = None, sha256: str | None = None
    ) -> "CompiledSampler":
        """Load a file of `export_sampler`. It is machine code: load only what you trust.

        sha256: the digest that the whole file must have; without it the file's own checksums tell
        damage, not authorship. ValueError, in one line, for a file that is damaged, or made for
        another kind of machine, device or torch; it is then not run.
        """
        try:
            from gentron_fast._runtime import Sampler
        except ImportError as error:
            raise ValueError(f"the C++ runtime is not built: {error}") from error
        if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
            raise ValueError(f"a SHA-256 has 64 hexadecimal digits, got {sha256!r}")
        launch.cpu_library()
        pinned = "" if sha256 is None else sha256.lower()
        try:
            return cls(Sampler.load(os.fsencode(path), pinned, str(device or ""), ""))
        except RuntimeError as error:  # torch's own, such as for an unknown device
            raise ValueError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error

    def __call__(
        self,
        text: str | Iterable[str] | TextCondition,
        *,
        negative: str | TextCondition | None = None,
        seed: int | Iterable[int] = 0,
        lambda_t: float | Tensor | None = None,
        lambda_m: float | Tensor | None = None,
        rescale: float | Tensor | None = None,
        frames: int | None = None,
        size: int | Sequence[int] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> CompiledOutput:
        """Sample one clip of each prompt.

        text: prompts, for a file with text encoders, or what encoders made of them; negative
        likewise, one for all clips, in place of the empty prompt. seed: one a clip, or a number
        for all. lambda_t, lambda_m, rescale: numbers, one a clip (B,), or a schedule (S, 1) or
        (S, B); None are the file's. frames and size (pixels) are refused unless the file was made
        for them. ValueError for what does not fit.
        """
        self.check_shape(frames, size)
        text = self._encoded(text)
        batch = next(iter(text.values()))[0].shape[0]
        seeds = arguments.seeds(seed, batch)
        seeds = [seeds] * batch if isinstance(seeds, int) else seeds
        null_text = {} if negative is None else self._encoded(negative)
        scales = [
            arguments.numbers(name, self.metadata[name] if scale is None else scale)
            for name, scale in zip(SCALES, (lambda_t, lambda_m, rescale), strict=True)
        ]
        self._warn_of(dict(zip(SCALES, scales, strict=True)))
        latents = self._runtime.sample(text, null_text, seeds, *scales, on_step)
        frames = self._runtime.decode(latents) if self.metadata["whole"] else None
        own = self.defaults
        distilled = self.metadata["model"].get("guidance_embedding")
        branches = " of one branch, distilled: guidance is its input" if distilled else ""
        return CompiledOutput(
            frames, latents, f"{own.steps} compiled steps of {own.solver}{branches}"
        )

    @property
    def defaults(self) -> SamplingDefaults:
        """Steps and solver, which are fixed, and the guidance of a call that gives none."""
        steps, solver = len(self.metadata["timesteps"]), self.metadata["solver"]
        return SamplingDefaults(steps, solver, *(self.metadata[name] for name in SCALES))

    def _warn_of(self, scales: dict[str, Tensor]) -> None:
        if self.metadata["frames"] == [1]:  # nothing moves
            del scales["lambda_m"]
        for line in arguments.not_learnt(self._learnt, scales):
            warnings.warn(line, stacklevel=3)

    def check_shape(
        self, frames: int | None = None, size: int | Sequence[int] | None = None
    ) -> None:
        """ValueError where the file was made for other frames or another size."""
        asked_for = {}
        if frames is not None:
            asked_for["frames"] = [arguments.whole("frames", frames, 1, MAX_FRAMES)]
        if size is not None:
            asked_for["size"] = list(arguments.size(size))
        for name, asked in asked_for.items():
            if asked != (made := self.metadata[name]):
                wanted, got = (" × ".join(map(str, values)) for values in (made, asked))
                raise ValueError(f"the compiled sampler was made for {name} {wanted}, not {got}")

    def _encoded(self, text) -> dict[str, tuple]:
        if isinstance(text, TextCondition):
            encoded = {name: tuple(e) for name, e in text._asdict().items() if e is not None}
            if not encoded:
                raise ValueError(f"the text is empty, wanted that of {' and '.join(self.encoders)}")
            return encoded
        if not self.metadata["whole"]:
            raise ValueError("this compiled sampler has no text encoders: give a TextCondition")
        if self._tokenizers is None:
            self._tokenizers = self._load_tokenizers()
        prompts = arguments.texts("a prompt", text)
        return self._runtime.encode(self._tokenizers.tokenize(prompts))

    def _load_tokenizers(self) -> TextEncoder:
        own = "|".join(SUBFOLDERS[name][1] for name in self.encoders)
        with tempfile.TemporaryDirectory() as folder:
            for name in self.metadata["tokenizers"]:
                if not re.fullmatch(rf"({own})/\w[\w.-]*", name):
                    raise ValueError(f"the compiled sampler names no tokenizer's file: {name!r}")
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(self._runtime.section(name))
            folders = {name: Path(folder, SUBFOLDERS[name][1]) for name in self.encoders}
            return TextEncoder.tokenizers_alone(folders)

    @property
    def encoders(self) -> list[str]:
        return self.metadata["model"]["encoders"]


class CompiledPipeline:
    """A compiled sampler, called as a GenTronPipeline is.

    folder: the pipeline folder with the text encoders and the VAE, for a file that has none;
    ValueError where they are others than those the file was made for.
    """

    def __init__(
        self, sampler: CompiledSampler, folder: Path | None, device: torch.device | str = "cpu"
    ):
        self.sampler, self.text_encoder, self.vae = sampler, None, None
        if folder is not None:
            wanted = sampler.metadata["parts"]
            for part, digest in part_digests(folder, wanted).items():
                if digest != wanted[part]:
                    raise ValueError(
                        f"{folder / part} is not what the compiled sampler was made for: "
                        "wanted the pipeline folder that it was exported from"
                    )
            dtype = getattr(torch, sampler.metadata["dtype"])
            folders = {
                name: tuple(folder / part for part in SUBFOLDERS[name]) for name in sampler.encoders
            }
            self.text_encoder = TextEncoder.from_pretrained(**folders, dtype=dtype).to(device)
            self.vae = VideoVAE.from_pretrained(folder / "vae", dtype).to(device)

    @torch.no_grad()
    def __call__(
        self,
        prompts: list[str],
        *,
        negative_prompt: str | None = None,
        frames: int | None = None,
        size: Sequence[int] | None = None,
        lambda_t: float | None = None,
        lambda_m: float | None = None,
        rescale: float | None = None,
        guidance_range: tuple[float, float] = (0.0, 1.0),
        seed: Sequence[int] | int = 0,
        callback_on_step_end: Callable[[int, int, Tensor | None], None] | None = None,
        **fixed,
    ) -> CompiledOutput:
        """`GenTronPipeline.__call__`; `fixed`, such as steps, is what the file has decided. The
        callback gets None for the latents."""
        metadata = self.sampler.metadata
        timesteps = metadata["timesteps"]
        scales = {
            name: guidance_schedule(
                metadata[name] if scale is None else scale, len(timesteps), *guidance_range
            )
            for name, scale in (("lambda_t", lambda_t), ("lambda_m", lambda_m))
        }

        def step_done(step: int) -> None:
            if callback_on_step_end is not None:
                callback_on_step_end(step, timesteps[step], None)

        if self.text_encoder is None:
            text, negative = prompts, negative_prompt or None
        else:
            text = self.text_encoder.encode(prompts)
            negative = self.text_encoder.encode([negative_prompt]) if negative_prompt else None
        output = self.sampler(
            text,
            negative=negative,
            seed=seed,
            frames=frames,
            size=size,
            on_step=step_done,
            rescale=rescale,
            **scales,
        )
        if self.vae is None:
            return output
        pixels = self.vae.decode(output.latents.to(self.vae.dtype), clamp=False)
        check_finite(pixels, f"the pixels of the VAE in {self.vae.dtype} are")
        return output._replace(frames=to_frames(pixels).cpu())
