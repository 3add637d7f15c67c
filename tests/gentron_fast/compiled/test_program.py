"""gentron-sample: the pipeline's result without Python, signals, and every refusal."""

import os
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled_files import (
    LONG,
    PROGRAM,
    PROMPT,
    SANITIZER_OPTIONS,
    STEPS,
    embeddings,
    error,
    run_program,
)
from safetensors.torch import save_file


def token_arguments(pipeline, prompt):
    tokens = pipeline.text_encoder.tokenize([prompt])
    return [f"{name}={','.join(map(str, ids[0].tolist()))}" for name, (ids, _) in tokens.items()]


def test_the_program_gives_the_pipelines_latents_and_frames(pipeline, package, tmp_path):
    scales = {"lambda_t": 5.0, "lambda_m": 1.3, "rescale": 0.4}
    wanted = pipeline([PROMPT], steps=STEPS, seed=7, **scales, progress=False)
    arguments = [package, "--tokens", *token_arguments(pipeline, PROMPT), "--seed", 7]
    arguments += [
        "--lambda-t",
        5,
        "--lambda-m",
        1.3,
        "--rescale",
        0.4,
        "--frames",
        8,
        "--size",
        64,
        64,
    ]
    done = run_program(*arguments, "--latents", "--out", tmp_path / "latents.npy")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    latents = torch.from_numpy(np.load(tmp_path / "latents.npy"))
    assert latents.dtype == torch.float32 and error(latents, wanted.latents) <= 1e-4
    assert run_program(*arguments, "--out", tmp_path / "frames.npy").returncode == 0
    frames = torch.from_numpy(np.load(tmp_path / "frames.npy"))
    assert frames.dtype == torch.uint8 and frames.shape == wanted.frames.shape
    assert (frames.int() - wanted.frames.int()).abs().max() <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames.npy", "latents.npy"]


def test_the_program_takes_embeddings(pipeline, package, tmp_path):
    text = pipeline.text_encoder.encode([PROMPT, LONG])
    negative = pipeline.text_encoder.encode(["a blue square"])
    save_file(embeddings(text) | embeddings(negative, "null."), tmp_path / "text.safetensors")
    arguments = ["--embeddings", tmp_path / "text.safetensors", "--seed", "1,2", "--latents"]
    done = run_program(package, *arguments, "--out", tmp_path / "latents.npy")
    assert (done.returncode, done.stderr) == (0, "")
    wanted = pipeline(
        [PROMPT, LONG], negative_prompt="a blue square", steps=STEPS, seed=[1, 2], progress=False
    )
    latents = torch.from_numpy(np.load(tmp_path / "latents.npy"))
    assert error(latents, wanted.latents) <= 1e-4


def start_loading(package, tmp_path, ignored=False):
    """gentron-sample while it loads the package, and its folder of temporary files."""
    (temporary := tmp_path / "tmp").mkdir()
    arguments = [package, "--tokens", "clip=1", "t5=1", "--out", tmp_path / "out.npy"]
    process = subprocess.Popen(
        [PROGRAM, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={"TMPDIR": str(temporary)} | SANITIZER_OPTIONS,
        # A test run in the background ignores SIGINT, and its children with it.
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL
        ),
    )
    while not any(temporary.iterdir()) and process.poll() is None:
        time.sleep(0.001)
    return process, temporary


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_interrupted_program_leaves_nothing(package, tmp_path, number):
    process, temporary = start_loading(package, tmp_path)
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert (process.returncode, told.count("\n")) == (130, 1) and "interrupted" in told
    assert not any(temporary.iterdir()) and not (tmp_path / "out.npy").exists()


def signal_mask(process, name):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(rf"{name}:\s*(\w+)", status)[1], 16)


def test_a_second_interrupt_ends_the_program_at_once(package, tmp_path):
    process, _ = start_loading(package, tmp_path)
    bit = 1 << signal.SIGINT - 1
    assert signal_mask(process, "SigCgt") & bit
    process.send_signal(signal.SIGINT)
    while signal_mask(process, "SigCgt") & bit:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == -signal.SIGINT


def test_an_ignored_interrupt_stays_ignored(package, tmp_path):
    process, _ = start_loading(package, tmp_path, ignored=True)
    assert signal_mask(process, "SigIgn") & 1 << signal.SIGINT - 1
    process.terminate()
    assert "interrupted" in process.communicate(timeout=60)[1] and process.returncode == 130


