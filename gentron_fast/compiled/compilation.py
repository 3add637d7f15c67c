"""Graphs into machine code, in as many processes as there are cores."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gentron_fast.compiled.graphs import Graph
from gentron_fast.files import scratch_folder
from gentron_fast.processes import signal_at_parents_end
from gentron_fast.threads import available_cores

LEAST_SPACE = 512 << 20  # of TMPDIR: 283 MiB of precompiled headers, then code and its sources


def compile_all(graphs: list[Graph], folder: Path, on_graph: Callable | None) -> None:
    """Compile every graph to folder/NAME.pt2, for the CPU in as many processes as it has cores:
    nearly all of the time is the C++ compiler's. ValueError, in one line, where one fails.

    What compilers leave in TMPDIR is in one folder there; it is removed, or after SIGKILL by the
    next call, and the processes of a CPU end with this one.
    """
    root = check_temporary_folder()
    with scratch_folder(root / "gentron-export") as temporary:
        if graphs[0].inputs[0].device.type != "cpu":
            with _working_in(temporary, LIBRARY_PATH=_driver_folder(temporary)):
                _compile_share(graphs, folder, on_graph)
            return
        failures = _compile_in_shares(graphs, folder, temporary, on_graph)
    missing = [graph.name for graph in graphs if not (folder / f"{graph.name}.pt2").exists()]
    if missing:
        name, words, trace = failures or (missing[0], "its process ended", "")
        where = f"; TMPDIR is {root}" if re.search("space left|[Qq]uota", words) else ""
        raise ValueError(f"the compilation of {name} failed: {words}{where}") from (
            RuntimeError(trace) if trace else None
        )


def check_temporary_folder() -> Path:
    """The folder that TMPDIR names; ValueError where code cannot be compiled in it."""
    folder = Path(os.environ.get("TMPDIR") or tempfile.gettempdir()).absolute()
    named = f"TMPDIR, {folder},"
    if not re.fullmatch(r"[\w/.,:@%+=-]+", str(folder)):
        raise ValueError(f"{named} has a character that compilers split at, such as a space")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{named} cannot be written: {error.strerror}") from error
    system = os.statvfs(folder)
    if system.f_flag & os.ST_NOEXEC:
        raise ValueError(f"{named} is mounted noexec, so that no code can be tried out in it")
    if (free := system.f_bavail * system.f_frsize) < LEAST_SPACE:
        raise ValueError(
            f"{named} has {free >> 20} MiB free, compiling takes up to {LEAST_SPACE >> 20}"
        )
    return folder


def check_toolkit(device: torch.device) -> None:
    """ValueError where code for the device cannot be compiled for want of NVIDIA's toolkit, whose
    headers AOTInductor's C++ includes."""
    if device.type != "cuda":
        return
    from torch.utils.cpp_extension import CUDA_HOME

    command = ["g++", "-E", "-x", "c++", "-", f"-I{CUDA_HOME}/include", "-o", os.devnull]
    quiet = {"stderr": subprocess.DEVNULL, "text": True}
    if (
        CUDA_HOME is None
        or subprocess.run(command, input="#include <cuda.h>\n", **quiet).returncode
    ):
        raise ValueError(
            "a compiled sampler for CUDA takes the headers of NVIDIA's CUDA toolkit, and cuda.h "
            f"was not found ({CUDA_HOME or 'no folder of a toolkit'}): install it, or name its "
            "folder in CUDA_HOME"
        )


def _driver_folder(temporary: Path) -> str:
    """LIBRARY_PATH with a folder where a linker finds -lcuda: the driver that this process has
    loaded. By that name it is installed with a toolkit alone, as a stub that AOTInductor finds
    only where CUDA_HOME is set."""
    folders = [os.environ.get("LIBRARY_PATH")]
    driver = re.search(r"/\S*/libcuda\.so\S*", Path("/proc/self/maps").read_text())
    if driver:
        folder = temporary / "driver"
        folder.mkdir()
        (folder / "libcuda.so").symlink_to(driver.group())
        folders.insert(0, str(folder))
    return os.pathsep.join(filter(None, folders))


def _compile_in_shares(
    graphs: list[Graph], folder: Path, temporary: Path, on_graph: Callable | None
) -> tuple[str, str, str] | None:
    """Returns the first failure: a graph's name, the error in one line, its traceback."""
    jobs = min(available_cores(), 8, len(graphs))
    fork = multiprocessing.get_context("fork")
    failures = fork.SimpleQueue()
    shares = [
        fork.Process(
            target=_forked_share,
            args=(os.getpid(), failures, temporary, graphs[i::jobs], folder, on_graph),
        )
        for i in range(jobs)
    ]
    try:
        with warnings.catch_warnings(action="ignore"):  # of threads, which the shares leave alone
            for share in shares:
                share.start()
                with contextlib.suppress(OSError):
                    os.setpgid(share.pid, share.pid)
        for share in shares:
            share.join()
    finally:
        for share in shares:
            if share.is_alive():
                os.killpg(share.pid, signal.SIGKILL)
                share.join()
    return None if failures.empty() else failures.get()


def _forked_share(parent: int, failures, temporary: Path, *share) -> None:
    _end_with(parent)
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    current = share[0][0].name

    def on_graph(name: str) -> None:
        nonlocal current
        current = name
        if share[-1] is not None:
            share[-1](name)

    try:
        with _working_in(temporary):
            _compile_share(*share[:-1], on_graph)
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        words = next((line for line in lines if "error:" in line), lines[0])
        failures.put((current, words, traceback.format_exc()))


def _end_with(parent: int) -> None:
    """End with the parent, the compilers that run here too: they are of this process's group."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells, and ends this
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    signal_at_parents_end(signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before
        os.killpg(0, signal.SIGKILL)


@contextlib.contextmanager
def _working_in(temporary: Path, **variables: str) -> Iterator[None]:
    """Let compilers have their temporary files in a folder, and these variables of the environment;
    Inductor's cache stays where it is."""
    from torch._inductor import codecache  # takes the place of precompiled headers from TMPDIR

    names = ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", *variables)
    before, folder = {name: os.environ.get(name) for name in names}, tempfile.tempdir
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = codecache.cache_dir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    os.environ.update(variables)
    try:
        yield
    finally:
        tempfile.tempdir = folder
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _compile_share(graphs: list[Graph], folder: Path, on_graph: Callable | None) -> None:
    from torch._inductor import config

    options = {}
    if graphs[0].inputs[0].device.type == "cpu":
        # The code takes as many threads as there are where it runs; the number makes it parallel.
        threads_there = max(2, len(os.sched_getaffinity(0)))
        options = {"cpp.threads": threads_there, "cpp.dynamic_threads": True, "compile_threads": 1}
    with config.patch(options), warnings.catch_warnings(action="ignore"):
        for graph in graphs:
            if on_graph is not None:
                on_graph(graph.name)
            graph.compile(folder / f"{graph.name}.pt2")
