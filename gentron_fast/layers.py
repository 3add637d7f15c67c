"""The parts of a GenTron block. Each forward reads as the paper's equations."""

# Shapes: B batch, T frames, N tokens of a frame, D width, S text tokens, H heads, Dh head size.

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from gentron_fast.config import MAX_FRAMES, GenTronConfig
from gentron_kernels.attention import attention
from gentron_kernels.layernorm_modulate import (
    Rows,
    add_residual_ref,
    residual_layernorm_modulate,
)
from gentron_kernels.linear import linear
from gentron_kernels.spatial_attention import spatial_attention
from gentron_kernels.temporal_attention import (
    temporal_attention,
    temporal_values,
)

TIMESTEP_CHANNELS = 256
GUIDANCE_STEP = 100  # of the sinusoid, for a guidance scale of 1


def sincos(positions: Tensor, channels: int, cos_first: bool = False) -> Tensor:
    """Sinusoid of positions (...,) in `channels` channels, halves sin | cos; fp32.

    Angles are taken in fp64: position · 10000^(-2i/channels) (Vaswani et al., 2017; as DiT).
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float64, device=positions.device)
    angles = positions.double()[..., None] * torch.exp(-math.log(10000) / half * steps)
    parts = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1).float()


def patch_positions(height: int, width: int, config: GenTronConfig, device) -> Tensor:
    """Fixed 2-D sin-cos positions of a height × width grid of patches, (N, D) fp32.

    The first half of the channels holds the column, the second the row, as in DiT. With
    `position_base_size` the grid is scaled to that many patches a side (PixArt-α).
    """
    row, column = (
        sincos(_grid_line(length, config, device), config.width // 2) for length in (height, width)
    )
    row = row[:, None].expand(-1, width, -1)
    column = column[None].expand(height, -1, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1)


def _grid_line(length: int, config: GenTronConfig, device) -> Tensor:
    line = torch.arange(length, dtype=torch.float64, device=device)
    if config.position_base_size is not None:
        line = line / (length / config.position_base_size)
    return line / config.position_interpolation


class Linear(nn.Linear):
    """nn.Linear with, where asked, the tanh-GELU behind it."""

    def __init__(self, width_in: int, width_out: int, gelu: bool = False):
        super().__init__(width_in, width_out)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.gelu)


class Mlp(nn.Sequential):
    """Linear → activation → Linear, for the timestep, the pooled text and the text tokens."""

    def __init__(self, width_in: int, hidden: int, width_out: int, activation: nn.Module):
        super().__init__(nn.Linear(width_in, hidden), activation, nn.Linear(hidden, width_out))


class TimestepEmbedder(nn.Module):
    """A scalar a sample → (B, width): sinusoid, Linear, SiLU, Linear."""

    def __init__(self, width: int, cos_first: bool):
        super().__init__()
        self.cos_first = cos_first
        self.mlp = Mlp(TIMESTEP_CHANNELS, width, width, nn.SiLU())

    def forward(self, timestep: Tensor) -> Tensor:
        embedding = sincos(timestep, TIMESTEP_CHANNELS, self.cos_first)
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))


class SizeEmbedder(nn.Module):
    """Pixel height, width and aspect ratio → (B, D), a third each (PixArt-α, 1024 px)."""

    def __init__(self, width: int, cos_first: bool):
        super().__init__()
        self.side = TimestepEmbedder(width // 3, cos_first)
        self.aspect = TimestepEmbedder(width // 3, cos_first)

    def forward(self, size: Tensor) -> Tensor:
        height, width = size.unbind(1)
        parts = self.side(height), self.side(width), self.aspect(height / width)
        return torch.cat(parts, dim=1)


class GuidanceEmbedder(nn.Module):
    """The guidance scales λ_T and λ_M of a distilled model → (B, D): the sum of an embedding each.

    As Meng et al. 2023 (arXiv 2210.03142, section 3.1) embed one scale. A scale is embedded as
    GUIDANCE_STEP times itself: the sinusoid was made for timesteps of 0 … 999.
    """

    def __init__(self, width: int, cos_first: bool):
        super().__init__()
        self.text = TimestepEmbedder(width, cos_first)
        self.motion = TimestepEmbedder(width, cos_first)

    def forward(self, guidance: Tensor) -> Tensor:
        """guidance (B, 2): λ_T and λ_M."""
        of_text, of_motion = (GUIDANCE_STEP * guidance).unbind(1)
        return self.text(of_text) + self.motion(of_motion)


class SelfAttention(nn.Module):
    """Attention among the tokens of one frame."""

    def __init__(self, config: GenTronConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)  # rows q | k | v, then heads
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, N, D) → (B, T, N, D)."""
        return self.out(spatial_attention(self.qkv(x).unflatten(-1, (3, self.heads, -1))))


