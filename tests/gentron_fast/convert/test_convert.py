"""Conversion, held against diffusers' PixArt and DiT; round trips, parts, refusals, memory."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.models import embeddings
from safetensors.torch import load_file, save_file

from gentron_fast import GenTron, GenTronPipeline, TextCondition
from gentron_fast.convert import convert_dit, convert_pixart, export_diffusers, main
from gentron_fast.convert import pipelines as module
from gentron_fast.convert.layouts import DIT, Source, dit_config, make_recipes, pixart_config
from gentron_fast.convert.layouts import PIXART as PIXART_FAMILY
from gentron_fast.convert.tensors import Checkpoint, Spec
from gentron_fast.diffusion import portable_noise
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


@pytest.fixture
def exact_sinusoids(monkeypatch):
    use_exact_sinusoids(monkeypatch)


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


@pytest.mark.parametrize("variant", PIXART)
def test_pixart_is_exact_in_fp32(variant, tmp_path):
    reference = make_pixart(**PIXART[variant])
    reference.save_pretrained(tmp_path / "pixart")
    convert_pixart(tmp_path / "pixart", tmp_path / "out")
    model = load(tmp_path / "out")
    for size in SIZES:
        assert difference(reference, model, *size) < 1e-5


@pytest.mark.parametrize("variant", PIXART)
def test_pixart_is_exact_in_fp64(variant, tmp_path, exact_sinusoids):
    reference = make_pixart(torch.float64, **PIXART[variant])
    reference.save_pretrained(tmp_path / "pixart")
    convert_pixart(tmp_path / "pixart", tmp_path / "out")
    model = load(tmp_path / "out")
    for size in SIZES:
        assert difference(reference, model, *size, dtype=torch.float64) < 1e-10


def test_pixart_is_exact_where_diffusers_own_angles_are(tmp_path):
    """At timestep 0, and on grids whose positions fp32 holds, nothing of diffusers is replaced."""
    reference = make_pixart(torch.float64, sample_size=32, interpolation_scale=2)
    reference.save_pretrained(tmp_path / "pixart")
    convert_pixart(tmp_path / "pixart", tmp_path / "out")
    model, zero = load(tmp_path / "out"), torch.zeros(2)
    for size in [(8, 8), (16, 4), (32, 32)]:
        assert difference(reference, model, *size, zero, torch.float64) < 1e-10


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
            width, side, base_size=side, interpolation_scale=scale
        )
        original["pos_embed"] = table[None].float()
    return original


@pytest.mark.parametrize(
    "sample,scale,options",
    [
        (32, 1, {}),
        (32, 0.5, {}),
        (32, 0.5, {"size": 256}),
        (64, 1, {}),
        (128, 2, {}),
        (128, None, {"size": 1024}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_original_pixart_is_exact(sample, scale, options, dtype, tmp_path, exact_sinusoids):
    reference = make_pixart(dtype, sample_size=sample, interpolation_scale=scale)
    path = tmp_path / "pixart.pth"
    torch.save({"state_dict": original_pixart(reference, scale), "epoch": 3}, path)
    report = convert_pixart(path, tmp_path / "out", heads=4, **options)
    assert any(line.startswith("left out") and "y_embedding" in line for line in report)
    model = load(tmp_path / "out")
    assert model.config.size_embedding == (sample == 128)
    assert model.config.position_interpolation == (scale or 2)
    for size in SIZES[:3]:
        assert difference(reference, model, *size, dtype=dtype) < DTYPES[dtype]


def test_original_safetensors_and_plain_dictionaries(tmp_path):
    original = original_pixart(make_pixart(sample_size=32), scale=1)
    save_file(original, tmp_path / "a.safetensors")
    torch.save(original, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        convert_pixart(tmp_path / name, tmp_path / f"out-{name}", heads=4)
    one, other = (tmp_path / f"out-{n}" / "transformer" for n in ("a.safetensors", "a.pt"))
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()


def test_halves_stay_exact(tmp_path):
    reference = make_pixart(sample_size=32).half()
    reference.save_pretrained(tmp_path / "pixart")
    convert_pixart(tmp_path / "pixart", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "transformer" / WEIGHTS)
    wide = {key for key, tensor in weights.items() if tensor.dtype != torch.float16}
    assert wide == {"blocks.0.adaln.bias", "blocks.1.adaln.bias"}
    assert difference(reference.float(), load(tmp_path / "out", torch.float32), 8, 8) < 1e-5


def test_shards_are_one_model(tmp_path):
    reference = make_pixart(sample_size=32)
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("whole", "shards"):
        convert_pixart(tmp_path / name, tmp_path / f"out-{name}")
    one, other = (tmp_path / f"out-{name}" / "transformer" for name in ("whole", "shards"))
    assert {file.name for file in one.iterdir()} == {file.name for file in other.iterdir()}
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()
    # What was written tensor by tensor is what safetensors writes.
    saved = tmp_path / "saved.safetensors"
    save_file(load_file(one / WEIGHTS), saved, metadata={"format": "pt"})
    assert saved.read_bytes() == (one / WEIGHTS).read_bytes()


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
    table = embeddings.get_2d_sincos_pos_embed(reference.inner_dim, side, base_size=side)
    return original | {"pos_embed": table[None].float()}


@torch.no_grad()
def dit_difference(reference, model, make_text, size, timestep=RANGE):
    """‖ours - DiT's of its null class‖ / ‖DiT's‖; the class takes square images alone."""
    text = make_text(model.config, dtype=reference.dtype)
    latents = torch.randn(2, 4, size, size, dtype=reference.dtype)
    null = torch.full((2,), reference.config.num_embeds_ada_norm)
    wanted = reference(latents, timestep=timestep, class_labels=null).sample
    ours = model(latents[:, :, None], timestep, text)[:, :, 0]
    assert ours.dtype == wanted.dtype == reference.dtype
    return ((ours - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("sample", [32, 64])
def test_dit_without_a_class_is_exact(sample, layout, dtype, tmp_path, make_text, monkeypatch):
    reference, path = make_dit(dtype, sample_size=sample), tmp_path / "dit"
    if layout == "diffusers":
        reference.save_pretrained(path)
        convert_dit(path, tmp_path / "out")
    else:
        torch.save(original_dit(reference), path)
        convert_dit(path, tmp_path / "out", heads=4)
    model = load(tmp_path / "out")
    # Timestep 0 first, with the class's own angles: all are 0 there, whatever the frequencies, and
    # fp32 holds the positions. At 999 fp64 needs exact angles.
    for timestep in (torch.zeros(2), RANGE):
        if timestep is RANGE and dtype == torch.float64:
            use_exact_sinusoids(monkeypatch)
        for size in (8, 16, 32):
            assert dit_difference(reference, model, make_text, size, timestep) < DTYPES[dtype]


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_full_pixart_is_exact(dtype, request):
    if dtype == torch.float64:
        request.getfixturevalue("exact_sinusoids")
    captions = {"cross_attention_dim": 1152, "caption_channels": 4096}
    reference = make_full(PixArtTransformer2DModel, dtype, **captions)
    model = convert_in_memory(reference, lambda source: pixart_config(source, 8), PIXART_FAMILY)
    assert len(model.blocks) == 28 and model.config.t5_width == 4096
    for size in ((8, 8), (4, 12)):
        assert difference(reference, model, *size, dtype=dtype) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_full_dit_is_exact(dtype, request, make_text):
    if dtype == torch.float64:
        request.getfixturevalue("exact_sinusoids")
    options = {"out_channels": 8, "norm_eps": 1e-6, "num_embeds_ada_norm": 1000}
    reference = as_published(make_full(DiTTransformer2DModel, dtype, **options))
    model = convert_in_memory(reference, lambda source: dit_config(source, {"t5": 64}, 8), DIT)
    assert dit_difference(reference, model, make_text, 8) < DTYPES[dtype]


def test_dit_starts_its_text_parts_fresh(tmp_path, make_text):
    make_dit(sample_size=32).save_pretrained(tmp_path / "dit")
    report = convert_dit(tmp_path / "dit", tmp_path / "a", seed=1)
    convert_dit(tmp_path / "dit", tmp_path / "b", seed=1)
    convert_dit(tmp_path / "dit", tmp_path / "c", seed=2)
    a, b, c = ((tmp_path / name / "transformer" / WEIGHTS).read_bytes() for name in ("a", "b", "c"))
    assert a == b != c
    model = load(tmp_path / "a")
    parameters = dict(model.named_parameters())
    counts = {}
    for line in report[1:-3]:
        word, name, count = line.split()
        counts[word, name] = int(count.replace(",", ""))
    assert sum(counts.values()) == sum(p.numel() for p in parameters.values())
    assert {name for word, name in counts if word == "fresh"} == {
        "pooled_embed",
        "blocks.*.cross_attention",
    }
    assert "class 10, the null class" in report[-3]

    zero = {key for key, parameter in parameters.items() if not parameter.any()}
    assert all(key.endswith("bias") or ".cross_attention.out" in key or "d.clip.2" in key
               or "d.t5.2" in key for key in zero)  # fmt: skip
    weight = parameters["blocks.0.cross_attention.kv.weight"]
    bound = math.sqrt(6 / sum(weight.shape))  # Xavier's
    assert 0.9 * bound < weight.abs().max() <= bound
    # The text starts without a say, and training gives it one.
    text = make_text(model.config, dtype=torch.float32)
    model(torch.randn(2, 4, 1, 8, 8), RANGE, text).square().mean().backward()
    for key in ("blocks.0.cross_attention.out.weight", "pooled_embed.t5.2.weight"):
        assert parameters[key].grad.abs().max() > 0


def test_dit_takes_the_text_encoders_it_is_given(tmp_path, text_folders):
    make_dit(sample_size=32).save_pretrained(tmp_path / "dit")
    t5 = shutil.copytree(text_folders["t5"], tmp_path / "texts")
    (t5 / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    convert_dit(tmp_path / "dit", tmp_path / "t5", t5=t5)
    config = json.loads((tmp_path / "t5" / "tokenizer_2" / "tokenizer_config.json").read_text())
    assert config == {"model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    convert_dit(tmp_path / "dit", tmp_path / "both", **text_folders)
    assert load(tmp_path / "t5").config.encoders == ("t5",)
    both = load(tmp_path / "both").config
    assert both.encoders == ("clip", "t5") and (both.clip_width, both.t5_width) == (128, 128)
    assert not (tmp_path / "both" / "model_index.json").exists()  # without a VAE it is no pipeline


def test_copies_of_dits_embedder_that_differ_are_refused(tmp_path):
    reference = make_dit(sample_size=32)
    with torch.no_grad():
        reference.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias[3] += 1
    reference.save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match=r"blocks.1.norm1.emb.timestep_embedder.linear_2.bias in"):
        convert_dit(tmp_path / "dit", tmp_path / "out")


# Round trips.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("variant", PIXART)
def test_there_and_back_gives_identical_tensors(variant, dtype, tmp_path):
    reference = make_pixart(**PIXART[variant]).to(dtype)
    reference.save_pretrained(tmp_path / "pixart")
    convert_pixart(tmp_path / "pixart", tmp_path / "gentron")
    export_diffusers(tmp_path / "gentron", tmp_path / "back")
    same_tensors(tmp_path / "back" / "transformer", tmp_path / "pixart")
    back = PixArtTransformer2DModel.from_pretrained(tmp_path / "back" / "transformer").float()
    assert back.config.sample_size == reference.config.sample_size
    assert difference(back, load(tmp_path / "gentron", torch.float32), 8, 12) < 1e-5


def test_the_original_layout_comes_back_as_diffusers(tmp_path):
    reference = make_pixart(sample_size=128)
    reference.save_pretrained(tmp_path / "pixart")
    torch.save(original_pixart(reference, scale=2), tmp_path / "pixart.pth")
    convert_pixart(tmp_path / "pixart.pth", tmp_path / "gentron", heads=4)
    export_diffusers(tmp_path / "gentron", tmp_path / "back")
    same_tensors(tmp_path / "back" / "transformer", tmp_path / "pixart")


def test_out_and_in_again_gives_identical_tensors(tmp_path):
    """A GenTron whose biases have moved since, so that the kept tables are no longer theirs."""
    make_pixart(sample_size=32).save_pretrained(tmp_path / "pixart")
    convert_pixart(tmp_path / "pixart", tmp_path / "gentron")
    model = load(tmp_path / "gentron")
    with torch.no_grad():
        model.blocks[1].adaln.bias += 0.1
    model.save_pretrained(tmp_path / "gentron" / "transformer")
    export_diffusers(tmp_path / "gentron", tmp_path / "out")
    back = PixArtTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert difference(back, model, 8, 8) < 1e-5
    convert_pixart(tmp_path / "out", tmp_path / "again")
    for name in (WEIGHTS, "config.json"):
        path = Path("transformer", name)
        assert (tmp_path / "again" / path).read_bytes() == (
            tmp_path / "gentron" / path
        ).read_bytes()


def load_folder(folder):
    """The tensors of all safetensors files in a folder, but for those kept for the way back."""
    files = [file for file in folder.glob("*.safetensors") if "tables" not in file.name]
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def same_tensors(folder, other):
    one, other = load_folder(folder), load_folder(other)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype and torch.equal(tensor, other[key]), key


@pytest.mark.parametrize(
    "fields,reason",
    [
        ({}, "temporal layers, text encoders other than one T5, a LayerNorm before"),
        ({"temporal": True}, "it has temporal layers$"),
        ({"final_table": False}, "an adaLN of its own in the final layer$"),
        ({"pooled_text": True}, "pooled text in the condition$"),
        ({"timestep_cos_first": False}, "sinusoids that begin with the sine$"),
        ({"position_base_size": None}, "positions that count patches$"),
        ({"mlp_ratio": 2.0}, "an MLP that is not 4 times as wide as the model$"),
    ],
)
def test_export_says_what_stands_in_the_way(fields, reason, tiny_config, make_model, tmp_path):
    exportable = {
        "temporal": False, "encoders": ("t5",), "cross_norm": False, "pooled_text": False,
        "final_table": True, "timestep_cos_first": True, "position_base_size": 16,
    }  # fmt: skip
    config = replace(tiny_config, **exportable | fields) if fields else tiny_config
    make_model(config, torch.float32).save_pretrained(tmp_path / "gentron")
    with pytest.raises(ValueError, match=f"cannot be a PixArt: .*{reason}"):
        export_diffusers(tmp_path / "gentron", tmp_path / "out")
    assert os.listdir(tmp_path) == ["gentron"]


def test_blocks_that_no_longer_share_an_adaln_are_named(tmp_path):
    make_pixart(sample_size=32).save_pretrained(tmp_path / "pixart")
    convert_pixart(tmp_path / "pixart", tmp_path / "gentron")
    model = load(tmp_path / "gentron")
    with torch.no_grad():
        model.blocks[1].adaln.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "gentron" / "transformer")
    with pytest.raises(ValueError, match=r"blocks.1.adaln.weight differs from blocks.0"):
        export_diffusers(tmp_path / "gentron", tmp_path / "out")


# Whole pipelines.


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A PixArtAlphaPipeline of random weights: 1024's conditions, a byte-level T5 in shards, a VAE
    of factor 4."""
    from gentron_train.small_world.architecture import small_text_encoder, small_vae
    from gentron_train.small_world.renderer import vocabulary

    torch.manual_seed(0)
    text = small_text_encoder(vocabulary())
    transformer = make_pixart(sample_size=128, caption_channels=128)
    pipeline = PixArtAlphaPipeline(
        tokenizer=text.tokenizers["t5"],
        text_encoder=text.encoders["t5"],
        vae=small_vae((16, 32, 64)).autoencoder,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
    folder = tmp_path_factory.mktemp("pixart")
    pipeline.save_pretrained(folder)
    (folder / "text_encoder" / "model.safetensors").unlink()
    pipeline.text_encoder.save_pretrained(folder / "text_encoder", max_shard_size="500KB")
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def text_folders(tiny_pipeline_folder, tmp_path_factory):
    """Text encoders as they are published: a folder each, with its tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    pipeline = GenTronPipeline.from_pretrained(tiny_pipeline_folder)
    for name in ("clip", "t5"):
        pipeline.text_encoder.encoders[name].save_pretrained(folder / name)
        pipeline.text_encoder.tokenizers[name].save_pretrained(folder / name)
    return {name: folder / name for name in ("clip", "t5")}


@pytest.fixture(scope="module")
def converted_folder(pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "pipeline"
    assert main(["pixart", str(pipeline_folder), str(folder)]) == 0
    return folder


def sample_pixart(pipeline, latents, prompts, negative):
    return pipeline(
        prompts,
        negative_prompt=negative,
        num_inference_steps=10,
        guidance_scale=4.5,
        height=4 * latents.shape[-2],
        width=4 * latents.shape[-1],
        latents=latents,
        output_type="latent",
        use_resolution_binning=False,
        clean_caption=False,
    ).images


def test_sampled_latents_are_pixarts(pipeline_folder, converted_folder, tmp_path):
    prompts = ["a red circle", "a small blue square on the left"]
    noise = portable_noise((4, 1, 16, 8), [0, 1], 0)
    reference = PixArtAlphaPipeline.from_pretrained(pipeline_folder)
    reference.set_progress_bar_config(disable=True)
    wanted = sample_pixart(reference, noise[:, :, 0], prompts, "dull")
    pipeline = GenTronPipeline.from_pretrained(converted_folder)
    assert pipeline.default_size == (512, 512) and pipeline.default_frames == 1
    options = {"size": (64, 32), "steps": 10, "lambda_t": 4.5, "seed": [0, 1], "progress": False}
    output = pipeline(prompts, negative_prompt="dull", **options)
    assert output.frames.shape == (2, 1, 64, 32, 3)
    ours = output.latents[:, :, 0]
    assert (ours - wanted).abs().max() < 1e-3 * wanted.std()
    assert (ours[0] - ours[1]).std() > 0.1 * wanted.std()
    unguided = pipeline(prompts, negative_prompt="dull", **options | {"lambda_t": 1.0}).latents
    assert (unguided[:, :, 0] - wanted).abs().max() > 1e-2 * wanted.std()

    export_diffusers(converted_folder, tmp_path / "back")
    back = PixArtAlphaPipeline.from_pretrained(tmp_path / "back")
    back.set_progress_bar_config(disable=True)
    assert torch.equal(sample_pixart(back, noise[:, :, 0], prompts, "dull"), wanted)


def test_prompts_are_read_as_pixarts_pipeline_does(pipeline_folder, converted_folder, tmp_path):
    """Lower-cased, stripped, and cut at 120 tokens; after saving and loading too."""
    prompts = [" A Red Circle ", "A Small Blue Square on the left, " * 5]
    noise = portable_noise((4, 1, 16, 8), [0, 1], 0)
    reference = PixArtAlphaPipeline.from_pretrained(pipeline_folder)
    reference.set_progress_bar_config(disable=True)
    wanted = sample_pixart(reference, noise[:, :, 0], prompts, " Dull")
    GenTronPipeline.from_pretrained(converted_folder).save_pretrained(tmp_path)
    for folder in (converted_folder, tmp_path):
        pipeline = GenTronPipeline.from_pretrained(folder)
        options = {"size": (64, 32), "steps": 10, "lambda_t": 4.5, "output_type": "latent"}
        with pytest.warns(UserWarning, match="a prompt of 165 t5 tokens was cut to 120"):
            output = pipeline(
                prompts, negative_prompt=" Dull", **options, seed=[0, 1], progress=False
            )
        assert (output.latents[:, :, 0] - wanted).abs().max() < 1e-3 * wanted.std()


@pytest.mark.parametrize(
    "name,tokens", [("PixArtAlphaPipeline", 120), ("PixArtSigmaPipeline", 300), (None, 120)]
)
def test_the_pipelines_class_tells_where_prompts_are_cut(name, tokens, pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder, tmp_path / "pixart")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": name}
    (folder / "model_index.json").write_text(json.dumps(index))
    if name is None:
        (folder / "model_index.json").unlink()
    convert_pixart(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_2" / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == tokens and config["lower_and_strip"] is True


def test_a_tokenizer_without_a_configuration_is_t5s(converted_folder, refused, tmp_path):
    folder = shutil.copytree(converted_folder, tmp_path / "gentron")
    path = folder / "tokenizer_2" / "tokenizer_config.json"
    path.write_text("{")
    refused("export-diffusers", "gentron", "tokenizer_config.json is not JSON")
    path.unlink()
    export_diffusers(folder, tmp_path / "back")
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "T5Tokenizer"]

    shutil.rmtree(folder)
    folder = tmp_path / "back"
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{")
    refused("pixart", "back", "tokenizer_config.json is not JSON")
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    convert_pixart(folder, tmp_path / "again")
    path = tmp_path / "again" / "tokenizer_2" / "tokenizer_config.json"
    assert json.loads(path.read_text())["tokenizer_class"] == "T5Tokenizer"


def test_a_converted_pipeline_is_saved_to_the_same_bytes(converted_folder, tmp_path):
    GenTronPipeline.from_pretrained(converted_folder).save_pretrained(tmp_path)
    names = ("model_index.json", "tokenizer_2/tokenizer_config.json", "transformer/config.json")
    for name in (*names, f"transformer/{WEIGHTS}"):
        assert (tmp_path / name).read_bytes() == (converted_folder / name).read_bytes()


def test_video_starts_as_the_images_of_pixart(converted_folder):
    image = load(converted_folder)
    video = GenTron.from_t2i(image)
    latents, tokens, mask = pixart_inputs(torch.float32, 8, 12)
    frames = torch.stack([latents, latents.flip(1), -latents], dim=2)
    text = TextCondition(t5=EncodedText(tokens.repeat(1, 1, 4), mask))
    with torch.no_grad():
        clip = video(frames, RANGE, text, torch.tensor([False, True]))
        for frame in range(3):
            alone = image(frames[:, :, frame : frame + 1], RANGE, text)[:, :, 0]
            torch.testing.assert_close(clip[:, :, frame], alone, rtol=1e-5, atol=1e-5)


def test_an_original_file_takes_its_parts_by_name(text_folders, pipeline_folder, tmp_path):
    reference = make_pixart(sample_size=32, caption_channels=128)
    torch.save(original_pixart(reference, scale=1), tmp_path / "pixart.pth")
    arguments = ["pixart", str(tmp_path / "pixart.pth"), str(tmp_path / "out"), "--heads", "4"]
    arguments += ["--t5", str(text_folders["t5"]), "--vae", str(pipeline_folder / "vae")]
    assert main(arguments) == 0
    pipeline = GenTronPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.default_size == (128, 128)
    # The null caption is as long as captions were in training.
    assert pipeline.text_encoder.tokenizers["t5"].model_max_length == 90
    frames = pipeline("a star", steps=2, size=(32, 32), progress=False).frames
    assert frames.shape == (1, 1, 32, 32, 3)


def test_torch_weights_become_safetensors(pipeline_folder, converted_folder, tmp_path):
    """Old folders, DiT's among them, hold .bin files; ours hold none."""
    shutil.copytree(pipeline_folder, tmp_path / "pixart")
    stems = {"transformer": WEIGHTS[:-12], "vae": WEIGHTS[:-12], "text_encoder": "pytorch_model"}
    for folder, stem in stems.items():
        torch.save(load_folder(tmp_path / "pixart" / folder), tmp_path / f"{stem}.bin")
        for path in (tmp_path / "pixart" / folder).glob("*.safetensors*"):
            path.unlink()
        (tmp_path / f"{stem}.bin").rename(tmp_path / "pixart" / folder / f"{stem}.bin")
    convert_pixart(tmp_path / "pixart", tmp_path / "out")
    for folder in ("transformer", "vae", "text_encoder_2"):
        same_tensors(tmp_path / "out" / folder, converted_folder / folder)
    assert not list((tmp_path / "out").rglob("*.bin"))
    GenTronPipeline.from_pretrained(tmp_path / "out")


# Refusals.


class Code:
    """What a pickle could run."""


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the command line on PATH in tmp_path: it must refuse in one line, and write nothing."""

    def run(command, path, message, *options):
        before = sorted(tmp_path.rglob("*"))
        out = tmp_path / "out"
        assert main([command, str(tmp_path / path), str(out), *map(str, options)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("gentron_fast.convert: error: ")
        assert message in error
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.mark.parametrize(
    "key,tensor,message",
    [
        ("proj_out.bias", None, "lacks 1 tensors: proj_out.bias of shape (32,)"),
        ("extra", torch.zeros(3), "has 1 tensors too many: extra of shape (3,)"),
        (
            "transformer_blocks.1.attn2.to_k.weight",
            torch.zeros(48, 47),
            "tensor transformer_blocks.1.attn2.to_k.weight in .* has shape (48, 47), "
            "wanted (48, 48)",
        ),
        ("proj_out.bias", torch.zeros(32, dtype=torch.int64), "is torch.int64, wanted a float"),
        ("proj_out.bias", torch.zeros(32, dtype=torch.int8), "tensor proj_out.bias in .* is I8"),
    ],
    ids=["missing", "surplus", "misshapen", "integer", "unknown dtype"],
)
def test_tensors_that_do_not_fit_are_named(key, tensor, message, refused, tmp_path):
    make_pixart(sample_size=32).save_pretrained(tmp_path / "pixart")
    path = tmp_path / "pixart" / WEIGHTS
    tensors = load_file(path) | {key: tensor}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)
    refused("pixart", "pixart", message.replace(".*", str(tmp_path / "pixart")
            if "I8" not in message else str(path)))  # fmt: skip


def test_the_first_tensors_that_do_not_fit_are_named(refused, tmp_path):
    make_pixart(sample_size=32).save_pretrained(tmp_path / "pixart")
    config, path = tmp_path / "pixart" / "config.json", tmp_path / "pixart" / WEIGHTS
    two = config.read_text()
    first = [f"{BLOCK}.2.attn1.to_{part}" for part in ("k", "out.0", "q", "v")]
    listed = (f"{name}.bias of shape (48,), {name}.weight of shape (48, 48)" for name in first)
    config.write_text(two.replace('"num_layers": 2', '"num_layers": 3'))
    message = f"lacks 21 tensors: {', '.join(listed)} and 13 more\n"
    refused("pixart", "pixart", message)
    config.write_text(two.replace('"num_layers": 2', '"num_layers": 1'))
    message = message.replace("lacks 21 tensors", "has 21 tensors too many")
    refused("pixart", "pixart", message.replace(f"{BLOCK}.2", f"{BLOCK}.1"))
    config.write_text(two)
    tensors = load_file(path)
    save_file(tensors | {"proj_in.bias": tensors.pop("proj_out.bias")}, path)
    refused("pixart", "pixart", "lacks 1 tensors: proj_out.bias of shape (32,); it has 1 tensors "
            "too many: proj_in.bias of shape (32,)")  # fmt: skip


def test_files_that_are_not_whole_are_refused(refused, tmp_path):
    reference = make_pixart(sample_size=32)
    reference.save_pretrained(tmp_path / "pixart")
    whole = (tmp_path / "pixart" / WEIGHTS).read_bytes()
    (tmp_path / "pixart" / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refused("pixart", "pixart", "is damaged")
    torch.save(original_pixart(reference, 1), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    for length in (0, 100, len(whole) // 2):
        (tmp_path / "a.pth").write_bytes(whole[:length])
        refused("pixart", "a.pth", "a.pth is no whole file of torch.save")
    legacy = {"_use_new_zipfile_serialization": False}
    torch.save(original_pixart(reference, 1), tmp_path / "a.pth", **legacy)
    refused("pixart", "a.pth", "a.pth is in torch's old format: load it and save it with torch")


def test_shards_that_are_missing_or_elsewhere_are_named(refused, tmp_path):
    make_pixart(sample_size=32).save_pretrained(tmp_path / "pixart", max_shard_size="200KB")
    shard = sorted((tmp_path / "pixart").glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    refused("pixart", "pixart", f"no such file: {shard}")
    shard.write_bytes(content)
    index = tmp_path / "pixart" / f"{WEIGHTS}.index.json"
    text = index.read_text()
    index.write_text(text.replace(shard.name, f"../pixart/{shard.name}"))
    refused("pixart", "pixart", "has no weight_map of tensors to files beside it")


def test_pickle_code_is_refused(refused, tmp_path):
    original = original_pixart(make_pixart(sample_size=32), 1)
    for extra in ({"args": Code()}, {"state_dict": {"f": os.system}}):
        torch.save({"state_dict": original} | extra, tmp_path / "a.pth")
        refused("pixart", "a.pth", "needs pickle code to be read")
    torch.save(original | {"epoch": 3}, tmp_path / "a.pth")
    refused("pixart", "a.pth", "holds not only tensors: epoch is a int")
    torch.save([1, 2], tmp_path / "a.pth")
    refused("pixart", "a.pth", "holds no tensors by name, it holds a list")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"norm_type": "ada_norm_zero"}, "is 'ada_norm_zero', wanted 'ada_norm_single'"),
        ({"norm_eps": 1e-5}, "norm_eps of"),
        ({"attention_bias": False}, "attention_bias of"),
        ({"num_layers": None}, "num_layers of"),
        ({"num_layers": "2"}, "is '2', wanted a whole number above 0"),
        ({"num_layers": 3}, "lacks 21 tensors"),
        ({"out_channels": 6}, "predicts 6 channels, wanted 4 or 8"),
        ({"interpolation_scale": "2"}, "interpolation_scale of"),
        ({"interpolation_scale": 0}, "is 0, wanted above 0"),
        ({"cross_attention_dim": 32}, "is 32, wanted 48, the width of the projected captions"),
        ({"num_attention_heads": 5}, "is 48, wanted 60"),
        ({"_class_name": "GenTron"}, "is a GenTron already"),
    ],
)
def test_configurations_that_are_no_pixart_are_named(changes, message, refused, tmp_path):
    make_pixart(sample_size=128).save_pretrained(tmp_path / "pixart")
    path = tmp_path / "pixart" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused("pixart", "pixart", message)


def test_files_that_do_not_tell_enough_are_named(refused, tmp_path):
    reference = make_pixart(sample_size=32)
    original = original_pixart(reference, 1)
    torch.save(original, tmp_path / "a.pth")
    refused("pixart", "a.pth", "is 48 wide: --heads must tell")
    refused("dit", "a.pth", "it is no DiT", "--heads", 4)
    refused("pixart", "a.pth", "--size 250 is no multiple of 16", "--heads", 4, "--size", 250)
    torch.save(original_dit(make_dit(sample_size=32)), tmp_path / "dit.pt")
    refused("pixart", "dit.pt", "it is no PixArt", "--heads", 4)
    message = "pos_embed in {} has shape (1, 256, 48), wanted (1, 1024, 48) for 32 x 32 patches"
    refused("pixart", "a.pth", message.format(tmp_path / "a.pth"), "--heads", 4, "--size", 512)
    for table, message in (
        (original["pos_embed"].roll(1, 1), "is no sin-cos table of 16 x 16 patches"),
        (original["pos_embed"][0], "has shape (256, 48), wanted 3 axes"),
    ):
        torch.save(original | {"pos_embed": table}, tmp_path / "a.pth")
        refused("pixart", "a.pth", message, "--heads", 4)
        refused("pixart", "a.pth", message, "--heads", 4, "--size", 256)
    del original["pos_embed"]
    torch.save(original, tmp_path / "a.pth")
    refused("pixart", "a.pth", "no tensor pos_embed: --size must tell", "--heads", 4)
    save_file(reference.state_dict(), tmp_path / "a.safetensors")
    refused("pixart", "a.safetensors", "is in the diffusers layout: give its folder")


def test_parts_that_do_not_fit_are_named(refused, pipeline_folder, text_folders, tmp_path):
    make_pixart(sample_size=32).save_pretrained(tmp_path / "pixart")
    t5, vae = text_folders["t5"], pipeline_folder / "vae"
    refused("pixart", "pixart", "is 128 wide, the transformer takes 32", "--t5", t5)
    refused("pixart", "pixart", "no such folder: /nowhere", "--vae", "/nowhere")
    refused("pixart", "pixart", "no tokenizer in", "--t5", pipeline_folder / "text_encoder")
    make_pixart(sample_size=32, in_channels=3, out_channels=3).save_pretrained(tmp_path / "three")
    refused("pixart", "three", "makes 4 latent channels, the transformer takes 3", "--vae", vae)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text((vae / "config.json").read_text())
    refused("pixart", "pixart", "no weights in", "--vae", tmp_path / "vae")


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "COMMAND"),
        (["sdxl", "a", "b"], "invalid choice: 'sdxl'"),
        (["pixart", "a"], "the following arguments are required: OUT"),
        (["pixart", "nowhere", "out"], "no such file or folder: nowhere"),
        (["export-diffusers", "nowhere", "out"], "no such file: nowhere/config.json"),
        (["pixart", "a", "b", "--clip", "c"], "unrecognized arguments: --clip c"),
        (["pixart", "a", "b", "--size", "0"], "wanted a whole number of at least 1, got '0'"),
    ],
)
def test_wrong_command_lines_are_told_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["dit", "--help"])
    assert exit.value.code == 0 and "export-diffusers PATH OUT" in capsys.readouterr().out


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    make_pixart(sample_size=32).save_pretrained(tmp_path / "pixart")
    (tmp_path / "out").mkdir()
    assert main(["pixart", str(tmp_path / "pixart"), str(tmp_path / "out")]) == 0  # it was empty
    before = (tmp_path / "out" / "transformer" / WEIGHTS).stat().st_mtime_ns
    assert main(["pixart", str(tmp_path / "pixart"), str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "out" / "transformer" / WEIGHTS).stat().st_mtime_ns == before


@pytest.mark.parametrize("error,code", [(OSError("disk full"), 2), (KeyboardInterrupt(), 130)])
def test_nothing_half_written_stays(error, code, tmp_path, monkeypatch):
    make_pixart(sample_size=32).save_pretrained(tmp_path / "pixart")

    def fail(*_):
        assert list(tmp_path.rglob(f".out.*/transformer/{WEIGHTS}"))
        raise error

    monkeypatch.setattr(module, "keep_tables", fail)
    (tmp_path / "old").mkdir()
    for out in ("out", "old/out", "old/new/out", "new/new/out"):
        assert main(["pixart", str(tmp_path / "pixart"), str(tmp_path / out)]) == code
        assert sorted(os.listdir(tmp_path)) == ["old", "pixart"]
        assert not os.listdir(tmp_path / "old")


# Memory.

MEASURE = """
import sys
from pathlib import Path
from gentron_fast import convert

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))

