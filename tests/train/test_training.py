"""Training: the objective by hand, the schedule of the rate, and runs under the `deepspeed`
launcher."""

import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from training import finish, launch, log_of

from gentron_fast import PRESETS, GenTron, GenTronPipeline
from gentron_fast.diffusion import SCHEDULER_CONFIG, NoiseSchedule
from gentron_train.objective import Objective
from gentron_train.settings import Settings
from gentron_train.small_world.architecture import small_text_encoder
from gentron_train.small_world.renderer import vocabulary
from gentron_train.trainer import learning_rate

STEPS = 20
SCHEDULE = NoiseSchedule.from_config(SCHEDULER_CONFIG)
T2I = ("--batch=4", "--draws=4", "--lr=1e-3", f"--steps={STEPS}", f"--save-every={STEPS // 2}")


@pytest.fixture(scope="module")
def image_run(world):
    """Twenty T2I steps on two ranks, a checkpoint in the middle and one at the end."""
    run = world / "t2i"
    finish(launch("train/t2i.py", world, run, *T2I, f"--sample-every={STEPS}"))
    return run


def test_loss_falls_and_pipeline_is_exported(image_run):
    values = [row["loss"] for row in log_of(image_run)]
    assert len(values) == STEPS
    assert sum(values[-4:]) < 0.95 * sum(values[:4])
    checkpoints = sorted(path.name for path in (image_run / "checkpoints").iterdir())
    assert checkpoints == ["latest", "step-00000010", "step-00000020"]
    pipeline = GenTronPipeline.from_pretrained(image_run / "pipeline")
    assert pipeline.transformer.config == PRESETS["small"]
    assert (pipeline.default_size, pipeline.default_frames) == ((64, 64), 1)


def test_the_log_tells_all(image_run):
    rows = log_of(image_run)
    for row in rows:
        assert row["grad_norm"] > 0 and 0 < row["mfu"] < 1 and row["memory_gib"] > 0.1
        assert row["captions"] == 8 * row["step"] and row["skipped"] == row["broken"] == 0
    assert rows[-1]["minutes_left"] == 0
    assert (image_run / "samples" / f"step-{STEPS:08d}.png").stat().st_size > 1000
    pytest.importorskip("matplotlib")
    assert (image_run / "loss.png").exists()


def test_tensorboard(image_run):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(image_run / "tensorboard"))
    accumulator.Reload()
    losses = [event.value for event in accumulator.Scalars("loss")]
    assert losses == pytest.approx([row["loss"] for row in log_of(image_run)])


def test_t2v_trains_from_the_t2i_pipeline(world, image_run):
    run = world / "t2v"
    init = image_run / "pipeline"
    output = finish(launch("train/t2v.py", world, run, f"--init={init}", "--batch=3", "--steps=2"))
    assert "batch 6 = 3 per rank × 1 micro-steps × 2 ranks" in output
    assert "clips/s" in output
    pipeline = GenTronPipeline.from_pretrained(run / "pipeline")
    assert pipeline.transformer.config == PRESETS["small-T2V"]
    assert pipeline.default_frames == 8
    for name in ("text_encoder", "text_encoder_2"):  # frozen
        before, after = (
            load_file(next((f / name).glob("*.safetensors"))) for f in (init, run / "pipeline")
        )
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    "number, whole_group, ranks",
    [(signal.SIGTERM, True, 1), (signal.SIGTERM, False, 2), (signal.SIGINT, True, 2)],
    ids=["group", "launcher-alone", "ctrl-c"],
)
def test_a_signal_saves_and_ends(world, tiny_t2i_folder, tmp_path, number, whole_group, ranks):
    options = ("--batch=2", "--steps=100000", f"--init={tiny_t2i_folder}")
    process = launch("train/t2i.py", world, tmp_path, *options, ranks=ranks)
    log = tmp_path / "log.jsonl"
    for _ in range(900):
        if log.exists() or process.poll() is not None:
            break
        time.sleep(0.2)
    assert process.poll() is None, process.communicate()[0][-4000:]
    if whole_group:
        os.killpg(process.pid, number)
    else:  # what `kill` of the deepspeed command does: its ranks are orphaned
        process.send_signal(number)
    output, _ = process.communicate(timeout=60)  # until the last rank has closed it
    assert process.returncode != 0
    assert "go on with --resume" in output, output[-4000:]
    name = (tmp_path / "checkpoints" / "latest").read_text().strip()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"latest", name}


