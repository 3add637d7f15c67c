"""Precomputed shards: what they hold, what reads them, and the command that writes them."""

import argparse
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load
from samples import BROKEN, CAPTION, as_file, assert_same, settings, write_tar
from training import log_of
from webdataset import WebDataset

from gentron_fast.files import MARK, claim
from gentron_fast.index import ASSETS
from gentron_fast.text import SUBFOLDERS
from gentron_train.data import shards as shards_module
from gentron_train.data.decode import Sampling
from gentron_train.data.loader import make_loader
from gentron_train.data.precompute import Decoder, load_models, new_shard, precompute
from gentron_train.data.precompute import main as precompute_main
from gentron_train.data.shards import PRECOMPUTED, Shard, find_shards, read_facts
from gentron_train.data.sources import load_facts, pack_facts


@pytest.mark.parametrize("name", BROKEN)
def test_each_kind_of_broken_sample(broken_samples, name, tmp_path):
    shard = find_shards(str(write_tar(tmp_path / "a.tar", [broken_samples[name]])))[0]
    record, broken = Decoder(Sampling(size=(32, 32)))[shard, 0]
    assert (broken.cause, broken.sample) == (BROKEN[name], "a-0000") and "\n" not in broken.detail
    assert json.loads(record.files["broken.json"]) == [broken.cause, broken.detail]


def test_precomputed_shards(precomputed, encoder):
    """Standard WebDataset files: mean, std, and the embeddings that the encoder gives."""
    names = sorted(path.name for path in precomputed.iterdir() if not path.name.startswith("."))
    assert names == ["broken.jsonl", "clips-0.tar", "images-0.tar", "images-1.tar"]
    samples = list(WebDataset(str(precomputed / "clips-0.tar"), shardshuffle=False))
    assert len(samples) == 10 and sum("broken.json" in sample for sample in samples) == 5
    whole = [sample for sample in samples if "safetensors" in sample]
    tensors = load(whole[1]["safetensors"])
    assert tensors["mean"].shape == tensors["std"].shape == (2, 4, 8, 4, 4)
    assert (tensors["std"] > 0).all() and not torch.equal(*tensors["mean"])
    text = encoder.encode([whole[1]["txt"].decode()])
    for name, encoded in text._asdict().items():
        for part, value in encoded._asdict().items():
            torch.testing.assert_close(tensors[f"{name}.{part}"], value[0], rtol=1e-4, atol=1e-5)
    causes = Counter(json.loads(line)["cause"] for line in (precomputed / "broken.jsonl").open())
    assert causes == {**Counter(BROKEN.values()), "shard cut off": 1}


def test_precomputed_needs_no_decoder_and_no_encoder(precomputed, tmp_path):
    code = f"""
import sys
from pathlib import Path
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "transformers", "av", "PIL", "deepspeed"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
from gentron_train.data.loader import DataSettings, make_loader
data = DataSettings(kinds=("images", "clips"), size=(32, 32), batch=2, workers=1, max_broken=1.0,
    windows_per_clip=2,
    images={str(precomputed / "images-*.tar")!r}, clips={str(precomputed / "clips-*.tar")!r},
    log=Path({str(tmp_path / "log")!r}))
batch = next(make_loader(data, Path("nowhere"), None))
assert batch.latents.shape == (2, 4, 8, 4, 4) and batch.text.t5.tokens.shape[2] == 128
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_on_precomputed_shards_needs_no_other_package(precomputed, tiny_t2i_folder, tmp_path):
    """Two steps to the transformer alone; the text encoders of --init are copied unopened."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "transformers", "av"):
            raise ModuleNotFoundError(name + " is blocked")