for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    options = ["--heads", "8"] if path.endswith(".pth") else []
    options += ["--t5", "t5"] if path != "shards" else []
    assert convert.main(["pixart", path, path + "-out", *options]) == 0
    print("grew by", status("VmHWM") - before)
"""


def to_torch(folder, out, stem):
    """The safetensors shards of a folder as shards of torch.save."""
    out.mkdir()
    where = {}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        torch.save(tensors, out / f"{file.stem}.bin")
        where |= dict.fromkeys(tensors, f"{file.stem}.bin")
    (out / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": where}))
    if (folder / "config.json").exists():
        shutil.copyfile(folder / "config.json", out / "config.json")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_memory_stays_under_the_largest_shard(tmp_path):
    """A PixArt of 133 MiB in two shards, in two shards of torch.save and as one .pth; the latter
    with a T5 in two shards of torch.save."""
    options = {"num_attention_heads": 8, "attention_head_dim": 72, "num_layers": 6}
    options |= {"cross_attention_dim": 576, "caption_channels": 256, "sample_size": 32}
    reference = PixArtTransformer2DModel(**options)
    reference.save_pretrained(tmp_path / "shards", max_shard_size="80MB")
    shards = [file.stat().st_size for file in (tmp_path / "shards").glob("*.safetensors")]
    torch.save(original_pixart(reference, 1), tmp_path / "pixart.pth")
    whole = (tmp_path / "pixart.pth").stat().st_size
    to_torch(tmp_path / "shards", tmp_path / "bin", WEIGHTS[:-12])
    for part, names in (("1", "ac"), ("2", "bd")):  # the names take turns
        tensors = {name: torch.zeros(10_000_000) for name in names}
        save_file(tensors, tmp_path / f"model-{part}.safetensors")
    to_torch(tmp_path, tmp_path / "t5", "pytorch_model")
    (tmp_path / "t5" / "config.json").write_text('{"d_model": 256}')
    (tmp_path / "t5" / "spiece.model").touch()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "shards", "bin", "pixart.pth"],
        check=True, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    grown = [int(line.split()[2]) for line in done.stdout.splitlines() if "grew by" in line]
    assert len(shards) == 2 and max(grown[:2]) < 1.3 * max(shards) and grown[2] < 1.3 * whole
    same_tensors(tmp_path / "bin-out" / "transformer", tmp_path / "shards-out" / "transformer")
    same_tensors(tmp_path / "bin-out" / "text_encoder_2", tmp_path)
