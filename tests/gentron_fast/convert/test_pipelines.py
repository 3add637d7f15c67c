"""Whole pipelines: text encoders, tokenizers, VAE, scheduler, sampled latents."""

import json
import shutil

import pytest
import torch
from diffusers import PixArtAlphaPipeline
from published import (
    RANGE,
    WEIGHTS,
    load,
    load_folder,
    make_pixart,
    original_pixart,
    pixart_inputs,
    same_tensors,
)

from gentron_fast import GenTron, GenTronPipeline, TextCondition
from gentron_fast.convert import convert_pixart, export_diffusers, main
from gentron_fast.diffusion import portable_noise
from gentron_fast.model import EncodedText
from gentron_fast.text import TextEncoder
from gentron_fast.vae import VideoVAE


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


def test_a_folder_of_the_fp16_variant_alone(pipeline_folder, converted_folder, tmp_path):
    pixart = PixArtAlphaPipeline.from_pretrained(pipeline_folder)
    pixart.save_pretrained(tmp_path / "pixart", variant="fp16")
    sharded = tmp_path / "pixart" / "text_encoder"
    (sharded / "model.fp16.safetensors").unlink()
    pixart.text_encoder.save_pretrained(sharded, variant="fp16", max_shard_size="500KB")
    assert (sharded / "model.safetensors.index.fp16.json").exists()
    with pytest.warns(UserWarning, match="holds only the fp16 variant: it is taken"):
        convert_pixart(tmp_path / "pixart", tmp_path / "out")
    for folder in ("transformer", "vae", "text_encoder_2"):
        same_tensors(tmp_path / "out" / folder, converted_folder / folder)
    assert not list((tmp_path / "out").rglob("*fp16*"))
    # Every part that is loaded takes it too, told by each.
    with pytest.warns(UserWarning, match="variant") as told:
        vae = VideoVAE.from_pretrained(tmp_path / "pixart" / "vae")
        text = TextEncoder.from_pretrained(t5=(sharded, tmp_path / "pixart" / "tokenizer"))
    assert {str(tmp_path / "pixart" / part) for part in ("vae", "text_encoder")} == {
        str(warning.message).partition(" holds")[0] for warning in told
    }
    whole = GenTronPipeline.from_pretrained(converted_folder)
    pairs = (vae, whole.vae), (text.encoders["t5"], whole.text_encoder.encoders["t5"])
    for ours, wanted in pairs:
        for one, other in zip(ours.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(one, other)
