"""Attention of others: scaled_dot_product_attention by backend, and flash-attn where installed."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "cpu": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
    "cuda": [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ],
}
FLASH_MODULES = {"FA4": "flash_attn.cute", "FA3": "flash_attn_interface", "FA2": "flash_attn"}


def sdpa_backends(device: str) -> dict[str, Callable[..., Tensor]]:
    """Name → scaled_dot_product_attention with that backend forced; (B, H, L, Dh) in and out."""

    def forced(backend: SDPBackend, *args, **kwargs) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*args, **kwargs)

    return {
        backend.name.removesuffix("_ATTENTION").lower(): partial(forced, backend)
        for backend in BACKENDS[device]
    }


def flash_attention() -> tuple[Callable[..., Tensor], str] | str:
    """flash-attn's newest function and its generation, or why there is none; (B, L, H, Dh)."""
    for generation, module in FLASH_MODULES.items():
        try:
            function = import_module(module).flash_attn_func
        except (ImportError, AttributeError):
            continue
        return partial(_first, function), generation
    return "flash_attn is not installed"


def _first(function: Callable, *args: Tensor) -> Tensor:
    out = function(*args)  # FA3 and FA4 may add the log-sum-exp
    return out[0] if isinstance(out, tuple) else out
