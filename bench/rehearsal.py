"""`make gpu DRY=1`: the plan walked through without a GPU, step for step, and what it would take.

The command of each step runs as on a GPU, but for this plugin, on a copy of the files that git
knows, in a process that sees the H200 of tests/shared/pretended_gpu. Tensors on "cuda" are fake: a
wrong name, argument, file or shape is found, and no figure. No package can be imported but those
that a GPU machine needs and what they need, models have few blocks, torch.compile leaves a
function as it is, no compiled sampler is made, and the tests that need a GPU are collected and
set up only.
"""

import contextlib
import inspect
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import wraps
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import gpu
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# What the run asks of a machine, gpu.py says it in words; pytest takes no plugin but the last.
PRESENT = ("torch", "triton", "einops", "safetensors", "numpy", "setuptools", "pytest")
PRESENT = (*PRESENT, "pytest-benchmark")
CUT = 2  # blocks of a model: one of each encoder
SECONDS_WALKED = 300.0  # of a step, at most

# What the estimates rest on, besides the FLOPs and bytes of the rows; the plan has them printed.
BASIS = """\
An H200 copies 4.3 TB/s and multiplies at 780 TFLOP/s in bf16, as was timed on one. Taken of it:
70 % by models and operators, a third of a copy by plain torch's operators; 50 TFLOP/s in fp32.
Seconds of a core measured here, compiling for the H200 that is not there: imports; a Triton kernel
1; by Inductor an operator 4, a block 9, a graph of a sampler 5, the first time 6 more; FLOPs of a
model on meta tensors 0.2 a block. Guessed: 5 for a graph's C++, half of what it takes on a core
here with -O1; a test with its kernels 1.5, on 8 cores."""
COPY, PRODUCT, REACHED = 4.3e12, {"bfloat16": 780e12, "float32": 50e12}, 0.7
KERNEL, OPERATOR, BLOCK, GRAPH, INDUCTOR, TEST, COUNTED_BLOCK = 1.0, 4.0, 9.0, 10.0, 6.0, 1.5, 0.2
BLOCK_KINDS = 3  # that are compiled apart: the first block, and one of each encoder
ROW = 2.0  # inputs, the rate of a product, the table


def rehearse(steps: Sequence[gpu.Step], limit: float) -> int:
    """Walk through the steps, two at once; 0 where each is walked well and all fit the limit."""
    with tempfile.TemporaryDirectory(prefix="gentron-gpu-") as folder:
        copy, record = Path(folder, "checkout"), Path(folder, "results", "gpu.jsonl")
        copy_checkout(gpu.ROOT, copy)
        gpu.ROOT, gpu.SCRATCH, gpu.start_pytest = copy, copy / "build/gpu", _Forked
        _see_a_gpu(copy)
        gpu.note(record, run="begun")
        with ThreadPoolExecutor(2) as pool:
            walks = [pool.submit(_walk, step, record) for step in steps]
            found = [walk.result() for walk in walks]
        lines = [line for line in gpu.lines_of(record) if "estimate" in line]
        failed, total = [], 0.0
        print(f"{'step':<14} {'walked':<7} {'estimate':>8} {'limit':>7}")
        for step, one in zip(steps, found, strict=True):
            parts = [(line["of"], line["estimate"]) for line in lines if line["step"] == step.name]
            seconds = sum(estimate for _, estimate in parts)
            total += seconds
            well = one["state"] == "done" and seconds <= step.limit
            failed += [] if well else [step.name]
            words = ", ".join(f"{of} {estimate:.0f}" for of, estimate in parts)
            state = "well" if one["state"] == "done" else "failed"
            print(f"{step.name:<14} {state:<7} {seconds:6.0f} s {step.limit:5.0f} s  {words}")
            if "error" in one:
                print(f"    {one['error']}")
        print(f"{'all':<14} {'':<7} {total:6.0f} s {limit:5.0f} s\n\n{BASIS}")
        if failed:
            print(f"\n{record.with_suffix('.log').read_text()}\nnot well: {', '.join(failed)}")
    return int(bool(failed) or total > limit)