sys.meta_path.insert(0, Block())
from gentron_train.process import run
from gentron_train.trainer import train
run(lambda: train("t2i", "", sys.argv[1:]))
"""
    run = tmp_path / "run"
    options = [f"--data={precomputed}", f"--run={run}", f"--init={tiny_t2i_folder}", "--size=32"]
    options += ["--vae=nowhere", "--steps=2", "--batch=2", "--draws=1", "--max-broken=1"]
    options += ["--workers=0", "--no-in-memory", "--no-tensorboard", "--log-every=1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *options]
    result = subprocess.run(command, env=os.environ | rank, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    told = f"pipeline in {run / 'pipeline'}: no whole pipeline, no autoencoder in nowhere; training"
    assert told in result.stdout
    assert [row["step"] for row in log_of(run)] == [1, 2]
    names = {path.name for path in (run / "pipeline").iterdir()}
    assert names == {MARK, "transformer", "scheduler", *itertools.chain(*SUBFOLDERS.values())}


def test_latents_alone_leave_the_text_to_the_run(shards, models, encoder, tmp_path):
    command = [f"{shards}/clips-0.tar", str(tmp_path / "new"), f"--vae={models / 'vae'}"]
    options = ["--size=32x32", "--workers=0", "--max-broken=1", "--no-text"]
    assert precompute_main([*command, *options]) == 0
    data = settings(tmp_path / "new", tmp_path, kinds=("clips",))
    fresh = make_loader(
        settings(shards, tmp_path, kinds=("clips",)), models / "vae", encoder.tokenize
    )
    assert_same(next(make_loader(data, None, encoder.tokenize)), next(fresh))
    with pytest.raises(ValueError, match="holds no text embeddings"):
        make_loader(data, None, None)


def test_a_distilled_folder_has_its_teachers_parts():
    options = {"pipeline": ASSETS / "fast", "vae": None, "clip": None, "t5": None, "dtype": "fp32"}
    folder, encoder = load_models(argparse.Namespace(**options, no_text=False))
    assert (folder / "config.json").is_file() and set(encoder.encoders) == {"clip", "t5"}


def test_precompute_goes_on_where_it_was_cut_off(shards, models, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new"
    command = [f"{shards}/images-*.tar", f"{shards}/clips-*.tar", str(out)]
    command += [f"--pipeline={models}", "--size=32x32", "--workers=0", "--max-broken=1"]
    decode, left = Decoder.__getitem__, [13]

    def stop_after_13(self, place):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return decode(self, place)

    monkeypatch.setattr("gentron_train.data.precompute.ENCODED_AT_ONCE", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "__getitem__", stop_after_13)
        assert precompute_main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert [path.name for path in out.glob("*.tar*")] == ["images-0.tar"]
    assert not list(out.glob(".*.part*"))
    before = (out / "images-0.tar").stat()
    assert precompute_main(command) == 0
    assert len(list(out.glob("*.tar"))) == 3
    assert (out / "images-0.tar").stat().st_mtime_ns == before.st_mtime_ns
    # Ranks share the shards out, and the result is the same to the byte.
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert precompute_main([*command[:2], str(tmp_path / "ranks"), *command[3:]]) == 0
    for path in out.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "ranks" / path.name).read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert precompute_main([*command, "--starts=3"]) == 2
    assert "with other settings or models" in capsys.readouterr().err


def test_a_new_shard_is_the_same_whatever_is_made_before_it(shards, models, tmp_path):
    """To the byte, though texts that are encoded together differ from those encoded alone."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").symlink_to(shards / "clips-0.tar")
    options = [f"--pipeline={models}", "--size=32x32", "--workers=0", "--max-broken=1"]
    for folder, names in (("both", "{a,b}"), ("alone", "b")):
        command = [f"{tmp_path}/{names}.tar", str(tmp_path / folder), *options]
        assert precompute_main(command) == 0
    made = [(tmp_path / folder / "b.tar").read_bytes() for folder in ("both", "alone")]
    assert made[0] == made[1]


def test_a_shard_that_was_replaced_under_its_name_is_told(models, tmp_path, capsys):
    path, out = tmp_path / "a.tar", tmp_path / "out"
    command = [str(path), str(out), f"--vae={models / 'vae'}", "--no-text", "--workers=0"]

    def write(shade):
        image = {"png": as_file(Image.new("RGB", (32, 32), (shade,) * 3), "png")} | CAPTION
        write_tar(path, [image])

    write(0)
    assert precompute_main(command) == 0
    assert precompute_main(command) == 0
    before = (out / "a.tar").read_bytes()
    write(255)
    assert precompute_main(command) == 2
    assert "a.tar was made from a when its content was another" in capsys.readouterr().err
    assert (out / "a.tar").read_bytes() == before
    # Those of earlier versions do not say of what they were made.
    facts, null = load_facts(read_facts(Shard("a", out / "a.tar")), "a")
    with new_shard(out / "a.tar") as add:
        add(PRECOMPUTED, pack_facts(replace(facts, source=""), null))
    shards_module.index.cache_clear()
    shards_module._open_files.clear()
    assert precompute_main(command) == 0


