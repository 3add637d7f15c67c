"""The pipeline: folder round trip, seeds and neighbours, null text, sizes, offload, errors."""

import json
import math
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gentron_fast import GenTronPipeline
from gentron_fast.config import SamplingDefaults
from gentron_fast.files import read_json, write_json

CALL = {"steps": 3, "frames": 2, "size": (32, 32), "progress": False}


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder):
    return GenTronPipeline.from_pretrained(tiny_pipeline_folder)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_saved_loaded_and_saved_again_is_the_same(pipeline, tiny_pipeline_folder, tmp_path):
    pipeline.save_pretrained(tmp_path)
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    originals = [p for p in Path(tiny_pipeline_folder).rglob("*") if p.is_file()]
    assert len(files) == len(originals)
    for name in files:
        assert (tmp_path / name).read_bytes() == (tiny_pipeline_folder / name).read_bytes(), name
    assert {p.suffix for p in files} == {".json", ".safetensors", ""}  # the last: the mark's


def test_a_folder_without_its_index_is_no_pipeline(tiny_pipeline_folder, tmp_path):
    shutil.copytree(tiny_pipeline_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        GenTronPipeline.from_pretrained(tmp_path)


def test_frames_and_latents(pipeline):
    output = pipeline("a red circle", **CALL)
    assert output.frames.shape == (1, 2, 32, 32, 3) and output.frames.dtype == torch.uint8
    latent = pipeline("a red circle", output_type="latent", **CALL)
    assert latent.frames is None and torch.equal(latent.latents, output.latents)


@pytest.mark.parametrize("solver,eta", [("dpm++", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_a_clip_does_not_depend_on_its_neighbours(pipeline, solver, eta):
    options = CALL | {"solver": solver, "eta": eta, "output_type": "latent"}
    together = pipeline(["a red circle moving left", "a star"], clips=2, seed=5, **options).latents
    alone = pipeline("a star", seed=6, **options).latents
    assert relative_error(together[3:], alone) < 1e-5
    by_list = pipeline(["a star", "a red circle"], seed=[6, 1], **options).latents
    assert relative_error(by_list[:1], alone) < 1e-5
    assert relative_error(together[2:3], alone) > 1e-2


def test_negative_prompts_take_the_place_of_the_null_text(pipeline):
    options = CALL | {"output_type": "latent"}
    plain = pipeline("a star", **options).latents
    assert torch.equal(plain, pipeline("a star", negative_prompt="", **options).latents)
    negative = pipeline("a star", negative_prompt="a long text of several words", **options)
    assert relative_error(negative.latents, plain) > 1e-3
    each = pipeline(["a star", "a star"], negative_prompt=["", "a circle"], **options).latents
    assert relative_error(each[:1], plain) < 1e-5


def test_callback_sees_every_step(pipeline):
    seen = []
    output = pipeline(
        "a star",
        callback_on_step_end=lambda step, timestep, latents: seen.append((step, timestep, latents)),
        **CALL,
    )
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == sorted((t for _, t, _ in seen), reverse=True)
    assert torch.equal(seen[-1][2], output.latents)


def test_other_precisions_and_offload(tiny_pipeline_folder, pipeline):
    reference = pipeline("a star", **CALL).latents
    half = GenTronPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)
    assert relative_error(half("a star", **CALL).latents, reference) < 0.2
    offloaded = GenTronPipeline.from_pretrained(tiny_pipeline_folder)
    offloaded.enable_offload("cpu")
    assert torch.equal(offloaded("a star", **CALL).latents, reference)


def test_prompts_encoded_ahead_need_no_encoder(tiny_pipeline_folder, pipeline):
    options = CALL | {"negative_prompt": ["", "a circle"]}
    prompts = ["a star", "a blue square moving right"]
    reference = pipeline(prompts, **options).latents
    released = GenTronPipeline.from_pretrained(tiny_pipeline_folder)
    released.encode_ahead([*prompts, "a circle"], batch=3)
    assert not list(released.text_encoder.parameters())
    assert relative_error(released(prompts, **options).latents, reference) < 1e-4
    with pytest.raises(RuntimeError, match="released"):
        released("another prompt", **CALL)


def test_images_from_an_image_model(tiny_t2i_folder):
    pipeline = GenTronPipeline.from_pretrained(tiny_t2i_folder)
    output = pipeline("a star", steps=2, size=(32, 64), progress=False)
    assert output.frames.shape == (1, 1, 32, 64, 3)
    with pytest.raises(ValueError, match="makes images: 2 frames were asked for"):
        pipeline("a star", **CALL)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"prompt": []}, "no prompt"),
        ({"size": (30, 32)}, "size 30x32 does not fit"),
        ({"size": [64, 64, 64]}, "size must be height and width"),
        ({"size": "64"}, "size must be one or many in a row, got '64'"),
        ({"size": (64, 2**20)}, "a side of size must be a whole number from 1 to 32768"),
        ({"frames": 0}, "frames must be a whole number from 1 to 32, got 0"),
        ({"frames": 2.5}, "frames must be a whole number from 1 to 32, got 2.5"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"steps": "3"}, "steps must be a whole number"),
        ({"eta": "much"}, "eta must be a number"),
        ({"guidance_range": [0.5]}, "the guidance range must be two numbers"),
        ({"prompt": [7]}, "a prompt must be text, got 7"),
        ({"prompt": b"a star"}, "a prompt must be one or many in a row"),
        ({"prompt": "\udcff"}, "tokenizer cannot read the prompts"),
        ({"seed": None}, "seed must be one or many in a row, got None"),
        ({"seed": [0.5]}, "a seed must be a whole number"),
        ({"seed": 2**64}, "seed must be a whole number from 0 to"),
        ({"lambda_m": "1"}, "lambda_m must be one or many in a row, got '1'"),
        ({"lambda_t": [[1.0], [2.0, 3.0]]}, "lambda_t must be a number"),
        ({"solver": "euler"}, "euler"),
        ({"clips": 0}, "clips per prompt must be a whole number"),
        ({"seed": [1, 2]}, "2 seeds for 1 clips"),
        ({"lambda_t": float("nan")}, "lambda_t must be a number"),
        ({"output_type": "pil"}, "output_type"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ],
)
def test_wrong_calls_are_named(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"prompt": "a star"} | CALL | options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"frames": 5, "size": 64}, "5 frames, where its own are 4"),
        ({"frames": 1, "size": (64, 144)}, "64x144 pixels, where its own are 64x64"),
        ({"frames": 1, "size": 32}, "32x32 pixels, where its own are 64x64"),
        ({"frames": 4, "size": (32, 128)}, None),
    ],
    ids=str,
)
def test_a_shape_far_from_the_folders_own_is_told(pipeline, options, words):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipeline("a star", steps=1, progress=False, output_type="latent", **options)
    told = [str(warning.message) for warning in caught if "may not know" in str(warning.message)]
    assert told == ([] if words is None else [f"the model may not know {words}"])
    assert pipeline.remarks(pipeline.sampling("a star", **options)) == told


