"""The compilation: TMPDIR, failures in one line, and what ends with a killed export."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gentron_fast import export
from gentron_fast.compiled import compilation
from gentron_fast.compiled.compilation import check_temporary_folder, compile_all

# An export whose compiler runs for minutes, with a compiler proper below it, as g++ has.
SLOW = """
import subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from gentron_fast.commandline import run
from gentron_fast.compiled.compilation import compile_all

def compile(path):
    subprocess.run(["sh", "-c", "echo > $TMPDIR/made; sleep 300 & echo $! > $0.pid; wait", path])

graphs = [
    SimpleNamespace(name=name, inputs=[torch.zeros(1)], compile=compile) for name in ("a", "b")
]
sys.exit(run("slow", lambda: compile_all(graphs, Path(sys.argv[1]), None), [], "interrupted"))
"""


def graph(compile, name="a"):
    return SimpleNamespace(name=name, inputs=[torch.zeros(1)], compile=compile)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_compilers_end_with_a_killed_export(tmp_path, monkeypatch, tally, number):
    """And its folder of temporary files goes, after SIGKILL with the next export."""
    for name in ("tmp", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / "out")])
    deadline = time.monotonic() + 120
    while not (started := list((tmp_path / "out").glob("*.pid"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # the number is written
    pids = [int(path.read_text()) for path in started]
    assert pids and all(map(is_running, pids))
    assert list((tmp_path / "tmp").glob("*/made"))
    process.send_signal(number)
    process.wait(timeout=60)
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))
    if number == signal.SIGKILL:
        assert list((tmp_path / "tmp").glob(".gentron-export.*"))
        compile_all([graph(Path.touch)], tmp_path / "out", None)
    assert not list((tmp_path / "tmp").glob(".gentron-export.*"))
    tally("recovered")


def test_a_failed_compilation_is_one_line(tmp_path, monkeypatch, capfd):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))

    def fail(path):
        raise RuntimeError("C++ compile error\nx.s: fatal error: x: No space left on device\n" * 9)

    words = r"compilation of a failed: x.s: .* No space left on device; TMPDIR is .*tmp$"
    with pytest.raises(ValueError, match=words) as failure:
        compile_all([graph(fail)], tmp_path, None)
    assert "\n" not in str(failure.value) and capfd.readouterr().err == ""
    assert "Traceback" in str(failure.value.__cause__)  # for --verbose
    assert not list((tmp_path / "tmp").iterdir())
    with pytest.raises(ValueError, match="compilation of a failed: its process ended"):
        compile_all([graph(lambda path: os._exit(1))], tmp_path, None)


@pytest.mark.parametrize("name", ["missing", "a space", "a;b"])
def test_a_tmpdir_that_cannot_serve_is_named_in_one_line(tmp_path, monkeypatch, capsys, name):
    if name != "missing":
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))
    assert export.main(["nowhere", "--out", str(tmp_path / "x.gentron")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"TMPDIR, {tmp_path / name}," in err


@pytest.mark.parametrize(
    "change, words",
    [({"f_flag": os.ST_NOEXEC}, "noexec"), ({"f_bavail": 0}, "has 0 MiB free")],
    ids=["noexec", "full"],
)
def test_a_tmpdir_is_looked_at_before_the_work(tmp_path, monkeypatch, change, words):
    usual = {"f_flag": 0, "f_bavail": 1 << 30, "f_frsize": 4096}
    statvfs = {name: usual[name] for name in usual} | change
    monkeypatch.setattr(compilation.os, "statvfs", lambda _: SimpleNamespace(**statvfs))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(ValueError, match=f"TMPDIR, {tmp_path}, .*{words}"):
        check_temporary_folder()


def test_cuda_takes_the_toolkits_headers(tmp_path, monkeypatch):
    cuda = torch.device("cuda")
    compilation.check_toolkit(torch.device("cpu"))
    for home in (None, str(tmp_path)):
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", home)
        with pytest.raises(ValueError, match=r"cuda.h was not found \(.*\): install it"):
            compilation.check_toolkit(cuda)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda.h").touch()
    compilation.check_toolkit(cuda)


# The driver as a GPU's machine has it: libcuda.so.1, and nothing that -lcuda would find.
LINKS = """
import ctypes, subprocess, sys
from pathlib import Path
from gentron_fast.compiled.compilation import _driver_folder, _working_in

folder = Path(sys.argv[1])
link = ["g++", "-shared", "-xc++", "-", "-o", str(folder / "graph.so"), "-lcuda"]
driver = folder / "libcuda.so.1"
subprocess.run([*link[:4], "-o", str(driver)], input="int cuInit() { return 0; }", text=True)
assert subprocess.run(link, input="", text=True).returncode
ctypes.CDLL(str(driver))
with _working_in(folder, LIBRARY_PATH=_driver_folder(folder)):
    sys.exit(subprocess.run(link, input="", text=True).returncode)
"""


def test_a_graph_for_cuda_links_with_the_driver_that_is_loaded(tmp_path):
    subprocess.run([sys.executable, "-c", LINKS, str(tmp_path)], check=True)
