"""The paper's findings in the small world: train what is missing, score it, write the page.

python -m gentron_train.findings      (make findings)

Runs are trained JOBS at a time, all seeds of one before the next, and can be cut off anywhere: the
same command goes on. RESULTS has a file of each run's scores; what is there is not trained again.
"""

import argparse
import functools
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from gentron_fast.commandline import check_writable, refuse, run, usable_device, whole_number
from gentron_fast.config import GenTronConfig
from gentron_fast.cores import all_cores
from gentron_fast.files import whole_file
from gentron_fast.processes import signal_at_parents_end
from gentron_fast.threads import available_cores, settle_threads
from gentron_train.checkpoint import EXPORTED
from gentron_train.findings import page as pages
from gentron_train.findings.scoring import read_records, record, result_name, write_record
from gentron_train.findings.table import TABLE, Run, Table, read_table
from gentron_train.flops import parameter_count, training_flops
from gentron_train.shipped import ROOT, program, run_stages

NAME = "gentron_train.findings"
PICTURES = "findings"  # folder beside the page
# What two cores of an AMD EPYC take, before a pilot has told: a step with next to no model, FLOP/s,
# and one scoring. Of a caption's tokens.
STEP_SECONDS, RATE = 0.1, 150e9
SCORE_SECONDS = {"t2i": 40, "t2v": 150}
LENGTHS = {"clip": 16, "t5": 64}
POLL = 1.0  # seconds between two looks at what runs
TURN = 1.0  # seconds in which one who waits for the cores gets them


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


def plan(table: Table, jobs: list[tuple[Run, int]], records: list[dict]) -> list[str]:
    """What would be run, with an estimate: of the pilot's times, or before it by the FLOPs."""
    told = pages.estimate(records, table)
    known = {} if told is None else told.seconds
    lines = [f"{'run':18}{'stage':7}{'parameters':>11}{'steps':>8}{'minutes':>9}  seeds"]
    total = 0.0
    for name in dict.fromkeys(job.name for job, _ in jobs):
        own, seeds = table.runs[name], [seed for job, seed in jobs if job.name == name]
        seconds = known.get(name) or rough_seconds(own, table)
        total += seconds * len(seeds)
        mark = "" if name in known else "~"
        lines.append(
            f"{name:18}{own.stage:7}{parameter_count(table.model(own)):>11,}"
            f"{own.settings(table.config).steps:>8,}{mark + format(seconds / 60, '.1f'):>9}  "
            f"{', '.join(map(str, seeds))}"
        )
    how = "by the pilot's times" if known else "~ by its FLOPs, before a pilot"
    lines.append(f"{len(jobs)} runs, {total / 3600:.1f} hours one after another, {how}")
    return lines


def rough_seconds(own: Run, table: Table) -> float:
    """A run's training and scoring, by what it computes."""
    settings, config = own.settings(table.config), table.model(own)
    latents = config.in_channels, settings.frames if own.stage == "t2v" else 1, 8, 8
    flops = _flops(config, latents, settings.draws)
    step = STEP_SECONDS + flops * settings.batch * settings.draws / RATE
    return step * settings.steps + SCORE_SECONDS[own.stage] * len(table.scales(own))


@functools.cache
def _flops(config: GenTronConfig, latents: tuple[int, ...], draws: int) -> int:
    """Of a sample; several runs train one model."""
    return training_flops(config, latents, LENGTHS, draws)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0; 2 where a run failed, told in one line; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    return run(NAME, lambda: _command(argv), argv, "stopped; the same command goes on")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = refuse
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pilot", action="store_true", help="the seeds that are left out instead")
    what.add_argument("--plan", action="store_true", help="print what would be run, and how long")
    what.add_argument("--page", action="store_true", help="write the page of what is there")
    what.add_argument("--one", help=argparse.SUPPRESS)  # a run, trained and scored: a job's own
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/findings"), help="folder of the runs"
    )
    parser.add_argument("--results", type=Path, default=Path("bench/results/findings"))
    parser.add_argument("--document", type=Path, default=Path("docs/findings.md"))
    parser.add_argument("--table", type=Path, default=TABLE, help="the runs")
    parser.add_argument("--device", type=usable_device, default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--jobs",
        type=whole_number(1),
        help="runs at a time, which share the cores (default: cpu: one a core)",
    )
    return parser


