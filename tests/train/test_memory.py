"""The memory table against what small models really take."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from training import settings_of

from gentron_fast import PRESETS, GenTron
from gentron_train import memory
from gentron_train.flops import parameter_count, training_flops
from gentron_train.objective import attention_operators, checkpoint_activations
from gentron_train.settings import CHECKPOINTING, CONFIGS, parse_settings
from gentron_train.trainer import trainer_of

LENGTHS = {"clip": 5, "t5": 9}


def kept_by_autograd(model: GenTron, batch: int, latents, text) -> int:
    """Bytes that a real forward pass leaves, counted by the allocations that outlive it."""
    inputs = torch.randn(batch, *latents), torch.randint(1000, (batch,)), text
    motion_free = torch.zeros(batch, dtype=torch.bool)
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = model(*inputs, motion_free).square().mean()
    del loss
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("mode", CHECKPOINTING)
@pytest.mark.parametrize("depth", [2, 5])
def test_activations(make_text, mode, depth):
    config = replace(PRESETS["small-T2V"], depth=depth)
    latents, batch = (4, 8, 8, 8), 2
    model = GenTron(config)
    checkpoint_activations(model, mode)
    text = make_text(config, batch, LENGTHS["clip"], LENGTHS["t5"], torch.float32)
    measured = kept_by_autograd(model, batch, latents, text)
    recomputed = 0
    if mode != "none":  # the block that the backward pass computes again is not there yet
        checkpoint_activations(model, "none")
        longer = kept_by_autograd(GenTron(replace(config, depth=2)), batch, latents, text)
        shorter = kept_by_autograd(GenTron(replace(config, depth=1)), batch, latents, text)
        recomputed = longer - shorter
    expected = memory.activations(config, latents, LENGTHS, batch, 4)[mode]
    assert expected == pytest.approx(measured + recomputed, rel=0.1)


def test_modes_are_ordered():
    config, latents = PRESETS["XL/2-T2V"], (4, 8, 32, 32)
    none, attention, full = (
        memory.activations(config, latents, LENGTHS, 1, 2)[mode] for mode in CHECKPOINTING
    )
    assert none > 4 * attention and attention > 1.5 * full


def state_bytes(settings) -> dict[str, int]:
    """Bytes of a rank's states after a step, by what they are."""
    trainer = trainer_of(settings, "t2i")
    trainer.train_step(1e-3)
    zero, parameters = trainer.engine.optimizer, list(trainer.engine.module.parameters())
    moments = [t for state in zero.optimizer.state.values() for t in state.values()]
    buffers = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values()
    return {
        "count": sum(p.ds_numel for p in parameters),
        "parameters": size(p.ds_tensor for p in parameters),
        "gradients": size(buffers),
        "optimizer": size(zero.fp32_partitioned_groups_flat) + size(moments),
        "ema": size(trainer.ema.shards.values()),
    }


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("count, parameters", [(1, "fp32"), (2, "bf16")])
def test_states(ranks, world, tiny_t2i_folder, tmp_path, count, parameters):
    dtype = "bf16"
    settings = settings_of(world, tiny_t2i_folder, tmp_path, dtype=dtype, parameters=parameters)
    for measured in ranks.call(count, state_bytes, settings):
        expected = memory.states(measured.pop("count"), count, 4 if parameters == "fp32" else 2)
        for name, taken in measured.items():
            assert expected[name] == pytest.approx(taken, rel=0.01), name


def test_report():
    config = CONFIGS / "t2v-512.yaml"
    argv = ["--config", str(config), "--preset=G/2", "--batch=1", "--gpu-memory=80"]
    lines = memory.report(parse_settings("t2v", "", [*argv, "--init=nowhere"]), "t2v")
    title, rows = lines[0], [line.split() for line in lines[2:11]]
    assert title.startswith("G/2-T2V: 3") and "(4, 8, 64, 64)" in title
    assert [(row[0], row[1]) for row in rows] == [
        (ranks, mode) for ranks in ("1", "8", "64") for mode in CHECKPOINTING
    ]
    for row in rows:
        assert float(row[9]) == pytest.approx(sum(map(float, row[2:9])), abs=0.05)
        assert (row[10] == "yes") == (float(row[9]) <= 80)
    assert rows[0][10] == "no" and rows[-1][10] == "yes"
    assert "batch 128 = 1 per rank × 2 micro-steps × 64 ranks" in lines


def test_report_counts_frozen_encoders_and_wants_a_size(tmp_path):
    (tmp_path / "vae").mkdir()
    for name in ("a", "b"):
        with (tmp_path / "vae" / f"{name}.safetensors").open("wb") as file:
            file.truncate(2**30)
    argv = ["--preset=XL/2", "--gpu-memory=80", "--clip=someone/clip", f"--vae={tmp_path / 'vae'}"]
    argv += [f"--t5={tmp_path / 'nowhere'}", "--batch=1"]
    with pytest.raises(ValueError, match="--dry-run reads no data: wanted --size or --buckets"):
        memory.report(parse_settings("t2i", "", argv), "t2i")
    lines = memory.report(parse_settings("t2i", "", [*argv, "--size=64"]), "t2i")
    for row in lines[2:11]:
        assert row.split()[7] == "2.00"
    assert any("clip (no files here), t5 (no files here)" in line for line in lines)
    assert memory.report(parse_settings("t2i", "", ["--gpu-memory=1"]), "t2i")  # small: 64 × 64


def test_flops_are_three_forward_passes():
    config, latents = PRESETS["small"], (4, 1, 8, 8)
    tokens, width = 16, config.width
    block = 2 * tokens * width * width * (3 + 1 + 1 + 1 + 8) + 2 * width * 6 * width
    block += 4 * tokens * tokens * width  # scores and values
    block += sum(4 * length * 128 * width + 4 * tokens * length * width for length in (5, 9)) / 2
    counted = training_flops(config, latents, LENGTHS)
    # The text's gradient is not computed, and there are layers outside of the blocks.
    assert counted == pytest.approx(3 * config.depth * block, rel=0.05)


def test_parameter_count():
    assert parameter_count(PRESETS["XL/2"]) == pytest.approx(928.0e6, rel=1e-3)
    assert parameter_count(nn.Linear(3, 4)) == 16


class _Counted(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls += operator in attention_operators()
        return operator(*args, **(kwargs or {}))


def counting(contexts, counted: _Counted):
    """The contexts of a checkpoint, with what is computed again counted."""
    forward, again = contexts()

    @contextmanager
    def both():
        with counted, again:
            yield

    return forward, both()


def test_kept_attention_is_not_computed_again(make_text):
    """The gradients are those without checkpointing, and no attention runs twice."""
    config = replace(PRESETS["small-T2V"], depth=2)
    text = make_text(config, 2, 5, 9, torch.float32)
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8, 8), torch.tensor([3, 700]), text, torch.tensor([True, False])
    model = GenTron(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    gradients, again = {}, {}
    for mode in CHECKPOINTING:
        checkpoint_activations(model, mode)
        counted = _Counted()
        model.checkpoint_contexts = partial(counting, model.checkpoint_contexts, counted)
        model.zero_grad()
        model(*inputs).square().mean().backward()
        again[mode] = counted.calls
        gradients[mode] = [parameter.grad.clone() for parameter in model.parameters()]
    for mode in ("attention", "full"):
        torch.testing.assert_close(gradients[mode], gradients["none"])
    # Spatial, cross and temporal attention in each of two blocks.
    assert again == {"none": 0, "attention": 0, "full": 6}
