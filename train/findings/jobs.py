"""Runs of a table, trained and scored a few at a time, each a process on its share of the cores."""

import argparse
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from gentron_fast.commandline import check_writable, usable_device, whole_number
from gentron_fast.cores import all_cores, is_waited_for
from gentron_fast.processes import signal_at_parents_end
from gentron_fast.threads import available_cores, settle_threads
from gentron_train.checkpoint import EXPORTED
from gentron_train.findings.scoring import note_start, record, result_name, write_record
from gentron_train.findings.table import Run, Table
from gentron_train.stages import ROOT, program, run_stages

ONE = "gentron_train.findings"  # whose --one is a process of a run
POLL = 1.0  # seconds between two looks at what runs
CORES_A_GPU_RUN = 2  # one launches kernels, which take longer to launch than to run
TURN = 1.0  # seconds in which one who waits for the cores gets them


def add_arguments(parser: argparse.ArgumentParser, name: str, table: Path) -> None:
    """Where the runs of a table lie, with their results and their page, and how they run."""
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("bench/results") / name)
    parser.add_argument("--document", type=Path, default=Path(f"docs/{name}.md"))
    parser.add_argument("--table", type=Path, default=table, help="the runs")
    parser.add_argument("--device", type=usable_device, default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--jobs",
        type=whole_number(1),
        help="runs at a time, which share the cores (default: one a core, cuda: one in two)",
    )


@dataclass(frozen=True)
class Place:
    """Where runs, results and their page lie, of which table, on which device; at_once: runs side
    by side."""

    table: Path
    out: Path
    results: Path
    document: Path
    device: str
    at_once: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Place":
        """Of what add_arguments reads."""
        places = map(in_checkout, (args.table, args.out, args.results, args.document))
        return cls(*places, str(args.device), args.jobs)

    def check_writable(self) -> None:
        """ValueError where a page or result could not be written."""
        check_writable([ROOT / self.document, ROOT / self.results / "x", ROOT / self.out / "x"])

    def options(self) -> list[str]:
        """As `--one` takes them."""
        options = ["--out", str(self.out), "--results", str(self.results)]
        return [*options, "--table", str(self.table), "--device", self.device]

    def result_names(self) -> list[str]:
        """The files of results that are there."""
        return sorted(path.name for path in (ROOT / self.results).glob("*-seed*.json"))


def in_checkout(path: Path) -> Path:
    """A path as the commands, which run in the checkout, name it: relative where it is within, so
    that results name no folder of this machine."""
    path = path.absolute()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def trained_folder(out: Path, name: str, seed: int) -> Path:
    """Where the trainer keeps a run of one seed."""
    return out / f"{name}-seed{seed}" / "train"


def missing_jobs(
    jobs: list[tuple[Run, int]], table: Table, out: Path, results: Path
) -> list[tuple[Run, int]]:
    """Those without all their results, each behind the run that it starts from, where that one's
    pipeline is not there."""
    missing: list[tuple[Run, int]] = []
    for job, seed in jobs:
        files = [results / result_name(job.name, seed, scale) for scale in table.scales(job)]
        if all(file.exists() for file in files):
            continue
        if job.start is not None and not _is_trained(out, job.start, seed):
            start = table.runs[job.start], seed
            missing += [start] if start not in missing else []
        if (job, seed) not in missing:
            missing.append((job, seed))
    return missing


def _is_trained(out: Path, name: str, seed: int) -> bool:
    return (ROOT / trained_folder(out, name, seed) / EXPORTED).is_dir()


def training(job: Run, seed: int, table: Table, out: Path) -> list[str]:
    """The command that trains a run."""
    train = ["deepspeed", f"train/{job.stage}.py", "--config", str(in_checkout(table.config))]
    train += ["--run", str(trained_folder(out, job.name, seed)), "--seed", str(seed)]
    train += ["--data", str(out / "shapes")]
    if job.start is not None:
        train += ["--init", str(trained_folder(out, job.start, seed) / EXPORTED)]
    return train + job.words()


