"""The project's GPU run, planned for minutes: `make gpu` calls this file, see --help.

The steps of PLAN run one behind the other, what is worth most first, each in processes of its own
and within a limit of its own: one that fails or hangs costs its share alone. The checkout runs in
place: it needs PyTorch ≥ 2.11 with CUDA, Triton ≥ 3.6, einops, safetensors, numpy, pytest and
pytest-benchmark, a C++ compiler for one step, and no network.

In the folder of results: the rows of the benchmarks, a file a kind, device and day, rewritten after
every row; gpu-DEVICE-DATE.jsonl, a line for every step and test as it ends, by which --rest knows
what is left; gpu-DEVICE-DATE.log, what the steps said.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date, datetime
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
INPLACE = {"gentron_kernels": "kernels", "gentron_fast": "gentron_fast", "gentron_train": "train"}
SCRATCH = ROOT / "build/gpu"
FOLDERS = ("bench/", "tests/")  # of the files that the steps name
FAILED, NO_CUDA, NOTHING_LEFT, OUT_OF_TIME = 1, 2, 3, 124
LIMIT, REST_LIMIT, PART_LIMIT = 540.0, 240.0, 465.0  # seconds of a call
LEAST = 10.0  # seconds without which no step begins


@dataclass(frozen=True)
class Step:
    """A part of the run. limit: its seconds; arguments: pytest's; shares: processes that share its
    tests; builds: it needs the C++."""

    name: str
    limit: float
    arguments: tuple[str, ...]
    shares: int = 1
    builds: bool = False


BRIEF = ("-s", "--benchmark-only", "--brief")
# They need neither diffusers nor deepspeed, webdataset or av, as the other steps do not.
TESTS = ("tests/kernels", "tests/gentron_fast/test_guidance.py", "tests/gentron_fast/test_model.py")
OPERATORS = tuple(
    f"bench/bench_{name}.py" for name in ("layernorm_modulate", "temporal_attention", "guided_step")
)
OPERATOR_ROWS = "G/2 and not chain or guided_step and bfloat16"
PLAN = (
    Step("tests", 80, ("-q", "-m", "gpu", *TESTS), shares=8),
    Step("chain", 45, (*BRIEF, "--full", OPERATORS[0], "-k", "chain")),
    Step("predictions", 90, (*BRIEF, "bench/bench_predictions.py")),
    Step("operators", 120, (*BRIEF, *OPERATORS, "-k", OPERATOR_ROWS)),
    Step("guided-step", 75, (*BRIEF, "bench/bench_step.py::test_whole_model[eager]")),
    Step("compiled-step", 120, (*BRIEF, "bench/bench_step.py::test_whole_model[compiled]")),
    Step("small-step", 40, (*BRIEF, "bench/bench_step.py::test_small")),
    Step("training-step", 90, (*BRIEF, "bench/bench_train.py::test_checkpointed")),
    Step("sampler", 160, (*BRIEF, "bench/bench_export.py::test_clip"), builds=True),
)
# Every row of a kind, in the order in which they matter, where there is time for it.
EVERY_ROW = {
    "ops": (*OPERATORS, "bench/bench_predictions.py", "bench/bench_attention.py"),
    "step": ("bench/bench_step.py",),
    "train": ("bench/bench_train.py",),
    "export": ("bench/bench_export.py",),
}
WORDS = "The whole plan on a CUDA machine, what is worth most first, each step in its own limit."
PARTS = {step.name: step for step in PLAN} | {
    name: Step(name, PART_LIMIT, ("--benchmark-only", "--full", *files), builds=name == "export")
    for name, files in EVERY_ROW.items()
}


def main(arguments: list[str]) -> int:
    """0 where every step is done, else FAILED, NO_CUDA, NOTHING_LEFT or OUT_OF_TIME."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="make gpu", description=WORDS)
    parser.add_argument("--part", choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--results", type=Path, metavar="DIR", help="OUT's or bench/results")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of the call, 540; REST 240")
    parser.add_argument("--rest", action="store_true", help="what failed or was cut before")
    parser.add_argument("--dry", action="store_true", help="rehearse here, without a GPU")
    args = parser.parse_args(arguments)
    results = (args.results or Path(os.environ.get("OUT") or ROOT / "bench/results")).resolve()
    steps = (PARTS[args.part],) if args.part else PLAN
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends its processes
    limit = args.limit or (REST_LIMIT if args.rest else PART_LIMIT if args.part else LIMIT)
    if args.dry:
        import rehearsal

        return rehearsal.rehearse(steps, limit)
    if reason := missing():
        print(f"make gpu: {reason}")
        return NO_CUDA
    sys.path.insert(0, str(inplace(ROOT)))
    from records import commit, device_name, file_name

    today = date.today().isoformat()
    record = results / f"{file_name('gpu', device_name('cuda'), today)}.jsonl"
    if args.rest:
        record = take_up(results, commit())
        if record is None:
            print(f"make gpu: nothing to take up: no gpu-….jsonl in {results} or bench/results")
            return NOTHING_LEFT
        steps = left_over(steps, lines_of(record))
        if not steps:
            print(f"make gpu: every step of {record.name} is done")
            return 0
    else:
        note(record, run="begun", commit=commit(), limit=limit)
    return run_plan(steps, record, limit - (time.monotonic() - start), args.rest)


def missing() -> str | None:
    """What keeps this machine from a GPU run, in one line."""
    if find_spec("torch") is None:
        return "torch is not installed; 2.11 or newer, with CUDA, is needed"
    import torch

    if not torch.cuda.is_available():
        return f"no CUDA device here (torch {torch.__version__})"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        return f"torch {torch.__version__} is here; 2.11 or newer is needed"
    if find_spec("triton") is None:
        return "triton is not installed; 3.6 or newer is needed"
    return None


def run_plan(steps, record: Path, limit: float, rest: bool = False) -> int:
    """The steps within `limit` seconds, each noted in the record as it begins and ends."""
    end = time.monotonic() + limit
    began = datetime.now().isoformat(timespec="seconds")
    build, states = Build(any(step.builds for step in steps)), {}
    try:
        for step in steps:
            seconds = min(step.limit, end - time.monotonic())
            if seconds < LEAST:
                found = {"state": "cut", "seconds": 0.0, "error": f"not begun: {limit:.0f} s ended"}
            else:
                note(record, step=step.name, state="begun")
                found = run_step(step, record, seconds, rest, build)
            note(record, step=step.name, **found)
            states[step.name] = found
            print(told(step.name, found), flush=True)
    finally:
        build.end()
    print_rows(record.parent, began)
    print("\n" + "\n".join(told(*pair) for pair in states.items()))
    print(f"rows and {record.name} are in {record.parent}")
    counts = Counter(found["state"] for found in states.values())
    return FAILED if counts["failed"] else OUT_OF_TIME if counts["cut"] else 0


def run_step(step: Step, record: Path, seconds: float, rest: bool, build: "Build") -> dict:
    """What came of it: its state, done, failed or cut, seconds, tests, the error in one line."""
    start, before = time.monotonic(), lines_of(record)
    files = [name.partition("::")[0] for name in step.arguments if name.startswith(FOLDERS)]
    missing_files = [name for name in files if not (ROOT / name).exists()]
    reason = f"no such file: {', '.join(missing_files)}" if missing_files else None
    if reason := reason or (build.wait(seconds) if step.builds else None):
        return {"state": "failed", "seconds": time.monotonic() - start, "error": reason}
    SCRATCH.mkdir(parents=True, exist_ok=True)
    logs = [SCRATCH / f"{step.name}-{share}.txt" for share in range(step.shares)]
    processes = []
    try:
        for share, log in enumerate(logs):
            with log.open("wb") as output:
                arguments = pytest_arguments(step, record, share, rest)
                processes.append(start_pytest(arguments, environment(record.parent), output))
        was_cut = not all(_ended(one, start + seconds) for one in processes)
    finally:
        for process in processes:
            _kill(process)
        with record.with_suffix(".log").open("a") as whole:
            for log in logs:
                whole.write(f"\n--- {log.stem}\n{log.read_text(errors='replace')}")
    tests = [line for line in lines_of(record)[len(before) :] if line.get("step") == step.name]
    tests = [line for line in tests if "test" in line]
    counts = Counter(line["outcome"] for line in tests)
    errors = [line["error"] for line in tests if line["outcome"] == "failed"]
    failed = [one.returncode for one in processes if one.returncode not in (0, NO_TESTS)]
    if was_cut:
        errors.insert(0, f"ended after {seconds:.0f} s")
    elif failed and not errors:
        words = [line for line in logs[0].read_text(errors="replace").splitlines() if line.strip()]
        named = [line for line in words if "error: " in line.lower()]
        signalled = [f"ended by signal {-failed[0]}"] if failed[0] < 0 else []
        errors.append([*signalled, *named, *words[-1:], "no word"][0])
    elif not errors and not counts["passed"] and not (rest and passed(before, step.name)):
        errors.append("no test ran: " + next((line["error"] for line in tests), "none was found"))
    found = {
        "state": "cut" if was_cut else "failed" if errors else "done",
        "seconds": round(time.monotonic() - start, 2),
        "tests": dict(counts),
    }
    return found | ({"error": errors[0][:300]} if errors else {})


NO_TESTS = 5  # pytest's status of a share that has none


def pytest_arguments(step: Step, record: Path, share: int, rest: bool) -> list[str]:
    ours = ["-p", "no:cacheprovider", "-p", "gpu_plugin"]
    ours += [f"--record={record}", f"--step={step.name}", f"--share={share}/{step.shares}"]
    return [*ours, *["--rest"] * rest, *step.arguments]


def start_pytest(arguments: list[str], environment: dict[str, str], output) -> subprocess.Popen:
    """In a group of its own, so that what it starts ends with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        process_group=0,
    )


def environment(results: Path) -> dict[str, str]:
    """Of a step's process: where imports, the rows and CUDA are, which AOTInductor links with."""
    nvcc = shutil.which("nvcc")
    home = Path(nvcc).resolve().parents[1] if nvcc else Path("/usr/local/cuda")
    paths = str(inplace(ROOT)), str(ROOT / "bench"), os.environ.get("PYTHONPATH")
    values = {"RESULTS": str(results), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return ({"CUDA_HOME": str(home)} if home.exists() else {}) | os.environ | values


def inplace(root: Path) -> Path:
    """A folder in which the checkout's packages lie under their import names."""
    folder = root / ".inplace"
    folder.mkdir(exist_ok=True)
    for name, target in INPLACE.items():
        link = folder / name
        if not link.exists():
            link.unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):  # another step's thread was first
                link.symlink_to(Path("..") / target, target_is_directory=True)
    return folder


BUILT = {
    "gentron_kernels/libgentron.so": "kernels/libgentron.so",
    "gentron_fast/_runtime.so": "gentron_fast/_runtime.so",
    "gentron_fast/gentron-sample": "gentron_fast/gentron-sample",
}


class Build:
    """The C++, built beside the first steps where it is not built, and put in place whole."""

    def __init__(self, needed: bool = True):
        self.process, self.reason = None, None
        if not needed or all((ROOT / target).exists() for target in BUILT.values()):
            return
        SCRATCH.mkdir(parents=True, exist_ok=True)
        self.log = SCRATCH / "build.txt"
        command = [sys.executable, "setup.py", "-q", "build_ext"]
        command += ["--build-lib", str(SCRATCH / "lib"), "--build-temp", str(SCRATCH / "objects")]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, process_group=0
            )

    def wait(self, seconds: float) -> str | None:
        """Why there is none, in one line, once it has ended or the seconds have."""
        if self.process is None:
            return self.reason
        if not _ended(self.process, time.monotonic() + seconds):
            return f"the C++ was not built within {seconds:.0f} s"
        if self.process.returncode == 0:
            for built, target in BUILT.items():
                os.replace(SCRATCH / "lib" / built, ROOT / target)
        else:
            words = self.log.read_text(errors="replace").splitlines() or ["no message"]
            error = next((line for line in words if "error:" in line), words[-1])
            self.reason = f"the C++ does not build here: {error}"
        self.process = None
        return self.reason

    def end(self) -> None:
        if self.process is not None:
            _kill(self.process)


