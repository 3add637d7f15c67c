"""PixArt-α and DiT checkpoints in, PixArt-α out: python -m gentron_fast.convert pixart PATH OUT."""

# Shapes: D width, C latent channels, p patch size, N patches of an image.

import argparse
import math
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gentron_fast.checkpoint import (
    Checkpoint,
    Spec,
    copy_weights,
    new_folder,
    open_safetensors,
    open_torch,
    open_weights,
    write_tensors,
)
from gentron_fast.config import ENCODERS, GenTronConfig
from gentron_fast.diffusion import SCHEDULER_CONFIG, NoiseSchedule
from gentron_fast.generate import refuse, whole_number
from gentron_fast.layers import patch_positions
from gentron_fast.model import CONFIG_NAME, WEIGHTS_NAME, GenTron, read_json, write_json
from gentron_fast.pipeline import INDEX_NAME, SCHEDULER_PATH, model_index
from gentron_fast.text import SUBFOLDERS

NAME = "gentron_fast.convert"
HELP = f"""\
usage: python -m {NAME} pixart PATH OUT [options]
       python -m {NAME} dit PATH OUT [options]
       python -m {NAME} export-diffusers PATH OUT

pixart            PixArt-α to GenTron: the same function, to sample from and to train on
dit               DiT to GenTron: an initialisation, equal to DiT without a class
export-diffusers  a GenTron of PixArt's kind to PixArtTransformer2DModel

PATH              a folder in the diffusers layout, pipeline or transformer (.safetensors or
                  .bin, sharded or not), or a file in the original layout (.pth, .pt or
                  .safetensors); for export-diffusers a GenTron folder
OUT               the folder to write; it must not be there yet
--t5 FOLDER       T5 with its tokenizer, where PATH has none, or in place of PATH's
--clip FOLDER     dit: CLIP with its tokenizer; without --t5 and --clip the model takes both
--vae FOLDER      AutoencoderKL, where PATH has none, or in place of PATH's
--size N          original layout: the side in pixels of the images it was trained on
--heads N         original layout: attention heads, where the width does not tell
--seed N          dit: seed of what starts fresh (0)
--verbose         a traceback where something fails
"""

