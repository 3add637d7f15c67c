"""PixArt becomes GenTron: the same function, of diffusers' models and of the authors' files."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from published import (
    DTYPES,
    PIXART,
    SIZES,
    WEIGHTS,
    convert_in_memory,
    difference,
    load,
    make_full,
    make_pixart,
    original_pixart,
    same_tensors,
)
from safetensors.torch import load_file, save_file

from gentron_fast.convert import convert_pixart, main
from gentron_fast.convert.layouts import PIXART as PIXART_FAMILY
from gentron_fast.convert.layouts import pixart_config


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


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model."])
def test_averaged_weights_are_taken_and_prefixes_are_stripped(prefix, tmp_path):
    original = original_pixart(make_pixart(sample_size=32), scale=1)
    averaged = {key: tensor + 1 for key, tensor in original.items() if key != "pos_embed"}
    save_file(averaged, tmp_path / "averaged.safetensors")
    convert_pixart(tmp_path / "averaged.safetensors", tmp_path / "wanted", size=256, heads=4)

    def named(tensors):
        return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}

    both = {"state_dict": named(original), "state_dict_ema": named(averaged), "epoch": 3}
    torch.save(both, tmp_path / "a.pth")
    report = convert_pixart(tmp_path / "a.pth", tmp_path / "out", size=256, heads=4)
    assert "took         state_dict_ema (averaged) of a.pth, not state_dict" in report
    assert (f"stripped     {prefix} before every name" in report) == bool(prefix)
    same_tensors(tmp_path / "out" / "transformer", tmp_path / "wanted" / "transformer")
    arguments = ["pixart", tmp_path / "a.pth", tmp_path / "raw", "--no-ema", "--heads", 4]
    assert main(list(map(str, arguments))) == 0
    torch.save({"state_dict": named(original)}, tmp_path / "b.pth")
    report = convert_pixart(tmp_path / "b.pth", tmp_path / "wanted-raw", heads=4)
    assert not any(line.startswith("took") for line in report)
    same_tensors(tmp_path / "raw" / "transformer", tmp_path / "wanted-raw" / "transformer")