def _ended(process: subprocess.Popen, deadline: float) -> bool:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def told(name: str, found: dict) -> str:
    counts = ", ".join(f"{number} {outcome}" for outcome, number in found.get("tests", {}).items())
    parts = [counts, found.get("error", "")]
    seconds = f"{found['seconds']:6.1f} s"
    return f"{name:<14} {found['state']:<7} {seconds}  {': '.join(filter(None, parts))}"


def print_rows(results: Path, since: str) -> None:
    """The rows that came into the folder since then, as a table."""
    from contest import table
    from records import read_rows

    rows = [row for path in sorted(results.glob("*.json")) for row in read_rows(path)]
    rows = [row for row in rows if "contenders" in row and row["time"] >= since]
    print("\n".join(table(rows)))


def note(record: Path, **line) -> None:
    """Add a line to the record, whole even where several processes write at once."""
    record.parent.mkdir(parents=True, exist_ok=True)
    words = json.dumps(line | {"time": datetime.now().isoformat(timespec="seconds")}) + "\n"
    handle = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, words.encode())
    finally:
        os.close(handle)


def lines_of(record: Path) -> list[dict]:
    """The record's lines since the last whole run began; one that was cut short is left out."""
    from gentron_fast.files import read_json_lines

    lines = read_json_lines(record) if record.exists() else []
    last = max((i for i, line in enumerate(lines) if "run" in line), default=0)
    return lines[last:]


