"""What every benchmark takes: the contest, the clip's shape, options, and the table at the end.

pytest bench/ --benchmark-only      measures          pytest bench/ --benchmark-disable   a dry run
RESULTS=DIR                         keeps the rows    --full, --budget, --threads         see --help
"""

import contextlib
import os
import shlex
import time
from pathlib import Path
from typing import NamedTuple

import gpu
import pytest
import torch
from contest import DEVICE, Contest, table
from records import append_row

from gentron_fast.cores import all_cores

PARTS = ("step", "train", "export")  # parts of `make gpu` with a benchmark file each; others: ops
DEFAULT_BUDGET = 540.0


class Clip(NamedTuple):
    batch: int
    frames: int
    tokens: int


def pytest_addoption(parser):
    group = parser.getgroup("gentron_fast")
    group.addoption("--full", action="store_true", help="every row, without a budget")
    group.addoption("--brief", action="store_true", help="few rounds, and fewer peers")
    group.addoption("--threads", type=int, help="of every contender on the CPU (default: torch's)")
    group.addoption(
        "--budget",
        type=float,
        help="no row begins after this many seconds (default: 540, or none with --full)",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "full: measured under --full only")
    if (threads := config.getoption("threads")) is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    step = config.getoption("step", None)  # of `make gpu`, by its plugin
    command = shlex.join(["pytest", *map(str, config.invocation_params.args)])
    command = f"make gpu PART={step}" if step else command
    smoke, brief = config.getoption("benchmark_disable"), config.getoption("brief")
    config.stash[_CONTEST] = Contest(DEVICE, smoke, brief, command)
    config.stash[_ROWS] = []
    config.stash[_START] = time.monotonic()


def pytest_collection_modifyitems(config, items):
    # Operators first, should the budget end early.
    files = [Path(file).name for part in gpu.EVERY_ROW.values() for file in part]
    order = {name: place for place, name in enumerate(files)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if config.getoption("full"):
        return
    extra = [item for item in items if item.get_closest_marker("full")]
    items[:] = [item for item in items if item not in extra]
    config.hook.pytest_deselected(items=extra)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_ROWS]
    if rows and not config.stash[_CONTEST].smoke:
        terminalreporter.section(f"contests on {rows[0]['device']}")
        for line in table(rows):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def alone(request):
    """No long run of ours that asks for the cores shares them with a measurement."""
    with contextlib.ExitStack() as stack:
        if not request.config.stash[_CONTEST].smoke:
            capture = request.config.pluginmanager.getplugin("capturemanager")
            with capture.global_and_fixture_disabled():  # whom it waits for is seen
                stack.enter_context(all_cores())
        yield


@pytest.fixture
def contest(request) -> Contest:
    config = request.config
    budget = config.getoption("budget")
    if budget is None and not config.getoption("full"):
        budget = DEFAULT_BUDGET
    if budget is not None and time.monotonic() - config.stash[_START] > budget:
        pytest.skip(f"out of time: the budget is {budget:.0f} s")
    return config.stash[_CONTEST]


@pytest.fixture
def measure(request, contest, benchmark):
    """Contest.measure, its row kept in extra_info, in RESULTS and for the closing table.

    pytest-benchmark's own record is of ours only, call by call on warm inputs.
    """

    def run(*args, **kwargs) -> dict:
        row, prepare = contest.measure(*args, **kwargs)
        request.config.stash[_ROWS].append(row)
        if os.environ.get("RESULTS") and not contest.smoke:
            part = request.path.stem.removeprefix("bench_")
            append_row(os.environ["RESULTS"], part if part in PARTS else "ops", row)
        benchmark.group = " ".join(filter(None, (row["operator"], row["direction"])))
        benchmark.extra_info.update(row)
        benchmark.pedantic(
            _finish, setup=lambda: ((prepare(),), {}), rounds=5, warmup_rounds=1, iterations=1
        )
        return row

    return run


@pytest.fixture
def clip(contest) -> Clip:
    """A guided batch of three: 8 frames at 512² on a GPU, at 128² on the CPU."""
    if contest.smoke:
        return Clip(3, 8, 2)
    return Clip(3, 8, 1024 if contest.device == "cuda" else 64)


def _finish(call) -> None:
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()


_CONTEST = pytest.StashKey[Contest]()
_ROWS = pytest.StashKey[list]()
_START = pytest.StashKey[float]()
