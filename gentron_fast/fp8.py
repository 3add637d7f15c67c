"""The large products of every block in fp8, by torchao: another function than the definition.

Off unless asked for; bench_generate.py reports the error of a whole clip.
"""

# Shapes: D channels.

import torch
from torch import Tensor, nn

from gentron_fast.model import GenTron

# The weights of the others are folded and merged before the first step.
PROJECTIONS = ("self_attention.qkv", "self_attention.out", "mlp.fc1", "mlp.fc2")
_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def use_fp8(model: GenTron, emulate: bool = False) -> None:
    """Have PROJECTIONS multiply in fp8 (e4m3), activations and weights with one scale a row.

    In place; inference only, and the model can no longer be saved. emulate: round to fp8 and
    multiply as before, which shows the error on any device. ValueError where torchao or the device
    lacks it.
    """
    names = {f"blocks.{index}.{name}" for index in range(len(model.blocks)) for name in PROJECTIONS}
    if emulate:
        for name in names:
            layer = model.get_submodule(name)
            layer.weight = nn.Parameter(fp8_rounded(layer.weight.detach()), requires_grad=False)
            layer.register_forward_pre_hook(_round_input)
        return
    device = model.patch_embed.weight.device
    found = device if device.type != "cuda" else torch.cuda.get_device_capability(device)
    if device.type != "cuda" or found < (8, 9):
        raise ValueError(f"fp8 needs a GPU of compute capability 8.9 or higher, not {found}")
    if model.patch_embed.weight.dtype != torch.bfloat16:
        raise ValueError(f"fp8 goes with bfloat16, not {model.patch_embed.weight.dtype}")
    try:
        from torchao import quantization
    except ImportError:
        raise ValueError("fp8 needs torchao: pip install torchao") from None
    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow()
    )
    quantization.quantize_(model, config, filter_fn=lambda _, name: name in names)


def fp8_rounded(x: Tensor) -> Tensor:
    """x (..., D) as e4m3 with one scale a row keeps it, in x's dtype."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / _LARGEST
    return ((wide / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def _round_input(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (fp8_rounded(inputs[0]),)