def left_over(steps, lines: list[dict]) -> tuple[Step, ...]:
    """The steps that are not done: failed, cut, ended with the call, or never begun."""
    states = {line["step"]: line["state"] for line in lines if "state" in line}
    return tuple(step for step in steps if states.get(step.name) != "done")


def passed(lines: list[dict], step: str) -> set[str]:
    """The tests of a step that need not run again."""
    tests = [line for line in lines if "test" in line and line["step"] == step]
    outcomes = {line["test"]: line["outcome"] for line in tests}
    return {test for test, outcome in outcomes.items() if outcome == "passed"}


def take_up(results: Path, commit: str) -> Path | None:
    """The newest record in the folder, or brought there from bench/results with its rows; it is
    said where the record is of another commit than `commit`."""

    def day(path: Path) -> tuple[str, float]:  # a file that was brought here has a new time
        return path.stem[-len("2026-01-02") :], path.stat().st_mtime

    for folder in (results, ROOT / "bench/results"):
        found = max(folder.glob("gpu-*.jsonl"), key=day, default=None)
        if found is None:
            continue
        begun = next(iter(lines_of(found)), {}).get("commit", commit)
        if begun != commit:
            print(
                f"make gpu: {found.name} is of commit {begun}, this is {commit}: what it has done"
            )
            print("is not run again; leave REST=1 out to run all")
        results.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"*{found.stem.removeprefix('gpu')}.*"):
            if not (results / path.name).exists():
                shutil.copy(path, results)
        return results / found.name
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
