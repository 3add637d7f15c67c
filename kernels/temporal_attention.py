"""Attention over the frames of a clip, read from the (b t) n layout, with the identity-mask path.

Under motion-free guidance a sample's mask is the T × T identity: each token attends to itself
alone, softmax over one key is 1, and the attention returns v.
"""

# Shapes: B batch, T frames, N tokens of a frame, H heads, Dh head size.

import torch
from einops import rearrange
from torch import Tensor

from gentron_kernels.attention import sdpa


def temporal_attention(qkv: Tensor, motion_free: Tensor | bool | None = None) -> Tensor:
    """Attention along T for every (sample, token).

    qkv (B, T, N, 3, H, Dh), the packed projection; motion_free (B,) bool, True where the mask is
    the identity, or one bool for the whole batch, None as False. Returns (B, T, N, H · Dh).
    Source: GenTron (arXiv 2312.04557), section 3.3 and its motion-free guidance.
    """
    return temporal_attention_ref(qkv, motion_free)


def temporal_attention_ref(qkv: Tensor, motion_free: Tensor | bool | None = None) -> Tensor:
    """The definition of `temporal_attention`."""
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be (B, T, N, 3, H, Dh), got {tuple(qkv.shape)}")
    batch, frames = qkv.shape[:2]
    values = qkv[:, :, :, 2].flatten(3)
    if frames == 1 or motion_free is True:
        return values
    q, k, v = rearrange(qkv, "b t n three h d -> three (b n) h t d")
    out = sdpa(q, k, v)
    out = rearrange(out, "(b n) h t d -> b t n (h d)", b=batch)
    if motion_free is None or motion_free is False:
        return out
    if motion_free.shape != (batch,) or motion_free.dtype != torch.bool:
        raise ValueError(
            f"motion_free must be a bool tensor of shape ({batch},), "
            f"got {motion_free.dtype} {tuple(motion_free.shape)}"
        )
    return torch.where(motion_free[:, None, None, None], values, out)