def test_numbers_of_numpy_and_iterators_are_taken(pipeline):
    options = CALL | {"output_type": "latent"}
    wanted = pipeline(["a star", "a circle"], seed=[3, 4], lambda_t=[2.0, 3.0], **options).latents
    given = {
        "steps": np.int32(3),
        "frames": torch.tensor(2),
        "size": np.uint16(32),
        "eta": np.float32(0),
    }
    latents = pipeline(
        iter(["a star", "a circle"]),
        seed=(seed for seed in np.arange(3, 5)),
        lambda_t=map(np.float32, (2, 3)),
        clips=np.int64(1),
        **options | given,
    ).latents
    assert torch.equal(latents, wanted)
    one, other = (pipeline("a star", seed=seed, **options).latents for seed in (5, np.uint64(5)))
    assert torch.equal(one, other)


def test_parts_that_do_not_fit_are_named(tiny_pipeline_folder, tmp_path):
    shutil.copytree(tiny_pipeline_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"in_channels": 8}))
    with pytest.raises(ValueError, match=r"tensor .* has shape"):
        GenTronPipeline.from_pretrained(tmp_path)


def test_an_autoencoder_without_a_tensor_is_named(tiny_pipeline_folder, tmp_path):
    shutil.copytree(tiny_pipeline_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_out.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['decoder.conv_out.weight'\]"):
        GenTronPipeline.from_pretrained(tmp_path)


def test_an_encoder_of_another_width_is_named(pipeline, make_model, tiny_config):
    model = make_model(replace(tiny_config, t5_width=64), torch.float32)
    with pytest.raises(ValueError, match="t5 text encoder is 128 wide, the transformer takes 64"):
        GenTronPipeline(model, pipeline.text_encoder, pipeline.vae)


def test_a_size_embedding_of_another_autoencoder_is_named(pipeline, make_model, tiny_config):
    config = replace(tiny_config, size_embedding=True, pixels_per_latent=pipeline.vae.factor)
    assert GenTronPipeline(make_model(config, torch.float32), pipeline.text_encoder, pipeline.vae)
    model = make_model(replace(config, pixels_per_latent=16), torch.float32)
    with pytest.raises(ValueError, match="counts 16 pixels a latent, the VAE makes a latent of"):
        GenTronPipeline(model, pipeline.text_encoder, pipeline.vae)


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json"])
def test_json_that_is_no_object_is_named(name, tiny_pipeline_folder, tmp_path):
    shutil.copytree(tiny_pipeline_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object, it holds a list"):
        GenTronPipeline.from_pretrained(tmp_path)


def test_numbers_that_are_not_finite_are_an_error_with_their_part(tiny_pipeline_folder):
    pipeline = GenTronPipeline.from_pretrained(tiny_pipeline_folder)
    damaged = {
        "the tokens of the t5 encoder are": (pipeline.text_encoder.encoders["t5"], "nan"),
        "the latents of step 1 of 3 are": (pipeline.transformer, "nan"),
        "the pixels of the VAE .* are": (pipeline.vae.autoencoder.decoder, "nan"),
        "the pixels of the VAE in torch.float32 are": (  # infinity would be white
            pipeline.vae.autoencoder.decoder.conv_out,
            "inf",
        ),
    }
    for words, (part, value) in damaged.items():
        weight = list(part.parameters())[-1 if value == "inf" else 0].detach()
        kept = weight.clone()
        weight.fill_(float(value))
        with pytest.raises(ValueError, match=f"{words} not finite"):
            pipeline("a star", **CALL)
        weight.copy_(kept)
    assert pipeline("a star", **CALL).frames.any()
    pipeline.vae.autoencoder.register_to_config(force_upcast=True)
    pipeline.to(dtype=torch.float16)
    assert pipeline.vae.dtype == torch.float32


def test_a_call_takes_the_folders_own_defaults(tiny_pipeline_folder, tmp_path):
    shutil.copytree(tiny_pipeline_folder, folder := tmp_path / "pipeline")
    own = {"steps": 3, "solver": "ddim", "lambda_t": 2.0, "lambda_m": 1.0, "rescale": 0.5}
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | SamplingDefaults(**own).to_index())
    plain, chosen = map(GenTronPipeline.from_pretrained, (tiny_pipeline_folder, folder))
    papers = {"steps": 50, "solver": "dpm++", "lambda_t": 7.5, "lambda_m": 1.2, "rescale": 0.0}
    assert asdict(plain.defaults) == papers
    assert asdict(chosen.defaults) == own
    options = {"output_type": "latent", "progress": False}
    wanted = plain("a red circle", **own, **options).latents
    assert torch.equal(chosen("a red circle", **options).latents, wanted)
    chosen.save_pretrained(tmp_path / "again")
    assert GenTronPipeline.from_pretrained(tmp_path / "again").defaults == chosen.defaults


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"solver": 7},
        {"lambda_t": "much"},
        {"lambda_m": math.nan},
        {"rescale": 1.5},
    ],
    ids=str,
)
def test_defaults_that_no_call_takes_are_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"default_{name} is .* wanted"):
        SamplingDefaults.from_index({f"default_{name}": change[name]})


def test_a_folder_without_defaults_takes_the_papers(tiny_pipeline_folder, tmp_path):
    shutil.copytree(tiny_pipeline_folder, folder := tmp_path / "pipeline")
    index = json.loads((folder / "model_index.json").read_text())
    old = {name: v for name, v in index.items() if name not in SamplingDefaults().to_index()}
    assert len(old) == len(index) - len(SamplingDefaults().to_index())
    (folder / "model_index.json").write_text(json.dumps(old))
    assert GenTronPipeline.from_pretrained(folder).defaults == SamplingDefaults()


def test_saving_over_a_pipeline_and_over_something_else(tiny_pipeline_folder, tmp_path):
    pipeline = GenTronPipeline.from_pretrained(tiny_pipeline_folder)
    shutil.copytree(tiny_pipeline_folder, folder := tmp_path / "pipeline")
    pipeline.save_pretrained(folder)
    assert GenTronPipeline.from_pretrained(folder).defaults == pipeline.defaults
    (folder / "vae/notes.txt").write_text("mine")
    before = sorted(path for path in folder.rglob("*"))
    with pytest.raises(ValueError, match="it holds vae/notes"):
        pipeline.save_pretrained(folder)
    assert sorted(path for path in folder.rglob("*")) == before
