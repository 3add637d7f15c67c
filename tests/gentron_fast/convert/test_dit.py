"""DiT becomes a GenTron that starts as DiT without a class."""

import json
import math
import shutil

import pytest
import torch
from diffusers import DiTTransformer2DModel
from published import (
    DTYPES,
    RANGE,
    WEIGHTS,
    as_published,
    convert_in_memory,
    load,
    make_dit,
    make_full,
    original_dit,
    use_exact_sinusoids,
)

from gentron_fast.convert import convert_dit
from gentron_fast.convert.layouts import DIT, dit_config


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