def test_the_program_links_no_python():
    dynamic = subprocess.run(["readelf", "-d", PROGRAM], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic.stdout)
    assert "libtorch_cpu.so" in needed and not [name for name in needed if "python" in name]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere.gentron"], "one of --tokens and --embeddings"),
        (["nowhere.gentron", "--tokens", "clip=1"], "no file nowhere.gentron"),
        (["FILE", "--tokens", "clip=1,x"], "--tokens: no number: x"),
        (["FILE", "--tokens", "clip=99999999", "t5=1"], "ids below"),
        (["FILE", "--tokens", "clip=1"], "there are no t5 tokens"),
        (["FILE", "--tokens", "clip=1", "t5=1", "--frames", "4"], "made for frames"),
        (["FILE", "--tokens", "clip=1", "t5=1", "--size", "8", "8"], "made for size"),
        (["FILE", "--tokens", "clip=1", "t5=1", "--seed", "-1"], "--seed"),
        (["FILE", "--tokens", "clip=1", "t5=1", "--device", "cuda"], "made for cpu, not for cuda"),
        (["FILE", "--shiny", "1"], "unknown option --shiny"),
        (["FILE", "--embeddings", "nowhere"], "no file nowhere"),
        (["FILE", "--tokens", "clip=1", "t5=1", "--sha256", ""], "64 hexadecimal digits"),
        (["FILE", "--tokens", "clip=1", "--sha256", "é" * 32], "64 hexadecimal digits"),
        (["FILE", "--tokens", "clip=1", "clip=2"], "--tokens names clip twice"),
        (["FILE", "--tokens", "clip=1", "t5=1", "--tokens", "t6=1"], "of t6, which is no encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_program_refuses_in_one_line(package, tmp_path, arguments, words):
    arguments = [package if argument == "FILE" else argument for argument in arguments]
    done = run_program(*arguments, "--out", tmp_path / "out.npy")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gentron-sample: error: ") and done.stderr.count("\n") == 1
    assert words in done.stderr


@pytest.mark.parametrize("name", ["missing/out.npy", "folder.npy"])
def test_the_program_refuses_what_cannot_be_written_first(tmp_path, name):
    (tmp_path / "folder.npy").mkdir()
    done = run_program("nowhere", "--tokens", "clip=1", "--out", tmp_path / name)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gentron-sample: error: cannot write {tmp_path / name}: ")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.npy"]


def test_the_program_touches_nothing_that_is_there(tmp_path):
    """Neither what lies under a likely name of a partial file nor what it links to."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out.npy.part").symlink_to("mine")
    (tmp_path / ".out.part.npy").symlink_to("mine")
    before = sorted(tmp_path.iterdir())
    done = run_program("nowhere", "--tokens", "clip=1", "--out", tmp_path / "out.npy")
    assert done.returncode == 2 and sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_a_killed_program_left_is_removed(tmp_path):
    host = re.sub(r"\W", "-", socket.gethostname())
    ended = subprocess.Popen(["true"])
    ended.wait()
    alive, dead = (tmp_path / f".out.{host}.{pid}.0.part.npy" for pid in (os.getpid(), ended.pid))
    for path in (alive, dead):
        path.touch()
    run_program("nowhere", "--tokens", "clip=1", "--out", tmp_path / "out.npy")
    assert list(tmp_path.iterdir()) == [alive]


def test_a_full_disk_is_named_and_leaves_nothing(package, pipeline, tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    (tmp_path / "out").mkdir()
    arguments = [
        PROGRAM,
        package,
        "--tokens",
        "clip=1",
        "t5=1",
        "--out",
        tmp_path / "out" / "x.npy",
    ]
    options = {"capture_output": True, "text": True, "preexec_fn": limit, "timeout": 300}
    environment = {"TMPDIR": str(tmp_path)} | SANITIZER_OPTIONS
    done = subprocess.run([*map(str, arguments)], env=environment, **options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot write into TMPDIR" in done.stderr
    assert not list((tmp_path / "out").iterdir()) and len(list(tmp_path.iterdir())) == 1


def test_a_missing_tmpdir_is_named(package, tmp_path):
    arguments = [PROGRAM, package, "--tokens", "clip=1", "t5=1", "--out", tmp_path / "x.npy"]
    options = {"capture_output": True, "text": True, "timeout": 300}
    environment = {"TMPDIR": str(tmp_path / "missing")} | SANITIZER_OPTIONS
    done = subprocess.run([*map(str, arguments)], env=environment, **options)
    assert done.returncode == 2
    assert done.stderr == (
        "gentron-sample: error: cannot write into TMPDIR, "
        f"{tmp_path / 'missing'}: No such file or directory\n"
    )
