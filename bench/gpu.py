"""python bench/gpu.py PART [RESULTS]: one part of the project's GPU run, inside its time budget.

PART is test, ops, step, train or export. The checkout runs in place: it needs PyTorch ≥ 2.11 with
CUDA, Triton ≥ 3.6, einops, safetensors, numpy, pytest and pytest-benchmark, and no network. Figures
go to RESULTS (default: bench/results), a file a part, device and day, rewritten after every row.
"""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
INPLACE = {"gentron_kernels": "kernels", "gentron_fast": "gentron_fast", "gentron_train": "train"}
PARTS = {
    # These need neither diffusers nor transformers, deepspeed, webdataset or av.
    "test": [
        "tests/kernels",
        "tests/gentron_fast/test_guidance.py",
        "tests/gentron_fast/test_model.py",
    ],
    # In the order in which they matter, should the budget end early.
    "ops": [
        "bench/bench_layernorm_modulate.py",
        "bench/bench_temporal_attention.py",
        "bench/bench_guided_step.py",
        "bench/bench_attention.py",
    ],
    "step": ["bench/bench_step.py"],
    "train": ["bench/bench_train.py"],
    "export": ["bench/bench_export.py"],
}
NO_CUDA, NOTHING_YET, NO_BUILD, OUT_OF_TIME = 2, 3, 4, 124
LIMIT = 465  # seconds until a part is ended
LAST_ROW = 400  # seconds after which no row begins


def main(arguments: list[str]) -> int:
    start = time.monotonic()
    if not 1 <= len(arguments) <= 2 or arguments[0] not in PARTS:
        print(f"usage: make gpu PART={'|'.join(PARTS)} [RESULTS=DIR]")
        return 1
    part, results = arguments[0], Path(*arguments[1:] or [ROOT / "bench/results"])
    if reason := missing():
        print(f"make gpu: {reason}")
        return NO_CUDA
    if part in ("test", "export") and (reason := build()):
        print(f"make gpu: the C++ does not build here: {reason}")
        return NO_BUILD
    absent = [path for path in PARTS[part] if not (ROOT / path).exists()]
    if absent:
        print(f"make gpu: nothing in part {part} yet: {', '.join(absent)} does not exist")
        return NOTHING_YET
    return run(part, results.resolve(), LIMIT - (time.monotonic() - start))


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


def build() -> str | None:
    """Build the C++ in place where it is not built; the compiler's last line where it fails."""
    if (ROOT / "kernels/libgentron.so").exists() and (ROOT / "gentron_fast/_runtime.so").exists():
        return None
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.splitlines() or ["no message"])[-1]


def run(part: str, results: Path, seconds: float) -> int:
    """The part under pytest in a process of its own; its exit status, or OUT_OF_TIME."""
    environment = os.environ | {
        "RESULTS": str(results),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(inplace(ROOT)), str(ROOT / "bench"), os.environ.get("PYTHONPATH")])
        ),
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *PARTS[part]]
    if part == "test":
        command += ["-q", "-p", "gpu"]
    else:
        command += ["--benchmark-only", "--full", f"--budget={LAST_ROW}"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"make gpu: part {part} was ended after {LIMIT} s; finished rows are in {results}")
        return OUT_OF_TIME
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def inplace(root: Path) -> Path:
    """A folder in which the checkout's packages lie under their import names."""
    folder = root / ".inplace"
    folder.mkdir(exist_ok=True)
    for name, target in INPLACE.items():
        link = folder / name
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(Path("..") / target, target_is_directory=True)
    return folder


class _TestRows:
    """Part test: a row a test file, written when the next file begins and at the end."""

    def __init__(self):
        self.file, self.counts, self.seconds = None, {}, 0.0

    def pytest_runtest_logreport(self, report):
        file = report.nodeid.partition("::")[0]
        if file != self.file:
            self.write()
            self.file, self.counts, self.seconds = file, {}, 0.0
        self.seconds += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1

    def pytest_sessionfinish(self):
        self.write()

    def write(self):
        if self.file is None:
            return
        from contest import DEVICE
        from records import append_row, environment

        row = {"operator": self.file, "outcomes": self.counts, "seconds": round(self.seconds, 2)}
        append_row(os.environ["RESULTS"], "test", row | environment(DEVICE))


def pytest_configure(config):
    config.pluginmanager.register(_TestRows())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
