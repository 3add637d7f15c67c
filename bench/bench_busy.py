"""A guided step of the small model on a quiet machine, and beside a process that never rests.

python bench/bench_busy.py [--turns N] [--steps N]      RESULTS=DIR keeps the row

Each way of waiting is a process of its own that holds the model; they take turns. Quiet, a turn is
ten steps; beside the other process it is long enough that what adapts has adapted.

torch's defaults   threads spin for milliseconds where they wait for one another
commands of ours   they sleep while other processes take the CPUs (gentron_fast/threads.py)
never spinning     OMP_WAIT_POLICY=passive
one thread         has nothing to wait for
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain

import numpy as np
import torch
from bench_step import Step
from records import append_row, environment

from gentron_fast import PRESETS
from gentron_fast.cores import all_cores
from gentron_fast.threads import settle_threads
from gentron_train.allocator import keep_freed_memory

DEFAULTS, OURS, PASSIVE, SINGLE = WAYS = (
    *("torch's defaults", "commands of ours"),
    *("never spinning", "one thread"),
)
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SHAPE = 1, 4, 8, 8, 8
QUIET_STEPS, WARM_UP = 10, 2
REST = 0.03  # seconds before a turn, in which the threads of the turn before go to sleep
NEVER_RESTS = "while True: pass"


def take_turns(way: str) -> None:
    """The process of a way: for each number on standard input so many steps, their milliseconds in
    a line of JSON."""
    if way == OURS:
        settle_threads()
    if way == SINGLE:
        torch.set_num_threads(1)
    keep_freed_memory()
    step = Step(PRESETS["small-T2V"], SHAPE, torch.float32, "cpu").ours()
    latents = [torch.randn(SHAPE) for _ in range(2)]
    for line in chain(("1",), sys.stdin):
        spent = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step(*latents)
            spent.append(1e3 * (time.perf_counter() - start))
        print(json.dumps(spent), flush=True)


class Turns:
    """The process of a way, from outside."""

    def __init__(self, way: str, until_the_end: ExitStack):
        settings = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        if way == PASSIVE:
            settings["OMP_WAIT_POLICY"] = "passive"
        command = [sys.executable, __file__, "--way", way]
        pipe = subprocess.PIPE
        self.process = until_the_end.enter_context(running(command, settings, stdin=pipe))

    def wait_until_ready(self) -> None:
        self._read()

    def take(self, steps: int) -> list[float]:
        """Milliseconds of each step."""
        time.sleep(REST)
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> list[float]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a process that was to take turns has ended, its reason above")
        return json.loads(line)


@contextmanager
def running(command: Sequence[str], settings: dict[str, str], stdin=None):
    with subprocess.Popen(
        command, env=settings, stdin=stdin, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def in_turns(ways: dict[str, Turns], turns: int, steps: int, warm_up: int = 0) -> dict[str, list]:
    """Each way's turns, the first steps of each left out; the order moves on every round."""
    found, order = {name: [] for name in ways}, list(ways)
    for _ in range(turns):
        for name in order:
            found[name].append(ways[name].take(warm_up + steps)[warm_up:])
        order = order[1:] + order[:1]
    return found


def figures_of(quiet: list, busy: list, of_defaults: list) -> dict[str, float]:
    """Of one way: ms quiet and beside the other process, median and 90th percentile; how many times
    the quiet median the others are; the quiet turns' medians over those of the defaults beside
    them."""
    p50, p90 = np.percentile(quiet, [50, 90])
    busy50, busy90 = np.percentile(busy, [50, 90])
    beside = np.median(quiet, axis=1) / np.median(of_defaults, axis=1)
    return {
        "quiet": p50,
        "quiet_p90": p90,
        "busy": busy50,
        "busy_p90": busy90,
        "times_quiet": busy50 / p50,
        "times_quiet_p90": busy90 / p50,
        "quiet_of_defaults": float(np.median(beside)),
    }


def measure(turns: int, steps: int) -> dict[str, dict[str, float]]:
    with ExitStack() as until_the_end:
        ways = {way: Turns(way, until_the_end) for way in WAYS}
        for way in ways.values():
            way.wait_until_ready()
        in_turns(ways, 1, QUIET_STEPS)
        quiet = in_turns(ways, 4 * turns, QUIET_STEPS, WARM_UP)
        other = [sys.executable, "-c", NEVER_RESTS]
        with running(other, dict(os.environ)):
            busy = in_turns(ways, turns, steps)
    return {way: figures_of(quiet[way], busy[way], quiet[DEFAULTS]) for way in WAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=5, help="beside the other process; 4 × quiet")
    parser.add_argument("--steps", type=int, default=60, help="of a turn beside the other process")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way is not None:
        return take_turns(args.way)
    with all_cores():
        figures = measure(args.turns, args.steps)
    for way, of in figures.items():
        print(
            f"{way:<18} quiet {of['quiet']:6.1f} ms, {of['quiet_of_defaults']:.3f} × the defaults; "
            f"busy {of['busy']:6.1f}, p90 {of['busy_p90']:6.1f}: "
            f"{of['times_quiet']:.2f} × and {of['times_quiet_p90']:.2f} × quiet"
        )
    if os.environ.get("RESULTS"):
        row = {"operator": "guided step, small, busy", "direction": "", "preset": None}
        row |= {"shape": list(SHAPE), "dtype": "float32", "busy": figures}
        row |= {"turns": args.turns, "steps": args.steps, "command": "python bench/bench_busy.py"}
        append_row(os.environ["RESULTS"], "busy", row | environment("cpu"))


if __name__ == "__main__":
    main()
