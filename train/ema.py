"""Exponential moving average of ZeRO-3 parameters, kept on each rank's own shard."""

from pathlib import Path

import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_local_fp32_param
from safetensors.torch import load_file, save_file
from torch import nn

from gentron_train.checkpoint import read_sharded, shard_of


class ShardedEMA:
    """The average of every trainable parameter's fp32 shard; an update communicates nothing.

    The first updates average over fewer steps, decay min(decay, (1 + n) / (10 + n)) at update n,
    so that the random start is forgotten.
    """

    def __init__(self, module: nn.Module, decay: float):
        """`module` is the one that DeepSpeed's ZeRO-3 engine wraps. Its shards are copied now."""
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA decay is {decay}, must be at least 0 and below 1")
        self.decay = decay
        self.updates = 0
        self.parameters = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.shards = {
            name: safe_get_local_fp32_param(parameter).clone()
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the current masters; call it after each step that was applied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [safe_get_local_fp32_param(p) for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.shards.values()), current, 1 - decay)
        self.updates += 1

    def shapes(self) -> dict[str, list[int]]:
        """The whole parameters' shapes."""
        return {name: list(p.ds_shape) for name, p in self.parameters.items()}

    def save(self, path: Path) -> None:
        """Write this rank's shards; each rank has its own file."""
        save_file(self.shards, path, metadata={"updates": str(self.updates)})

    def load(self, paths: list[Path], updates: int) -> None:
        """Read what `save` wrote, after `updates` updates; paths: of all ranks that wrote."""
        self.updates = updates
        if len(paths) == dist.get_world_size():
            for name, shard in load_file(paths[dist.get_rank()]).items():
                self.shards[name].copy_(shard)
            return
        for name, shard in self.shards.items():
            whole = read_sharded(paths, name, self.parameters[name].ds_shape)
            shard.copy_(shard_of(whole, shard.numel(), dist.get_rank()))
