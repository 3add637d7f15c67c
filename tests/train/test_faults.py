"""Ranks that are killed or freeze: everything ends within a minute, and a resumed run loses few
steps; a checkpoint that takes longer than the launcher's patience is written.

`make faults` makes more trials, and what takes a minute; the tests make two trials, one a rank.
"""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from faults import FAULTS
from training import launch, log_of

from gentron_train.checkpoint import latest_checkpoint, read_info
from gentron_train.process import run as run_entry
from gentron_train.trainer import train

OPTIONS = (
    "--batch=1",
    "--steps=100000",
    "--save-every=2",
    "--save-total-limit=1",
    "--no-tensorboard",
)
OPTIONS += ("--dtype=fp32",)
pytestmark = pytest.mark.faults
slow = pytest.mark.skipif("FAULTS" not in os.environ, reason="takes a minute: make faults")


def wait_for(condition, seconds: float) -> float:
    """Seconds until the condition holds; AssertionError where that takes too long."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds
        time.sleep(0.05)
    return time.monotonic() - start


def members(session: int) -> list[psutil.Process]:
    """The processes of a session that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def rank_process(session: int, rank: int) -> psutil.Process:
    """The process of a rank, by the option that the launcher appends."""
    for process in members(session):
        with contextlib.suppress(psutil.NoSuchProcess):
            if f"--local_rank={rank}" in process.cmdline():
                return process
    raise AssertionError(f"no process of rank {rank} in session {session}")


def end_all(process) -> str:
    """Kill what is left of a launched run; what it wrote and was not read yet."""
    for left in members(process.pid):
        left.send_signal(signal.SIGKILL)
    with process.stdout:
        output = process.stdout.read()
    process.wait()
    return output


@pytest.mark.parametrize("trial", range(max(2, FAULTS)))
def test_a_killed_rank_ends_the_run(ranks, world, tiny_t2i_folder, tmp_path, tally, trial):
    run, moment = tmp_path / "run", random.Random(trial)
    options = (*OPTIONS, f"--init={tiny_t2i_folder}")
    process = launch("train/t2i.py", world, run, *options)
    try:
        wait_for(lambda: latest_checkpoint(run) or process.poll() is not None, 300)
        time.sleep(moment.uniform(0, 5))  # while it computes, or while it saves
        rank_process(process.pid, trial % 2).kill()
        wait_for(lambda: not members(process.pid), 60)
    finally:
        end_all(process)
    assert process.returncode != 0
    step, done = read_info(latest_checkpoint(run))["step"], log_of(run)[-1]["step"]
    assert done - step <= 3  # the last two, and a checkpoint that was not whole yet
    assert ranks.wait(ranks.start(2, resume, world, tiny_t2i_folder, run, step + 2)) == [0, 0]
    assert [row["step"] for row in log_of(run)] == list(range(1, step + 3))
    tally("recovered")


@slow
def test_a_frozen_rank_ends_the_run(world, tiny_t2i_folder, tmp_path, tally):
    options = (*OPTIONS, f"--init={tiny_t2i_folder}", "--save-every=100000")
    process = launch("train/t2i.py", world, tmp_path, *options)
    try:
        wait_for(lambda: (tmp_path / "log.jsonl").exists() or process.poll() is not None, 300)
        rank_process(process.pid, 1).send_signal(signal.SIGSTOP)
        wait_for(lambda: not members(process.pid), 60)
    finally:
        end_all(process)
    assert process.returncode != 0
    tally("ended well")


@slow
def test_a_signal_waits_for_a_long_save(world, tiny_t2i_folder, tmp_path, tally):
    """The launcher would kill its ranks after 30 seconds."""
    options = (*OPTIONS, f"--init={tiny_t2i_folder}", "--save-every=100000")
    process = launch("tests/train/slow_save.py", world, tmp_path, *options)
    wait_for(lambda: (tmp_path / "log.jsonl").exists() or process.poll() is not None, 300)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert "go on with --resume" in output, output[-4000:]
    assert latest_checkpoint(tmp_path).is_dir()
    assert not members(process.pid)
    tally("ended well")


@slow
@pytest.mark.parametrize("trial", range(FAULTS // 2))
def test_a_signal_while_the_ranks_start(world, tiny_t2i_folder, tmp_path, tally, trial):
    """To all processes of a launch, as Ctrl-C in a terminal."""
    process = launch("train/t2i.py", world, tmp_path, *OPTIONS, f"--init={tiny_t2i_folder}")
    try:
        while "t2i: loading" not in (line := process.stdout.readline()):
            assert line, "it ended"
        time.sleep(random.Random(trial).uniform(0, 10))
        os.killpg(process.pid, (signal.SIGINT, signal.SIGTERM)[trial % 2])
        wait_for(lambda: not members(process.pid), 60)
    finally:
        output = end_all(process)
    launchers = output.count('deepspeed/launcher/runner.py", line')  # two lines, after Ctrl-C
    assert output.count("Traceback") == launchers // 2 <= 1, output
    tally("ended well")


def resume(world: Path, init: Path, run: Path, steps: int) -> None:
    argv = [f"--data={world / 'data'}", f"--vae={world / 'vae'}", f"--init={init}", f"--run={run}"]
    argv += [
        "--train-text",
        "--warmup=1",
        "--log-every=1",
        "--windows-per-clip=1",
        *OPTIONS,
        "--resume",
        f"--steps={steps}",
    ]
    run_entry(lambda: train("t2i", "", argv))