class CrossContext(NamedTuple):
    """A block's projected text: k, v (B, S, H, Dh); mask (B, S) bool, True on real tokens, or None.

    A sample may stand for several of the batch in a row, or for all of it.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None


class CrossAttention(nn.Module):
    """Attention from the tokens of all frames to one encoder's text."""

    def __init__(self, config: GenTronConfig, text_width: int):
        super().__init__()
        self.heads, self.head_size = config.heads, config.head_size
        self.q = Linear(config.width, config.width)
        self.kv = Linear(text_width, 2 * config.width)  # rows k | v, then heads
        self.out = Linear(config.width, config.width)

    def project(self, tokens: Tensor, mask: Tensor | None) -> CrossContext:
        """tokens (B, S, text width), mask (B, S) → the keys and values that `forward` takes."""
        k, v = rearrange(self.kv(tokens), "b s (two h d) -> two b s h d", two=2, h=self.heads)
        return CrossContext(k, v, mask)

    def forward(self, x: Tensor, context) -> Tensor | tuple[Tensor, ...]:
        """x (B, T, N, D) → like x; of a shared form also one row a sample (B, D), or parts.

        context: a CrossContext, or a form of `gentron_fast.guidance.contexts`, which attends for
        itself. The text is repeated neither over frames nor over samples in a row that share it.
        """
        if not isinstance(context, CrossContext):
            return context.attend(self, x)
        tokens = x.reshape(context.k.shape[0], -1, x.shape[-1])
        q = rearrange(self.q(tokens), "b l (h d) -> b l h d", h=self.heads)
        return self.out(attention(q, *context)).view_as(x)


