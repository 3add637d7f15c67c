"""Linear layers, GELU included: the best there is for the device at hand, which is a product of our
own for small weights alone, in bf16 on a CPU with AMX."""

# Shapes: K channels in, M channels out.

import torch
import torch.nn.functional as F
from torch import Tensor

from gentron_kernels import launch

ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """x·Wᵀ + b, and its tanh-GELU where asked: x (..., K), weight (M, K), bias (M,) → (..., M).

    On the CPU oneDNN is called, in inference and in fp32 training: torch's linear takes MKL for
    fp32, which leaves an AMD processor's AVX-512 idle. Without gradients one call does it all,
    where torch copies the bias first and reads and writes the whole result again for the GELU.
    Weights of at most 1 MB in bf16 are multiplied by a loop of our own where the CPU has AMX.
    Needs the C++ operators; without them it is torch's.
    """
    launch.check_tensors(x=x, weight=weight, bias=bias)
    if _takes_onednn(x, weight):
        return torch.ops.gentron.linear_cpu(x, weight, bias, gelu)
    out = F.linear(x, weight, bias)
    return F.gelu(out, approximate="tanh") if gelu else out


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    # In bf16 training torch's linear takes oneDNN itself.
    dtypes = (torch.float32,) if torch.is_grad_enabled() else ONEDNN_DTYPES
    if x.dtype != weight.dtype or x.dtype not in dtypes:
        return False
    return launch.backend(x) == "cpu" and not torch.is_autocast_enabled("cpu")


if launch.cpu_library():

    @torch.library.register_fake("gentron::linear_cpu")
    def _(x, weight, bias, gelu):
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
