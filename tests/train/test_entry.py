"""The commands of the front page in a folder where nothing is, and a signal while they start."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from faults import FAULTS
from training import ROOT, free_port, log_of

from gentron_fast import GenTron
from gentron_fast.index import ASSETS
from gentron_train.settings import parse_settings
from gentron_train.trainer import trainer_of

SHORT = ("--steps=2", "--batch=2", "--log-every=1", "--no-tensorboard", "--dtype=fp32")


def first_steps(stage: str) -> dict:
    """Two steps of a stage with its defaults; the transformer before them."""
    trainer = trainer_of(parse_settings(stage, "", [*SHORT]), stage)
    named = trainer.engine.module.transformer.named_parameters()
    before = {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in named}
    trainer.train()
    return before


@pytest.mark.parametrize("stage", ["t2i", "t2v"])
def test_a_fresh_clone_trains(stage, ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = ranks.call(1, first_steps, stage)[0]
    assert [row["step"] for row in log_of(tmp_path / "runs" / stage)] == [1, 2]
    assert (tmp_path / "runs" / stage / "pipeline" / "model_index.json").exists()
    assert not (tmp_path / "data").exists()
    if stage == "t2v":
        shipped = GenTron.from_pretrained(ASSETS / "transformer", torch.float32).state_dict()
        for name, weight in before.items():
            if "temporal_attention.out." in name:
                assert not weight.any(), name
            elif "temporal_attention." not in name:
                assert torch.equal(weight, shipped[name]), name


@pytest.mark.faults
@pytest.mark.parametrize("trial", range(3 * FAULTS))
def test_a_signal_while_a_rank_starts(trial, tmp_path, tally):
    """At the first moment, or at a random one; with other work beside, those are in the imports."""
    number = (signal.SIGINT, signal.SIGTERM)[trial % 2]
    moment = random.Random(trial).uniform(0, 5) if trial else 0
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "train" / "t2i.py"), "--no-tensorboard"],
        cwd=tmp_path,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("t2i: loading")
    time.sleep(moment)
    process.send_signal(number)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    *_, last = output.splitlines()
    assert last == "stopped before the first step" or "go on with --resume" in last
    tally("ended well")
