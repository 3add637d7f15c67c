"""How many threads a command computes in, that they sleep while others take the CPUs, and that a
thread lets its own go."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from compiled_files import PROGRAM

from gentron_fast import export, generate, serve
from gentron_fast.threads import available_cores
from gentron_train.data import precompute
from gentron_train.shapes_score import main as score

CPUS = sorted(os.sched_getaffinity(0))
V2, V1 = "0::/a/b\n", "5:memory:/a\n4:cpu,cpuacct:/a/b\n"
QUOTAS = {
    "none": (V2, {}, None),
    "of its group": (V2, {"a/b/cpu.max": "100000 100000"}, 1.0),
    "rounded up": (V2, {"a/b/cpu.max": "110000 100000"}, 1.1),
    "less than a core": (V2, {"a/b/cpu.max": "5000 100000"}, 0.05),
    "of the group above": (V2, {"a/cpu.max": "50000 50000", "a/b/cpu.max": "max 100000"}, 1.0),
    "no limit": (V2, {"a/cpu.max": "max 100000"}, None),
    "seen from a container": ("0::/\n", {"cpu.max": "90000 100000"}, 0.9),
    "of a container's host": (V2, {"cpu.max": "100000 100000"}, 1.0),
    "beside v1": (V2, {"unified/a/b/cpu.max": "100000 100000"}, 1.0),
    "v1": (
        V1,
        {
            "cpu,cpuacct/a/b/cpu.cfs_quota_us": "100000",
            "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
        },
        1.0,
    ),
    "v1, no limit": (
        V1,
        {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000"},
        None,
    ),
    "v1 of another controller": (
        "5:cpuset:/a\n",
        {"cpuset/a/cpu.cfs_quota_us": "1", "cpuset/a/cpu.cfs_period_us": "1"},
        None,
    ),
    "not to be read": ("nonsense\n0::/\n:\n", {"cpu.max": "1e999x 0"}, None),
}


def machine(root: Path, groups: str, files: dict[str, str]) -> str:
    """A root folder with a process's cgroups and the files of them."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return str(root)