def _see_a_gpu(copy: Path) -> None:
    """Before anything of ours is imported: it would ask for the device."""
    sys.modules.update(dict.fromkeys(absent_packages()))  # None: neither found nor imported
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(copy / "tests/shared"))
    import pretended_gpu

    pretended_gpu.pretend()
    import torch._dynamo  # noqa: F401  as fake tensors do

    _walk_of_process.imports = time.process_time()


def absent_packages() -> set[str]:
    """What can be imported here, but not where PRESENT alone and what it needs are installed."""
    present, names = {"gentron-fast"}, list(PRESENT)
    while names:
        if (name := canonicalize_name(names.pop())) in present:
            continue
        present.add(name)
        with contextlib.suppress(PackageNotFoundError):
            needed = map(Requirement, requires(name) or ())
            names += [
                one.name for one in needed if not one.marker or one.marker.evaluate({"extra": ""})
            ]
    return {
        module
        for module, owners in packages_distributions().items()
        if not present & set(map(canonicalize_name, owners))
    }


def copy_checkout(root: Path, copy: Path) -> None:
    """What a clone would hold, changes among it, and the C++ that is built."""
    git = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():  # one that was removed is listed, too
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)
    for name in gpu.BUILT.values():
        if (root / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).symlink_to(root / name)


def _walk(step: gpu.Step, record: Path) -> dict:
    return gpu.run_step(replace(step, shares=1), record, SECONDS_WALKED, False, _Built())


class _Built:
    def wait(self, seconds: float) -> None:
        pass


class _Forked:
    """pytest in a fork of this process, which has torch and sees the GPU: one import for all."""

    def __init__(self, arguments: list[str], environment: dict[str, str], output):
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=_run_pytest, args=(arguments, environment, output))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("pytest", timeout)


def _run_pytest(arguments: list[str], environment: dict[str, str], output) -> None:
    os.setpgid(0, 0)
    os.chdir(gpu.ROOT)
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    status = pytest.main(["-p", "pytest_benchmark.plugin", "-p", "rehearsal", *arguments])
    sys.stdout.flush()
    os._exit(status)  # what ends with a process is its parent's


# What follows is this file as a plugin of pytest, in the process of a step.


@dataclass
class _Walk:
    """What this process has met: functions and blocks that are to be compiled."""

    functions: int = 0
    blocks: int = 0
    has_inductor: bool = False
    imports: float = 0.0  # seconds, before the fork
    config: pytest.Config | None = None


_walk_of_process = _Walk()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    """What fake tensors cannot do, and what takes long."""
    import contest
    import torch
    from pytest_benchmark.fixture import BenchmarkFixture

    from gentron_fast import PRESETS, cores, model

    cores.all_cores = contextlib.nullcontext  # nothing is measured, for no run need it wait

    class Generator(torch.Generator):
        def __new__(cls, device=None):
            return super().__new__(cls)

    torch.Generator, torch.cuda._sleep = Generator, lambda cycles: None
    torch.compile, torch._dynamo.reset = _compile, lambda: None
    model.EncodedText.trim = lambda self: self  # the values of a mask are unknown
    for preset in ("G/2-T2V", "small-T2V"):
        PRESETS[preset] = replace(PRESETS[preset], depth=CUT)

    contest._relative_error = lambda results, reference: 0.0
    inputs, measure = contest.Contest._input_sets, contest.Contest.measure
    contest.Contest._input_sets = lambda self, *rest: inputs(self, *rest)[:1]
    contest.Contest._take_turns = lambda self, calls, times_launch=False: {
        contender: [self._pass(prepare)[0]] for contender, prepare in calls.items()
    }

    @wraps(measure)
    def measured(self, operator, shape, dtype, **options):
        row = measure(self, operator, shape, dtype, **options)
        _note(operator, _seconds_of_row(self, operator, dtype, options))
        return row

    contest.Contest.measure = measured
    BenchmarkFixture.pedantic = lambda self, target, setup, **_: target(*setup()[0])


def _compile(
    model=None,
    *,
    fullgraph=False,
    dynamic=None,
    backend="inductor",
    mode=None,
    options=None,
    disable=False,
):
    """torch.compile with the arguments that torch 2.11 has, which leaves the function alone."""
    if type(getattr(model, "__self__", None)).__name__ == "Block":
        _walk_of_process.blocks += 1
    else:
        _walk_of_process.functions += 1
    return model


