"""The video autoencoder: diffusers' AutoencoderKL, applied frame by frame."""
# Shapes: B batch, T frames, H × W pixels, C latent channels, h × w = H × W / factor latents.

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from gentron_fast.model import CONFIG_NAME, WEIGHTS_STEM
from gentron_fast.parts import check_parameters, read_part_config, told_as
from gentron_fast.schema import FLAG, MOST_WIDTH, TEXT, optional, real, several, whole
from gentron_fast.weights import variant

_WIDTH = whole(1, MOST_WIDTH)
VAE_SCHEMA = dict.fromkeys(("in_channels", "out_channels", "latent_channels"), _WIDTH)
VAE_SCHEMA |= dict.fromkeys(("down_block_types", "up_block_types"), several(TEXT, 1, 16))
VAE_SCHEMA |= dict.fromkeys(("force_upcast", "use_quant_conv", "use_post_quant_conv"), FLAG)
VAE_SCHEMA |= {
    "block_out_channels": several(_WIDTH, 1, 16),
    "layers_per_block": whole(1, 64),
    "norm_num_groups": _WIDTH,
    "act_fn": TEXT,
    "scaling_factor": real(1e-6, 1e6),
    "shift_factor": optional(real(-1e6, 1e6)),
}
REASONS = "the weights are damaged, or their numbers go beyond this dtype (try another --dtype)"