class TemporalAttention(nn.Module):
    """Attention of every token along the frames; the identity mask leaves out(value(x))."""

    def __init__(self, config: GenTronConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.out = Linear(config.width, config.width)
        self.register_buffer("positions", torch.empty(MAX_FRAMES, config.width), persistent=False)
        self.reset_positions()

    def reset_positions(self) -> None:
        """Fill the fixed 1-D sin-cos positions p_t, (MAX_FRAMES, D)."""
        if self.positions.is_meta:  # nothing to fill, and PyTorch would import much to pretend so
            return
        frames, width = self.positions.shape
        steps = torch.arange(frames, device=self.positions.device)
        self.positions = sincos(steps, width).to(self.positions.dtype)

    def forward(self, x: Tensor, motion_free) -> Tensor | tuple[Tensor, ...]:
        """x (B, T, N, D), positions already added → like x; of a shared form also parts.

        motion_free: (B,) bool, one bool for the batch, None as False, or a form of
        `gentron_fast.guidance.contexts`, which attends for itself.
        """
        if not (motion_free is None or isinstance(motion_free, bool | Tensor)):
            return motion_free.attend(self, x)
        if x.shape[1] == 1 or motion_free is True:
            return temporal_values(x, *self.value_and_out())
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        return self.out(temporal_attention(qkv, motion_free))

    def value_and_out(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight (D, D) and bias (D,) of the value projection, then of the output projection."""
        width = self.out.weight.shape[0]
        value = self.qkv.weight[-width:], self.qkv.bias[-width:]
        return *value, self.out.weight, self.out.bias


class FeedForward(nn.Module):
    """Linear → tanh-GELU → Linear, token by token."""

    def __init__(self, config: GenTronConfig):
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.fc1 = Linear(config.width, hidden, gelu=True)
        self.fc2 = Linear(hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


def unbound(modulation: Rows) -> list[Rows]:
    """The shift, scale and gate rows, one operand each, of rows (B, k, D) or (table, index)."""
    if isinstance(modulation, tuple):
        table, index = modulation
        return [(rows, index) for rows in table.unbind(1)]
    return list(modulation.unbind(1))


def frame_numbers(batch: int, frames: int, device: torch.device) -> Tensor:
    """Which row of the temporal positions each frame of a batch has, (batch · frames,) int64."""
    return torch.arange(frames, device=device).repeat(batch)


class Block(nn.Module):
    """Spatial self-attention → cross-attention → temporal self-attention → MLP (paper, fig. 3).

        x += gate_a · SelfAttn(modulate(LN(x), shift_a, scale_a))
        x += CrossAttn(LN(x), text)
        x += TempSelfAttn(LN(x) + p_t)
        x += gate_m · MLP(modulate(LN(x), shift_m, scale_m))

    `forward` takes and returns the stream before the last sub-layer's output is added, so that one
    chain operator joins every two sub-layers, across blocks too.
    """

    def __init__(self, config: GenTronConfig, encoder: str | None):
        super().__init__()
        self.encoder = encoder
        self.cross_norm = config.cross_norm
        self.adaln = nn.Linear(config.width, 6 * config.width)
        self.self_attention = SelfAttention(config)
        if encoder is not None:
            width = config.width if config.caption_projection else config.text_width(encoder)
            self.cross_attention = CrossAttention(config, width)
        self.temporal_attention = TemporalAttention(config) if config.temporal else None
        self.mlp = FeedForward(config)

    def modulation(self, c: Tensor) -> Tensor:
        """Condition c (B, D) → rows (B, 6, D): shift, scale, gate of attention, then of the MLP."""
        return self.adaln(F.silu(c)).unflatten(1, (6, -1))

    def context(self, text) -> CrossContext | None:
        """The block's keys and values of a TextCondition; None without cross-attention."""
        if self.encoder is None:
            return None
        encoded = getattr(text, self.encoder)
        return self.cross_attention.project(encoded.tokens, encoded.mask)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        gate: Rows | None,
        modulation: Rows,
        context,
        motion_free,
        frames: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Rows]:
        """One block on the stream x + gate · y.

        x (B, T, N, D); y like x, the last sub-layer's output not yet added, or None; gate: rows
        (B, D) or None; modulation: rows (B, 6, D), or a table of them (P, 6, D) and an index (B,);
        context of `Block.context`; motion_free (B,) bool, one bool or None; both also in the shared
        forms of `gentron_fast.guidance.contexts`; frames: what `frame_numbers` makes of x's shape,
        where it is at hand. Returns (x, y, gate) of the same kind.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = unbound(modulation)
        x, h = residual_layernorm_modulate(x, y, gate, shift_a, scale_a)
        y, gate = self.self_attention(h), gate_a
        if self.encoder is not None:
            if self.cross_norm:
                x, h = residual_layernorm_modulate(x, y, gate)
            else:
                x = h = add_residual_ref(x, y, gate)
            y, gate = self.cross_attention(h, context), None
        if self.temporal_attention is not None:
            if frames is None:
                frames = frame_numbers(*x.shape[:2], x.device)
            shift = self.temporal_attention.positions, frames
            x, h = residual_layernorm_modulate(x, y, gate, shift)
            y, gate = self.temporal_attention(h, motion_free), None
        x, h = residual_layernorm_modulate(x, y, gate, shift_m, scale_m)
        return x, self.mlp(h), gate_m


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the linear decoder to patches (no convolution)."""

    def __init__(self, config: GenTronConfig):
        super().__init__()
        if config.final_table:
            self.table = nn.Parameter(torch.empty(2, config.width))
        else:
            self.adaln = nn.Linear(config.width, 2 * config.width)
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)

    def modulation(self, c: Tensor, time: Tensor) -> Tensor:
        """Condition c and time embedding (B, D) → shift and scale rows (B, 2, D)."""
        if hasattr(self, "table"):
            return self.table + time[:, None]
        return self.adaln(F.silu(c)).unflatten(1, (2, -1))

    def forward(self, x: Tensor, y: Tensor, gate: Rows, modulation: Rows) -> Tensor:
        """x, y (B, T, N, D), gate and modulation as in `Block.forward` → (B, T, N, p² · C)."""
        return self.linear(residual_layernorm_modulate(x, y, gate, *unbound(modulation))[1])