def _seconds_of_row(contest, operator: str, dtype, options: dict) -> float:
    """What a row would take: compilation, the definition, and every contender's passes."""
    import contest as measuring

    from gentron_fast import PRESETS

    walk, name = _walk_of_process, str(dtype).removeprefix("torch.")
    preset = next((preset for preset in ("G/2", "small") if preset in operator), None)
    cut = PRESETS[preset].depth / CUT if preset else 1
    nbytes, flops = options.get("nbytes") or 0, cut * (options.get("flops") or 0)

    def seconds_of(contender) -> float:
        share = 3 if contender.name in ("eager", "SDPA") else 1
        own = cut * contender.flops if contender.flops else flops
        return max(share * nbytes / COPY, own / PRODUCT[name]) / REACHED

    calls = [seconds_of(one) for one in options["contenders"] if one.run is not None]
    sets = 2 if not nbytes else max(4, -(-2 * measuring.cache_bytes("cuda") // nbytes))
    one_pass = sets * (sum(calls) + nbytes / COPY)
    low, high = measuring.BRIEF_ROUNDS if contest.brief else measuring.ROUNDS
    rounds = min(high, max(low, int(measuring.SECONDS / max(one_pass, 1e-6))))
    seconds = ROW + KERNEL + (3 + rounds) * one_pass + flops / PRODUCT["float32"]
    compiled = OPERATOR * walk.functions + BLOCK * BLOCK_KINDS * walk.blocks / CUT
    if compiled and not walk.has_inductor:
        walk.has_inductor = True
        compiled += INDUCTOR
    walk.functions = walk.blocks = 0
    return seconds + compiled + COUNTED_BLOCK * (cut * CUT if preset else 0)


def _note(of: str, seconds: float) -> None:
    config = _walk_of_process.config
    gpu.note(config.getoption("record"), step=config.getoption("step"), of=of, estimate=seconds)


def pytest_configure(config):
    _walk_of_process.config = config


def pytest_collection_finish(session):
    _note("imports", _walk_of_process.imports + time.process_time())
    tests = [item for item in session.items if item.get_closest_marker("gpu")]
    if tests:
        _note(f"{len(tests)} tests", TEST * len(tests) / 8)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    import pretended_gpu

    if item.path.name == "bench_export.py":
        _make_no_sampler(item.module)
    with pretended_gpu.Host():
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    return True if pyfuncitem.get_closest_marker("gpu") else None


def _make_no_sampler(bench) -> None:
    """The graphs of a compiled sampler are made and no file; the model's own clip stands for it."""
    import torch
    from bench_step import new_model

    from gentron_fast import GenTronConfig
    from gentron_fast.compiled.graphs import sampling_graphs

    export = bench.export_sampler

    def exported(*arguments, **options):
        given = inspect.signature(export).bind(*arguments, **options).arguments
        frames, size = given["frames"], given["latent_size"]
        model, most = given["model"], given["max_batch"]
        shape = (model.config.in_channels, frames, *size)
        graphs = list(sampling_graphs(model, shape, bench.TABLE, most, given["max_tokens"]))
        _note(f"{len(graphs)} graphs", INDUCTOR + GRAPH * len(graphs))

    def fresh(kind, *_):
        """A process that imports what the real one does."""
        head = bench.COLD.format(bench=str(bench.ROOT / "bench")).partition("kind, dtype")[0]
        compile(bench.COLD.format(bench=""), "COLD", "exec")
        bench.run([sys.executable, "-c", head], dict(os.environ))
        _note(f"cold {kind}", _walk_of_process.imports + 2.0)
        return 1.0, torch.zeros(1, *bench.SHAPE)

    config = replace(GenTronConfig.read(bench.MODEL / "config.json"), depth=CUT)
    bench.STEPS = 2
    bench.load_model = lambda dtype: new_model(config, dtype, "cuda")
    bench.export_sampler, bench.cold = exported, fresh
    bench.cold_program = lambda folder: (1.0, torch.zeros(1, *bench.SHAPE))
    bench.load_compiled = lambda path, dtype: bench.pipeline_of(bench.load_model(dtype))
