"""What is refused: in one line, with nothing written."""

import argparse
import json
import os
import shutil

import pytest
import torch
from configurations import changes, copied, ending
from faults import EXIT_CODES, FAULTS
from published import BLOCK, WEIGHTS, make_dit, make_pixart, original_dit, original_pixart
from safetensors.torch import load_file, save_file

from gentron_fast.convert import main
from gentron_fast.convert import pipelines as module
from gentron_fast.convert.tensors import _save_alone


class Code:
    """What a pickle could run."""


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


def test_pickle_code_is_refused(refused, tmp_path, monkeypatch):
    original = original_pixart(make_pixart(sample_size=32), 1)
    for extra in ({"args": Code()}, {"state_dict": {"f": os.system}}):
        torch.save({"state_dict": original} | extra, tmp_path / "a.pth")
        refused("pixart", "a.pth", "needs pickle code to be read")
    torch.save({"state_dict": original, "args": argparse.Namespace()}, tmp_path / "a.pth")
    refused("pixart", "a.pth", "torch.save(w['state_dict'], 'weights.pth')")
    command = _save_alone(tmp_path / "a.pth", averaged=True)
    monkeypatch.chdir(tmp_path)
    exec(command.partition('"')[2].removesuffix('"'))
    assert torch.load(tmp_path / "weights.pth", weights_only=True).keys() == original.keys()
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


@pytest.mark.faults
def test_a_changed_configuration_is_converted_or_refused_in_one_line(
    pipeline_folder, tmp_path, capfd, tally
):
    folder, out = copied(pipeline_folder, tmp_path / "pixart"), tmp_path / "out"
    endings = {}
    for what in changes(folder, range(40 * FAULTS)):
        endings[what] = ending(main, ["pixart", folder, out], capfd)
        assert out.exists() == (endings[what][0] == 0)
        shutil.rmtree(out, ignore_errors=True)
    wrong = {what: told for what, (_, told) in endings.items() if told}
    assert not wrong, json.dumps(wrong, indent=1)
    assert {code for code, _ in endings.values()} == {0, 2}
    for code, _ in endings.values():
        tally(EXIT_CODES[code])


def test_code_of_a_folder_is_not_carried_along(pipeline_folder, refused, tmp_path):
    folder = copied(pipeline_folder, tmp_path / "pixart")
    path = folder / "tokenizer" / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["code.Own", None]}}
    path.write_text(json.dumps(values))
    refused("pixart", "pixart", f"{path} wants code of its own to be run (auto_map)")
