"""There and back: the tensors that went in come out."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from published import PIXART, WEIGHTS, difference, load, make_pixart, original_pixart, same_tensors

from gentron_fast.convert import convert_pixart, export_diffusers


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
