"""What a run tells: its log file, its lines, Weights & Biases, and that other ranks keep silent."""

import errno
import importlib.util
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from gentron_train import log as log_module
from gentron_train.log import RunLog

VALUES = {
    "loss": 0.5,
    "lr": 1e-3,
    "grad_norm": 1.25,
    "clips_per_s": 3.0,
    "mfu": 0.25,
    "memory_gib": 1.5,
    "skipped": 0,
    "broken": 0,
    "minutes_left": 2.0,
}


def log_in(run, main=True, **options) -> RunLog:
    return RunLog(
        run, {"lr": 1e-3}, main=main, **({"tensorboard": False, "wandb": False} | options)
    )


def test_lines_and_file(tmp_path):
    log = log_in(tmp_path)
    lines = [
        log.step(9, VALUES | {"step": step, "skipped": int(step == 3)}) for step in range(1, 4)
    ]
    expected = "step 1/9  loss 0.5000  gradient 1.250  3.0 clips/s  25.0 % MFU  1.50 GiB  "
    assert lines[0] == expected + "2.0 min left"
    assert lines[2] == expected.replace("1/9", "3/9") + "1 skipped  2.0 min left"
    none = log.step(9, VALUES | {"step": 4, "loss": None, "grad_norm": None})
    assert none.startswith("step 4/9  loss not finite  3.0 clips/s")
    some = log.step(9, VALUES | {"step": 5, "broken": 7})
    assert some.endswith("1.50 GiB  7 broken  2.0 min left")
    log = log_in(tmp_path, resumed_at=2)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    log.picture(2, "samples", np.zeros((4, 6, 3), np.uint8))
    assert (tmp_path / "samples" / "step-00000002.png").exists()


@pytest.mark.parametrize(
    "content", [b"notes\n", b'{"step": 1, "loss": 2}\n', b"\xff", b"[1]\n", b"{mine"]
)
def test_a_log_that_no_run_wrote_is_refused_and_stays(tmp_path, content):
    (tmp_path / "log.jsonl").write_bytes(content)
    for resumed_at in (None, 1):
        with pytest.raises(ValueError, match=r"log\.jsonl is there already"):
            log_in(tmp_path, resumed_at=resumed_at)
    assert (tmp_path / "log.jsonl").read_bytes() == content


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_no_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    log = log_in(tmp_path / "run", tensorboard=True)
    writer = log._tensorboard.file_writer.event_writer._async_writer._writer
    monkeypatch.setattr(writer, "write", full)  # in TensorBoard's own thread
    for name in ("write_media", "draw_curve"):
        monkeypatch.setattr(log_module, name, full)
    for step in range(1, 3):
        assert log.step(9, VALUES | {"step": step}).startswith(f"step {step}/9")
    log.picture(2, "samples", np.zeros((4, 6, 3), np.uint8))
    log.close()
    error = capsys.readouterr().err
    assert "TensorBoard's file could not be written: [Errno 28]" in error
    assert "step-00000002.png could not be written" in error
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


def test_other_ranks_write_nothing(tmp_path):
    log = log_in(tmp_path / "run", main=False, tensorboard=True)
    log.step(9, VALUES | {"step": 1})
    log.picture(1, "samples", np.zeros((4, 6, 3), np.uint8))
    log.close()
    assert not (tmp_path / "run").exists()


def test_wandb_runs_offline(tmp_path, monkeypatch):
    kept = []
    run = SimpleNamespace(log=lambda values, step: kept.append((step, values)), finish=kept.clear)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    client = SimpleNamespace(init=lambda **options: kept.append(options) or run, Image=np.shape)
    monkeypatch.setitem(sys.modules, "wandb", client)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "wandb" or None)
    log = log_in(tmp_path, wandb=True)
    assert kept.pop()["config"] == {"lr": 1e-3}
    assert os.environ["WANDB_MODE"] == "offline"
    log.step(9, VALUES | {"step": 1})
    log.picture(1, "samples", np.zeros((4, 6, 3), np.uint8))
    assert kept[0][0] == 1 and kept[0][1]["loss"] == 0.5
    assert kept[1] == (1, {"samples": (4, 6, 3)})


def test_wandb_that_is_missing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--wandb needs the package wandb"):
        log_in(tmp_path, wandb=True)
