"""Folders to convert and converted ones, and how the command line refuses."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
from published import make_pixart, use_exact_sinusoids

from gentron_fast import GenTronPipeline
from gentron_fast.convert import main


@pytest.fixture
def exact_sinusoids(monkeypatch):
    use_exact_sinusoids(monkeypatch)


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def text_folders(tiny_pipeline_folder, tmp_path_factory):
    """Text encoders as they are published: a folder each, with its tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    pipeline = GenTronPipeline.from_pretrained(tiny_pipeline_folder)
    for name in ("clip", "t5"):
        pipeline.text_encoder.encoders[name].save_pretrained(folder / name)
        pipeline.text_encoder.tokenizers[name].save_pretrained(folder / name)
    return {name: folder / name for name in ("clip", "t5")}


@pytest.fixture(scope="session")
def converted_folder(pipeline_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "pipeline"
    assert main(["pixart", str(pipeline_folder), str(folder)]) == 0
    return folder


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