def _command(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    table = read_table(args.table.absolute())
    args.out, args.results, args.document = (
        in_checkout(path) for path in (args.out, args.results, args.document)
    )
    if args.one is not None:
        _train_one(args, table)
        return
    records = read_records(ROOT / args.results)
    pages.check_records(records, table)
    jobs = table.jobs(pilot=True) if args.pilot else table.jobs(pilot=False)
    jobs = missing_jobs(jobs, table, args.out, ROOT / args.results)
    if args.plan:
        pilot = missing_jobs(table.jobs(pilot=True), table, args.out, ROOT / args.results)
        for title, own in (("the pilot", pilot), ("the findings", jobs)):
            print("\n".join([f"{title}:", *plan(table, own, records)]))
        return
    check_writable([ROOT / args.document, ROOT / args.results / "x", ROOT / args.out / "x"])
    if not args.page:
        _train(jobs, table, args)
    _write(args, table)


def _train(jobs: list[tuple[Run, int]], table: Table, args) -> None:
    """Groups of JOBS runs, each run a process with its share of the cores; between two groups who
    waits for the cores gets them."""
    if args.device.type == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or the trainer would take the GPU
    (ROOT / args.out).mkdir(parents=True, exist_ok=True)
    counts = ["--images", str(table.images), "--clips", str(table.clips)]
    shapes = ["python", "-m", "gentron_train.shapes", str(args.out / "shapes"), *counts]
    if jobs:
        with all_cores():
            run_stages({"shards": [shapes]}, ROOT / args.out / "data")
    at_once = args.jobs or (available_cores() if args.device.type == "cpu" else 1)
    left = list(jobs)
    while left:
        ready = [
            (job, seed)
            for job, seed in left
            if job.start is None or _is_trained(args.out, job.start, seed)
        ]
        group = ready[:at_once]
        if not group:
            job, seed = left[0]
            folder = trained_folder(args.out, job.start, seed)
            raise ValueError(f"{folder.parent} says that it is trained, and has no {EXPORTED}")
        with all_cores():
            _train_group(group, (len(jobs) - len(left), len(jobs)), table, args)
        left = [job for job in left if job not in group]
        if left:
            time.sleep(TURN)


def _train_group(group: list[tuple[Run, int]], place: tuple[int, int], table: Table, args) -> None:
    """Runs side by side; their output goes to a file each. ValueError for one that fails, once the
    others have ended; the page after each result."""
    threads = str(max(1, available_cores() // len(group)))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    first, total = place
    with ExitStack() as ends:
        running, failed = {}, []
        for number, (job, seed) in enumerate(group, first + 1):
            folder = ROOT / trained_folder(args.out, job.name, seed).parent
            log = folder.with_name(f"{folder.name}.txt")
            print(f"run          {number} of {total}: {job.name}, seed {seed}: {log}", flush=True)
            words = ["python", "-m", NAME, "--one", job.name, "--seed", str(seed), *_options(args)]
            output = ends.enter_context(open(log, "a", encoding="utf-8"))
            process = subprocess.Popen(
                program(words), cwd=ROOT, env=environment, stdout=output, stderr=output
            )
            ends.callback(_end, process)
            running[process] = log
        known = _result_names(args)
        while running:
            time.sleep(POLL)
            for process in [process for process in running if process.poll() is not None]:
                log = running.pop(process)
                if process.returncode:
                    failed.append(log)
                    print(f"failed       {log}", flush=True)
            if (names := _result_names(args)) != known:
                known = names
                _write(args, table)
        if failed:
            end = " ".join(failed[0].read_text(encoding="utf-8", errors="replace").split())
            raise ValueError(f"a run failed, {failed[0]} ends with: {end[-300:]}")


def _end(process: subprocess.Popen) -> None:
    """Ask a run that is not over to end, and wait until it has."""
    process.terminate()
    process.wait()


def _result_names(args) -> list[str]:
    return sorted(path.name for path in (ROOT / args.results).glob("*-seed*.json"))


def _train_one(args, table: Table) -> None:
    """One run from nothing to its results."""
    if args.one not in table.runs or args.seed is None:
        raise ValueError(f"--one takes a run of {', '.join(table.runs)}, and --seed")
    job, seed = table.runs[args.one], args.seed
    signal_at_parents_end(signal.SIGTERM)
    trained = ROOT / trained_folder(args.out, job.name, seed)
    run_stages({"training": [training(job, seed, table, args.out)]}, trained.parent)
    settle_threads()
    for scale in table.scales(job):
        name = result_name(job.name, seed, scale)
        if not (ROOT / args.results / name).exists():
            values = record(table, job, seed, trained, scale, str(args.device))
            write_record(ROOT / args.results / name, values)
            print(f"wrote        {args.results / name}", flush=True)


def _options(args) -> list[str]:
    """Where a run of this one's lies and how it is made."""
    options = ["--out", str(args.out), "--results", str(args.results)]
    return [*options, "--table", str(in_checkout(args.table)), "--device", str(args.device)]


def _write(args, table: Table) -> None:
    """The page and its pictures."""
    records = read_records(ROOT / args.results)
    pages.check_records(records, table)
    document = ROOT / args.document
    text = pages.page(records, table, PICTURES)
    pages.draw(records, table, document.parent / PICTURES)
    with whole_file(document) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"wrote        {args.document}")


if __name__ == "__main__":
    sys.exit(main())
