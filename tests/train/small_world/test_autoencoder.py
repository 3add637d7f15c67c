"""The autoencoder's training: what it writes, and that an interrupted run ends as a whole one."""

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import cut_off_at_its_first_state, holder_of
from safetensors.torch import load_file

from gentron_fast.files import whole_folder
from gentron_fast.vae import VideoVAE
from gentron_train.small_world import autoencoder as vae_training
from gentron_train.small_world import text_encoders
from gentron_train.small_world.architecture import small_vae
from gentron_train.small_world.autoencoder import (
    VaeTraining,
    copy_levels,
    learning_rate,
    read_frames,
    train,
)
from gentron_train.small_world.renderer import write_shards

TRAINING = VaeTraining(steps=4, batch=2, save_every=2, warmup=2)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_shards(folder, images=6, clips=2, shard_size=4, processes=1, progress=False)
    return folder


def test_frames_of_images_and_clips(data):
    frames = read_frames(data, images=5, clips=2)
    assert frames.shape == (5 + 2 * vae_training.CLIP_FRAMES, 64, 64, 3)
    with pytest.raises(ValueError, match="no shards"):
        read_frames(data / "nothing", 1, 1)


def test_shards_that_break_off_are_read_up_to_there(tmp_path, capsys):
    write_shards(tmp_path, images=6, clips=2, shard_size=4, processes=1, progress=False)
    first = sorted(tmp_path.glob("images-*.tar"))[0]
    with tarfile.open(first) as tar:
        end = tar.getmembers()[4].offset_data + 100  # in a file of the second image
    first.write_bytes(first.read_bytes()[:end])
    frames = read_frames(tmp_path, images=6, clips=2)
    assert frames.shape[0] == 1 + 2 + 2 * vae_training.CLIP_FRAMES
    assert f"{first} breaks off after " in capsys.readouterr().out
    first.write_bytes(b"")
    assert read_frames(tmp_path, images=6, clips=2).shape[0] == 2 + 2 * vae_training.CLIP_FRAMES


def train_in_two_parts(data, out, training, init=None):
    """The same training, cut off behind its first state."""
    with cut_off_at_its_first_state(vae_training):
        train(data, out, training, "cpu", resume=False, init=init)
    assert not out.exists()
    train(data, out, training, "cpu", resume=True, init=init)
    return load_file(out / WEIGHTS)


def test_an_interrupted_run_ends_as_a_whole_one(data, tmp_path):
    train(data, tmp_path / "whole", TRAINING, "cpu", resume=False)
    whole = load_file(tmp_path / "whole" / WEIGHTS)
    parts = train_in_two_parts(data, tmp_path / "parts", TRAINING)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not (tmp_path / "parts.training").exists()
    vae = VideoVAE.from_pretrained(tmp_path / "parts")
    assert vae.factor == 8 and vae.scaling_factor != 1.0


def test_a_decoder_goes_on_behind_latents_that_stay(data, tmp_path):
    init, training = tmp_path / "init", replace(TRAINING, decoder_only=True)
    train(data, init, TRAINING, "cpu", resume=False)
    train(data, tmp_path / "whole", training, "cpu", resume=False, init=init)
    before, whole = load_file(init / WEIGHTS), load_file(tmp_path / "whole" / WEIGHTS)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], whole[name])}
    assert changed == {"decoder", "post_quant_conv"}
    scales = {
        VideoVAE.from_pretrained(folder).scaling_factor for folder in (init, tmp_path / "whole")
    }
    assert len(scales) == 1 and scales != {1.0}
    parts = train_in_two_parts(data, tmp_path / "parts", training, init)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_what_no_training_wrote_beside_is_refused_and_stays(data, tmp_path):
    out = tmp_path / "out"
    for own in (tmp_path / "out.log.jsonl", tmp_path / "out.training" / "state.safetensors"):
        own.parent.mkdir(exist_ok=True)
        own.write_text("mine")
        with pytest.raises(ValueError, match="move it"):
            train(data, out, TRAINING, "cpu", resume=False)
        assert own.read_text() == "mine" and not out.exists()
        own.unlink()


def test_a_folder_has_one_training(data, tmp_path):
    out = tmp_path / "vae"
    with holder_of(tmp_path / "vae.training") as holder:
        with pytest.raises(ValueError, match=f"in use by process {holder.pid} on"):
            train(data, out, TRAINING, "cpu", resume=True)
        assert not out.exists()


def test_the_rate_warms_up_and_falls():
    rates = [learning_rate(step, VaeTraining(steps=100, warmup=10)) for step in range(100)]
    assert max(rates) == pytest.approx(VaeTraining.lr) and rates.index(max(rates)) in (9, 10)
    assert rates[-1] < 0.03 * VaeTraining.lr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "wanted a whole number of at least 1, got '0'"),
        (["--lr", "nan"], "--lr is nan, must be above 0 and finite"),
        (["--out", "/dev/null/x"], "cannot write into /dev/null/x: Not a directory"),
        (["--init", "nowhere"], "no autoencoder in nowhere"),
        (["--decoder-only"], "--decoder-only needs --init FOLDER"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
    ids=str,
)
@pytest.mark.parametrize("module", [vae_training, text_encoders])
def test_wrong_input_is_one_line_before_any_work(
    module, arguments, message, tmp_path, monkeypatch, capsys
):
    if module is text_encoders and arguments[0] in ("--init", "--decoder-only"):
        pytest.skip("an option of the autoencoder's")
    monkeypatch.chdir(tmp_path)
    assert module.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{module.NAME}: error: ") and error.count("\n") == 1
    assert message in error
    assert not any(tmp_path.iterdir())  # no shard either


@pytest.mark.parametrize("module, name", [(vae_training, "config.json"), (text_encoders, "clip")])
def test_what_is_finished_is_not_trained_again(module, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(vae_training, "ensure_shards", lambda *_: pytest.fail("made data"))
    with whole_folder(tmp_path / "out", [name]) as partial:
        (partial / name).write_text("{}")
    assert module.main(["--out", str(tmp_path / "out"), "--resume"]) == 0
    assert "finished before" in capsys.readouterr().out


def test_levels_at_the_pixels_end_are_copied():
    torch.manual_seed(0)
    smaller, vae = small_vae((16, 32, 64)), small_vae((16, 32, 64, 64))
    untouched = vae.state_dict()["autoencoder.encoder.down_blocks.3.resnets.0.conv1.weight"].clone()
    copy_levels(smaller, vae)
    old, new = smaller.state_dict(), vae.state_dict()
    for name, counterpart in (
        ("encoder.conv_in.weight", "encoder.conv_in.weight"),
        ("encoder.down_blocks.1.resnets.0.conv1.weight",) * 2,
        (
            "decoder.up_blocks.2.resnets.0.conv1.weight",
            "decoder.up_blocks.3.resnets.0.conv1.weight",
        ),
        ("decoder.up_blocks.1.resnets.1.conv2.bias", "decoder.up_blocks.2.resnets.1.conv2.bias"),
        ("decoder.conv_out.bias", "decoder.conv_out.bias"),
    ):
        assert torch.equal(old[f"autoencoder.{name}"], new[f"autoencoder.{counterpart}"])
    assert torch.equal(new["autoencoder.encoder.down_blocks.3.resnets.0.conv1.weight"], untouched)