def train_jobs(
    jobs: list[tuple[Run, int]], table: Table, place: Place, written: Callable[[], None]
) -> None:
    """Runs side by side, the next one when one ends; who waits for the cores gets them once those
    at hand are over. written is called behind each result. ValueError for a run that fails."""
    is_cpu = place.device.startswith("cpu")
    if is_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or the trainer would take the GPU
    (ROOT / place.out).mkdir(parents=True, exist_ok=True)
    counts = ["--images", str(table.images), "--clips", str(table.clips)]
    shapes = ["python", "-m", "gentron_train.shapes", str(place.out / "shapes"), *counts]
    if jobs:
        with all_cores():
            run_stages({"shards": [shapes]}, ROOT / place.out / "data")
    at_once = place.at_once or default_at_once(is_cpu)
    left = list(jobs)
    while left:
        with all_cores():
            _train_side_by_side(left, len(jobs), at_once, place, written)
        if left:
            time.sleep(TURN)


def default_at_once(is_cpu: bool) -> int:
    """How many runs share the cores."""
    return max(1, available_cores() // (1 if is_cpu else CORES_A_GPU_RUN))


def _train_side_by_side(
    left: list[tuple[Run, int]],
    total: int,
    at_once: int,
    place: Place,
    written: Callable[[], None],
) -> None:
    """Take runs from `left` until there are none or another waits for the cores, each with its
    share of them; their output goes to a file each. ValueError for one that fails, once the others
    have ended."""
    threads = str(max(1, available_cores() // at_once))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    running: dict[subprocess.Popen, Path] = {}
    failed: list[Path] = []
    known = place.result_names()
    with ExitStack() as ends:
        while True:
            waits = bool(failed) or is_waited_for()
            while len(running) < at_once and not waits and (ready := _first_ready(left, place)):
                left.remove(ready)
                job, seed = ready
                folder = ROOT / trained_folder(place.out, job.name, seed).parent
                log = folder.with_name(f"{folder.name}.txt")
                count = f"{total - len(left)} of {total}"
                print(f"run          {count}: {job.name}, seed {seed}: {log}", flush=True)
                output = ends.enter_context(open(log, "a", encoding="utf-8"))
                process = _begin(job, seed, place, environment, output)
                ends.callback(_end, process)
                running[process] = log
            if not running:
                break
            time.sleep(POLL)
            for process in [process for process in running if process.poll() is not None]:
                log = running.pop(process)
                if process.returncode:
                    failed.append(log)
                    print(f"failed       {log}", flush=True)
            if (names := place.result_names()) != known:
                known = names
                written()
    if failed:
        end = " ".join(failed[0].read_text(encoding="utf-8", errors="replace").split())
        raise ValueError(f"a run failed, {failed[0]} ends with: {end[-300:]}")
    if left and not waits:
        job, seed = left[0]
        folder = trained_folder(place.out, job.start, seed)
        raise ValueError(f"{folder.parent} says that it is trained, and has no {EXPORTED}")


def _begin(job: Run, seed: int, place: Place, environment: dict, output: TextIO):
    words = ["python", "-m", ONE, "--one", job.name, "--seed", str(seed), *place.options()]
    streams = {"stdout": output, "stderr": output}
    return subprocess.Popen(program(words), cwd=ROOT, env=environment, **streams)


def _first_ready(left: list[tuple[Run, int]], place: Place) -> tuple[Run, int] | None:
    """The first run whose start is trained."""
    for job, seed in left:
        if job.start is None or _is_trained(place.out, job.start, seed):
            return job, seed
    return None


def _end(process: subprocess.Popen) -> None:
    """Ask a run that is not over to end, and wait until it has."""
    process.terminate()
    process.wait()


def train_one(job: Run, seed: int, table: Table, place: Place) -> None:
    """One run from nothing to its results, in a process of its own."""
    signal_at_parents_end(signal.SIGTERM)
    trained = ROOT / trained_folder(place.out, job.name, seed)
    if job.start is not None and not trained.parent.exists():
        note_start(trained, ROOT / trained_folder(place.out, job.start, seed) / EXPORTED)
    run_stages({"training": [training(job, seed, table, place.out)]}, trained.parent)
    settle_threads()
    for scale in table.scales(job):
        name = result_name(job.name, seed, scale)
        if not (ROOT / place.results / name).exists():
            values = record(table, job, seed, trained, scale, place.device)
            write_record(ROOT / place.results / name, values)
            print(f"wrote        {place.results / name}", flush=True)
