"""Tensors from the host to a device."""

import torch
from torch import Tensor


def on_device(
    tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> Tensor:
    """The tensor there. To a GPU it is copied from pinned memory, beside what the CPU does next:
    from other memory the copy would wait for what the GPU has to do before."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, dtype, non_blocking=True)
    return tensor.to(device, dtype)
