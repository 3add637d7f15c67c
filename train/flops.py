"""How much a step computes, by the model's own count, and how much the device could."""

import time
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gentron_fast.config import GenTronConfig
from gentron_fast.model import EncodedText, GenTron, TextCondition

# Dense bf16 TFLOP/s as the makers' data sheets give them, by part of the device's name.
BF16_PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
}
PRODUCT_SIDE = 1024  # of the product that is timed where no data sheet is at hand


def meta_text(config: GenTronConfig, batch: int, lengths: dict[str, int], device="meta", **factory):
    """Text of so many tokens an encoder, without values."""

    def encoded(length: int, width: int) -> EncodedText:
        tokens = torch.zeros(batch, length, width, device=device, **factory)
        # On the meta device no mask can be looked at.
        mask = None if device == "meta" else torch.ones(batch, length, dtype=torch.bool)
        return EncodedText(tokens, mask, tokens[:, 0])

    parts = {name: encoded(lengths[name], config.text_width(name)) for name in config.encoders}
    return TextCondition(**parts)


def training_flops(
    config: GenTronConfig,
    latents: tuple[int, int, int, int],
    lengths: dict[str, int],
    draws: int = 1,
) -> int:
    """FLOPs of one sample's forward and backward pass, counted by torch on meta tensors.

    latents (C, T, h, w); lengths: text tokens of each encoder; draws: samples that share a text.
    What activation checkpointing computes again does not count.
    """
    with torch.device("meta"):
        model = GenTron(config)
        inputs = torch.zeros(draws, *latents), torch.zeros(draws, dtype=torch.long)
        guidance = torch.ones(draws, 2) if config.guidance_embedding else None
    with FlopCounterMode(display=False) as counter:
        text = meta_text(config, 1, lengths)
        model(*inputs, text, guidance=guidance).sum().backward()
    return counter.get_total_flops() // draws


def parameter_count(module: nn.Module | GenTronConfig) -> int:
    """Parameters of a model, or of the model that a configuration describes."""
    if isinstance(module, GenTronConfig):
        with torch.device("meta"):
            module = GenTron(module)
    return sum(parameter.numel() for parameter in module.parameters())


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the device: its data sheet's for bf16 on a known GPU, else a measured product's."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, tera in BF16_PEAKS.items():
            if all(word in name for word in part.split()):
                return tera * 1e12
    return _product_rate(device, dtype, torch.get_num_threads())


@cache
def _product_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    side = PRODUCT_SIDE * (8 if device.type == "cuda" else 1)
    # No random values: a run that resumes draws no others than one that did not stop.
    a, b = (torch.full((side, side), 0.5, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / min(_seconds(a, b) for _ in range(6))


def _seconds(a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    product = a @ b
    if product.device.type == "cuda":
        torch.cuda.synchronize(product.device)
    return time.perf_counter() - start
