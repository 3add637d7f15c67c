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
from gentron_kernels.layernorm_modulate import add_residual_ref, residual_layernorm_modulate
from gentron_kernels.linear import linear
from gentron_kernels.spatial_attention import spatial_attention
from gentron_kernels.temporal_attention import (
    merge_values,
    temporal_attention,
    temporal_values,
)

TIMESTEP_CHANNELS = 256


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


class FoldedContext(NamedTuple):
    """Text of fewer tokens than the head size, with W_Q in its keys and W_O in its values.

    keys, values (B, H · S, D), key_bias (B, H · S), -inf where a token is padding; out_bias (D,).
    A sample may stand for several in a row, as in a CrossContext.
    """

    keys: Tensor
    key_bias: Tensor
    values: Tensor
    out_bias: Tensor


class ConstantContext(NamedTuple):
    """Text of one token: softmax over one key is 1, and the output is one row (B, D) a sample."""

    row: Tensor


class BranchContexts(NamedTuple):
    """Contexts of neighbouring parts of a batch: `sizes` samples each."""

    sizes: tuple[int, ...]
    parts: tuple[CrossContext | FoldedContext | ConstantContext, ...]


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
        return CrossContext(*self._split(self.kv(tokens)), mask)

    def fold(self, tokens: Tensor, mask: Tensor | None) -> FoldedContext | ConstantContext:
        """The same as `project`, with the products of `q` and `out` made ahead.

        scores = (W_Q·x + b_Q)·k / √Dh = x·(W_Qᵀk / √Dh) + b_Q·k / √Dh, and W_O·Σ p·v + b_O =
        Σ p·(W_O·v) + b_O, head by head. Made in fp32 (fp64 for fp64 weights), cast once.
        """
        dtype = self.q.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        k, v = self._split(linear(tokens.to(wide), *(p.to(wide) for p in self.kv.parameters())))
        q_weight, q_bias = (
            rearrange(p.to(wide) * self.head_size**-0.5, "(h d) ... -> h d ...", h=self.heads)
            for p in (self.q.weight, self.q.bias)
        )
        out_weight = rearrange(self.out.weight.to(wide), "o (h d) -> h d o", h=self.heads)
        values = torch.einsum("bshd,hdo->bhso", v, out_weight)
        if tokens.shape[1] == 1:
            return ConstantContext((values.sum((1, 2)) + self.out.bias.to(wide)).to(dtype))
        keys = torch.einsum("bshd,hdi->bhsi", k, q_weight)
        key_bias = torch.einsum("bshd,hd->bhs", k, q_bias)
        if mask is not None:
            key_bias = key_bias.masked_fill(~mask[:, None], float("-inf"))
        flat = (t.flatten(1, 2).to(dtype) for t in (keys, key_bias, values))
        return FoldedContext(*flat, self.out.bias)

    def _split(self, kv: Tensor) -> Tensor:
        return rearrange(kv, "b s (two h d) -> two b s h d", two=2, h=self.heads)

    def forward(self, x: Tensor, context) -> Tensor | tuple[Tensor, ...]:
        """x (B, T, N, D) → like x, a row (B, D) for a ConstantContext, a tuple for BranchContexts.

        The text is repeated neither over frames nor over samples in a row that share it.
        """
        if isinstance(context, BranchContexts):
            parts = zip(x.split(context.sizes), context.parts, strict=True)
            return tuple(self(part, own) for part, own in parts)
        if isinstance(context, ConstantContext):
            texts, width = context.row.shape
            return context.row[:, None].expand(-1, x.shape[0] // texts, -1).reshape(-1, width)
        tokens = x.reshape(context[0].shape[0], -1, x.shape[-1])
        if isinstance(context, FoldedContext):
            return self._attend_folded(tokens, context).view_as(x)
        q = rearrange(self.q(tokens), "b l (h d) -> b l h d", h=self.heads)
        return self.out(attention(q, *context)).view_as(x)

    def _attend_folded(self, x: Tensor, context: FoldedContext) -> Tensor:
        if context.keys.shape[0] == 1:
            scores = linear(x, context.keys[0], context.key_bias[0])
        else:
            scores = torch.baddbmm(context.key_bias[:, None], x, context.keys.mT)
        weights = scores.unflatten(-1, (self.heads, -1)).softmax(-1).flatten(-2)
        if context.keys.shape[0] == 1:
            return linear(weights, context.values[0].T, context.out_bias)
        return torch.baddbmm(context.out_bias, weights, context.values)


class LeadingMotionFree(NamedTuple):
    """The first `count` samples of a batch are motion-free; merged: `TemporalAttention.merged` of
    the block, or None."""

    count: int
    merged: tuple[Tensor, Tensor] | None = None


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
        """x (B, T, N, D), positions already added → like x, or in two parts.

        motion_free: (B,) bool, one bool for the batch, None as False, or LeadingMotionFree.
        """
        if isinstance(motion_free, LeadingMotionFree):
            count = x.shape[0] if x.shape[1] == 1 else motion_free.count
            if count == 0:
                return self(x, False)
            values = self.values(x[:count], motion_free.merged)
            return (values, self(x[count:], False)) if count < x.shape[0] else values
        if x.shape[1] == 1 or motion_free is True:
            return self.values(x)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        return self.out(temporal_attention(qkv, motion_free))

    def values(self, x: Tensor, merged: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What the identity mask leaves: out(value(x)), in one product with `merged`."""
        return temporal_values(x, *self._projections(), merged)

    def merged(self) -> tuple[Tensor, Tensor]:
        """The value and the output projection as one: weight (D, D), bias (D,)."""
        return merge_values(*self._projections())

    def _projections(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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

    def context(self, text, fold: bool = False):
        """The block's keys and values of a TextCondition; None without cross-attention.

        fold: in the form of `CrossAttention.fold` where the text is shorter than the head size.
        """
        if self.encoder is None:
            return None
        encoded, attention = getattr(text, self.encoder), self.cross_attention
        short = encoded.tokens.shape[1] < attention.head_size
        project = attention.fold if fold and short else attention.project
        return project(encoded.tokens, encoded.mask)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        modulation: Tensor,
        context: CrossContext | FoldedContext | ConstantContext | BranchContexts | None,
        motion_free: Tensor | bool | LeadingMotionFree | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block on the stream x + gate · y.

        x (B, T, N, D); y like x, the last sub-layer's output not yet added, or None; gate (B, D)
        or None; modulation (B, 6, D); context of `Block.context`; motion_free (B,) bool, one bool
        or None. Returns (x, y, gate) of the same kind.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)
        x, h = residual_layernorm_modulate(x, y, gate, shift_a, scale_a)
        y, gate = self.self_attention(h), gate_a
        if self.encoder is not None:
            if self.cross_norm:
                x, h = residual_layernorm_modulate(x, y, gate)
            else:
                x = h = add_residual_ref(x, y, gate)
            y, gate = _joined(self.cross_attention(h, context), x), None
        if self.temporal_attention is not None:
            frame = torch.arange(x.shape[1], device=x.device).repeat(x.shape[0])
            shift = self.temporal_attention.positions, frame
            x, h = residual_layernorm_modulate(x, y, gate, shift)
            y, gate = _joined(self.temporal_attention(h, motion_free), x), None
        x, h = residual_layernorm_modulate(x, y, gate, shift_m, scale_m)
        return x, self.mlp(h), gate_m


def _joined(y: Tensor | tuple[Tensor, ...], x: Tensor) -> Tensor:
    """A sub-layer's output, in parts of the batch, as one tensor; one row (B, D) stays one."""
    if isinstance(y, Tensor):
        return y
    rows = [part.ndim == 2 for part in y]
    if all(rows):
        return torch.cat(y)
    whole = [
        part[:, None, None].expand(-1, *x.shape[1:]) if is_row else part
        for part, is_row in zip(y, rows, strict=True)
    ]
    return torch.cat(whole)


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

    def forward(self, x: Tensor, y: Tensor, gate: Tensor, modulation: Tensor) -> Tensor:
        """x, y (B, T, N, D) → patches (B, T, N, p² · C)."""
        return self.linear(residual_layernorm_modulate(x, y, gate, *modulation.unbind(1))[1])