class VideoVAE(nn.Module):
    """Pixels to scaled latents and back, one frame at a time.

    Wraps a diffusers AutoencoderKL. The spatial factor, the scaling and the shift of the latents
    are read from its configuration: 8 and 0.18215 are Stable Diffusion's, other checkpoints differ.
    Both directions are differentiable; put sampling under `torch.no_grad()`.
    """

    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder = autoencoder

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, dtype: torch.dtype = torch.float32
    ) -> VideoVAE:
        """Load config.json and the safetensors weights of an AutoencoderKL from a local folder.

        One whose configuration says force_upcast, such as SDXL's, overflows in fp16: it is loaded
        in fp32 then. Raises FileNotFoundError if the folder holds no autoencoder, ValueError if its
        tensors do not fit its configuration.
        """
        folder = Path(folder)
        if not (folder / CONFIG_NAME).is_file():
            raise FileNotFoundError(f"no autoencoder at {folder}: it has no config.json")
        if not list(folder.glob("*.safetensors")):
            raise FileNotFoundError(f"no autoencoder at {folder}: it has no .safetensors weights")
        from diffusers import AutoencoderKL

        config = read_part_config(folder / CONFIG_NAME, VAE_SCHEMA)
        check_parameters(
            "autoencoder", folder, WEIGHTS_STEM, lambda: AutoencoderKL.from_config(config)
        )
        upcast = config.get("force_upcast", True)  # diffusers' default
        with told_as(f"no autoencoder at {folder}"):
            autoencoder, report = AutoencoderKL.from_pretrained(
                folder,
                torch_dtype=_computed_in(dtype, upcast),
                variant=variant(folder, WEIGHTS_STEM),
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        # diffusers would go on with random values in place of what is missing.
        missing, surplus = (
            sorted(report[f"{kind}_keys"])[:4] for kind in ("missing", "unexpected")
        )
        if missing or surplus:
            raise ValueError(
                f"the tensors in {folder} do not fit its config.json: "
                f"missing {missing or 'none'}, surplus {surplus or 'none'}"
            )
        return cls(autoencoder.eval())

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors; the same model, same bytes."""
        self.autoencoder.save_pretrained(folder, safe_serialization=True)
        # diffusers notes where the model was loaded from: a path of this machine, and other bytes
        # after every move.
        path = Path(folder) / "config.json"
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @property
    def factor(self) -> int:
        """Pixels per latent along each side: every level of the encoder but the last halves."""
        return 2 ** (len(self.autoencoder.config.block_out_channels) - 1)

    @property
    def scaling_factor(self) -> float:
        """What encoded latents are multiplied by, about 1 / their standard deviation."""
        return self.autoencoder.config.scaling_factor

    @property
    def shift_factor(self) -> float:
        """What is subtracted from encoded latents before they are scaled; 0 if not configured."""
        return self.autoencoder.config.shift_factor or 0.0

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.config.latent_channels

    @property
    def dtype(self) -> torch.dtype:
        return next(self.autoencoder.parameters()).dtype

    def computed_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype to cast to where `dtype` is asked for: fp32 for fp16 that would overflow."""
        return _computed_in(dtype, self.autoencoder.config.force_upcast)

    def check_size(self, height: int, width: int, patch: int) -> None:
        """Raise ValueError unless height and width, in pixels, are multiples of factor × patch."""
        multiple = self.factor * patch
        if height > 0 and width > 0 and height % multiple == 0 and width % multiple == 0:
            return
        below = [max(side // multiple, 1) * multiple for side in (height, width)]
        above = [max(-(-side // multiple), 1) * multiple for side in (height, width)]
        nearest = " or ".join(dict.fromkeys(f"{h}x{w}" for h, w in (below, above)))
        raise ValueError(
            f"size {height}x{width} does not fit: height and width must be multiples of {multiple} "
            f"(VAE factor {self.factor} x patch {patch}); nearest: {nearest}"
        )

    def encode(self, pixels: Tensor, slice_frames: int | None = None) -> tuple[Tensor, Tensor]:
        """Encode pixels (B, 3, T, H, W) in [-1, 1] to the posterior of the latents.

        Returns mean and standard deviation, each (B, C, T, h, w), scaled: a sample is
        mean + std * noise. `slice_frames` bounds how many frames are encoded at once.
        """
        _, channels, frames, height, width = pixels.shape
        if channels != self.autoencoder.config.in_channels:
            raise ValueError(
                f"pixels have {channels} channels, the VAE takes "
                f"{self.autoencoder.config.in_channels}"
            )
        self.check_size(height, width, patch=1)
        images = rearrange(pixels, "b c t h w -> (b t) c h w").to(self.dtype)
        posteriors = [
            self.autoencoder.encode(part).latent_dist
            for part in images.split(slice_frames or len(images))
        ]
        mean = torch.cat([posterior.mean for posterior in posteriors])
        std = torch.cat([posterior.std for posterior in posteriors])
        mean = (mean - self.shift_factor) * self.scaling_factor
        std = std * self.scaling_factor
        return tuple(rearrange(part, "(b t) c h w -> b c t h w", t=frames) for part in (mean, std))

    def decode(self, latents: Tensor, slice_frames: int = 8, clamp: bool = True) -> Tensor:
        """Decode scaled latents (B, C, T, h, w) to pixels (B, 3, T, H, W) in [-1, 1].

        At most `slice_frames` frames are decoded at once, so that memory does not grow with the
        clip; the slices change nothing in the result. `clamp=False` leaves overshoot, and its
        gradient, in place: for training.
        """
        if latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents have {latents.shape[1]} channels, the VAE takes {self.latent_channels}"
            )
        if slice_frames < 1:
            raise ValueError(f"slice_frames must be at least 1, not {slice_frames}")
        images = rearrange(latents, "b c t h w -> (b t) c h w").to(self.dtype)
        images = images / self.scaling_factor + self.shift_factor
        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            # All layers keep this layout: the small decoder takes 0.8 of its time in fp32, 0.7 in
            # bf16, Stable Diffusion's the same and 0.95.
            images = images.contiguous(memory_format=torch.channels_last)
        pixels = torch.cat(
            [self.autoencoder.decode(part).sample for part in images.split(slice_frames)]
        )
        if clamp:
            pixels = pixels.clamp(-1, 1)
        return rearrange(pixels, "(b t) c h w -> b c t h w", t=latents.shape[2])


def _computed_in(dtype: torch.dtype, force_upcast: bool) -> torch.dtype:
    return torch.float32 if force_upcast and dtype == torch.float16 else dtype


def check_finite(values: Tensor, what: str) -> None:
    """ValueError where a number is none: what fp16 that overflowed or damaged weights made would
    become black frames."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"{what} not finite: {REASONS}")


def to_frames(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, T, H, W) in [-1, 1] → uint8 (B, T, H, W, 3)."""
    pixels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1)
