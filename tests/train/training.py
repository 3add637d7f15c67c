"""Settings, trainers and launches of tiny runs, for the tests beside."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from gentron_train.settings import Settings, parse_settings

ROOT = Path(__file__).parents[2]
STEPS = 10


def settings_of(world: Path, init: Path, run: Path, stage: str = "t2i", **changes) -> Settings:
    argv = [f"--data={world / 'data'}", f"--vae={world / 'vae'}", f"--init={init}"]
    argv += [f"--run={run}", "--windows-per-clip=1", "--batch=2", "--draws=2", "--no-tensorboard"]
    argv += ["--train-text"]
    argv += ["--warmup=2", f"--steps={STEPS}", "--dtype=fp32", "--log-every=1"]
    return replace(parse_settings(stage, "", argv), **changes)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(script: str, world: Path, run: Path, *options, ranks: int = 2) -> subprocess.Popen:
    """The `deepspeed` command of a script in the repository, in a session of its own."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    command += [f"--num_gpus={ranks}", f"--master_port={free_port()}", script]
    command += [f"--data={world / 'data'}", f"--vae={world / 'vae'}", f"--run={run}"]
    command += [
        "--train-text",
        "--warmup=1",
        "--log-every=1",
        "--windows-per-clip=1",
        *map(str, options),
    ]
    if not any(str(option).startswith("--init") for option in options):
        command.append(f"--text={world / 'text'}")
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
    """Its output; it must end well."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-4000:]
    return output


def log_of(run: Path) -> list[dict]:
    """The rows of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
