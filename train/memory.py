"""What a training run takes of a GPU's memory, on paper, before anything is allocated."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gentron_fast.config import GenTronConfig
from gentron_fast.model import CONFIG_NAME, GenTron
from gentron_fast.text import MAX_TOKENS
from gentron_train.flops import meta_text, parameter_count
from gentron_train.objective import attention_operators
from gentron_train.settings import CHECKPOINTING, Settings, stored_config

# Shapes: latents (C, T, h, w) of a sample.
# DeepSpeed's defaults on CUDA, in elements.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
WHOLE_MODEL = 50_000_000  # parameters up to which gathers cost more than the memory they save
GPUS = (1, 8, 64)
SMALL_SIZE = (64, 64)  # pixels of the small world


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. gathered: whole parameters in use, and the buckets they travel in;
    frozen: text encoders and autoencoder."""

    parameters: int
    gradients: int
    optimizer: int  # fp32 masters and AdamW's two moments
    ema: int
    gathered: int
    frozen: int
    activations: int

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))


def states(parameters: int, ranks: int, itemsize: int) -> dict[str, int]:
    """Bytes of one rank under ZeRO-3 but for the activations; itemsize: of a parameter.

    Gradients are summed, masters, moments and EMA are kept in fp32, each rank its part.
    """
    part = -(-parameters // ranks)
    live = min(parameters, LIVE_PARAMETERS) + min(parameters, REDUCE_BUCKET)
    return {
        "parameters": part * itemsize,
        "gradients": part * 4,
        "optimizer": part * 12,
        "ema": part * 4,
        "gathered": live * itemsize,
    }


def activations(
    config: GenTronConfig,
    latents: tuple[int, int, int, int],
    lengths: dict[str, int],
    batch: int,
    itemsize: int,
) -> dict[str, int]:
    """Bytes that a forward pass of `batch` samples leaves for its backward pass, at the peak, by
    mode of CHECKPOINTING.

    itemsize: of an activation; lengths: text tokens of each encoder. A few blocks and twice as many
    run on fake tensors, and autograd tells what it keeps; the rest are alike.
    """
    period = max(len(config.encoders), 1)
    one, two = (
        _kept(replace(config, depth=depth), latents, lengths, batch)
        for depth in (period, 2 * period)
    )
    return {
        mode: (one[mode] + (two[mode] - one[mode]) * (config.depth - period) // period)
        * itemsize
        // 4
        for mode in CHECKPOINTING
    }


def _kept(config: GenTronConfig, latents, lengths, batch: int) -> dict[str, int]:
    """Bytes in fp32 that a forward pass keeps, with those of a block that is computed again."""
    with FakeTensorMode(), torch.device("cpu"):
        model = GenTron(config)
        text = meta_text(config, batch, lengths, device="cpu")
        inputs = [torch.zeros(batch, *latents), torch.zeros(batch, dtype=torch.long), text]
        if config.temporal:
            inputs.append(torch.zeros(batch, dtype=torch.bool))
        guidance = torch.ones(batch, 2) if config.guidance_embedding else None
        weights = [*model.parameters(), *model.buffers()]
        outside, boundary, attention = (_Storages(weights) for _ in range(3))
        inside = [_Storages(weights) for _ in model.blocks]
        for block, own in zip(model.blocks, inside, strict=True):
            block.forward = partial(_watched, block.forward, own, boundary)
        with outside.keeping(), _AttentionOutputs(attention):
            model(*inputs, guidance=guidance).square().mean()
    again = _Storages.bytes(inside[-1])
    return {
        "none": _Storages.bytes(outside, *inside),
        "attention": _Storages.bytes(outside, boundary, attention) + again,
        "full": _Storages.bytes(outside, boundary) + again,
    }


class _Storages:
    """Memory that tensors lie in, each counted once; that of the weights does not count."""

    def __init__(self, weights: Iterable[Tensor]):
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []  # or another tensor could take its place

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._sizes[storage._cdata] = storage.nbytes()
            self._alive.append(tensor)
        return tensor

    def keeping(self):
        """What autograd saves meanwhile is added."""
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)

    @staticmethod
    def bytes(*parts: "_Storages") -> int:
        """Of all of these together."""
        return sum({key: size for part in parts for key, size in part._sizes.items()}.values())


def _watched(forward, own: _Storages, boundary: _Storages, *inputs):
    tree_map_only(Tensor, boundary.add, inputs)
    with own.keeping():
        return forward(*inputs)


class _AttentionOutputs(TorchDispatchMode):
    """Adds what the operators of ATTENTION return."""

    def __init__(self, storages: _Storages):
        super().__init__()
        self.storages, self.operators = storages, set(attention_operators())

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator in self.operators:
            tree_map_only(Tensor, self.storages.add, result)
        return result


def model_config(settings: Settings, stage: str) -> GenTronConfig:
    """The model that a run of these settings trains."""
    if settings.init is not None and (path := settings.init / "transformer" / CONFIG_NAME).exists():
        config = stored_config(path.parent)
    else:
        config = settings.fresh_model()
    return replace(
        config,
        temporal=config.temporal or stage == "t2v",
        guidance_embedding=config.guidance_embedding or stage == "distill",
    )


def frozen_files(settings: Settings, encoders: tuple[str, ...]) -> dict[str, int | None]:
    """Bytes of the autoencoder's weights and of each text encoder's, as their files hold them;
    None where there are none here."""
    sources = settings.text_sources(encoders)
    folders = {name: sources[name][0] if name in sources else None for name in encoders}
    sizes = {}
    for name, folder in ({"vae": settings.vae} | folders).items():
        files = [] if folder is None else list(Path(folder).glob("*.safetensors"))
        sizes[name] = sum(file.stat().st_size for file in files) if files else None
    return sizes


def report(settings: Settings, stage: str) -> list[str]:
    """Lines for --dry-run: the batch and the memory on 1, 8 and 64 GPUs, and whether it fits.

    ValueError where the size of the samples is not known before the data is read.
    """
    config = model_config(settings, stage)
    size = settings.pixels() or (SMALL_SIZE if settings.preset == "small" else None)
    if size is None:
        raise ValueError("--dry-run reads no data: wanted --size or --buckets, got neither")
    height, width = size
    factor = config.pixels_per_latent
    frames = settings.frames if config.temporal and stage != "t2i" else 1
    latents = (config.in_channels, frames, height // factor, width // factor)
    itemsize = {"fp32": 4, "bf16": 2}
    samples = settings.batch * settings.draws
    kept = activations(config, latents, MAX_TOKENS, samples, itemsize[settings.dtype])
    frozen = frozen_files(settings, config.encoders)
    teacher = parameter_count(config) * itemsize[settings.dtype] if settings.teacher else 0
    room, where = _room(settings)
    title = f"{settings.preset}{'-T2V' if stage == 't2v' else ''}"
    title += f" with {settings.model}" if settings.model else ""
    lines = [
        f"{title}: {parameter_count(config) / 1e6:.1f} M parameters, latents {latents}, "
        f"{samples} samples a micro-step, texts at their longest; GiB of one GPU",
        f"{'GPUs':>4} {'checkpointing':<14}{'parameters':>11}{'gradients':>10}{'optimizer':>10}"
        f"{'EMA':>7}{'gathered':>9}{'frozen':>7}{'activations':>12}{'all':>8}  "
        f"fits in {room:.0f} {where}",
    ]
    for ranks in GPUS:
        shared = states(parameter_count(config), ranks, itemsize[settings.parameters])
        for mode in CHECKPOINTING:
            memory = Memory(
                **shared,
                frozen=sum(filter(None, frozen.values())) + teacher,
                activations=kept[mode],
            )
            parts = [getattr(memory, item.name) / 2**30 for item in fields(memory)]
            total = memory.total / 2**30
            mark = " ←" if mode == settings.checkpoint_activations else ""
            lines.append(
                f"{ranks:>4} {mode:<14}{parts[0]:>11.2f}{parts[1]:>10.2f}{parts[2]:>10.2f}"
                f"{parts[3]:>7.2f}{parts[4]:>9.2f}{parts[5]:>7.2f}{parts[6]:>12.2f}{total:>8.2f}  "
                f"{'yes' if total <= room else 'no'}{mark}"
            )
    lines.append("frozen: the encoders' files, which shards of embeddings and latents do without")
    if teacher:
        lines[-1] += f"; the teacher, {teacher / 2**30:.2f} GiB; what it computes is not counted"
    away = [f"{name} (no files here)" for name, size in frozen.items() if size is None]
    lines.append(
        "not counted: " + ", ".join(["the CUDA context, what NCCL takes, fragmentation", *away])
    )
    for ranks in GPUS:
        try:
            lines.append(f"{settings.batch_line(ranks)}")
        except ValueError as error:
            lines.append(f"{ranks} ranks: {error}")
    return lines


def _room(settings: Settings) -> tuple[float, str]:
    """GiB there are, and where."""
    if settings.gpu_memory is not None:
        return settings.gpu_memory, "(--gpu-memory)"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 2**30, "(this GPU)"
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return pages / 2**30, "(this machine; --gpu-memory asks for a GPU)"
