"""PixArt-α and DiT as others keep them: their names of our tensors, and their configurations.

Two layouts of each: diffusers' classes, and the authors' own files.
"""

# Shapes: D width, N patches of an image.

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gentron_fast.config import ENCODERS, GenTronConfig
from gentron_fast.convert.tensors import Checkpoint, Spec
from gentron_fast.layers import patch_positions
from gentron_fast.model import GenTron

NAMED = 8  # tensors that an error lists
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # DiT's S, B, L and XL, by width

# Modules as we, diffusers and the original call them; several are joined row by row. * is a block.
BLOCKS = ("blocks.", "transformer_blocks.", "blocks.")
SHARED = {
    "patch_embed": ("pos_embed.proj", "x_embedder.proj"),
    "*.self_attention.qkv": ("*.attn1.to_q *.attn1.to_k *.attn1.to_v", "*.attn.qkv"),
    "*.self_attention.out": ("*.attn1.to_out.0", "*.attn.proj"),
    "*.mlp.fc1": ("*.ff.net.0.proj", "*.mlp.fc1"),
    "*.mlp.fc2": ("*.ff.net.2", "*.mlp.fc2"),
}
PIXART_EMBED = "adaln_single.emb"
PIXART_NAMES = SHARED | {
    "time_embed.mlp.0": (f"{PIXART_EMBED}.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    "time_embed.mlp.2": (f"{PIXART_EMBED}.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    "size_embed.side.mlp.0": (
        f"{PIXART_EMBED}.resolution_embedder.linear_1",
        "csize_embedder.mlp.0",
    ),
    "size_embed.side.mlp.2": (
        f"{PIXART_EMBED}.resolution_embedder.linear_2",
        "csize_embedder.mlp.2",
    ),
    "size_embed.aspect.mlp.0": (
        f"{PIXART_EMBED}.aspect_ratio_embedder.linear_1",
        "ar_embedder.mlp.0",
    ),
    "size_embed.aspect.mlp.2": (
        f"{PIXART_EMBED}.aspect_ratio_embedder.linear_2",
        "ar_embedder.mlp.2",
    ),
    "caption_projection.t5.0": ("caption_projection.linear_1", "y_embedder.y_proj.fc1"),
    "caption_projection.t5.2": ("caption_projection.linear_2", "y_embedder.y_proj.fc2"),
    "*.adaln": ("adaln_single.linear", "t_block.1"),
    "*.cross_attention.q": ("*.attn2.to_q", "*.cross_attn.q_linear"),
    "*.cross_attention.kv": ("*.attn2.to_k *.attn2.to_v", "*.cross_attn.kv_linear"),
    "*.cross_attention.out": ("*.attn2.to_out.0", "*.cross_attn.proj"),
    "final.table": ("scale_shift_table", "final_layer.scale_shift_table"),
    "final.linear": ("proj_out", "final_layer.linear"),
}
DIT_EMBED = "transformer_blocks.0.norm1.emb"
DIT_NAMES = SHARED | {
    "time_embed.mlp.0": (f"{DIT_EMBED}.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    "time_embed.mlp.2": (f"{DIT_EMBED}.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    "*.adaln": ("*.norm1.linear", "*.adaLN_modulation.1"),
    "final.adaln": ("proj_out_1", "final_layer.adaLN_modulation.1"),
    "final.linear": ("proj_out_2", "final_layer.linear"),
}
# Tensors whose last elements are added: a block's table to the shared adaLN's bias, and the null
# class, the last row of DiT's classes, to the timestep's embedding.
PIXART_ADDED = {"*.adaln.bias": ("*.scale_shift_table", "*.scale_shift_table")}
CLASSES = (
    f"{DIT_EMBED}.class_embedder.embedding_table.weight",
    "y_embedder.embedding_table.weight",
)
DIT_ADDED = {"time_embed.mlp.2.bias": CLASSES}
PIXART, DIT = (PIXART_NAMES, PIXART_ADDED), (DIT_NAMES, DIT_ADDED)
# Fixed positions, which we compute, and the null caption of PixArt's training; diffusers and we
# encode the empty prompt in its place.
LEFT_OUT = {"pos_embed", "caption_projection.y_embedding", "y_embedder.y_embedding"}

# What a diffusers configuration must say for the equations to be ours. Of DiT, diffusers' class has
# another norm_eps (1e-5) and other frequencies of the timestep (over 127) than DiT, whose weights
# were trained with 1e-6 and 128. GenTron has DiT's.
SETTINGS = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
PIXART_SETTINGS = SETTINGS | {
    "norm_type": "ada_norm_single",
    "norm_eps": 1e-6,
    "attention_type": "default",
    "double_self_attention": False,
    "only_cross_attention": False,
}
DIT_SETTINGS = SETTINGS | {"norm_type": "ada_norm_zero"}
# What a GenTron must be to be a PixArt, and the words for what it is otherwise.
EXPORTABLE = {
    "temporal": (False, "temporal layers"),
    "encoders": (("t5",), "text encoders other than one T5"),
    "cross_attention": (True, "no cross-attention"),
    "cross_norm": (False, "a LayerNorm before cross-attention"),
    "pooled_text": (False, "pooled text in the condition"),
    "final_table": (True, "an adaLN of its own in the final layer"),
    "timestep_cos_first": (True, "sinusoids that begin with the sine"),
    "mlp_ratio": (4.0, "an MLP that is not 4 times as wide as the model"),
    "guidance_embedding": (False, "guidance as an input"),
}


@dataclass(frozen=True)
class Source:
    """A model to convert; config is None in the original layout, root a pipeline's folder or None.

    `layout` is the layout's column in the tables of names.
    """

    checkpoint: Checkpoint
    config: dict | None
    root: Path | None

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def layout(self) -> int:
        return 0 if self.config is not None else 1


@dataclass(frozen=True)
class Recipe:
    """One of our tensors: those it is joined from, and one whose last elements are added to it.

    sources: name → shape; without any the tensor starts fresh.
    """

    shape: tuple[int, ...]
    sources: dict[str, tuple[int, ...]]
    added: str | None = None

    def dtype(self, specs: dict[str, Spec]) -> torch.dtype:
        """The sources' dtype; of a sum at least fp32, which a sum of halves needs to be exact."""
        names = [*self.sources, *([self.added] if self.added else [])]
        dtype = torch.float32 if self.added else specs[names[0]].dtype
        for name in names:
            dtype = torch.promote_types(dtype, specs[name].dtype)
        return dtype

    def make(self, checkpoint: Checkpoint) -> Tensor:
        dtype = self.dtype(checkpoint.specs)
        parts = [checkpoint.read(name).to(dtype) for name in self.sources]
        tensor = (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(self.shape)
        if self.added is None:
            return tensor
        added = checkpoint.read(self.added).flatten()[-tensor.numel() :]
        return tensor + added.to(dtype).reshape(self.shape)


def pixart_config(
    source: Source, pixels: int, size: int | None = None, heads: int | None = None
) -> GenTronConfig:
    """GenTron's configuration of a PixArt; pixels: per latent, along a side."""
    if source.config is None:
        tensor_shape(source, "t_block.1.weight", 2, "it is no PixArt")
        fields = original_fields(source, pixels, size, heads)
        fields["t5_width"] = tensor_shape(source, "y_embedder.y_proj.fc1.weight", 2)[1]
        fields["size_embedding"] = "csize_embedder.mlp.0.weight" in source.checkpoint.specs
        # A model with a size embedding computes its positions at the scale of its size; any other
        # reads the table in its file, and so do we where it is there.
        trained = fields["position_base_size"] * fields["patch_size"] * pixels
        scale = max(trained // 512, 1)
        if not fields["size_embedding"] and "pos_embed" in source.checkpoint.specs:
            tensor_shape(source, "pos_embed", 3)
            scale = table_scale(source.checkpoint.read("pos_embed")[0])
        captions = True
    else:
        check_settings(source, PIXART_SETTINGS)
        fields = diffusers_fields(source)
        sample = whole(source, "sample_size")
        scale = source.config.get("interpolation_scale")
        scale = max(sample // 64, 1) if scale is None else scale
        if not isinstance(scale, int | float) or scale <= 0:
            raise ValueError(f"interpolation_scale of {source.path} is {scale!r}, wanted above 0")
        captions = source.config.get("caption_channels") is not None
        cross = whole(source, "cross_attention_dim")
        if captions and cross != fields["width"]:
            raise ValueError(
                f"cross_attention_dim of {source.path} is {cross}, "
                f"wanted {fields['width']}, the width of the projected captions"
            )
        fields["t5_width"] = whole(source, "caption_channels") if captions else cross
        sized = source.config.get("use_additional_conditions")
        fields["size_embedding"] = sample == 128 if sized is None else bool(sized)
    return GenTronConfig(
        **fields,
        encoders=("t5",),
        pooled_text=False,
        caption_projection=captions,
        cross_norm=False,
        timestep_cos_first=True,
        final_table=True,
        position_interpolation=float(scale),
        pixels_per_latent=pixels,
    )


def dit_config(
    source: Source,
    widths: dict[str, int],
    pixels: int,
    size: int | None = None,
    heads: int | None = None,
) -> GenTronConfig:
    """GenTron's configuration of a DiT, for text encoders of these widths; for both without any."""
    if source.config is None:
        tensor_shape(source, CLASSES[1], 2, "it is no DiT")
        fields = original_fields(source, pixels, size, heads)
    else:
        check_settings(source, DIT_SETTINGS)
        fields = diffusers_fields(source)
    return GenTronConfig(
        **fields,
        **{f"{name}_width": width for name, width in widths.items()},
        encoders=tuple(widths) or ENCODERS,
        timestep_cos_first=True,
        pixels_per_latent=pixels,
    )


def diffusers_fields(source: Source) -> dict:
    """The sizes that PixArt and DiT share, from a diffusers configuration."""
    heads, patch, channels = (
        whole(source, key) for key in ("num_attention_heads", "patch_size", "in_channels")
    )
    return {
        "depth": whole(source, "num_layers"),
        "width": heads * whole(source, "attention_head_dim"),
        "heads": heads,
        "patch_size": patch,
        "in_channels": channels,
        "learned_range": learned_range(source, channels, whole(source, "out_channels", channels)),
        "position_base_size": max(whole(source, "sample_size") // patch, 1),
    }


def original_fields(source: Source, pixels: int, size: int | None, heads: int | None) -> dict:
    """The sizes that PixArt and DiT share, from tensors' shapes and what the user adds."""
    width, channels, patch, _ = tensor_shape(source, "x_embedder.proj.weight", 4)
    out = tensor_shape(source, "final_layer.linear.weight", 2)[0] // patch**2
    hidden = tensor_shape(source, "blocks.0.mlp.fc1.weight", 2)[0]
    if heads is None and width not in HEADS:
        raise ValueError(f"{source.path} is {width} wide: --heads must tell how many heads it has")
    if size is None:
        base = math.isqrt(tensor_shape(source, "pos_embed", 3, "--size must tell the size")[1])
    elif size % (patch * pixels):
        raise ValueError(f"--size {size} is no multiple of {patch * pixels}")
    else:
        base = size // (patch * pixels)
    blocks = {key.split(".")[1] for key in source.checkpoint.specs if key.startswith("blocks.")}
    return {
        "depth": len(blocks),
        "width": width,
        "heads": heads or HEADS[width],
        "mlp_ratio": hidden / width,
        "patch_size": patch,
        "in_channels": channels,
        "learned_range": learned_range(source, channels, out),
        "position_base_size": base,
    }


def learned_range(source: Source, channels: int, out_channels: int) -> bool:
    """Whether the model predicts the variance too."""
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{source.path} predicts {out_channels} channels, wanted {channels} or {2 * channels}"
        )
    return out_channels == 2 * channels


def dit_embedders(
    source: Source, config: GenTronConfig, recipes: dict[str, Recipe]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """DiT's embedders of timestep and class: name → shape, and name of a copy → name.

    diffusers keeps a copy of them in every block.
    """
    classes, diffusers = CLASSES[source.layout], source.config is not None
    rows = whole(source, "num_embeds_ada_norm") + 1 if diffusers else None
    rows = rows or tensor_shape(source, classes, 2)[0]
    time = {key: recipe for key, recipe in recipes.items() if key.startswith("time_embed.")}
    shapes = wanted_of(time) | {classes: (rows, config.width)}
    blocks = range(1, config.depth) if diffusers else ()
    copies = {
        name.replace("blocks.0.", f"blocks.{block}."): name for name in shapes for block in blocks
    }
    return shapes | {copy: shapes[name] for copy, name in copies.items()}, copies


def check_settings(source: Source, settings: dict) -> None:
    """Raise ValueError where a diffusers configuration asks for other equations than ours."""
    for key, wanted in settings.items():
        found = source.config.get(key, wanted)
        if found != wanted:
            raise ValueError(f"{key} of {source.path} is {found!r}, wanted {wanted!r}")


def whole(source: Source, key: str, default: int | None = None) -> int:
    """A number above 0 of a diffusers configuration; the default in place of none."""
    value = source.config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} of {source.path} is {value!r}, wanted a whole number above 0")
    return value


def tensor_shape(source: Source, key: str, axes: int, otherwise: str = "") -> tuple[int, ...]:
    """The shape of a tensor that tells something of the model."""
    spec = source.checkpoint.specs.get(key)
    if spec is None:
        raise ValueError(f"{source.path} has no tensor {key}{otherwise and ': '}{otherwise}")
    if len(spec.shape) != axes:
        raise ValueError(
            f"tensor {key} in {source.path} has shape {spec.shape}, wanted {axes} axes"
        )
    return spec.shape


def make_recipes(
    config: GenTronConfig, family: tuple[dict, dict], layout: int
) -> dict[str, Recipe]:
    """How each tensor of a GenTron is made of those of PIXART or DIT; layout 0 is diffusers'."""
    names, added = family
    with torch.device("meta"):
        expected = GenTron(config).state_dict()
    recipes = {}
    for key, tensor in expected.items():
        shape = tuple(tensor.shape)
        block = re.match(r"blocks\.\d+", key)
        general = key if block is None else f"*{key[block.end() :]}"
        theirs = "" if block is None else block[0].replace(BLOCKS[0], BLOCKS[layout + 1])
        module, dot, kind = general.rpartition(".")
        if general in names:  # a table is a parameter, without .weight and .bias
            module, dot, kind = general, "", ""
        if module not in names:
            recipes[key] = Recipe(shape, {})
            continue
        sources = [name.replace("*", theirs) + dot + kind for name in names[module][layout].split()]
        part = (shape[0] // len(sources), *shape[1:])
        if key == "patch_embed.weight":  # a convolution
            part = (shape[0], config.in_channels, config.patch_size, config.patch_size)
        extra = added[general][layout].replace("*", theirs) if general in added else None
        recipes[key] = Recipe(shape, dict.fromkeys(sources, part), extra)
    return recipes


def wanted_of(recipes: dict[str, Recipe]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every source of the recipes."""
    return {name: shape for recipe in recipes.values() for name, shape in recipe.sources.items()}


def check_tensors(checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError that names a misshapen, missing or surplus tensor, with its shapes."""
    specs, path = checkpoint.specs, checkpoint.path
    for name in sorted(wanted.keys() & specs.keys()):
        if specs[name].shape != wanted[name]:
            raise ValueError(
                f"tensor {name} in {path} has shape {specs[name].shape}, wanted {wanted[name]}"
            )
        if not specs[name].dtype.is_floating_point:
            raise ValueError(f"tensor {name} in {path} is {specs[name].dtype}, wanted a float")
    wrong = []
    if missing := sorted(wanted.keys() - specs.keys()):
        wrong.append(f"lacks {len(missing)} tensors: {listed(missing, wanted)}")
    if surplus := sorted(specs.keys() - wanted.keys() - LEFT_OUT):
        shapes = {name: specs[name].shape for name in surplus}
        wrong.append(f"has {len(surplus)} tensors too many: {listed(surplus, shapes)}")
    if wrong:
        raise ValueError(f"{path} {'; it '.join(wrong)}")


def listed(names: list[str], shapes: dict[str, tuple[int, ...]]) -> str:
    """The first names, with their shapes, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"{name} of shape {shapes[name]}" for name in names[:NAMED]) + more


def table_scale(table: Tensor) -> float:
    """The interpolation of a table of positions (N, D): its second column is at 1 / scale."""
    if len(table) < 2:
        return 1.0
    sine, cosine = table[1, 0].double(), table[1, table.shape[1] // 4].double()
    angle = torch.atan2(sine, cosine).item()
    return round(1 / angle, 3) if angle > 0 else 1.0


def check_positions(checkpoint: Checkpoint, config: GenTronConfig) -> None:
    """Raise ValueError unless a file's table of positions, if any, is what GenTron computes."""
    if "pos_embed" not in checkpoint.specs:
        return
    side, table = config.position_base_size, checkpoint.read("pos_embed")
    positions = patch_positions(side, side, config, "cpu")[None]
    if table.shape != positions.shape:
        raise ValueError(
            f"tensor pos_embed in {checkpoint.path} has shape {tuple(table.shape)}, "
            f"wanted {tuple(positions.shape)} for {side} x {side} patches"
        )
    error = (table.float() - positions).abs().max().item()
    if not error < 1e-3:
        raise ValueError(
            f"pos_embed in {checkpoint.path} is no sin-cos table of {side} x {side} patches: "
            f"it is off by {error:.2g}"
        )


def check_exportable(config: GenTronConfig, path: Path) -> None:
    """Raise ValueError that lists what PixArt has no place for."""
    reasons = [
        words for field, (wanted, words) in EXPORTABLE.items() if getattr(config, field) != wanted
    ]
    if config.position_base_size is None:
        reasons.append("positions that count patches")
    if reasons:
        raise ValueError(f"{path} cannot be a PixArt: it has {', '.join(reasons)}")


def pixart_json(config: GenTronConfig) -> dict:
    """The config.json of PixArtTransformer2DModel."""
    scale = config.position_interpolation
    captions = config.caption_projection
    return PIXART_SETTINGS | {
        "_class_name": "PixArtTransformer2DModel",
        "attention_head_dim": config.head_size,
        "caption_channels": config.t5_width if captions else None,
        "cross_attention_dim": config.width if captions else config.t5_width,
        "in_channels": config.in_channels,
        "interpolation_scale": int(scale) if scale == int(scale) else scale,
        "num_attention_heads": config.heads,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.position_base_size * config.patch_size,
        "use_additional_conditions": config.size_embedding,
    }
