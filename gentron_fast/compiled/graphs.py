"""The graphs of a compiled sampler: functions of tensors and of a module's weights."""

# Shapes: B clips, k branches of a step, R rows, T frames, N tokens of a frame, S text tokens,
# D width, h × w latents.

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gentron_fast.guidance.contexts import FoldedContext, block_context, fold, merged_values
from gentron_fast.guidance.steps import (
    Branches,
    embed,
    finish,
    leading_motion_free,
    split,
    update,
)
from gentron_fast.layers import CrossContext
from gentron_fast.model import EncodedText, GenTron, TextCondition
from gentron_fast.solvers import SolverTable
from gentron_fast.text import TextEncoder
from gentron_fast.vae import VideoVAE, to_frames


class Graph(NamedTuple):
    """A function of tensors and of a module's weights, to be compiled.

    run(module, *inputs); dims: the dynamic dimensions of each input; weights: the tensors of the
    module that it reads, with their names in the file, "*" standing for the block's number.
    """

    name: str
    module: nn.Module
    run: Callable
    inputs: tuple[Tensor, ...]
    dims: tuple[dict, ...]
    weights: dict[str, str]

    @property
    def per_block(self) -> bool:
        return any("*" in name for name in self.weights.values())

    def describe(self) -> dict:
        """What the runtime checks: dtypes and shapes, a dynamic dimension as [least, most]."""
        weights = zip(self.weights.values(), self._tensors().values(), strict=True)
        return {
            "per_block": self.per_block,
            "inputs": [_kind(*pair) for pair in zip(self.inputs, self.dims, strict=True)],
            "weights": [{"name": name} | _kind(tensor) for name, tensor in weights],
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        return {name: tensors[name].detach() for name in self.weights}

    def compile(self, path: Path) -> None:
        """Through torch.export and AOTInductor into a .pt2 file."""
        weights = tuple(self._tensors().values())
        with torch.no_grad():
            program = torch.export.export(
                _WithWeights(self.module, self.run, list(self.weights)),
                # Clones: torch.export takes two inputs that are one tensor for one input.
                (tuple(tensor.clone() for tensor in self.inputs), weights),
                dynamic_shapes=(self.dims, (None,) * len(weights)),
            )
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _kind(tensor: Tensor, dims: dict | None = None) -> dict:
    shape = list(tensor.shape)
    for i, dim in (dims or {}).items():
        shape[i] = [dim.min, dim.max]
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}


class _WithWeights(nn.Module):
    """forward(inputs, weights). The module is hidden: torch.export would keep its parameters, and
    as inputs they are one copy for all graphs, and one graph serves every block."""

    def __init__(self, module: nn.Module, run: Callable, names: list[str]):
        super().__init__()
        self._hidden = (_Method(module, run),)
        self._names = [f"module.{name}" for name in names]

    def forward(self, inputs, weights):
        named = dict(zip(self._names, weights, strict=True))
        return torch.func.functional_call(self._hidden[0], named, inputs)


class _Method(nn.Module):
    """A function of a module as the forward of a module, for functional_call."""

    def __init__(self, module: nn.Module, run: Callable):
        super().__init__()
        self.module, self.run = module, run

    def forward(self, *inputs):
        return self.run(self.module, *inputs)


