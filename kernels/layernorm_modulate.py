"""LayerNorm + adaLN modulation, and the chain that joins every two sub-layers of a block.

layernorm_modulate             y = LN(x) · (1 + scale) + shift
residual_layernorm_modulate    x' = x + gate · y,   h = LN(x') · (1 + scale) + shift
"""

# Shapes: R rows of modulation (a sample, or a frame of a sample), L tokens of a row, D width.

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def layernorm_modulate(
    x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None, eps: float = EPS
) -> Tensor:
    """Normalise over the width, then modulate: LN(x) · (1 + scale) + shift.

    x (R, ..., D); shift and scale (R, D) or None. Returns x's shape and dtype. Statistics and
    products are taken in fp32 (fp64 for fp64 input). Source: adaLN of DiT (arXiv 2212.09748).
    """
    return layernorm_modulate_ref(x, shift, scale, eps)


def residual_layernorm_modulate(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """Add a sub-layer's output to the residual stream and prepare the next sub-layer's input.

    x, y (R, ..., D), y None at the first sub-layer; gate, shift, scale (R, D) or None.
    Returns (x + gate · y, LN(x + gate · y) · (1 + scale) + shift), both in x's dtype.
    """
    return residual_layernorm_modulate_ref(x, y, gate, shift, scale, eps)


def layernorm_modulate_ref(
    x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None, eps: float = EPS
) -> Tensor:
    """The definition of `layernorm_modulate`."""
    return _modulated_layernorm(_wide(x), shift, scale, eps).to(x.dtype)


def residual_layernorm_modulate_ref(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    """The definition of `residual_layernorm_modulate`."""
    residual = add_residual_ref(x, y, gate)
    return residual, _modulated_layernorm(_wide(residual), shift, scale, eps).to(x.dtype)


def add_residual_ref(x: Tensor, y: Tensor | None, gate: Tensor | None) -> Tensor:
    """x + gate · y in x's dtype; x (R, ..., D), y like x or None, gate (R, D) or None."""
    if y is None:
        return x
    update = _wide(y) if gate is None else _wide(y) * _rows(gate, x)
    return (_wide(x) + update).to(x.dtype)


def _modulated_layernorm(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float
) -> Tensor:
    out = F.layer_norm(x, x.shape[-1:], eps=eps)
    if scale is not None:
        out = out * (1 + _rows(scale, x))
    return out if shift is None else out + _rows(shift, x)


def _rows(row: Tensor, x: Tensor) -> Tensor:
    """(R, D) -> (R, 1, ..., D), to broadcast over the tokens of x."""
    if row.shape != (x.shape[0], x.shape[-1]):
        raise ValueError(
            f"modulation rows must be {(x.shape[0], x.shape[-1])} for x {tuple(x.shape)}, "
            f"got {tuple(row.shape)}"
        )
    return _wide(row).reshape(row.shape[0], *(1,) * (x.ndim - 2), row.shape[1])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
