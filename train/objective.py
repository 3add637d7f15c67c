"""The training objective: the loss of a batch, and what its backward pass computes again."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts, noop_context_fn

from gentron_fast.config import GenTronConfig
from gentron_fast.diffusion import NoiseSchedule, diffusion_loss, vlb_loss
from gentron_fast.model import GenTron, TextCondition
from gentron_fast.text import TextEncoder, Tokens

# The operators whose outputs are kept when all of a block but its attention is computed again.
ATTENTION = (
    *("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_cudnn_attention"),
    *("aten::_scaled_dot_product_efficient_attention", "gentron::flash4"),
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    *("flash_attn::_flash_attn_forward", "flash_attn_3::fwd"),
    *("gentron::temporal_attention_cuda", "gentron::temporal_attention_cpu"),
)


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
        max_loss_weight: float = 1.0,
        min_snr_gamma: float | None = None,
    ):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.schedule = schedule
        self.dtype = dtype
        self.weights = loss_weights(schedule, max_loss_weight, min_snr_gamma)

    @property
    def config(self) -> GenTronConfig:
        return self.transformer.config

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tokens | TextCondition,
        motion_free: Tensor | bool | None = None,
        noise: Tensor | None = None,
        guidance: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """latents and noise (B, C, T, h, w) fp32, timestep (B,), motion_free (B,) bool → scalar.

        Without noise the latents are noisy already, and the prediction comes back; or, with a
        target like them, a teacher's guided noise, the loss against it. guidance (B, 2).
        """
        noisy = latents if noise is None else self.schedule.add_noise(latents, noise, timestep)
        if self.text_encoder is not None:
            text = self.text_encoder(text)
        if motion_free is True:  # a bool would have a layer read another's weights, ungathered
            motion_free = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
        parameters = self.transformer.patch_embed.weight.dtype
        noisy, text = noisy.to(parameters), text.to(latents.device, parameters)
        autocast = self.dtype != parameters
        with torch.autocast(latents.device.type, self.dtype, enabled=autocast):
            prediction = self.transformer(noisy, timestep, text, motion_free, guidance=guidance)
        goal = noise if target is None else target
        if goal is None:
            return prediction
        weight = self.weights.to(timestep.device)[timestep]
        loss = diffusion_loss(prediction, goal, weight)
        if self.config.learned_range and target is None:
            loss = loss + vlb_loss(self.schedule, prediction, noise, timestep)
        return loss


def loss_weights(schedule: NoiseSchedule, cap: float, min_snr_gamma: float | None) -> Tensor:
    """Weights (T,) fp32 of the ε loss at each timestep.

    1 / ᾱ, at most `cap`, makes it the v loss, or x0's with weight SNR + 1 (Salimans & Ho, 2022,
    section 4); cap 1 is the plain ε loss. With a γ, min-SNR's min(SNR, γ) / SNR instead (Hang et
    al. 2023, section 3.4), which is 1 wherever the SNR is below γ.
    """
    signal = schedule.alphas_cumprod
    if min_snr_gamma is None:
        return (1 / signal).clamp(max=cap).float()
    return (min_snr_gamma * (1 - signal) / signal).clamp(max=1).float()


def checkpoint_activations(transformer: GenTron, mode: str) -> None:
    """Have a model's backward pass recompute nothing ("none"), whole blocks ("full"), or blocks
    but their attention, whose outputs are kept ("attention")."""
    transformer.gradient_checkpointing = mode != "none"
    transformer.checkpoint_contexts = noop_context_fn
    if mode == "attention":
        transformer.checkpoint_contexts = partial(
            create_selective_checkpoint_contexts, attention_operators()
        )


def attention_operators() -> list:
    """Those of ATTENTION that are registered here."""
    pairs = [name.split("::") for name in ATTENTION if torch._C._dispatch_has_kernel(name)]
    return [getattr(getattr(torch.ops, library), name).default for library, name in pairs]