@pytest.mark.faults
def test_two_precomputes_share_the_work(
    shards, models, encoder, precomputed, tmp_path, capfd, tally
):
    """What another one has begun is waited for; what it does not finish is made."""
    paths = find_shards(f"{shards}/{{images,clips}}-*.tar")
    arguments = tmp_path, models / "vae", encoder
    sampling = Sampling(size=(32, 32))
    for name, is_finished in (("images-0.tar", True), ("images-1.tar", False)):
        (tmp_path / name).unlink(missing_ok=True)
        give_back = claim(tmp_path / name)
        thread = threading.Thread(
            target=precompute, args=(paths, *arguments, sampling), kwargs={"max_broken": 1.0}
        )
        thread.start()
        while "waiting for" not in capfd.readouterr().err:
            assert thread.is_alive()
            time.sleep(0.05)
        assert not (tmp_path / name).exists() and (tmp_path / "clips-0.tar").exists()
        if is_finished:
            shutil.copy2(precomputed / name, tmp_path)
        give_back()
        thread.join()
        with tarfile.open(tmp_path / name) as made, tarfile.open(precomputed / name) as wanted:
            assert made.getnames() == wanted.getnames()
        times = {(folder / name).stat().st_mtime_ns for folder in (tmp_path, precomputed)}
        assert (len(times) == 1) == is_finished
        tally("ended well" if is_finished else "recovered")
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".lock", ".part")]


def test_sigterm_leaves_nothing_half_written(shards, models, tmp_path, monkeypatch, capsys):
    decode = Decoder.__getitem__
    monkeypatch.setattr("gentron_train.data.precompute.ENCODED_AT_ONCE", 1)

    def stopped(self, place):
        if place[1] == 3:
            assert list(tmp_path.glob("new/.*.part*"))
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(self, place)

    monkeypatch.setattr(Decoder, "__getitem__", stopped)
    before = signal.getsignal(signal.SIGTERM)
    command = [f"{shards}/images-0.tar", str(tmp_path / "new"), f"--vae={models / 'vae'}"]
    options = ["--no-text", "--size=32x32", "--workers=0", "--max-broken=1"]
    try:
        assert precompute_main([*command, *options]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "the same command goes on" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "new").iterdir() if path.name != "broken.jsonl"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing-*.tar", "out", "--vae=v"], "no shards match nothing-*.tar"),
        (["nothing.tar", "out", "--vae=v"], "there is no shard nothing.tar"),
        (["SHARDS/clips-0.tar", "out"], "name an autoencoder"),
        (["SHARDS/clips-0.tar", "out", "--vae=v"], "name text encoders"),
        (["SHARDS/clips-0.tar", "out", "--vae=v", "--no-text"], "no autoencoder at v"),
        (["SHARDS/clips-0.tar", "out", "--size=big"], "--size is 'big', wanted a side or HxW"),
        (["SHARDS/clips-0.tar", "out", "--windows-per-clip=0"], "--windows-per-clip is 0"),
        (["SHARDS/clips-0.tar", "out", "--fps=0"], "fps is 0.0, must be above 0"),
        (["SHARDS/clips-0.tar", "out", "--size=30x30", "--pipeline=MODELS"], "size 30x30"),
        (["SHARDS/clips-0.tar", "SHARDS", "--pipeline=MODELS"], "over itself"),
        (["SHARDS/clips-0.tar", "OUT", "--pipeline=MODELS", "--size=32x32"], "clips: 5 of 10"),
        (["SHARDS/clips-0.tar", "out", "--device=x"], "unknown device 'x': wanted cpu, cuda"),
        (["SHARDS/clips-0.tar", "out", "--device=meta"], "unknown device 'meta'"),
        (["SHARDS/clips-0.tar", "out", "--device=cuda:99"], "no device cuda:99 here"),
        (["pipe:cat a.tar", "out", "--pipeline=MODELS"], "shell: --allow-pipes allows it"),
        (["SHARDS/clips-0.tar", "SHARDS/clips-0.tar/out", "--vae=v"], "cannot write into"),
        (["SHARDS/clips-0.tar"], "arguments are required: out"),
        (["a", "b", "--quick"], "unrecognized arguments: --quick"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_commands(shards, models, tmp_path, arguments, message, capsys):
    names = {"SHARDS": str(shards), "MODELS": str(models), "OUT": str(tmp_path / "new")}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    assert precompute_main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    message = "samples are broken, more than 5.0%" if "of 10" in message else message
    assert message in lines[-1] and lines[-1].startswith("gentron_train.precompute: error: ")


def test_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit) as stop:
        precompute_main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and len(lines) <= 40 and max(map(len, lines)) <= 100
