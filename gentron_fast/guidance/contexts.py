"""Forms of text and of the identity mask in which a guided step shares work.

Each attends for itself: `attend(layer, x)` takes the layer of `gentron_fast.layers` and its input,
and gives what the layer's `forward` does, in other products; as a tuple where parts of the batch
have products of their own, which the chain adds where they are.
"""

# Shapes: B batch, T frames, N tokens of a frame, S text tokens, H heads, Dh head size, D width.

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from gentron_fast.layers import Block, CrossAttention, CrossContext, TemporalAttention
from gentron_fast.model import EncodedText, GenTron, TextCondition
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
    parts: tuple

    def attend(self, layer: CrossAttention, x: Tensor) -> tuple[Tensor, ...]:
        """x (B, T, N, D) → each part's own, like its samples of x or rows."""
        parts = zip(x.split(self.sizes), self.parts, strict=True)
        return tuple(layer(part, own) for part, own in parts)


class LeadingMotionFree(NamedTuple):
    """The first `count` samples of a batch are motion-free; merged: the value and the output
    projection of the block's temporal layer as one (`merged_values`)."""

    count: int
    merged: tuple[Tensor, Tensor]

    def attend(self, layer: TemporalAttention, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, T, N, D), positions already added → like x, in two parts where both kinds come."""
        count = x.shape[0] if x.shape[1] == 1 else self.count
        if count == 0:
            return layer(x, False)
        values = temporal_values(x[:count], *layer.value_and_out(), self.merged)
        return (values, layer(x[count:], False)) if count < x.shape[0] else values


Context = CrossContext | FoldedContext | ConstantContext


def block_context(nulls: Sequence[tuple], texts: Sequence[tuple], heads: int):
    """What a block attends to: of the null text's branches, one behind the other, then the text's.

    Each as (context, samples): a context of 1 … samples texts, each for as many samples in a row.
    None without cross-attention.
    """
    parts = [*_joined(nulls, heads), *_joined(texts, heads)]
    if len(parts) == 1:
        return parts[0][0]
    contexts, sizes = zip(*parts, strict=True)
    return BranchContexts(sizes, contexts)


def _joined(parts: Sequence[tuple], heads: int) -> list[tuple]:
    """The same in as few contexts as there can be."""
    if len(parts) < 2 or parts[0][0] is None:
        return list(parts[:1])
    samples = sum(size for _, size in parts)
    if all(context is parts[0][0] for context, _ in parts):
        context = parts[0][0]
        return [(context if context[0].shape[0] == 1 else _repeated(context, len(parts)), samples)]
    kinds = itertools.groupby(parts, lambda part: type(part[0]))
    return [(_cat(own, heads), sum(size for _, size in own)) for own in (list(g) for _, g in kinds)]


def _repeated(context: Context, times: int) -> Context:
    """A context whose samples come `times` times, one whole batch behind the other."""
    return _map(context, lambda tensor: tensor.repeat(times, *(1,) * (tensor.ndim - 1)))


def _cat(parts: list[tuple], heads: int) -> Context:
    """Contexts of one kind as one, texts padded to the longest."""
    contexts = [context for context, _ in parts]
    shares = [size // context[0].shape[0] for context, size in parts]
    if len(set(shares)) > 1:  # of how many samples a text is must be one number
        contexts = [
            _map(context, lambda tensor, share=share: tensor.repeat_interleave(share, 0))
            for context, share in zip(contexts, shares, strict=True)
        ]
    kind = type(contexts[0])
    if kind is ConstantContext:
        return ConstantContext(torch.cat([context.row for context in contexts]))
    if kind is FoldedContext:
        keys, biases, values = (
            _cat_padded([part.unflatten(1, (heads, -1)) for part in column], 2, fill).flatten(1, 2)
            for column, fill in zip(list(zip(*contexts, strict=True))[:3], _FILLS, strict=True)
        )
        return FoldedContext(keys, biases, values, contexts[0].out_bias)
    lengths = [context.k.shape[1] for context in contexts]
    masks = [context.mask for context in contexts]
    mask = None
    if len(set(lengths)) > 1 or any(own is not None for own in masks):
        masks = [
            context.k.new_ones(context.k.shape[:2], dtype=torch.bool) if own is None else own
            for context, own in zip(contexts, masks, strict=True)
        ]
        mask = _cat_padded(masks, 1, False)
    k, v = (_cat_padded(column, 1, 0.0) for column in list(zip(*contexts, strict=True))[:2])
    return CrossContext(k, v, mask)


_FILLS = 0.0, float("-inf"), 0.0  # of keys, key_bias and values, where there is no token


def _cat_padded(tensors: Sequence[Tensor], dim: int, fill: float) -> Tensor:
    """Tensors (B, ...) as one batch, each filled to the greatest length along `dim`."""
    longest = max(tensor.shape[dim] for tensor in tensors)
    shape = [sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:]]
    shape[dim] = longest
    out, start = tensors[0].new_full(shape, fill), 0
    for tensor in tensors:
        out[start : start + len(tensor)].narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
        start += len(tensor)
    return out


def _map(context: Context, function) -> Context:
    """A context with the function applied to what it holds of each text."""
    if isinstance(context, FoldedContext):
        return FoldedContext(*map(function, context[:3]), context.out_bias)
    return type(context)(*(None if tensor is None else function(tensor) for tensor in context))


def mark_length_dynamic(context) -> None:
    """Tell torch.compile that texts of other lengths will come: one compilation serves them all."""
    if isinstance(context, BranchContexts):
        for part in context.parts:
            mark_length_dynamic(part)
    lengths = {CrossContext: ("k", "v", "mask"), FoldedContext: ("keys", "key_bias", "values")}
    for name in lengths.get(type(context), ()):
        if (tensor := getattr(context, name)) is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 1)


def merged_values(layer: TemporalAttention) -> tuple[Tensor, Tensor]:
    """The value and the output projection of a temporal layer as one: weight (D, D), bias (D,)."""
    return merge_values(*layer.value_and_out())


@dataclass(frozen=True, eq=False)
class PreparedText:
    """A text condition of P prompts, with what each block attends to of it.

    pooled: the condition without its tokens; contexts: one a block, None without cross-attention.
    """

    pooled: TextCondition
    contexts: list[Context | None]

    @property
    def batch(self) -> int:
        return self.pooled.batch

    @classmethod
    @torch.no_grad()
    def of(cls, model: GenTron, text: TextCondition) -> "PreparedText":
        """text on the model's device and in its dtype. ValueError where an encoder is missing."""
        text = TextCondition(*map(_trimmed, text))
        pooled = TextCondition(
            *(
                part and EncodedText(part.tokens[:, :0], part.tokens[:, :0, 0].bool(), part.pooled)
                for part in text
            )
        )
        text = model.project_captions(text)
        return cls(pooled, [shared_context(block, text) for block in model.blocks])


def _trimmed(encoded: EncodedText | None) -> EncodedText | None:
    """The text without places that are padding everywhere, and no mask where none is left."""
    if encoded is None or encoded.mask is None:
        return encoded
    encoded = encoded.trim()
    return encoded._replace(mask=None) if encoded.mask.all() else encoded


def shared_context(block: Block, text) -> Context | None:
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
