"""Spatial and cross attention: no kernel of our own, PyTorch's scaled_dot_product_attention."""

# Shapes: B batch, L queries, S keys, H heads, Dh head size.

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention over the keys that the mask keeps.

    q (B, L, H, Dh); k, v (B, S, H, Dh); mask (B, S) bool, True where a key is real, at least one
    in each row, or None. Returns (B, L, H · Dh).
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    mask = None if mask is None else mask[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)
