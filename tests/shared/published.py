"""PixArt and DiT as others publish them, tiny and of random weights; how far ours are from them."""

import math
import re
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.models import embeddings
from safetensors.torch import load_file

from gentron_fast import GenTron, TextCondition
from gentron_fast.convert import pipelines as module
from gentron_fast.convert.layouts import Source, make_recipes
from gentron_fast.convert.tensors import Checkpoint, Spec
from gentron_fast.model import EncodedText

BLOCK = "transformer_blocks"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = {"num_attention_heads": 4, "attention_head_dim": 12, "num_layers": 2}
TEXT = {"cross_attention_dim": 48, "caption_channels": 32}
# The published models are 256, 512, 1024; α's 1024 embeds the size, Σ's does not.
PIXART = {
    "256": {"sample_size": 32},
    "512": {"sample_size": 64},
    "1024": {"sample_size": 128},
    "1024 without sizes": {"sample_size": 128, "use_additional_conditions": False},
    "256 interpolated": {"sample_size": 32, "interpolation_scale": 2},
    "no captions": {"sample_size": 32, "caption_channels": None, "cross_attention_dim": 32},
    "no variance": {"sample_size": 32, "out_channels": 4},
}
SIZES = [(8, 8), (8, 12), (14, 10), (32, 32)]
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-10}
RANGE = torch.tensor([20, 999])


def randomise(model, dtype, seed=0):
    """Every parameter random, of the size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 * noise / parameter.shape[-1] ** 0.5)
    return model


def make_pixart(dtype=torch.float32, **options):
    return randomise(PixArtTransformer2DModel(**TINY | TEXT | options), dtype)


def make_dit(dtype=torch.float32, **options):
    """diffusers' DiT, of random weights, as `as_published`."""
    options = TINY | {"out_channels": 8, "norm_eps": 1e-6, "num_embeds_ada_norm": 10} | options
    return as_published(randomise(DiTTransformer2DModel(**options), dtype))


