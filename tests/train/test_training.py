"""Training: the data stream, the schedule of the rate, and runs under the `deepspeed` launcher."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gentron_fast import PRESETS, GenTron, GenTronPipeline
from gentron_fast.diffusion import SCHEDULER_CONFIG, NoiseSchedule
from gentron_train.engine import Objective, Settings, learning_rate, parse_settings
from gentron_train.shapes import vocabulary, write_shards
from gentron_train.small import small_text_encoder, small_vae

ROOT = Path(__file__).parents[2]
STEPS = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a few shards (data) and an untrained autoencoder (vae)."""
    folder = tmp_path_factory.mktemp("world")
    write_shards(folder / "data", images=12, clips=6, shard_size=6, processes=1, progress=False)
    torch.manual_seed(0)
    small_vae().save_pretrained(folder / "vae")
    return folder


def launch(script: str, world: Path, run: Path, *options, ranks: int = 2) -> subprocess.Popen:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    command += [f"--num_gpus={ranks}", f"--master_port={port}", f"train/{script}.py"]
    command += [f"--data={world / 'data'}", f"--vae={world / 'vae'}", f"--run={run}"]
    command += ["--warmup=1", "--log-every=1", "--starts=1", *map(str, options)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, seconds: int = 240) -> str:
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-4000:]
    return output


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


T2I = ("--batch=4", "--draws=4", "--lr=1e-3", f"--steps={STEPS}", f"--save-every={STEPS // 2}")


@pytest.fixture(scope="module")
def image_run(world):
    """Twenty T2I steps on two ranks, a checkpoint in the middle and one at the end."""
    run = world / "t2i"
    finish(launch("t2i", world, run, *T2I))
    return run


def test_loss_falls_and_pipeline_is_exported(image_run):
    values = losses(image_run)
    assert len(values) == STEPS
    assert sum(values[-4:]) < 0.95 * sum(values[:4])
    checkpoints = sorted(path.name for path in (image_run / "checkpoints").iterdir())
    assert checkpoints == ["latest", "step-00000010", "step-00000020"]
    pipeline = GenTronPipeline.from_pretrained(image_run / "pipeline")
    assert pipeline.transformer.config == PRESETS["small"]


def test_resumed_run_equals_the_uninterrupted(world, image_run):
    resumed = world / "resumed"
    shutil.copytree(image_run, resumed)
    shutil.rmtree(resumed / "pipeline")
    shutil.rmtree(resumed / "checkpoints" / "step-00000020")
    (resumed / "checkpoints" / "latest").write_text("step-00000010\n")
    finish(launch("t2i", world, resumed, *T2I, "--resume"))
    assert losses(resumed) == losses(image_run)
    for rank in range(2):
        shards, expected = (
            load_file(run / "checkpoints" / "step-00000020" / f"ema-rank{rank}.safetensors")
            for run in (resumed, image_run)
        )
        assert shards.keys() == expected.keys()
        for name, shard in shards.items():
            assert torch.equal(shard, expected[name]), name
    for path in (image_run / "pipeline").rglob("*.safetensors"):
        again = resumed / path.relative_to(image_run)
        assert again.read_bytes() == path.read_bytes(), path


def test_t2v_trains_from_the_t2i_pipeline(world, image_run):
    run = world / "t2v"
    init = image_run / "pipeline"
    finish(launch("t2v", world, run, f"--init={init}", "--batch=3", "--steps=2"))
    pipeline = GenTronPipeline.from_pretrained(run / "pipeline")
    assert pipeline.transformer.config == PRESETS["small-T2V"]
    for name in ("text_encoder", "text_encoder_2"):  # frozen
        before, after = (
            load_file(next((f / name).glob("*.safetensors"))) for f in (init, run / "pipeline")
        )
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("whole_group", [True, False], ids=["group", "launcher-alone"])
def test_sigterm_saves_and_ends(world, tmp_path, whole_group):
    process = launch("t2i", world, tmp_path, "--batch=2", "--steps=100000", ranks=1)
    log = tmp_path / "log.jsonl"
    for _ in range(900):
        if log.exists() or process.poll() is not None:
            break
        time.sleep(0.2)
    if whole_group:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()  # what `kill` of the deepspeed command does: its ranks are orphaned
    output, _ = process.communicate(timeout=60)
    assert "go on with --resume" in output, output[-4000:]
    name = (tmp_path / "checkpoints" / "latest").read_text().strip()
    assert (tmp_path / "checkpoints" / name).is_dir()
    assert not (tmp_path / "checkpoints" / ".partial").exists()


