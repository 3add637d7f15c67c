"""Operators as DiT and its descendants write them, in calls of PyTorch."""

import torch.nn.functional as F

EPS = 1e-6


def modulated(x, shift, scale):
    """x (B, T, N, D), rows (B, D)."""
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return normed * (1 + scale[:, None, None]) + shift[:, None, None]


def residual_modulated(x, y, gate, shift, scale):
    x = x + gate[:, None, None] * y
    return x, modulated(x, shift, scale)
