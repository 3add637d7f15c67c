"""Forms of text and of the identity mask in which a guided step shares work.

Each attends for itself: `attend(layer, x)` takes the layer of `gentron_fast.layers` and its input,
and gives what the layer's `forward` does, in other products.
"""

# Shapes: B batch, T frames, N tokens of a frame, S text tokens, H heads, Dh head size, D width.

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from gentron_fast.layers import Block, CrossAttention, CrossContext, TemporalAttention
from gentron_kernels.linear import linear
from gentron_kernels.temporal_attention import merge_values, temporal_values


class FoldedContext(NamedTuple):
    """Text of fewer tokens than the head size, with W_Q in its keys and W_O in its values.

    keys, values (B, H · S, D), key_bias (B, H · S), -inf where a token is padding; out_bias (D,).
    A sample may stand for several in a row, as in a CrossContext.
    """

    keys: Tensor
    key_bias: Tensor
    values: Tensor
    out_bias: Tensor

    def attend(self, layer: CrossAttention, x: Tensor) -> Tensor:
        """x (B, T, N, D) → like x."""
        tokens = x.reshape(self.keys.shape[0], -1, x.shape[-1])
        if self.keys.shape[0] == 1:
            scores = linear(tokens, self.keys[0], self.key_bias[0])
        else:
            scores = torch.baddbmm(self.key_bias[:, None], tokens, self.keys.mT)
        weights = scores.unflatten(-1, (layer.heads, -1)).softmax(-1).flatten(-2)
        if self.keys.shape[0] == 1:
            return linear(weights, self.values[0].T, self.out_bias).view_as(x)
        return torch.baddbmm(self.out_bias, weights, self.values).view_as(x)


class ConstantContext(NamedTuple):
    """Text of one token: softmax over one key is 1, and the output is one row (B, D) a sample."""

    row: Tensor

    def attend(self, layer: CrossAttention, x: Tensor) -> Tensor:
        """x (B, T, N, D) → the row of each sample, (B, D)."""
        texts, width = self.row.shape
        return self.row[:, None].expand(-1, x.shape[0] // texts, -1).reshape(-1, width)


class BranchContexts(NamedTuple):
    """Contexts of neighbouring parts of a batch: `sizes` samples each."""

    sizes: tuple[int, ...]
    parts: tuple[CrossContext | FoldedContext | ConstantContext, ...]

    def attend(self, layer: CrossAttention, x: Tensor) -> Tensor:
        """x (B, T, N, D) → like x, or rows (B, D) where every part gives rows."""
        outputs = [
            layer(part, own) for part, own in zip(x.split(self.sizes), self.parts, strict=True)
        ]
        if not all(y.ndim == 2 for y in outputs):
            outputs = [
                y[:, None, None].expand(-1, *x.shape[1:]) if y.ndim == 2 else y for y in outputs
            ]
        return torch.cat(outputs)


class LeadingMotionFree(NamedTuple):
    """The first `count` samples of a batch are motion-free; merged: the value and the output
    projection of the block's temporal layer as one (`merged_values`)."""

    count: int
    merged: tuple[Tensor, Tensor]

    def attend(self, layer: TemporalAttention, x: Tensor) -> Tensor:
        """x (B, T, N, D), positions already added → like x."""
        count = x.shape[0] if x.shape[1] == 1 else self.count
        if count == 0:
            return layer(x, False)
        values = temporal_values(x[:count], *layer.value_and_out(), self.merged)
        return torch.cat([values, layer(x[count:], False)]) if count < x.shape[0] else values


def repeated(context, times: int):
    """A context whose samples come `times` times, one whole batch behind the other."""

    def repeat(tensor):
        return None if tensor is None else tensor.repeat(times, *(1,) * (tensor.ndim - 1))

    if isinstance(context, FoldedContext):
        return FoldedContext(*(repeat(t) for t in context[:3]), context.out_bias)
    return type(context)(*(repeat(t) for t in context))


def mark_length_dynamic(context) -> None:
    """Tell torch.compile that texts of other lengths will come: one compilation serves them all."""
    lengths = {CrossContext: ("k", "v", "mask"), FoldedContext: ("keys", "key_bias", "values")}
    for name in lengths.get(type(context), ()):
        if (tensor := getattr(context, name)) is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)


def merged_values(layer: TemporalAttention) -> tuple[Tensor, Tensor]:
    """The value and the output projection of a temporal layer as one: weight (D, D), bias (D,)."""
    return merge_values(*layer.value_and_out())


def shared_context(block: Block, text) -> CrossContext | FoldedContext | ConstantContext | None:
    """`Block.context`, folded where the text is shorter than the head size."""
    if block.encoder is None:
        return None
    encoded = getattr(text, block.encoder)
    if encoded.tokens.shape[1] < block.cross_attention.head_size:
        return fold(block.cross_attention, encoded.tokens, encoded.mask)
    return block.context(text)


def fold(
    layer: CrossAttention, tokens: Tensor, mask: Tensor | None
) -> FoldedContext | ConstantContext:
    """`CrossAttention.project` with the products of `q` and `out` made ahead.

    scores = (W_Q·x + b_Q)·k / √Dh = x·(W_Qᵀk / √Dh) + b_Q·k / √Dh, and W_O·Σ p·v + b_O =
    Σ p·(W_O·v) + b_O, head by head. Made in fp32 (fp64 for fp64 weights), cast once.
    """
    dtype = layer.q.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    kv = linear(tokens.to(wide), *(p.to(wide) for p in layer.kv.parameters()))
    k, v = rearrange(kv, "b s (two h d) -> two b s h d", two=2, h=layer.heads)
    q_weight, q_bias = (
        rearrange(p.to(wide) * layer.head_size**-0.5, "(h d) ... -> h d ...", h=layer.heads)
        for p in (layer.q.weight, layer.q.bias)
    )
    out_weight = rearrange(layer.out.weight.to(wide), "o (h d) -> h d o", h=layer.heads)
    values = torch.einsum("bshd,hdo->bhso", v, out_weight)
    if tokens.shape[1] == 1:
        return ConstantContext((values.sum((1, 2)) + layer.out.bias.to(wide)).to(dtype))
    keys = torch.einsum("bshd,hdi->bhsi", k, q_weight)
    key_bias = torch.einsum("bshd,hd->bhs", k, q_bias)
    if mask is not None:
        key_bias = key_bias.masked_fill(~mask[:, None], float("-inf"))
    flat = (t.flatten(1, 2).to(dtype) for t in (keys, key_bias, values))
    return FoldedContext(*flat, layer.out.bias)
