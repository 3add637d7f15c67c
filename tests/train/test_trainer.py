"""The engine against one plain process: ZeRO-3 on two ranks, bf16, EMA, and bad steps."""

import math
import platform
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param
from training import STEPS, log_of, settings_of

from gentron_fast import PRESETS, GenTron
from gentron_fast.diffusion import SCHEDULER_CONFIG, NoiseSchedule
from gentron_fast.model import TextCondition
from gentron_train import assembly, sharding, trainer
from gentron_train.assembly import build_parts, gather_persistent, load_text_encoder
from gentron_train.checkpoint import (
    checkpoints_folder,
    latest_checkpoint,
    read_info,
    read_sharded,
    shard_of,
)
from gentron_train.data.loader import Loader, TooManyBroken, make_loader
from gentron_train.data.sources import MemorySource
from gentron_train.metrics import mean_over_ranks
from gentron_train.objective import Objective
from gentron_train.process import run
from gentron_train.settings import Settings
from gentron_train.trainer import learning_rate, trainer_of


def run_steps(settings: Settings, stage: str = "t2i") -> dict:
    """Losses, whole weights and averaged weights of a rank after STEPS steps."""
    trainer = trainer_of(settings, stage)
    losses = []
    for step in range(STEPS):
        loss = trainer.train_step(learning_rate(settings, step, step / STEPS))
        losses += mean_over_ranks([loss])
    parameters = dict(trainer.engine.module.named_parameters())
    return {
        "losses": losses,
        "weights": {name: safe_get_full_fp32_param(p) for name, p in parameters.items()},
        "ema": trainer.ema.shards,
    }