def as_published(model):
    """A DiT of diffusers with one embedder in all blocks, and the frequencies of the timestep over
    128, as in the code that trained it; the class has 127 and no option for it. The eps of 1e-6
    for its 1e-5 is an option of the class."""
    shared = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(shared.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def use_exact_sinusoids(monkeypatch):
    """diffusers' models take the angles of timesteps and positions in fp64, and their sinusoids
    rounded to fp32, as GenTron does. In fp32, as diffusers has them, the angle 999 is off by 6e-5.
    """

    def timesteps(steps, channels, flip_sin_to_cos, downscale_freq_shift, scale=1, **_):
        assert flip_sin_to_cos and downscale_freq_shift == 0 and scale == 1
        angles = steps.numpy().astype(float)[:, None] * 10000 ** -(np.arange(128) / 128)
        return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], 1)).float()

    def positions(embed_dim, grid_size, base_size, interpolation_scale, **_):
        height, width = (grid_size,) * 2 if isinstance(grid_size, int) else grid_size
        rows, columns = (
            np.arange(n) * base_size / n / interpolation_scale for n in (height, width)
        )
        frequencies = 10000 ** -(np.arange(embed_dim // 4) / (embed_dim // 4))
        columns = np.tile(columns, height)[:, None] * frequencies
        rows = np.repeat(rows, width)[:, None] * frequencies
        parts = np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)
        return torch.from_numpy(np.concatenate(parts, 1)).float()

    monkeypatch.setattr(embeddings, "get_timestep_embedding", timesteps)
    monkeypatch.setattr(embeddings, "get_2d_sincos_pos_embed", positions)


def pixart_inputs(dtype, height, width, captions=32):
    """Latents of two samples and their text, 3 and 7 of 7 tokens long."""
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    latents, tokens = torch.randn(2, 4, height, width, **draw), torch.randn(2, 7, captions, **draw)
    tokens[0, 3:] = 1e3  # whatever lies under the mask
    return latents.to(dtype), tokens.to(dtype), torch.arange(7) < torch.tensor([[3], [7]])


@torch.no_grad()
def difference(reference, model, height, width, timestep=RANGE, dtype=torch.float32):
    """‖ours - PixArt's‖ / ‖PixArt's‖."""
    latents, tokens, mask = pixart_inputs(dtype, height, width, model.config.t5_width)
    conditions = {
        "resolution": torch.tensor([[8.0 * height, 8.0 * width]] * 2),
        "aspect_ratio": torch.tensor([[height / width]] * 2),
    }
    wanted = reference(
        latents,
        encoder_hidden_states=tokens,
        encoder_attention_mask=mask,
        timestep=timestep,
        added_cond_kwargs=conditions if model.config.size_embedding else None,
    ).sample
    text = TextCondition(t5=EncodedText(tokens, mask))
    ours = model(latents[:, :, None], timestep, text)[:, :, 0]
    assert ours.dtype == wanted.dtype == dtype
    return ((ours - wanted).norm() / wanted.norm()).item()


def load(folder, dtype=None):
    return GenTron.from_pretrained(Path(folder) / "transformer", dtype)


def original_pixart(reference, scale=None):
    """The tensors of a PixArt of diffusers in the layout of PixArt-alpha's own .pth.

    scale: interpolation of the table of positions, None leaves it away.
    """
    weights, width = reference.state_dict(), reference.inner_dim
    original = {}

    def move(theirs, *ours):
        for kind in ("weight", "bias"):
            original[f"{theirs}.{kind}"] = torch.cat([weights.pop(f"{n}.{kind}") for n in ours])

    def move_embedder(theirs, ours):
        move(f"{theirs}.mlp.0", f"adaln_single.emb.{ours}.linear_1")
        move(f"{theirs}.mlp.2", f"adaln_single.emb.{ours}.linear_2")

    move("x_embedder.proj", "pos_embed.proj")
    move_embedder("t_embedder", "timestep_embedder")
    if reference.use_additional_conditions:
        move_embedder("csize_embedder", "resolution_embedder")
        move_embedder("ar_embedder", "aspect_ratio_embedder")
    move("t_block.1", "adaln_single.linear")
    move("y_embedder.y_proj.fc1", "caption_projection.linear_1")
    move("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    for i in range(len(reference.transformer_blocks)):
        theirs, ours = f"blocks.{i}", f"transformer_blocks.{i}"
        original[f"{theirs}.scale_shift_table"] = weights.pop(f"{ours}.scale_shift_table")
        move(f"{theirs}.attn.qkv", *(f"{ours}.attn1.to_{part}" for part in "qkv"))
        move(f"{theirs}.attn.proj", f"{ours}.attn1.to_out.0")
        move(f"{theirs}.cross_attn.q_linear", f"{ours}.attn2.to_q")
        move(f"{theirs}.cross_attn.kv_linear", f"{ours}.attn2.to_k", f"{ours}.attn2.to_v")
        move(f"{theirs}.cross_attn.proj", f"{ours}.attn2.to_out.0")
        move(f"{theirs}.mlp.fc1", f"{ours}.ff.net.0.proj")
        move(f"{theirs}.mlp.fc2", f"{ours}.ff.net.2")
    original["final_layer.scale_shift_table"] = weights.pop("scale_shift_table")
    move("final_layer.linear", "proj_out")
    assert not weights
    original["y_embedder.y_embedding"] = torch.randn(90, 32)
    if scale is not None:
        side = reference.config.sample_size // 2
        table = embeddings.get_2d_sincos_pos_embed(
            width, side, base_size=side, interpolation_scale=scale, output_type="pt"
        )
        original["pos_embed"] = table[None].float()
    return original


def original_dit(reference):
    """The tensors of a DiT of diffusers in the layout of facebookresearch/DiT."""
    weights = reference.state_dict()
    weights = {k: v for k, v in weights.items() if ".emb." not in k or k.startswith(f"{BLOCK}.0.")}
    original = {}

    def move(theirs, *ours):
        for kind in ("weight", "bias"):
            original[f"{theirs}.{kind}"] = torch.cat([weights.pop(f"{n}.{kind}") for n in ours])

    move("x_embedder.proj", "pos_embed.proj")
    move("t_embedder.mlp.0", f"{BLOCK}.0.norm1.emb.timestep_embedder.linear_1")
    move("t_embedder.mlp.2", f"{BLOCK}.0.norm1.emb.timestep_embedder.linear_2")
    table = weights.pop(f"{BLOCK}.0.norm1.emb.class_embedder.embedding_table.weight")
    original["y_embedder.embedding_table.weight"] = table
    for i in range(len(reference.transformer_blocks)):
        theirs, ours = f"blocks.{i}", f"{BLOCK}.{i}"
        move(f"{theirs}.adaLN_modulation.1", f"{ours}.norm1.linear")
        move(f"{theirs}.attn.qkv", *(f"{ours}.attn1.to_{part}" for part in "qkv"))
        move(f"{theirs}.attn.proj", f"{ours}.attn1.to_out.0")
        move(f"{theirs}.mlp.fc1", f"{ours}.ff.net.0.proj")
        move(f"{theirs}.mlp.fc2", f"{ours}.ff.net.2")
    move("final_layer.adaLN_modulation.1", "proj_out_1")
    move("final_layer.linear", "proj_out_2")
    assert not weights
    side = reference.config.sample_size // 2
    table = embeddings.get_2d_sincos_pos_embed(
        reference.inner_dim, side, base_size=side, output_type="pt"
    )
    return original | {"pos_embed": table[None].float()}


# The full size: 28 blocks of width 1152. 22 s of one core, 2 GB.
XL2 = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32}


def make_full(model_class, dtype, **options):
    """A model of XL/2's size. Its weights are windows into one random vector, each at a place of
    its own: 5 GB of weights would take most of the time."""
    with torch.device("meta"):
        model = model_class(**XL2 | options)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # DiT's blocks share an embedder.
    names = {name: re.sub(r"\.\d+\.norm1\.emb", ".0.norm1.emb", name) for name in shapes}
    places = {name: 97 * place for place, name in enumerate(dict.fromkeys(names.values()))}
    length = max(map(math.prod, shapes.values())) + max(places.values())
    numbers = torch.randn(length, generator=torch.Generator().manual_seed(0)).to(dtype)
    numbers *= 0.5 / 1152**0.5
    windows = {
        name: numbers[places[names[name]] :][: shape.numel()].view(shape)
        for name, shape in shapes.items()
    }
    model.load_state_dict(windows, assign=True)
    return model.eval()


def convert_in_memory(reference, make_config, family):
    """The conversion without its files."""
    weights = reference.state_dict()
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    source = Source(Checkpoint(Path("memory"), specs, weights.get), dict(reference.config), None)
    config, generator = make_config(source), torch.Generator().manual_seed(0)
    tensors = {
        key: recipe.make(source.checkpoint)
        if recipe.sources
        else module.initial(key, recipe.shape, generator).to(reference.dtype)
        for key, recipe in make_recipes(config, family, 0).items()
    }
    with torch.device("meta"):
        model = GenTron(config)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def load_folder(folder):
    """The tensors of all safetensors files in a folder, but for those kept for the way back."""
    files = [file for file in folder.glob("*.safetensors") if "tables" not in file.name]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def same_tensors(folder, other):
    one, other = load_folder(folder), load_folder(other)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key
