"""Linear layers, GELU included: no product of our own, the best there is for the device at hand."""

# Shapes: K channels in, M channels out.

import torch
import torch.nn.functional as F
from torch import Tensor

ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """x·Wᵀ + b, and its tanh-GELU where asked: x (..., K), weight (M, K), bias (M,) → (..., M).

    On the CPU oneDNN is called: torch's own linear takes MKL for fp32, which leaves an AMD
    processor's AVX-512 idle, and without gradients one call does it all, where torch copies the
    bias first and reads and writes the whole result again for the GELU. Compilers fuse both
    themselves.
    """
    if _takes_onednn(x, weight):
        if not torch.is_grad_enabled():
            return _onednn(x, weight, bias, gelu)
        if x.dtype == torch.float32:  # torch takes oneDNN for bf16 itself
            out = _Linear.apply(x, weight, bias)
            return F.gelu(out, approximate="tanh") if gelu else out
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate="tanh") if gelu else out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            # A gradient of the gradient, if one is wanted, goes through torch's product.
            twice = torch.is_grad_enabled()
            dx = grad @ weight if twice else _onednn(grad, weight.T, None)
        if ctx.needs_input_grad[1]:
            dweight = rows.T @ x.reshape(-1, x.shape[-1])  # where MKL is the faster of the two
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, dweight, dbias


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    activation = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *activation)


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype in ONEDNN_DTYPES and x.numel() > 0