def plain_steps(settings: Settings, ranks: int) -> dict:
    """The same in one process of plain torch: each rank's micro-batches, one after the other."""
    data = settings.data_settings("t2i")
    parts = build_parts(settings, "t2i", data, torch.device("cpu"))
    tokenize = parts.text_encoder.tokenize
    loaders = [
        make_loader(data, settings.vae, tokenize, rank=rank, ranks=ranks) for rank in range(ranks)
    ]
    schedule = NoiseSchedule.from_config(SCHEDULER_CONFIG)
    model = Objective(
        parts.transformer, parts.text_encoder, schedule, torch.float32, settings.max_loss_weight
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step, step / STEPS)
        total = 0.0
        for loader in loaders:
            batch = next(loader)
            inputs = batch.latents, batch.timestep, batch.text, batch.motion_free, batch.noise
            loss = model(*inputs) / ranks
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(settings.ema_decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            ema[name] = decay * ema[name] + (1 - decay) * parameter.detach()
        losses.append(total)
    return {"losses": losses, "weights": dict(model.named_parameters()), "ema": ema}


@pytest.fixture(scope="module")
def plain(world, tiny_t2i_folder, tmp_path_factory):
    torch.set_num_threads(1)
    return plain_steps(settings_of(world, tiny_t2i_folder, tmp_path_factory.mktemp("plain")), 2)


# Softmax does not see the bias of k: its gradient is rounding alone, and Adam makes steps of that.
NO_GRADIENT = ("kv.bias", "k_proj.bias")


def distance(weights: dict, reference: dict) -> float:
    """‖weights - reference‖ / ‖reference‖ over all tensors that have a gradient."""
    names = [name for name in reference if not name.endswith(NO_GRADIENT)]
    ours, theirs = (
        torch.cat([tensors[name].detach().flatten() for name in names])
        for tensors in (weights, reference)
    )
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_equal_one_plain_process(
    ranks, world, tiny_t2i_folder, tmp_path, plain, monkeypatch, sharded
):
    """With a model that stays gathered between steps, and with one that is never whole."""
    if sharded:
        monkeypatch.setattr(assembly, "WHOLE_MODEL", 0)
    results = ranks.call(2, run_steps, settings_of(world, tiny_t2i_folder, tmp_path))
    assert results[0]["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert len(set(plain["losses"])) == STEPS
    average = {
        name: torch.cat([result["ema"][name] for result in results])[: weight.numel()]
        for name, weight in plain["weights"].items()
    }
    for result in results:
        assert distance(result["weights"], plain["weights"]) < 1e-6
    assert distance(average, plain["ema"]) < 1e-6


# Of a loss, and of all weights together: bf16 keeps 8 bits, and errors of ten steps add up.
LOSS_DRIFT, WEIGHT_DRIFT = 2e-2, 1e-3


@pytest.mark.parametrize("kind", ["bf16", "autocast", "sharded"])
def test_bf16_stays_near_fp32(ranks, world, tiny_t2i_folder, tmp_path, plain, monkeypatch, kind):
    """bf16 parameters, autocast, and a model that is shared out part by part when it is made."""
    if kind == "sharded":
        monkeypatch.setattr(assembly, "WHOLE_MODEL", 0)
    changes = {"dtype": "bf16", "parameters": "fp32" if kind == "autocast" else "bf16"}
    settings = settings_of(world, tiny_t2i_folder, tmp_path, **changes)
    result = ranks.call(2, run_steps, settings)[0]
    assert result["losses"] == pytest.approx(plain["losses"], rel=LOSS_DRIFT)
    assert distance(result["weights"], plain["weights"]) < WEIGHT_DRIFT


def masters(settings: Settings) -> dict:
    trainer = trainer_of(settings, "t2v")
    named = dict(trainer.engine.module.named_parameters())
    return {name: safe_get_local_fp32_param(p) for name, p in named.items()} | {
        "kept": sum(p.ds_tensor.numel() for p in named.values()),
        "whole": sum(p.ds_numel for p in named.values()),
    }


@pytest.mark.parametrize("sharded", [False, True])
def test_masters_are_not_rounded(ranks, world, tiny_t2i_folder, tmp_path, monkeypatch, sharded):
    """bf16 parameters begin with fp32 masters, and T2V with the T2I model's weights."""
    if sharded:
        monkeypatch.setattr(assembly, "WHOLE_MODEL", 0)
    settings = settings_of(
        world, tiny_t2i_folder, tmp_path, "t2v", dtype="bf16", parameters="bf16", draws=1
    )
    shards = ranks.call(2, masters, settings)
    image_model = GenTron.from_pretrained(tiny_t2i_folder / "transformer")
    for name, weight in image_model.named_parameters():
        for rank, shard in enumerate(shards):
            own = shard[f"transformer.{name}"]
            assert torch.equal(own, shard_of(weight.detach(), own.numel(), rank)), name
    for shard in shards:  # no rank holds the whole model, padding aside
        assert shard["kept"] == pytest.approx(shard["whole"] / 2, rel=0.01)
    for block in range(2):
        assert not shards[0][f"transformer.blocks.{block}.temporal_attention.out.weight"].any()


@pytest.fixture(scope="module")
def pixart_folder(make_model, tiny_config, tiny_t2i_folder, tmp_path_factory):
    """What gentron_fast.convert makes of a PixArt, tiny: a T5 alone, and the options it needs."""
    folder = tmp_path_factory.mktemp("pixart")
    options = {"pooled_text": False, "caption_projection": True, "cross_norm": False}
    options |= {"timestep_cos_first": True, "final_table": True, "learned_range": True}
    config = replace(tiny_config, temporal=False, encoders=("t5",), **options)
    make_model(config, torch.float32).save_pretrained(folder / "transformer")
    for part in ("text_encoder_2", "tokenizer_2", "vae"):
        shutil.copytree(tiny_t2i_folder / part, folder / part)
    return folder


def start_of_t2v(settings: Settings) -> dict:
    """What the engine predicts of a clip before any step, and T2I of its frames; then two steps."""
    trainer = trainer_of(settings, "t2v")
    gather_persistent(trainer.engine)
    image_model = GenTron.from_pretrained(settings.init / "transformer")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, 8, 8, generator=generator)
    timestep, motion_free = torch.tensor([3, 700]), torch.tensor([False, True])
    text = trainer.text_encoder.encode(["a red circle", ""])
    with torch.no_grad():
        frames = [image_model(latents[:, :, [t]], timestep, text) for t in range(3)]
        clip = trainer.engine(latents, timestep, text, motion_free)
    blocks = trainer.engine.module.transformer.blocks
    out = [safe_get_full_fp32_param(block.temporal_attention.out.weight) for block in blocks]
    before = [bool(weight.any()) for weight in out]
    losses = [float(trainer.train_step(1e-3)) for _ in range(2)]
    out = [safe_get_full_fp32_param(block.temporal_attention.out.weight) for block in blocks]
    after = [bool(weight.any()) for weight in out]
    frames = torch.cat(frames, 2)
    return {"clip": clip, "frames": frames, "losses": losses, "before": before, "after": after}


@pytest.mark.parametrize("sharded", [False, True])
def test_t2v_starts_as_a_converted_pixart(
    ranks, world, pixart_folder, tmp_path, monkeypatch, sharded
):
    if sharded:
        monkeypatch.setattr(assembly, "WHOLE_MODEL", 0)
    settings = settings_of(world, pixart_folder, tmp_path, "t2v", draws=1)
    result = ranks.call(2, start_of_t2v, settings)[0]
    assert result["clip"].shape == (2, 8, 3, 8, 8)
    torch.testing.assert_close(result["clip"], result["frames"], rtol=1e-5, atol=1e-5)
    assert result["before"] == [False, False] and result["after"] == [True, True]
    assert all(map(math.isfinite, result["losses"]))


def test_an_encoder_that_is_missing_is_named(world, pixart_folder, tiny_t2i_folder, tmp_path):
    settings = settings_of(world, pixart_folder, tmp_path)
    with pytest.raises(ValueError, match="needs its text encoders, no clip found: --clip"):
        load_text_encoder(settings, PRESETS["small"], torch.float32)
    settings = settings_of(world, tiny_t2i_folder, tmp_path)
    only_t5 = replace(PRESETS["small"], encoders=("t5",))
    encoder = load_text_encoder(settings, only_t5, torch.float32)
    assert list(encoder.encoders) == ["t5"]
    with pytest.raises(ValueError, match="t5 text encoder is 128 wide, the transformer takes 4096"):
        load_text_encoder(settings, PRESETS["XL/2-T5"], torch.float32)


@pytest.mark.parametrize("init, message", [(None, "--init T2I_FOLDER"), ("none/such", "none/such")])
def test_nothing_is_made_for_a_run_that_cannot_start(world, tmp_path, monkeypatch, init, message):
    monkeypatch.setattr(trainer, "start_distributed", lambda timeout: torch.device("cpu"))
    monkeypatch.setattr(trainer.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(trainer, "make_missing", lambda *_: pytest.fail("made data"))
    settings = replace(settings_of(world, tmp_path, tmp_path), init=init and tmp_path / init)
    with pytest.raises((ValueError, OSError), match=message):
        trainer_of(settings, "t2v")


@pytest.mark.parametrize("name", ["pipeline/config.json", "log.jsonl", "loss.png"])
def test_a_run_folder_with_something_else_is_refused_first(
    ranks, world, tiny_t2i_folder, tmp_path, monkeypatch, capfd, name
):
    monkeypatch.setattr(trainer, "make_missing", lambda *_: pytest.fail("made data"))
    init, own = tmp_path / "init", tmp_path / "run" / name
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    shutil.copytree(tiny_t2i_folder, init)
    (init / "model_index.json").unlink()
    settings = settings_of(world, init, tmp_path / "run")
    (code,) = ranks.wait(ranks.start(1, not_finite, settings, set(), 0.0))
    output = "".join(capfd.readouterr())
    assert code and f"{own.parent if '/' in name else own} is there already" in output, output
    assert f"{init} is no whole pipeline, it has no model_index.json" in output
    assert own.read_text() == "mine"


def test_fresh_parts_are_a_fresh_model():
    """Made part by part, a model has the shapes, zeros and spreads of one made whole."""
    config = replace(PRESETS["small-T2V"], depth=5)
    whole = GenTron(config).state_dict()
    parts = sharding.fresh_weights(config, 3)
    made = {f"{part}.{key}": value for part, tensors in parts() for key, value in tensors.items()}
    again = {f"{part}.{key}": value for part, tensors in parts() for key, value in tensors.items()}
    assert made.keys() == whole.keys()
    for name, tensor in whole.items():
        assert made[name].shape == tensor.shape
        assert torch.equal(made[name], again[name])
        assert bool(made[name].any()) == bool(tensor.any()), name
        if tensor.any():
            assert made[name].std() == pytest.approx(float(tensor.std()), rel=0.1), name
    assert not torch.equal(made["blocks.0.mlp.fc1.weight"], made["blocks.2.mlp.fc1.weight"])


def not_finite(settings: Settings, bad: set[int], value: float) -> None:
    """A run whose loss is `value` in the steps `bad`, on the last rank alone."""
    forward, calls = Objective.forward, iter(range(10**6))

    def broken(self, *args):
        loss = forward(self, *args)
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        return loss + value if next(calls) in bad and last else loss

    Objective.forward = broken
    run(lambda: trainer_of(settings, "t2i").train())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_steps_are_skipped_and_counted(ranks, world, tiny_t2i_folder, tmp_path, value):
    settings = settings_of(world, tiny_t2i_folder, tmp_path / "run", save_every=2, steps=6)
    pids = ranks.start(2, not_finite, settings, {2, 3}, value)
    assert ranks.wait(pids) == [0, 0]
    rows = log_of(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 2, 2, 2]
    assert [row["loss"] is None for row in rows] == [False, False, True, True, False, False]
    steps = [checkpoints_folder(tmp_path / "run") / f"step-0000000{step}" for step in (4, 6)]
    name = "transformer.blocks.0.mlp.fc1.weight"
    info = read_info(steps[0])
    assert (info["skipped"], info["ema_updates"]) == (2, 2)
    for step in steps:
        paths = [step / f"ema-rank{rank}.safetensors" for rank in range(2)]
        assert read_sharded(paths, name, info["parameters"][name]).isfinite().all()


def test_ten_bad_steps_end_the_run(ranks, world, tiny_t2i_folder, tmp_path, capfd):
    settings = settings_of(world, tiny_t2i_folder, tmp_path / "run", save_every=2, steps=50)
    pids = ranks.start(1, not_finite, settings, set(range(2, 50)), math.nan)
    assert ranks.wait(pids) == [2]
    error = capfd.readouterr().err
    last = checkpoints_folder(tmp_path / "run") / "step-00000010"
    assert "10 steps in a row without a finite loss and gradient, up to step 12" in error
    assert f"last good checkpoint: {last}" in error
    assert log_of(tmp_path / "run")[-1]["step"] == 11


def only_motion_free(settings: Settings) -> list[float]:
    trainer = trainer_of(settings, "t2v")
    losses = [float(trainer.train_step(1e-3)) for _ in range(3)]
    assert trainer._batch.motion_free.all()
    block = trainer.engine.module.transformer.blocks[0].temporal_attention
    before = safe_get_full_fp32_param(block.qkv.weight).clone()
    losses.append(float(trainer.train_step(1e-3)))
    after = safe_get_full_fp32_param(block.qkv.weight)
    width = block.out.weight.ds_shape[0]
    assert torch.equal(after[: 2 * width], before[: 2 * width])  # q and k get no gradient
    assert not torch.equal(after[2 * width :], before[2 * width :])
    return losses


@pytest.mark.parametrize("mode", ["none", "attention", "full"])
def test_a_whole_motion_free_batch(ranks, world, tiny_t2i_folder, tmp_path, mode):
    settings = settings_of(
        *(world, tiny_t2i_folder, tmp_path, "t2v"),
        p_motion_free=1.0,
        draws=1,
        checkpoint_activations=mode,
        dtype="bf16",
    )
    for losses in ranks.call(2, only_motion_free, settings):
        assert all(map(math.isfinite, losses))


def images_beside_clips(settings: Settings) -> list[tuple[int, float]]:
    trainer = trainer_of(settings, "t2v")
    steps = [float(trainer.train_step(1e-3)) for _ in range(4)]
    return [(trainer._batch.latents.shape[2], loss) for loss in steps]


@pytest.mark.parametrize("whole", [True, False])
def test_images_of_one_frame_train_a_clip_model(
    ranks, world, tiny_t2i_folder, tmp_path, monkeypatch, whole
):
    """Held whole, and with every weight shared out between uses."""
    if not whole:
        monkeypatch.setattr(assembly, "WHOLE_MODEL", 0)
        made = assembly.deepspeed_config

        def nothing_stays(*args, **kwargs) -> dict:
            config = made(*args, **kwargs)
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            return config

        monkeypatch.setattr(assembly, "deepspeed_config", nothing_stays)
    shares = {"p_motion_free": 0.0, "p_image": 1.0, "draws": 1}
    settings = settings_of(world, tiny_t2i_folder, tmp_path, "t2v", **shares)
    for steps in ranks.call(2, images_beside_clips, settings):
        assert all(frames == 1 and math.isfinite(loss) for frames, loss in steps)


def too_many_broken(settings: Settings) -> None:
    """A run whose last rank meets too many broken samples in its third step."""
    following, calls = Loader.__next__, iter(range(10**6))

    def limited(self):
        if next(calls) == 2 and torch.distributed.get_rank() == 1:
            self.log.causes["unreadable image"] = 6
            raise TooManyBroken("6 of 100 samples are broken: 6 unreadable image")
        return following(self)

    Loader.__next__ = limited
    run(lambda: trainer_of(settings, "t2i").train())


def test_too_many_broken_samples_end_with_a_checkpoint(
    ranks, world, tiny_t2i_folder, tmp_path, capfd
):
    settings = settings_of(world, tiny_t2i_folder, tmp_path / "run")
    assert ranks.wait(ranks.start(2, too_many_broken, settings)) == [2, 2]
    captured = capfd.readouterr()
    assert "rank 1: error: 6 of 100 samples are broken" in captured.err
    assert "broken samples, skipped: 6 unreadable image; " in captured.out
    assert "  6 broken  " in captured.out  # in the line of the step
    info = read_info(latest_checkpoint(tmp_path / "run"))
    assert (info["step"], info["skipped"], info["ema_updates"]) == (3, 1, 2)


def drawn_timesteps(settings: Settings) -> list:
    trainer = trainer_of(settings, "t2v")
    drawn = []
    trainer.engine.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[1].tolist()))
    trainer.train()
    return drawn