STEMS = {"vae": ("diffusion_pytorch_model",), "text": ("model", "pytorch_model")}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
)
PIXART_PARTS = {"text_encoder_2": "text_encoder", "tokenizer_2": "tokenizer", "vae": "vae"}
# A block's adaLN bias is the sum of PixArt's shared bias and the block's table. The two are kept
# beside the model, for the way back.
TABLES_STEM = "pixart_tables"
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # DiT's S, B, L and XL, by width
PIXELS_PER_LATENT = 8  # Stable Diffusion's autoencoder, where no other is at hand

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
PIXART = SHARED | {
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
DIT = SHARED | {
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


def convert_pixart(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    t5: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    size: int | None = None,
    heads: int | None = None,
) -> list[str]:
    """Write PixArt-α (arXiv 2310.00426) as a GenTron pipeline folder: the same function.

    path: a diffusers folder or a file in the original layout; t5, vae: folders to take in place of
    the pipeline's own; size (side in pixels) and heads: what an original file does not tell.
    Returns the lines of a report. Raises ValueError or OSError in one line, and leaves no folder.
    """
    source = open_source(Path(path))
    parts = find_parts(source, PIXART_PARTS, {"t5": t5}, vae)
    config = pixart_config(source, vae_factor(parts), size, heads)
    recipes = make_recipes(config, PIXART, PIXART_ADDED, source.layout)
    tables = {recipe.added: (6, config.width) for recipe in recipes.values() if recipe.added}
    check_tensors(source.checkpoint, wanted_of(recipes) | tables)
    if source.config is None and not config.size_embedding and size is None:
        check_positions(source.checkpoint, config)
    check_parts(parts, config)
    scheduler = find_scheduler(source.root)
    with new_folder(Path(out)) as folder:
        write_model(folder / "transformer", config, recipes, source.checkpoint)
        keep_tables(folder / "transformer", config, recipes, source.checkpoint)
        state = write_pipeline(folder, config, parts, scheduler)
    left_out = ", ".join(sorted(LEFT_OUT & source.checkpoint.specs.keys()))
    return [
        f"wrote        {out}: {config.depth} blocks of width {config.width}",
        *group("converted", recipes),
        *([f"left out     {left_out}"] if left_out else []),
        state,
    ]


def convert_dit(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    t5: str | os.PathLike | None = None,
    clip: str | os.PathLike | None = None,
    vae: str | os.PathLike | None = None,
    size: int | None = None,
    heads: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Write a GenTron that starts as DiT (arXiv 2212.09748) without a class, whatever the text.

    path, vae, size, heads and errors as for `convert_pixart`; t5, clip: the text encoders the model
    is made for, both in their usual widths when neither is given. Cross-attention and pooled text,
    which DiT lacks, start fresh from the seed with an output of zero. Returns a report's lines.
    """
    source = open_source(Path(path))
    parts = find_parts(source, {"vae": "vae"}, {"clip": clip, "t5": t5}, vae)
    config = dit_config(source, parts, vae_factor(parts), size, heads)
    recipes = make_recipes(config, DIT, DIT_ADDED, source.layout)
    classes = class_rows(source)
    embedder = wanted_of({key: r for key, r in recipes.items() if key.startswith("time_embed.")})
    embedder[CLASSES[source.layout]] = (classes, config.width)
    repeated = {}
    if source.config is not None:  # diffusers keeps a copy of the one embedder in every block
        repeated = {
            name.replace("blocks.0.", f"blocks.{block}."): name
            for name in embedder
            for block in range(1, config.depth)
        }
    copies = {copy: embedder[name] for copy, name in repeated.items()}
    check_tensors(source.checkpoint, wanted_of(recipes) | embedder | copies)
    for copy, name in repeated.items():
        if not torch.equal(source.checkpoint.read(copy), source.checkpoint.read(name)):
            raise ValueError(f"tensor {copy} in {path} differs from {name}, of which it is a copy")
    if source.config is None:
        check_positions(source.checkpoint, config)
    check_parts(parts, config)
    scheduler = find_scheduler(source.root)
    with new_folder(Path(out)) as folder:
        write_model(folder / "transformer", config, recipes, source.checkpoint, seed)
        state = write_pipeline(folder, config, parts, scheduler)
    return [
        f"wrote        {out}: {config.depth} blocks of width {config.width}",
        *group("copied", {key: recipe for key, recipe in recipes.items() if recipe.sources}),
        *group("fresh", {key: recipe for key, recipe in recipes.items() if not recipe.sources}),
        f"folded       class {classes - 1}, the null class, into the bias of time_embed.mlp.2",
        f"left out     classes 0 to {classes - 2}",
        state,
    ]


def export_diffusers(path: str | os.PathLike, out: str | os.PathLike) -> list[str]:
    """Write a GenTron as PixArtTransformer2DModel: a pipeline folder becomes a PixArtAlphaPipeline.

    What `convert_pixart` made gives PixArt's tensors back as they were. Returns a report's lines.
    ValueError says what stands in the way, where PixArt has no place for something.
    """
    path = Path(path)
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    values = read_json(folder / CONFIG_NAME)
    if values.get("_class_name") != "GenTron":
        raise ValueError(f"{folder} holds a {values.get('_class_name')}, wanted a GenTron")
    config = GenTronConfig.from_dict(values)
    check_exportable(config, path)
    checkpoint = open_weights(folder, WEIGHTS_NAME.removesuffix(".safetensors"))
    recipes = make_recipes(config, PIXART, PIXART_ADDED, 0)
    check_tensors(checkpoint, {key: recipe.shape for key, recipe in recipes.items()})
    check_shared_adaln(checkpoint, config)
    specs, read = split_tensors(checkpoint, config, recipes)
    parts = {theirs: path / ours for ours, theirs in PIXART_PARTS.items() if (path / ours).is_dir()}
    scheduler = find_scheduler(path)
    with new_folder(Path(out)) as aside:
        target = aside / folder.relative_to(path)
        target.mkdir(exist_ok=True)
        write_tensors(target / WEIGHTS_NAME, specs, read)
        write_json(target / CONFIG_NAME, pixart_json(config))
        state = "transformer  no pipeline: text encoder, tokenizer or VAE is not there"
        copy_parts(aside, parts)
        if len(parts) == len(PIXART_PARTS):
            write_json(aside / SCHEDULER_PATH, scheduler)
            write_json(aside / INDEX_NAME, pixart_index(parts, scheduler))
            state = "pipeline     for PixArtAlphaPipeline.from_pretrained"
    return [f"wrote        {out}: PixArtTransformer2DModel, {config.depth} blocks", state]


# The model to convert, and its configuration.


def open_source(path: Path) -> Source:
    """The model in a folder or a file. FileNotFoundError or ValueError where there is none."""
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        config = read_json(folder / CONFIG_NAME)
        if config.get("_class_name") == "GenTron":
            raise ValueError(f"{folder} is a GenTron already")
        checkpoint = open_weights(folder, *STEMS["vae"])
        return Source(checkpoint, config, path if folder != path else None)
    if not path.is_file():
        raise FileNotFoundError(f"no such file or folder: {path}")
    opened = open_safetensors if path.suffix == ".safetensors" else open_torch
    checkpoint = opened(path, [path])
    if "pos_embed.proj.weight" in checkpoint.specs:
        raise ValueError(f"{path} is in the diffusers layout: give its folder, with {CONFIG_NAME}")
    return Source(checkpoint, None, None)


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
        # reads the table in its file, and so do we unless told the size.
        trained = fields["position_base_size"] * fields["patch_size"] * pixels
        scale = max(trained // 512, 1)
        if not fields["size_embedding"] and size is None:
            scale = table_scale(source.checkpoint, fields["width"])
        captions = True
    else:
        check_settings(source, PIXART_SETTINGS)
        fields = diffusers_fields(source)
        sample = whole(source, "sample_size")
        scale = source.config.get("interpolation_scale") or max(sample // 64, 1)
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
    parts: dict[str, Path],
    pixels: int,
    size: int | None = None,
    heads: int | None = None,
) -> GenTronConfig:
    """GenTron's configuration of a DiT, for the text encoders among the parts, else for both."""
    if source.config is None:
        tensor_shape(source, CLASSES[1], 2, "it is no DiT")
        fields = original_fields(source, pixels, size, heads)
    else:
        check_settings(source, DIT_SETTINGS)
        fields = diffusers_fields(source)
    encoders = tuple(name for name in ENCODERS if SUBFOLDERS[name][0] in parts)
    for name in encoders:
        fields[f"{name}_width"] = text_width(parts[SUBFOLDERS[name][0]])
    return GenTronConfig(
        **fields,
        encoders=encoders or ENCODERS,
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


def class_rows(source: Source) -> int:
    """Rows of DiT's table of classes, the null class among them."""
    if source.config is None:
        return tensor_shape(source, CLASSES[1], 2)[0]
    return whole(source, "num_embeds_ada_norm") + 1


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


# Tensors.


def make_recipes(config: GenTronConfig, names: dict, added: dict, layout: int) -> dict[str, Recipe]:
    """How each tensor of a GenTron is made from the tensors of a layout."""
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
    missing = sorted(wanted.keys() - specs.keys())
    if missing:
        listed = ", ".join(f"{name} of shape {wanted[name]}" for name in missing[:4])
        raise ValueError(f"{path} lacks {len(missing)} tensors: {listed}")
    surplus = sorted(specs.keys() - wanted.keys() - LEFT_OUT)
    if surplus:
        listed = ", ".join(f"{name} of shape {specs[name].shape}" for name in surplus[:4])
        raise ValueError(f"{path} has {len(surplus)} tensors too many: {listed}")


def table_scale(checkpoint: Checkpoint, width: int) -> float:
    """The interpolation of a table of positions (1, N, D): its second column is at 1 / scale."""
    table = checkpoint.read("pos_embed")[0].double()
    if len(table) < 2:
        return 1.0
    angle = torch.atan2(table[1, 0], table[1, width // 4]).item()
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
            f"wanted {tuple(positions.shape)}"
        )
    error = (table.float() - positions).abs().max().item()
    if not error < 1e-3:
        raise ValueError(
            f"pos_embed in {checkpoint.path} is no sin-cos table of {side} x {side} patches: "
            f"it is off by {error:.2g}"
        )


def initial(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """What DiT lacks: initialised as GenTron does, the last layer before the sum at zero."""
    tensor = torch.zeros(shape)
    if key.endswith(".weight") and not re.search(r"cross_attention\.out|pooled_embed\.\w+\.2", key):
        nn.init.xavier_uniform_(tensor, generator=generator)
    return tensor


def write_model(
    folder: Path,
    config: GenTronConfig,
    recipes: dict[str, Recipe],
    checkpoint: Checkpoint,
    seed: int = 0,
) -> None:
    """The folder of the transformer, tensor by tensor."""
    generator = torch.Generator().manual_seed(seed)
    fresh = recipes["patch_embed.weight"].dtype(checkpoint.specs)
    specs = {
        key: Spec(recipe.dtype(checkpoint.specs) if recipe.sources else fresh, recipe.shape)
        for key, recipe in recipes.items()
    }

    def make(key: str) -> Tensor:
        if recipes[key].sources:
            return recipes[key].make(checkpoint)
        return initial(key, recipes[key].shape, generator).to(fresh)

    folder.mkdir()
    write_tensors(folder / WEIGHTS_NAME, specs, make)
    write_json(folder / CONFIG_NAME, {"_class_name": "GenTron"} | config.to_dict())


def keep_tables(
    folder: Path, config: GenTronConfig, recipes: dict[str, Recipe], checkpoint: Checkpoint
) -> None:
    """The shared adaLN's bias and the blocks' tables, under diffusers' names."""
    theirs = make_recipes(config, PIXART, PIXART_ADDED, 0)
    where = {}
    for key, recipe in recipes.items():
        if recipe.added:
            where |= zip(theirs[key].sources, recipe.sources, strict=True)
            where[theirs[key].added] = recipe.added
    specs = {name: checkpoint.specs[source] for name, source in where.items()}
    write_tensors(
        folder / f"{TABLES_STEM}.safetensors", specs, lambda name: checkpoint.read(where[name])
    )


def split_tensors(
    checkpoint: Checkpoint, config: GenTronConfig, recipes: dict[str, Recipe]
) -> tuple[dict[str, Spec], Callable[[str], Tensor]]:
    """The specs and a reader of PixArt's tensors, in diffusers' names, from those of a GenTron."""
    pieces = {
        name: (key, index, shape)
        for key, recipe in recipes.items()
        for index, (name, shape) in enumerate(recipe.sources.items())
    }
    tables = read_tables(checkpoint, config, recipes)
    specs = {
        name: Spec(checkpoint.specs[key].dtype, shape) for name, (key, _, shape) in pieces.items()
    }
    specs |= {name: Spec(table.dtype, tuple(table.shape)) for name, table in tables.items()}

    def read(name: str) -> Tensor:
        if name in tables:
            return tables[name]
        key, index, shape = pieces[name]
        return checkpoint.read(key).chunk(len(recipes[key].sources))[index].reshape(shape)

    return specs, read


def read_tables(
    checkpoint: Checkpoint, config: GenTronConfig, recipes: dict[str, Recipe]
) -> dict[str, Tensor]:
    """The shared adaLN's bias and the blocks' tables: those that were kept, where their sums are
    the model's still; else a bias of zero, and the blocks' own biases as their tables."""
    sums = {key: recipe for key, recipe in recipes.items() if recipe.added}
    tables = {recipe.added: (6, config.width) for recipe in sums.values()}
    (bias,) = wanted_of(sums)
    if (checkpoint.path / f"{TABLES_STEM}.safetensors").is_file():
        kept = open_weights(checkpoint.path, TABLES_STEM)
        check_tensors(kept, wanted_of(sums) | tables)
        if all(
            torch.equal(recipe.make(kept).to(checkpoint.specs[key].dtype), checkpoint.read(key))
            for key, recipe in sums.items()
        ):
            return {name: kept.read(name) for name in kept.specs}
    own = {
        recipe.added: checkpoint.read(key).reshape(tables[recipe.added])
        for key, recipe in sums.items()
    }
    return own | {bias: torch.zeros_like(next(iter(own.values()))).flatten()}


def check_exportable(config: GenTronConfig, path: Path) -> None:
    """Raise ValueError that lists what PixArt has no place for."""
    reasons = [
        words for field, (wanted, words) in EXPORTABLE.items() if getattr(config, field) != wanted
    ]
    if config.position_base_size is None:
        reasons.append("positions that count patches")
    if reasons:
        raise ValueError(f"{path} cannot be a PixArt: it has {', '.join(reasons)}")


def check_shared_adaln(checkpoint: Checkpoint, config: GenTronConfig) -> None:
    """Raise ValueError unless all blocks have one adaLN weight, as PixArt's."""
    first = "blocks.0.adaln.weight"
    for block in range(1, config.depth):
        name = f"blocks.{block}.adaln.weight"
        if not torch.equal(checkpoint.read(name), checkpoint.read(first)):
            raise ValueError(
                f"{checkpoint.path} cannot be a PixArt, whose blocks share one adaLN weight: "
                f"{name} differs from {first}, as after training"
            )


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


# What stands beside the transformer: text encoders, tokenizers, VAE, scheduler.


def find_parts(source: Source, carried: dict, encoders: dict, vae) -> dict[str, Path]:
    """Our subfolder → where its content is: a folder the user names, else the pipeline's own.

    carried: our subfolder → the pipeline's; encoders: "clip" or "t5" → a folder or None.
    """
    named = {sub: folder for name, folder in encoders.items() for sub in SUBFOLDERS[name]}
    named = {sub: Path(folder) for sub, folder in (named | {"vae": vae}).items() if folder}
    for folder in named.values():
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder}")
    if source.root is None:
        return named
    own = {ours: source.root / theirs for ours, theirs in carried.items()}
    return {sub: folder for sub, folder in own.items() if folder.is_dir()} | named


def find_scheduler(root: Path | None) -> dict:
    """The scheduler's configuration of a pipeline, else ours. ValueError where we cannot use it."""
    path = None if root is None else root / SCHEDULER_PATH
    scheduler = read_json(path) if path is not None and path.is_file() else SCHEDULER_CONFIG
    NoiseSchedule.from_config(scheduler)
    return scheduler


def check_parts(parts: dict[str, Path], config: GenTronConfig) -> None:
    """Raise ValueError or FileNotFoundError where a part lacks files or does not fit the model."""
    for name, folder in parts.items():
        if not name.startswith("tokenizer"):
            open_weights(folder, *stems(name))
        elif not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise FileNotFoundError(f"no tokenizer in {folder}: wanted {TOKENIZER_FILES[0]}")
    for encoder in config.encoders:
        model, tokenizer = SUBFOLDERS[encoder]
        if model not in parts:
            continue
        if tokenizer not in parts:
            raise FileNotFoundError(f"no tokenizer beside {parts[model]}")
        wanted, width = config.text_width(encoder), text_width(parts[model])
        if width != wanted:
            raise ValueError(
                f"the {encoder} text encoder in {parts[model]} is {width} wide, "
                f"the transformer takes {wanted}"
            )
    if "vae" in parts:
        channels = read_json(parts["vae"] / CONFIG_NAME).get("latent_channels")
        if channels != config.in_channels:
            raise ValueError(
                f"the VAE in {parts['vae']} makes {channels} latent channels, "
                f"the transformer takes {config.in_channels}"
            )


def stems(part: str) -> tuple[str, ...]:
    """What the files of a part's weights are called, without ending."""
    return STEMS["vae" if part == "vae" else "text"]


def text_width(folder: Path) -> int:
    """Width of a text encoder's tokens, by its config.json; a whole CLIP's has a text_config."""
    config = read_json(folder / CONFIG_NAME)
    config = config.get("text_config", config)
    width = config.get("d_model", config.get("hidden_size"))
    if not isinstance(width, int):
        raise ValueError(f"{folder / CONFIG_NAME} is of no text encoder: it has no width")
    return width


def vae_factor(parts: dict[str, Path]) -> int:
    """Pixels per latent along each side."""
    if "vae" not in parts:
        return PIXELS_PER_LATENT
    channels = read_json(parts["vae"] / CONFIG_NAME).get("block_out_channels")
    if not isinstance(channels, list) or not channels:
        raise ValueError(
            f"{parts['vae'] / CONFIG_NAME} is of no autoencoder: no block_out_channels"
        )
    return 2 ** (len(channels) - 1)


def copy_parts(folder: Path, parts: dict[str, Path]) -> None:
    """The parts' files into subfolders."""
    for name, source in parts.items():
        target = folder / name
        target.mkdir()
        if name.startswith("tokenizer"):
            for file in TOKENIZER_FILES:
                if (source / file).is_file():
                    shutil.copyfile(source / file, target / file)
        else:
            shutil.copyfile(source / CONFIG_NAME, target / CONFIG_NAME)
            copy_weights(source, target, *stems(name))


def write_pipeline(
    folder: Path, config: GenTronConfig, parts: dict[str, Path], scheduler: dict
) -> str:
    """What stands beside the transformer, and model_index.json where nothing is missing.

    Returns the line of the report.
    """
    copy_parts(folder, parts)
    write_json(folder / SCHEDULER_PATH, scheduler)
    needed = [SUBFOLDERS[name][0] for name in config.encoders] + ["vae"]
    missing = [name for name in needed if name not in parts]
    if missing:
        return (
            f"transformer  no pipeline: {', '.join(missing)} missing; training takes it as --init"
        )
    side = config.position_base_size * config.patch_size * config.pixels_per_latent
    write_json(folder / INDEX_NAME, model_index(config, 1, (side, side)))
    return f"pipeline     with {', '.join(needed)}; {side} x {side} pixels"


def pixart_index(parts: dict[str, Path], scheduler: dict) -> dict:
    """The model_index.json of a PixArtAlphaPipeline."""
    tokenizer = read_json(parts["tokenizer"] / "tokenizer_config.json")
    return {
        "_class_name": "PixArtAlphaPipeline",
        "scheduler": ["diffusers", scheduler.get("_class_name", SCHEDULER_CONFIG["_class_name"])],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", tokenizer.get("tokenizer_class", "T5Tokenizer")],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def group(word: str, recipes: dict[str, Recipe]) -> list[str]:
    """A report's lines of modules and their parameters, the blocks together."""
    counts = {}
    for key, recipe in recipes.items():
        module = re.sub(r"^blocks\.\d+\.", "blocks.*.", key)
        module = ".".join(module.split(".")[: 3 if "*" in module else 1])
        counts[module] = counts.get(module, 0) + math.prod(recipe.shape)
    return [f"{word:<12} {name:<26} {count:>13,}" for name, count in counts.items()]


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, 2 after wrong input (told in one line), 130 after SIGINT."""
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        print("\n".join(convert(parse_arguments(argv))))
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        if "--verbose" in argv:
            traceback.print_exc()
        print(f"{NAME}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def convert(args: argparse.Namespace) -> list[str]:
    """Do what the arguments ask for; the lines of the report. Raises ValueError or OSError."""
    if args.command == "export-diffusers":
        return export_diffusers(args.path, args.out)
    options = {name: getattr(args, name) for name in ("t5", "vae", "size", "heads")}
    if args.command == "pixart":
        return convert_pixart(args.path, args.out, **options)
    return convert_dit(args.path, args.out, **options, clip=args.clip, seed=args.seed)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raises ValueError where argparse would print its usage and exit."""
    parser = argparse.ArgumentParser(prog=NAME, allow_abbrev=False)
    parser.format_help, parser.error = lambda: HELP, refuse
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in ("pixart", "dit", "export-diffusers"):
        options = commands.add_parser(command, allow_abbrev=False)
        options.format_help, options.error = lambda: HELP, refuse
        options.add_argument("path", type=Path, metavar="PATH")
        options.add_argument("out", type=Path, metavar="OUT")
        options.add_argument("--verbose", action="store_true")
        if command == "export-diffusers":
            continue
        options.add_argument("--t5", type=Path)
        options.add_argument("--vae", type=Path)
        options.add_argument("--size", type=whole_number(1))
        options.add_argument("--heads", type=whole_number(1))
        if command == "dit":
            options.add_argument("--clip", type=Path)
            options.add_argument("--seed", type=whole_number(0, 2**64 - 1), default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