def test_t2v_starts_as_t2i():
    torch.manual_seed(0)
    image_model = GenTron(PRESETS["small"])
    with torch.no_grad():
        for parameter in image_model.parameters():
            parameter.normal_(std=0.02)
    encoder = small_text_encoder(vocabulary())
    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
    latents, noise = torch.randn(2, 3, 4, 8, 8, 8)
    latents, noise = latents[:, :, :3].contiguous(), noise[:, :, :3].contiguous()
    timestep, motion_free = torch.tensor([10, 500, 900]), torch.tensor([True, False, True])
    text = encoder.encode(["a red circle", "", "a blue square moving up"])
    with torch.no_grad():
        clip_loss = Objective(GenTron.from_t2i(image_model), None, schedule, torch.float32)(
            latents, noise, timestep, text, motion_free
        )
        frame_losses = [
            Objective(image_model, None, schedule, torch.float32)(
                latents[:, :, [frame]], noise[:, :, [frame]], timestep, text, None
            )
            for frame in range(3)
        ]
    torch.testing.assert_close(clip_loss, torch.stack(frame_losses).mean(), rtol=1e-6, atol=0)


def test_text_stands_for_several_draws():
    torch.manual_seed(0)
    encoder = small_text_encoder(vocabulary())
    objective = Objective(
        GenTron(PRESETS["small"]),
        encoder,
        NoiseSchedule.from_config(SCHEDULER_CONFIG),
        torch.float32,
    )
    latents, noise = torch.randn(2, 4, 4, 1, 8, 8)
    timestep = torch.tensor([1, 2, 3, 4])
    prompts = ["a red circle", "a blue square"]
    once = objective(latents, noise, timestep, encoder.tokenize(prompts), None)
    twice = encoder.tokenize([prompts[0], prompts[0], prompts[1], prompts[1]])
    torch.testing.assert_close(once, objective(latents, noise, timestep, twice, None))


@pytest.mark.parametrize("cap", [1.0, 300.0])
def test_noisy_timesteps_weigh_more_up_to_the_cap(cap):
    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
    torch.manual_seed(0)
    model = GenTron(PRESETS["small"])  # predicts zero: the error of a sample is its noise squared
    objective = Objective(model, None, schedule, torch.float32, cap)
    text = small_text_encoder(vocabulary()).eval().encode(["a star"] * 3)
    latents, noise = torch.randn(2, 3, 4, 1, 16, 16)
    timestep = torch.tensor([10, 500, 999])
    expected = (1 / schedule.alphas_cumprod[timestep]).clamp(max=cap)
    expected = (expected * noise.square().mean((1, 2, 3, 4))).mean()
    loss = objective(latents, noise, timestep, text, None)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_learning_rate():
    settings = Settings(lr=1.0, warmup=10, decay_last=0.25)
    assert learning_rate(settings, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(settings, 500, 0.5) == 1.0
    assert learning_rate(settings, 900, 0.875) == pytest.approx(0.5)
    assert learning_rate(settings, 999, 1.0) == 0.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch", "0"], "--batch is 0, must be at least 1"),
        (["--p-null", "1.5"], "--p-null is 1.5, must be in 0 … 1"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_wrong_settings(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_settings(Settings(), "", arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