def test_the_first_share_of_a_run_draws_narrow_timesteps(ranks, world, tiny_t2i_folder, tmp_path):
    narrow = {"min_timestep": 500, "max_timestep": 501, "timestep_range_portion": 0.5, "steps": 4}
    settings = settings_of(world, tiny_t2i_folder, tmp_path, "t2v", batch=8, **narrow)
    drawn = ranks.call(1, drawn_timesteps, settings)[0]
    assert {t for step in drawn[:2] for t in step} == {500, 501}
    assert len({t for step in drawn[2:] for t in step}) > 8


def is_encoded(settings: Settings) -> bool:
    """Whether a trainer's first batch holds embeddings."""
    return isinstance(next(trainer_of(settings, "t2i").loader).text, TextCondition)


def test_frozen_texts_are_encoded_ahead(ranks, world, tiny_t2i_folder, tmp_path, monkeypatch):
    """And a run learns the same from them as from texts that are encoded in its steps."""
    settings = settings_of(world, tiny_t2i_folder, tmp_path / "ahead", train_text=False)
    assert ranks.call(2, is_encoded, settings) == [True, True]
    ahead = ranks.call(1, run_steps, settings)[0]["losses"]
    monkeypatch.setattr(MemorySource, "embed", lambda *_, **__: None)
    settings = replace(settings, run=tmp_path / "in the steps")
    assert ranks.call(1, is_encoded, settings) == [False]
    assert ahead == pytest.approx(ranks.call(1, run_steps, settings)[0]["losses"], rel=1e-5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_allocation():
    """Pages that the system hands out anew in later rounds of large buffers: none, once there is
    a place for each."""
    script = """
import resource, torch
from gentron_train.process import keep_freed_memory  # as training imports it
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(50 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
rounds = [faults() for _ in range(6)]
assert rounds[0] > 10 * rounds[-1], rounds  # as many as there are pages, small or huge
assert sum(rounds[1:]) <= rounds[0], rounds
"""
    subprocess.run([sys.executable, "-c", script], check=True)