def sampling_graphs(
    model: GenTron,
    shape: tuple[int, ...],
    table: SolverTable,
    max_batch: int,
    max_tokens: dict[str, int],
) -> Iterator[Graph]:
    """The graphs that sample latents of `shape` (C, T, h, w)."""
    Dim = torch.export.Dim
    config, weight, blocks = model.config, model.patch_embed.weight, model.blocks
    batch, rows = Dim("batch", min=1, max=max_batch), Dim("rows", min=2, max=1 << 24)
    b, s, r = 3, 5, 7  # of the examples

    def some(*sizes: int, dtype: torch.dtype = weight.dtype) -> Tensor:
        return torch.ones(sizes, dtype=dtype, device=weight.device)

    pooled = config.encoders if config.pooled_text else ()
    inputs = [some(r, dtype=torch.int64), *(some(r, config.text_width(name)) for name in pooled)]
    prefixes = ("time_embed", "size_embed", "pooled_embed", "final.adaln", "final.table")
    if config.guidance_embedding:
        inputs.append(some(r, 2, dtype=torch.float32))
        prefixes += ("guidance_embed",)
    pixels = tuple(side * config.pixels_per_latent for side in shape[2:])
    yield Graph(
        *("condition", model, functools.partial(_condition, pixels=pixels)),
        *(tuple(inputs), ({0: rows},) * len(inputs)),
        _named(model, prefixes),
    )
    inputs, names = (some(r, config.width),), _named(blocks[0], "adaln", "blocks.*.")
    yield Graph("modulation", blocks[0], _modulation, inputs, ({0: rows},), names)
    latents = some(b, *shape, dtype=torch.float32)
    names = _named(model, "patch_embed")
    yield Graph("embed", model, _embed, (latents,), ({0: batch},), names)

    encoders = config.encoders if config.cross_attention else ()
    longest = max((max_tokens[name] for name in encoders), default=0)
    forms = ["folded", "projected"][: 1 + (longest >= config.head_size)] if encoders else [""]
    length = {0: batch, 1: Dim("length", min=2, max=longest)} if encoders else {}
    widths = {config.text_width(name): i for i, name in enumerate(encoders)}
    if config.caption_projection:
        for name in encoders:
            mlp, tokens = model.caption_projection[name], some(b, s, config.text_width(name))
            names = _named(mlp, file=f"caption_projection.{name}.")
            yield Graph(f"caption-{name}", mlp, _caption, (tokens,), (length,), names)
        widths = {config.width: 0}
    for wide, index in widths.items() if encoders else ():  # encoders of one width share graphs
        inputs, block = (some(b, s, wide), some(b, s, dtype=torch.bool)), blocks[index]
        names = _named(block, "cross_attention", "blocks.*.")
        yield Graph(f"fold-{wide}", block, _fold, inputs, (length, length), names)
        if "projected" in forms:
            names = _named(block, "cross_attention.kv", "blocks.*.")
            yield Graph(f"project-{wide}", block, _project, inputs, (length, length), names)

    module, heads, width = _BlockWithMerged(blocks[0]), config.heads, config.width
    patches = shape[2] * shape[3] // config.patch_size**2
    has_motion = config.temporal and shape[1] > 1
    for set_name in branch_sets(has_motion, config.guidance_embedding):
        branches = branches_of(set_name)
        k = sum(branches)
        stream, all_rows = some(k * b, shape[1], patches, width), {0: k * batch if k > 1 else batch}
        stack = stream, stream, some(k * b, width)
        for form in forms:
            inputs, dims = [*stack, some(k * b, 6, width)], [all_rows] * 4
            if form and k > 1:
                own = Dim("null_length", min=2, max=longest)
                inputs += _folded_example(some, 1, s, heads, width)
                dims += [{1: heads * own}] * 3
            if form:
                own = length[1]
                if form == "folded":
                    inputs += _folded_example(some, b, s + 1, heads, width)
                    dims += [{0: batch, 1: heads * own}] * 3
                else:
                    keys = some(b, s + 1, heads, config.head_size)
                    inputs += [keys, keys, some(b, s + 1, dtype=torch.bool)]
                    dims += [{0: batch, 1: own}] * 3
            name = "-".join(filter(None, ("block", set_name, form)))
            run = functools.partial(_block, branches=branches, form=form, has_motion=has_motion)
            yield Graph(name, module, run, tuple(inputs), tuple(dims), module.weights())

        draws = bool((table.rows[:, -1] != 0).any())
        inputs = [*stack, some(k * b, 2, width), latents]
        inputs += [some(*sizes, dtype=torch.float64) for sizes in ((b, 3), (b,), (6,))]
        inputs += [latents] * (1 + draws)
        dims = [all_rows] * 4 + [{0: batch}] * 3 + [{}] + [{0: batch}] * (1 + draws)
        if learns_range(model, table):
            inputs, dims = [*inputs, some(2, dtype=torch.float32)], [*dims, {}]
        run = functools.partial(_step, branches=branches, draws=draws)
        names = _named(model, "final.linear")
        yield Graph(f"step-{set_name}", model, run, tuple(inputs), tuple(dims), names)


