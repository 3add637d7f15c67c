"""How much memory is used and how much there is."""

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a CUDA device, else the most that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
