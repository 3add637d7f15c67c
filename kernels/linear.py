"""Linear layers, GELU included: no product of our own, the best there is for the device at hand."""

# Shapes: K channels in, M channels out.

import torch
import torch.nn.functional as F
from torch import Tensor

from gentron_kernels import launch

ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """x·Wᵀ + b, and its tanh-GELU where asked: x (..., K), weight (M, K), bias (M,) → (..., M).

    On the CPU oneDNN is called, in inference and, unless compiled, in fp32 training: torch's linear
    takes MKL for fp32, which leaves an AMD processor's AVX-512 idle. Without gradients one call
    does it all, where torch copies the bias first and reads and writes the whole result again for
    the GELU. Needs the C++ operators; without them it is torch's.
    """
    layer = F.linear
    if _takes_onednn(x, weight):
        if not torch.is_grad_enabled():
            return torch.ops.gentron.linear_cpu(x, weight, bias, gelu)
        # torch takes oneDNN for bf16 itself, and a compiler needs a formula for the gradient.
        if x.dtype == torch.float32 and not torch.compiler.is_compiling():
            layer = _Linear.apply
    out = layer(x, weight, bias)
    return F.gelu(out, approximate="tanh") if gelu else out


class _Linear(torch.autograd.Function):
    """linear_cpu with its gradient. Registered on the operator, it would cost every call of
    inference a turn through Python."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.gentron.linear_cpu(x, weight, bias, False)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled():  # its own gradient is wanted, which oneDNN's has not
                dx = grad @ weight
            else:
                dx = torch.ops.gentron.linear_cpu(grad, weight.T, None, False)
        if ctx.needs_input_grad[1]:
            dweight = rows.T @ x.reshape(-1, x.shape[-1])  # where MKL is the faster of the two
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, dweight, dbias


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    if x.dtype != weight.dtype or x.dtype not in ONEDNN_DTYPES:
        return False
    return launch.backend(x) == "cpu" and not torch.is_autocast_enabled("cpu")


if launch.cpu_library():

    @torch.library.register_fake("gentron::linear_cpu")
    def _(x, weight, bias, gelu):
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