def whole_graphs(
    text_encoder: TextEncoder,
    vae: VideoVAE,
    shape: tuple[int, ...],
    max_batch: int,
    max_tokens: dict[str, int],
) -> Iterator[Graph]:
    """Token ids to text, and latents to frames."""
    Dim = torch.export.Dim
    device, batch = next(vae.parameters()).device, Dim("batch", min=1, max=max_batch)
    inputs, dims = [], []
    for name, most in max_tokens.items():
        length = Dim(f"{name}_length", min=2, max=most)
        ids = torch.ones(3, 5 + len(inputs), dtype=torch.int64, device=device)
        inputs += [ids, ids.bool()]
        dims += [{0: batch, 1: length}] * 2
    run = functools.partial(_encode, encoders=tuple(max_tokens))
    names = _named(text_encoder, file="text_encoder.")
    yield Graph("encode", text_encoder, run, tuple(inputs), tuple(dims), names)
    latents = torch.ones(1, *shape, device=device)
    names = _named(vae, ("autoencoder.decoder", "autoencoder.post_quant_conv"), "vae.")
    yield Graph("decode", vae, _decode, (latents,), ({},), names)


def branches_of(set_name: str) -> Branches:
    """The branches of a set as the file names it: "011" for ε(∅,c_M) and ε(c_T,c_M)."""
    return tuple(digit == "1" for digit in set_name)


def learns_range(model: GenTron, table: SolverTable) -> bool:
    return table.log_variance is not None and model.config.learned_range


def branch_sets(has_motion: bool, distilled: bool) -> list[str]:
    """The branches that a compiled step may run, ε(∅,∅), ε(∅,c_M), ε(c_T,c_M), fewest first."""
    if distilled:
        return ["001"]
    return ["001", "011", "111"] if has_motion else ["001", "101"]