@pytest.mark.parametrize(("groups", "files", "quota"), QUOTAS.values(), ids=QUOTAS)
def test_cores_by_affinity_and_quota(tmp_path, groups, files, quota):
    wanted = len(CPUS) if quota is None else min(len(CPUS), int(-(-quota // 1)))
    assert available_cores(machine(tmp_path, groups, files)) == wanted


def test_cores_without_a_quota_to_read(tmp_path):
    assert available_cores(str(tmp_path / "nothing")) == len(CPUS)


# A process for all cases, each in a fork of it: torch takes seconds to import.
CASES = """
import os, sys
import torch
from gentron_fast.threads import settle_threads

for root, cpus, variable in (line.split() for line in sys.stdin):
    child = os.fork()
    if child == 0:
        os.sched_setaffinity(0, [int(cpu) for cpu in cpus.split(",")])
        name, _, value = variable.partition("=")
        os.environ[name] = value
        settle_threads(root)
        print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - 1, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def without_settings() -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")
    return {name: value for name, value in os.environ.items() if name not in names}


@pytest.mark.skipif(len(CPUS) < 2, reason="one CPU: nothing to wait for")
def test_settled_threads(tmp_path):
    """(threads, whether they are watched) by affinity, quota and the user's own settings."""
    one = machine(tmp_path / "one", "0::/\n", {"cpu.max": "100000 100000"})
    two, every = f"{CPUS[0]},{CPUS[1]}", ",".join(map(str, CPUS))
    cases = {
        ("/", str(CPUS[0]), "A=1"): (1, 0),
        ("/", two, "A=1"): (2, 1),
        (one, every, "A=1"): (1, 0),
        (one, every, "OMP_NUM_THREADS=2"): (len(CPUS), 1),  # torch has read the variable itself
        ("/", two, "OMP_WAIT_POLICY=active"): (2, 0),
        ("/", two, "GOMP_SPINCOUNT=5"): (2, 0),
        ("/", two, "GOMP_SPINCOUNT="): (2, 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", CASES],
        input="\n".join(map(" ".join, cases)),
        env=without_settings(),
        capture_output=True,
        text=True,
        check=True,
    )
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert dict(zip(cases, found, strict=True)) == cases


COMPUTE = """
import sys
import torch
from gentron_fast.threads import settle_threads
settle_threads()
a = torch.randn(256, 256)
print("ready", flush=True)
while True:
    for _ in range(100):
        a @ a
"""


def watchers(process) -> int:
    """Threads of the watch, and of the team that it keeps asleep."""
    names = []
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        try:
            names.append((task / "comm").read_text())
        except OSError:  # it has ended
            continue
    return names.count("gentron-watch\n")


def wait_until(condition, seconds: float = 20.0):
    """What it gives once it is true, or the last it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


@pytest.mark.skipif(len(CPUS) < 2, reason="one CPU: nothing to wait for")
def test_threads_sleep_while_others_compute():
    """A process on two CPUs beside two that never rest; then these are stopped."""

    def start(code):
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env=without_settings(),
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, CPUS[:2]),
        )

    started = [start(COMPUTE)]
    try:
        ours = started[0]
        assert ours.stdout.readline() == "ready\n"
        started += [start("while True: pass") for _ in range(2)]
        assert wait_until(lambda: watchers(ours) > 1)
        for other in started[1:]:
            other.kill()
            other.wait()
        assert wait_until(lambda: watchers(ours) == 1)
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.skipif(len(CPUS) < 2, reason="one CPU: nothing to wait for")
@pytest.mark.parametrize(("variable", "watched"), [("A", 1), ("OMP_WAIT_POLICY", 0)])
def test_the_program_without_python_settles_its_threads(tmp_path, variable, watched):
    pipe = tmp_path / "text.safetensors"
    os.mkfifo(pipe)  # it reads here, its threads settled, until the pipe is closed
    command = [PROGRAM, "none.gentron", "--embeddings", pipe, "--out", tmp_path / "a.npy"]
    environment = without_settings() | {variable: "passive"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    try:
        with opened_where_read(pipe):
            assert len(os.listdir(f"/proc/{process.pid}/task")) == 1 + watched
    finally:
        process.kill()
        process.communicate()


@contextmanager
def opened_where_read(pipe: Path):
    """The pipe's other end, once a process reads it."""

    def other_end() -> int | None:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            return None

    end = wait_until(other_end)
    assert end, "nobody reads the pipe"
    try:
        yield
    finally:
        os.close(end)


def test_commands_settle_their_threads(tiny_pipeline_folder, tmp_path, monkeypatch, capsys):
    def settled(*_):
        raise ValueError("settled")

    monkeypatch.setattr("gentron_fast.threads.settle_threads", settled)
    for module in (export, precompute):
        monkeypatch.setattr(module, "settle_threads", settled)
    folder, out = str(tiny_pipeline_folder), str(tmp_path / "out")
    lines = [
        (generate.main, ["a red circle", "--model", folder, "--out", f"{out}.mp4"]),
        (generate.main, ["a red circle", "--compiled", folder, "--out", f"{out}.mp4"]),
        (export.main, [folder, "--out", f"{out}.gentron"]),
        (serve.main, [folder, "--port", "0", "--out", out]),
        (precompute.main, ["a.tar", out, "--pipeline", folder]),
        (score, [folder]),
    ]
    for main, line in lines:
        assert main(line) == 2, line
        assert capsys.readouterr().err.strip().endswith("error: settled"), line


# Command lines that compute nothing by torch, leave it to commands of these, or, as `convert` and
# an export of a checkpoint, only move weights.
NOT_COMPUTING = {
    *("gentron_fast/convert/pipelines.py", "gentron_fast/evaluate.py"),
    *("gentron_fast/evaluation/study.py", "gentron_fast/evaluation/video.py"),
    *("train/export_pipeline.py", "train/shapes_table.py", "train/shipped.py"),
    *("train/add_fast.py", "train/findings/__main__.py", "train/trials.py"),
    "train/small_world/renderer.py",
}


def test_every_command_that_computes_settles_its_threads():
    root = Path(__file__).parents[2]
    sources = [path for name in ("gentron_fast", "train") for path in (root / name).rglob("*.py")]
    texts = {path.relative_to(root).as_posix(): path.read_text() for path in sources}
    commands = {name for name, text in texts.items() if "    return run(" in text}
    unsettled = {name for name in commands if "settle_threads()" not in texts[name]}
    assert unsettled == NOT_COMPUTING
    for name in ("gentron_fast/evaluation/score.py", "train/findings/jobs.py"):
        assert "settle_threads()" in texts[name]
    assert not [name for name, text in texts.items() if "os.cpu_count" in text]


def test_ranks_share_the_cores_that_there_are(monkeypatch):
    from gentron_train import process

    counts = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_SIZE", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(process.deepspeed, "init_distributed", lambda *_, **__: None)
    monkeypatch.setattr(process, "available_cores", lambda: 7)
    monkeypatch.setattr(process, "settle_threads", lambda: counts.append("settled"))
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    process.start_distributed(10.0)
    assert counts == [2, "settled"]


# Threads of the system are counted around computations: by the main thread, which then releases its
# workers, and by one beside it.
RELEASED = """
import os, threading, torch
from gentron_fast.threads import release_workers

torch.set_num_threads(3)
count = lambda: len(os.listdir("/proc/self/task"))
alone = count()
numbers = torch.ones(1 << 20)
working = count()
assert release_workers()
for _ in range(1000):  # they end by themselves
    if count() == alone:
        break
    threading.Event().wait(0.01)
released = count()
numbers.exp()
print(working - alone, released - alone, count() - alone)
"""


def test_a_thread_lets_its_workers_go_and_has_them_again():
    told = subprocess.run([sys.executable, "-c", RELEASED], capture_output=True, text=True)
    assert told.stdout.split() == ["2", "0", "2"], told
