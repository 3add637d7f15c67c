"""Linear layers, GELU included: no product of our own, the best there is for the device at hand."""

# Shapes: K channels in, M channels out.

import torch
import torch.nn.functional as F
from torch import Tensor

ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """x·Wᵀ + b, and its tanh-GELU where asked: x (..., K), weight (M, K), bias (M,) → (..., M).

    On the CPU, without gradients, one call of oneDNN: torch's own linear copies the bias first,
    reads and writes the whole result again for the GELU, and takes MKL for fp32, which leaves an
    AMD processor's AVX-512 idle. Compilers fuse both themselves.
    """
    if _one_call(x, weight):
        activation = ("gelu", [], "tanh") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *activation)
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate="tanh") if gelu else out


def _one_call(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype in ONEDNN_DTYPES and x.numel() > 0