class _BlockWithMerged(nn.Module):
    """A block and its temporal layer's merged projections, which are made ahead."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        if block.temporal_attention is not None:
            weight, bias = merged_values(block.temporal_attention)
            self.register_buffer("merged_weight", weight)
            self.register_buffer("merged_bias", bias)

    def weights(self) -> dict[str, str]:
        """As `Graph` takes them; the modulation and the context are made by other graphs."""
        names = {
            f"block.{name}": f"blocks.*.{name}"
            for name, _ in self.block.named_parameters()
            if not name.startswith(("adaln.", "cross_attention.kv."))
        }
        if self.block.temporal_attention is not None:
            names |= {f"merged_{part}": f"blocks.*.merged_{part}" for part in ("weight", "bias")}
            names["block.temporal_attention.positions"] = "temporal_positions"
        return names


def _named(module: nn.Module, prefixes: str | tuple[str, ...] = "", file: str = "") -> dict:
    """The parameters below the prefixes, as `Graph.weights`; `file` comes before their names."""
    names = [name for name, _ in module.named_parameters() if name.startswith(prefixes)]
    return {name: file + name for name in names}


def _condition(model: GenTron, timesteps: Tensor, *pooled: Tensor, pixels: tuple[int, int]):
    """Timesteps (R,), pooled texts (R, P), of a distilled model guidance (R, 2) → the condition c
    (R, D), final rows (R, 2, D)."""
    guidance = None
    if model.config.guidance_embedding:
        *pooled, guidance = pooled
    encoders = model.config.encoders if pooled else ()
    text = {name: EncodedText(None, None, own) for name, own in zip(encoders, pooled, strict=True)}
    size = None
    if model.config.size_embedding:
        size = torch.stack([torch.full_like(timesteps, side) for side in pixels], 1)
    c, time = model.condition(timesteps, TextCondition(**text), size, guidance)
    return c, model.final.modulation(c, time)


def _modulation(block: nn.Module, c: Tensor) -> tuple[Tensor]:
    return (block.modulation(c),)


def _embed(model: GenTron, latents: Tensor) -> tuple[Tensor]:
    return (embed(model, latents),)


def _caption(mlp: nn.Module, tokens: Tensor) -> tuple[Tensor]:
    return (mlp(tokens),)


def _fold(block: nn.Module, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return tuple(fold(block.cross_attention, tokens, mask)[:3])


def _project(block: nn.Module, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.contiguous() for part in block.cross_attention.project(tokens, mask)[:2])


def _block(
    module: _BlockWithMerged,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    modulation: Tensor,
    *contexts: Tensor,
    branches: Branches,
    form: str,
    has_motion: bool,
):
    """One block of a step. contexts: the null text's, folded, where one of its branches runs, then
    the text's in its form; none without cross-attention."""
    block, batch = module.block, x.shape[0] // sum(branches)
    context = motion_free = None
    if contexts:
        out_bias = block.cross_attention.out.bias
        own = contexts[-3:]
        own = FoldedContext(*own, out_bias) if form == "folded" else CrossContext(*own)
        null = FoldedContext(*contexts[:3], out_bias) if len(contexts) > 3 else None
        nulls = [(null, batch)] * (branches[0] + branches[1])
        context = block_context(nulls, [(own, batch)] * branches[2], block.cross_attention.heads)
    if block.temporal_attention is not None:
        merged = module.merged_weight, module.merged_bias
        motion_free = leading_motion_free(_sizes(branches, batch), has_motion, merged)
    x, y, gate = block(x, y, gate, modulation, context, motion_free)
    return x, y, gate.contiguous()


def _step(
    model, x, y, gate, final_rows, latents, weights, rescale, row, x0, *rest, branches, draws
):
    """The final layer, guidance and the solver's update. rest: the noise, where the solver draws
    any, and the bounds (2,) of a learned range."""
    predictions = finish(model, x, y, gate, final_rows, latents.shape[-2:])
    predictions = split(predictions, _sizes(branches, latents.shape[0]))
    noise = rest[0] if draws else None
    bounds = rest[-1] if len(rest) > draws else None
    return update(latents, predictions, weights, row, x0, noise, bounds, rescale)


def _sizes(branches: Branches, batch: int) -> list[int]:
    """Samples of each branch in a step of all samples."""
    return [batch if runs else 0 for runs in branches]


def _encode(text_encoder: TextEncoder, *ids_and_masks: Tensor, encoders: Sequence[str]):
    pairs = zip(ids_and_masks[::2], ids_and_masks[1::2], strict=True)
    text = text_encoder(dict(zip(encoders, pairs, strict=True)))
    return tuple(part for name in encoders for part in getattr(text, name)[::2])


def _decode(vae: VideoVAE, latents: Tensor) -> tuple[Tensor, Tensor]:
    """One clip's latents (1, C, T, h, w) → frames (T, H, W, 3) uint8, whether all pixels were
    finite."""
    pixels = vae.decode(latents.to(vae.dtype), clamp=False)  # infinity is told, too
    return to_frames(pixels)[0].contiguous(), pixels.isfinite().all()


def _folded_example(some: Callable, batch: int, length: int, heads: int, width: int) -> list:
    keys = some(batch, heads * length, width)
    return [keys, some(batch, heads * length), keys]
