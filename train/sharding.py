"""A model under ZeRO-3 that no rank ever holds whole, and fp32 masters for bf16 parameters."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_set_local_fp32_param
from torch import Tensor, nn

from gentron_fast.config import GenTronConfig
from gentron_fast.convert.tensors import open_weights
from gentron_fast.layers import TemporalAttention
from gentron_fast.model import WEIGHTS_STEM, GenTron
from gentron_train.checkpoint import shard_of

TEMPORAL = "temporal_attention."  # in the names of what a T2I model lacks
GUIDANCE = "guidance_embed"  # the part that a teacher lacks
# Every part of a model in turn: its name and its fp32 tensors. The same at every call.
Source = Callable[[], Iterator[tuple[str, dict[str, Tensor]]]]


def fresh_weights(config: GenTronConfig, seed: int) -> Source:
    """A new model's weights, drawn as GenTron draws them, a few blocks in memory at a time."""
    period = max(len(config.encoders), 1)

    def parts() -> Iterator[tuple[str, dict[str, Tensor]]]:
        with torch.random.fork_rng(devices=[]):
            for first in range(0, config.depth, period):
                torch.manual_seed(seed + first)
                few = GenTron(replace(config, depth=min(period, config.depth - first)))
                for index, block in enumerate(few.blocks):
                    yield f"blocks.{first + index}", dict(block.state_dict())
                if first == 0:
                    for name, module in few.named_children():
                        if name != "blocks":
                            yield name, dict(module.state_dict())

    return parts


def stored_weights(
    folder: Path, config: GenTronConfig, seed: int, fresh_temporal: bool = False
) -> Source:
    """A saved model's weights; a guidance embedding and temporal layers that it lacks, or all of
    these with fresh_temporal, are fresh."""
    fresh = fresh_weights(config, seed)

    def parts() -> Iterator[tuple[str, dict[str, Tensor]]]:
        stored = open_weights(folder, WEIGHTS_STEM)
        for part, tensors in fresh():
            known = {key for key in tensors if f"{part}.{key}" in stored.specs}
            if fresh_temporal:
                known = {key for key in known if TEMPORAL not in key}
            missing = [key for key in tensors.keys() - known if TEMPORAL not in key]
            if missing and part != GUIDANCE:
                raise ValueError(f"{folder} lacks the tensor {part}.{min(missing)}")
            read = {key: stored.read(f"{part}.{key}").float() for key in known}
            yield part, {key: read.get(key, tensor) for key, tensor in tensors.items()}

    return parts


def sharded_model(
    config: GenTronConfig, source: Source, zero: dict, dtype: torch.dtype, device: torch.device
) -> GenTron:
    """The model of `source`, each part shared out among the ranks before the next one is made.

    zero: DeepSpeed's configuration; dtype: of the parameters, which become ZeRO-3 shards on
    `device`.
    """
    with torch.device("meta"):
        model = GenTron(config)
    for name, tensors in source():
        part = model.get_submodule(name)
        part.to_empty(device=device)
        part.load_state_dict(tensors)
        for module in part.modules():
            if isinstance(module, TemporalAttention):
                module.reset_positions()
        part.to(dtype)
        if not tensors:
            continue
        deepspeed.zero.Init(module=part, config_dict_or_path=zero, dtype=dtype)
    if config.final_table:  # read outside its layer's forward, after which ZeRO-3 would release it
        deepspeed.zero.register_external_parameter(model, model.final.table)
    assert not any(parameter.is_meta for parameter in model.parameters())
    return model


@torch.no_grad()
def restore_masters(module: nn.Module, parts: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
    """fp32 values into the masters, which DeepSpeed makes from rounded parameters.

    module: under a DeepSpeed engine; parts: names of submodules and their tensors, as of a Source.
    """
    for part, tensors in parts:
        owner = module.get_submodule(part)
        for name, tensor in tensors.items():
            parameter = owner.get_parameter(name)
            shard = shard_of(tensor, parameter.ds_tensor.numel(), dist.get_rank())
            safe_set_local_fp32_param(parameter, shard.to(parameter.ds_tensor.device))
