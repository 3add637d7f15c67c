"""Spatial and cross attention: no kernel of our own, PyTorch's scaled_dot_product_attention."""

# Shapes: B batch, L queries, S keys, H heads, Dh head size.

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention over the keys that the mask keeps.

    q (B, L, H, Dh); k, v (B, S, H, Dh); mask (B, S) bool, True where a key is real, at least one
    in each row, or None. Returns (B, L, H · Dh).
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    mask = None if mask is None else mask[:, None, None, :]
    return sdpa(q, k, v, mask).transpose(1, 2).flatten(2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """scaled_dot_product_attention on (B, H, L, Dh), in fp32 where the CPU's gradient wants it.

    The CPU's bf16 backward takes 4 to 9 times as long as its fp32 one (16 to 128 queries).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            q, k, v = (tensor.float() for tensor in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).bfloat16()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