def by_hand(model: GenTron, latents, noise, timestep, text, motion_free, weight) -> float:
    """The mean over samples of weight(ᾱ) · mean((ε̂ - ε)²), one sample at a time."""
    total = 0.0
    for i in range(len(latents)):
        kept = 1.0
        for beta in SCHEDULE.betas[: int(timestep[i]) + 1].tolist():
            kept *= 1 - beta
        noisy = kept**0.5 * latents[[i]] + (1 - kept) ** 0.5 * noise[[i]]
        flags = None if motion_free is None else motion_free[[i]]
        with torch.no_grad():
            prediction = model(noisy, timestep[[i]], text.select([i]), flags)
        squares = (prediction[0].double() - noise[i]) ** 2
        total += weight(kept) * float(squares.sum()) / squares.numel()
    return total / len(latents)


@pytest.mark.parametrize("frames", [1, 3], ids=["images", "clips"])
@pytest.mark.parametrize(
    "options, weight",
    [
        ({}, lambda kept: 1.0),
        ({"max_loss_weight": 20.0}, lambda kept: min(1 / kept, 20.0)),
        ({"min_snr_gamma": 5.0}, lambda kept: min(kept / (1 - kept), 5.0) * (1 - kept) / kept),
    ],
    ids=["plain", "cap", "min-snr"],
)
def test_a_batch_by_hand(make_model, make_text, tiny_config, frames, options, weight):
    model = make_model(tiny_config, torch.float32)
    text = make_text(tiny_config, 3, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    latents, noise = torch.randn(2, 3, 4, frames, 4, 4, generator=generator)
    timestep = torch.tensor([0, 400, 999])
    motion_free = None if frames == 1 else torch.tensor([True, False, False])
    objective = Objective(model, None, SCHEDULE, torch.float32, **options)
    loss = objective(latents, timestep, text, motion_free, noise)
    expected = by_hand(model, latents, noise, timestep, text, motion_free, weight)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_t2v_starts_as_t2i():
    torch.manual_seed(0)
    image_model = GenTron(PRESETS["small"])
    with torch.no_grad():
        for parameter in image_model.parameters():
            parameter.normal_(std=0.02)
    encoder = small_text_encoder(vocabulary())
    latents, noise = torch.randn(2, 3, 4, 8, 8, 8)
    latents, noise = latents[:, :, :3].contiguous(), noise[:, :, :3].contiguous()
    timestep, motion_free = torch.tensor([10, 500, 900]), torch.tensor([True, False, True])
    text = encoder.encode(["a red circle", "", "a blue square moving up"])
    with torch.no_grad():
        clip_loss = Objective(GenTron.from_t2i(image_model), None, SCHEDULE, torch.float32)(
            latents, timestep, text, motion_free, noise
        )
        frame_losses = [
            Objective(image_model, None, SCHEDULE, torch.float32)(
                latents[:, :, [frame]], timestep, text, None, noise[:, :, [frame]]
            )
            for frame in range(3)
        ]
    torch.testing.assert_close(clip_loss, torch.stack(frame_losses).mean(), rtol=1e-6, atol=0)


def test_text_stands_for_several_draws():
    torch.manual_seed(0)
    encoder = small_text_encoder(vocabulary())
    objective = Objective(GenTron(PRESETS["small"]), encoder, SCHEDULE, torch.float32)
    latents, noise = torch.randn(2, 4, 4, 1, 8, 8)
    timestep = torch.tensor([1, 2, 3, 4])
    prompts = ["a red circle", "a blue square"]
    once = objective(latents, timestep, encoder.tokenize(prompts), None, noise)
    twice = encoder.tokenize([prompts[0], prompts[0], prompts[1], prompts[1]])
    torch.testing.assert_close(once, objective(latents, timestep, twice, None, noise))


def test_learning_rate():
    settings = Settings(lr=1.0, warmup=10, decay_ratio=0.25)
    assert learning_rate(settings, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(settings, 500, 0.5) == 1.0
    assert learning_rate(settings, 900, 0.875) == pytest.approx(0.5)
    assert learning_rate(settings, 999, 1.0) == 0.0
