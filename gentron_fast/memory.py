"""How much memory is used and how much there is."""

import resource
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a CUDA device, else the most that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of a CUDA device, or of the machine and the process's group
    (cgroup), whichever ends first."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return free


def held_at_most(function: Callable, device: torch.device) -> int:
    """Bytes of the tensors made while `function` runs that are there at one time, at most."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Living() as living:
        function()
    return living.most


class _Living(TorchDispatchMode):
    """Bytes of the tensors that live; what an operator takes inside is not seen."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._tensors: dict[int, int] = {}  # of each storage, how many tensors lie in it

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if _is_tensor(x)}
        for tensor in tree_iter(result):
            if not _is_tensor(tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._tensors:
                if key in given:
                    continue  # it was there before
                self._tensors[key] = 0
                self.now += size
                self.most = max(self.most, self.now)
            self._tensors[key] += 1
            weakref.finalize(tensor, self._let_go, key, size)
        return result

    def _let_go(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self.now -= size


def _is_tensor(value) -> bool:
    return isinstance(value, Tensor)
