"""The measuring: who is timed and how, where rows go, the report, and the parts of the GPU run."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import bench_busy
import bench_serve
import contest as measuring
import gpu
import pytest
import records
import rehearsal
import report
import scale
import torch
import work
from bench_step import Step
from contest import OPENVINO, OURS, ZENTORCH, Contender, Contest, absent
from engines import engine

from gentron_fast import PRESETS, GenTron

ROOT = Path(__file__).parents[1]


@pytest.fixture
def contest(monkeypatch) -> Contest:
    """A contest of milliseconds."""
    monkeypatch.setattr(measuring, "SECONDS", 0.01)
    monkeypatch.setattr(measuring, "ROUNDS", (3, 4))
    monkeypatch.setitem(measuring.PRODUCT_SIDE, "cpu", 16)
    monkeypatch.setattr(measuring, "cache_bytes", lambda device: 4096)
    monkeypatch.setattr(measuring, "keep_freed_memory", lambda: None)
    return Contest("cpu", command="pytest bench")


def double(x):
    return 2 * x


def measure(contest, contenders, **options):
    options = {"nbytes": 1024, "flops": 128} | options
    return contest.measure(
        "double",
        (4, 32),
        options.pop("dtype", torch.float32),
        make=lambda randn: (randn(4, 32),),
        definition=double,
        contenders=contenders,
        **options,
    )[0]


def row_of(**changes) -> dict:
    """A row as `measure` makes it, of a device that nobody has."""
    entry = {"iqr": [0.9, 1.3], "samples": 9, "note": "", "error": 0.0}
    contenders = {
        OURS: entry | {"ms": 1.0, "gbs": 321.5, "percent_of_copy": 87.6, "tflops": 0.25},
        "eager": entry | {"ms": 4.5, "gbs": 71.4, "tflops": 0.05, "speedup": 4.56},
        "flash-attn": {"absent": "not installed"},
    }
    return {
        "operator": "double",
        "direction": "forward",
        "preset": "XL/2-T2V",
        "shape": [3, 8, 64],
        "dtype": "bfloat16",
        "device": "Abacus 9",
        "torch": "2.11.0",
        "triton": None,
        "commit": "0123abc",
        "time": "2026-01-02T03:04:05",
        "command": "pytest bench",
        "bytes": 10**9,
        "flops": 10**9,
        "copy": entry | {"ms": 0.876, "gbs": 377.0},
        "product_tflops": 12.5,
        "contenders": contenders,
    } | changes


def test_a_row_holds_its_figures_and_where_they_come_from(contest):
    eager = Contender("eager", lambda x: x + x, "added", flops=256)
    contenders = [Contender(OURS, double), eager]
    row = measure(contest, [*contenders, absent("peer", "not installed")], preset="XL/2", seed=3)
    ours, eager, peer = row["contenders"].values()
    assert ours["gbs"] == pytest.approx(1024 / ours["ms"] / 1e6)
    assert ours["tflops"] == pytest.approx(128 / ours["ms"] / 1e9)
    assert eager["tflops"] == pytest.approx(256 / eager["ms"] / 1e9)
    assert ours["percent_of_copy"] == pytest.approx(100 * row["copy"]["ms"] / ours["ms"])
    assert eager["speedup"] == pytest.approx(eager["ms"] / ours["ms"]) and "speedup" not in ours
    assert ours["iqr"][0] <= ours["ms"] <= ours["iqr"][1] and ours["samples"] >= 3
    assert eager["note"] == "added" and peer == {"absent": "not installed"}
    assert (row["shape"], row["dtype"], row["seed"]) == ([4, 32], "float32", 3)
    of_flops = 128 / row["product_tflops"] / 1e9
    assert row["floor_ms"] == pytest.approx(max(of_flops, row["copy"]["ms"]))
    assert row["torch"] == torch.__version__ and row["commit"] and row["command"] == "pytest bench"
    assert json.loads(json.dumps(row)) == row
    text = "\n".join(measuring.table([row]))
    assert "double forward XL/2 (4, 32) float32" in text and "absent: not installed" in text


def test_inputs_outgrow_the_cache_within_the_memory(contest, monkeypatch):
    assert measure(contest, [Contender(OURS, double)])["input_sets"] == 8  # twice 4096 by 1024
    monkeypatch.setattr(measuring, "memory_bytes", lambda device: 16 * 3 * 1024)
    assert measure(contest, [Contender(OURS, double)])["input_sets"] == 3


def test_contenders_take_turns_over_rotating_inputs(contest):
    log = []

    def logged(name):
        def run(x):
            log.append((name, x.data_ptr()))
            return 2 * x

        return run

    measure(contest, [Contender(OURS, logged("a")), Contender("peer", logged("b"))])
    passes = [log[2 + 8 * i :][:8] for i in range((len(log) - 2) // 8)]
    assert all(len({name for name, _ in one}) == 1 for one in passes)
    assert all(len({pointer for _, pointer in one}) == 8 for one in passes)
    order = "".join(one[0][0] for one in passes)
    assert order.startswith("abab" + "abbaab"[:4])  # two of warm-up; then copy has its turns too
    assert order.count("a") == order.count("b")


def test_a_peer_that_fails_or_differs_is_absent_with_the_reason(contest):
    def broken(x):
        raise RuntimeError("no kernel\nfor this shape")

    peers = {"broken": broken, "wrong": lambda x: 2.001 * x, "nan": lambda x: x * math.nan}
    peers["transposed"] = lambda x: (2 * x).T
    row = measure(contest, [Contender(OURS, double), *(Contender(*p) for p in peers.items())])
    assert row["contenders"]["broken"] == {"absent": "RuntimeError: no kernel"}
    for name in ("wrong", "nan", "transposed"):
        assert row["contenders"][name]["absent"].startswith("differs from the definition")


def test_ours_must_agree_with_the_definition(contest):
    with pytest.raises(AssertionError, match="differs from the definition"):
        measure(contest, [Contender(OURS, lambda x: 2.001 * x)])
    measure(contest, [Contender(OURS, lambda x: 2.001 * x)], dtype=torch.bfloat16)  # its rounding
    with pytest.raises(RuntimeError, match="mine"):
        measure(contest, [Contender(OURS, lambda x: exec("raise RuntimeError('mine')"))])


def test_backward_checks_and_times_the_gradient(contest):
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 3 * gradient

    contenders = [Contender(OURS, double), Contender("peer", WrongGradient.apply)]
    row = measure(contest, contenders, backward=True)
    assert row["direction"] == "backward" and "ms" in row["contenders"][OURS]
    assert "differs" in row["contenders"]["peer"]["absent"]
    assert "ms" in measure(contest, contenders)["contenders"]["peer"]


def test_the_fastest_variant_of_a_name_counts(contest):
    def slow(x):
        for _ in range(200):
            x = x.clone()
        return 2 * x

    variants = [Contender("peer", slow, "slow"), Contender("peer", double, "fast")]
    row = measure(contest, [Contender(OURS, double), *variants, absent("peer", "third")])
    assert row["contenders"]["peer"]["note"] == "fast"


def test_rows_are_kept_at_once_and_replaced_by_newer_ones(tmp_path, monkeypatch):
    path = records.append_row(tmp_path, "ops", row_of())
    assert path.name == "ops-abacus-9-2026-01-02.json"
    records.append_row(tmp_path, "ops", row_of(dtype="float32"))
    records.append_row(tmp_path, "ops", row_of(commit="newer"))
    assert [row["dtype"] for row in records.read_rows(path)] == ["float32", "bfloat16"]
    assert records.read_rows(path)[1]["commit"] == "newer"

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        records.append_row(tmp_path, "ops", row_of(preset="G/2-T2V"))
    assert len(records.read_rows(path)) == 2


def test_the_report_shows_what_has_a_file_and_nothing_else(tmp_path):
    (tmp_path / "judge-small.json").write_text('{"settings": {}, "scores": {"seen": 1}}')
    (tmp_path / "list.json").write_text("[1, 2]")
    assert report.newest_rows(tmp_path) == []
    assert report.section([]) == "Nothing has been measured yet.\n"
    records.append_row(tmp_path, "ops", row_of())
    records.append_row(tmp_path, "ops", row_of(time="2025-01-01T00:00:00", commit="older"))
    records.append_row(tmp_path, "test", {"operator": "tests/a.py", "outcomes": {}} | ROW_HEAD)
    rows = report.newest_rows(tmp_path)
    assert [row["commit"] for row in rows] == ["0123abc"]
    text = report.section(rows)
    assert "### Abacus 9" in text and "copy 377 GB/s; bfloat16 product 12.5 TFLOP/s" in text
    assert "| double | direction | shape | dtype | ms | GB/s | % of copy | × eager |\n" in text
    assert (
        "| XL/2-T2V | forward | 3 × 8 × 64 | bfloat16 | 1 (0.9 to 1.3) | 322 | 87.6 | 4.56 |"
    ) in text
    assert "flash" not in text and "older" not in text
    without_preset = report.section([row_of(preset=None, direction="training step")])
    assert "**double**\n\n| direction | shape | dtype | ms |" in without_preset
    assert "\n| training step | 3 × 8 × 64 | bfloat16 | 1 (0.9 to 1.3) |" in without_preset


def test_the_headline_is_of_every_processor_and_the_gpu_measured_last():
    assert report.headline([]) == "Nothing has been measured yet.\n"
    title, beside, operator, preset, direction, contender = report.HEADLINES[0]
    kind = {"operator": operator, "preset": preset, "direction": direction}
    contenders = {OURS: {"ms": 1.0}, contender: {"ms": 4.5, "speedup": 4.5}}
    row = row_of(**kind, contenders=contenders)
    older = row_of(**kind, contenders=contenders, device="Older", time="2025-01-02T03:04:05")
    faster = {OURS: {"ms": 1.0}, contender: {"ms": 2.0, "speedup": 2.0}}
    processor = row_of(**kind, contenders=faster, device="Cores (2 threads)")
    processor |= {"time": older["time"], "dtype": "float32"}
    another = processor | {"device": "Atoms (4 threads)"}
    single = processor | {"device": "Cores (1 thread)"}
    lines = report.headline([row, older, processor, another, single, row_of()]).splitlines()
    names = "Atoms (4 threads), float32 | Cores (2 threads), float32 | Abacus 9, bfloat16"
    assert lines[0] == f"| ours | beside | {names} |"
    assert lines[2:] == [f"| {title} | {beside} | 2.00 × | 2.00 × | 4.50 × |"]
    assert report.headline([row]).splitlines()[0] == "| ours | beside | Abacus 9, bfloat16 |"


ROW_HEAD = {"device": "Abacus 9", "time": "2026-01-02T03:04:05"}


def test_the_report_tells_of_serving():
    figures = {"a_minute": 123.4, "p50": 0.25, "p95": 1.5}
    row = row_of(served={"scheduler": figures}, max_batch=8, arrivals_a_minute=61.7)
    text = report.serve_section([row])
    assert "| scheduler | 123 | 0.25 | 1.5 |" in text and "at 61.7 requests a minute" in text
    assert report.serve_section([]) == ""


def test_the_report_tells_of_a_busy_machine():
    figures = bench_busy.figures_of([[10.0, 10.0], [20.0, 20.0]], [[30.0], [45.0]], [[8.0], [16.0]])
    assert (figures["quiet"], figures["quiet_p90"], figures["busy"]) == (15.0, 20.0, 37.5)
    assert figures["quiet_of_defaults"] == 1.25 and figures["times_quiet"] == 2.5
    assert figures["times_quiet_p90"] == pytest.approx(43.5 / 15)
    text = report.busy_section([row_of(busy={"commands of ours": figures})])
    assert "| commands of ours | 15 | 1.25 | 37.5 | 43.5 | 2.5 | 2.9 |" in text
    assert report.busy_section([]) == ""


def test_the_roofline_is_a_picture_of_rows_with_flops(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "docs/roofline.png"
    assert not report.plot_roofline([row_of(flops=None)], path) and not path.exists()
    rows = [row_of(operator=f"operator {i}") for i in range(12)]
    assert report.plot_roofline([*rows, row_of(dtype="float32")], path)
    assert path.read_bytes().startswith(b"\x89PNG") and list(path.parent.iterdir()) == [path]


def test_without_cuda_the_gpu_run_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--part", "ops"]) == gpu.main([]) == gpu.NO_CUDA
    assert capsys.readouterr().out.startswith("make gpu: no CUDA device here")
    with pytest.raises(SystemExit):
        gpu.main(["--part", "all"])
    assert "argument --part: invalid choice: 'all'" in capsys.readouterr().err


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """plan(NAME=(limit, body of a test file), ...): steps, in place of those of `make gpu`."""
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(gpu, "BUILT", {})
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    bare = {"PYTHONPATH": BENCH, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    monkeypatch.setattr(gpu, "environment", lambda results: os.environ | bare)
    monkeypatch.setattr(records, "device_name", lambda device: "Abacus 9")

    def make(**files):
        steps = []
        for name, (limit, body) in files.items():
            (tmp_path / f"test_{name}.py").write_text(body)
            steps.append(gpu.Step(name, limit, ("-q", str(tmp_path / f"test_{name}.py"))))
        monkeypatch.setattr(gpu, "PLAN", tuple(steps))
        return tuple(steps)

    return make


BENCH = str(ROOT / "bench")
PASSES, HANGS = "def test(): pass\n", "import time\ndef test(): time.sleep(600)\n"


def run_gpu(folder, *arguments) -> tuple[int, dict[str, dict], list[dict]]:
    """The status, the last line of each step, and the lines of tests."""
    status = gpu.main(["--results", str(folder), *arguments])
    (record,) = folder.glob("gpu-abacus-9-*.jsonl")
    lines = gpu.lines_of(record)
    steps = {line["step"]: line for line in lines if "state" in line}
    return status, steps, [line for line in lines if "test" in line]


def test_a_step_that_fails_or_hangs_costs_its_share_alone(plan, tmp_path, capsys):
    plan(
        good=(60, PASSES + "def test_too(): pass\n"),
        wrong=(60, "def test():\n    print('seen before')\n    assert 1 == 2, 'not equal'\n"),
        endless=(2, HANGS),
        unknown=(60, "import no_such_module\n"),
        killed=(60, "import os\ndef test(): os.kill(os.getpid(), 9)\n"),
        absent=(60, "import pytest\npytest.importorskip('no_such_module')\n"),
        last=(60, PASSES),
    )
    status, steps, tests = run_gpu(tmp_path / "results")
    assert status == gpu.FAILED
    assert {name: line["state"] for name, line in steps.items()} == {
        **{"good": "done", "wrong": "failed", "endless": "cut", "unknown": "failed"},
        **{"killed": "failed", "absent": "failed", "last": "done"},
    }
    assert steps["good"]["tests"] == {"passed": 2} and "error" not in steps["good"]
    assert steps["wrong"]["error"] == "AssertionError: not equal"
    assert steps["endless"]["error"] == "ended after 2 s"
    unknown = "ModuleNotFoundError: No module named 'no_such_module'"
    assert steps["unknown"]["error"] == unknown
    assert steps["killed"]["error"] == "ended by signal 9"
    assert "no test ran: could not import 'no_such_module'" in steps["absent"]["error"]
    assert [line["outcome"] for line in tests[:3]] == ["passed", "passed", "failed"]
    (log,) = (tmp_path / "results").glob("*.log")
    assert "--- wrong-0" in log.read_text() and "seen before" in log.read_text()
    printed = capsys.readouterr().out
    assert "endless        cut" in printed and ": AssertionError: not equal" in printed


def test_the_limit_cuts_the_plan_anywhere_and_rest_takes_what_is_left(plan, tmp_path, capsys):
    runs = tmp_path / "runs"
    counted = f"def test(): open({str(runs)!r}, 'a').write('x')\n"
    flaky = f"def test_waits():\n    import os, time\n    os.path.exists({str(runs)!r} + '2') or "
    plan(good=(60, counted), half=(60, counted + flaky + "time.sleep(600)\n"), never=(60, PASSES))
    folder = tmp_path / "results"
    status, steps, tests = run_gpu(folder, "--limit", "6")
    assert status == gpu.OUT_OF_TIME
    assert [line["state"] for line in steps.values()] == ["done", "cut", "cut"]
    assert steps["never"]["error"] == "not begun: 6 s ended" and len(tests) == 2
    (tmp_path / "runs2").touch()
    status, steps, tests = run_gpu(folder, "--rest")
    assert status == 0 and {line["state"] for line in steps.values()} == {"done"}
    assert [Path(line["test"]).name for line in tests[2:]] == [
        *("test_half.py::test_waits", "test_never.py::test")
    ]
    assert runs.read_text() == "xx"
    assert gpu.main(["--results", str(folder), "--rest"]) == 0
    assert "every step of gpu-abacus-9" in capsys.readouterr().out
    assert run_gpu(folder, "--limit", "0.01")[1].keys() == {"good", "half", "never"}  # a new run


def test_rest_brings_the_rows_of_the_run_before_along(plan, tmp_path, monkeypatch, capsys):
    plan(good=(60, PASSES))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.main(["--results", str(tmp_path / "new"), "--rest"]) == gpu.NOTHING_LEFT
    assert "nothing to take up" in capsys.readouterr().out
    before = tmp_path / "bench/results/gpu-abacus-9-2026-01-02.jsonl"
    gpu.note(before, run="begun", commit="0ld")
    gpu.note(before, step="good", state="begun")
    records.append_row(before.parent, "ops", row_of())
    records.append_row(before.parent, "ops", row_of(time="2025-01-01T00:00:00"))
    older = before.with_name("gpu-abacus-9-2025-12-30.jsonl")  # came later than the newer one
    gpu.note(older, run="begun")
    os.utime(before, (0, 0))
    capsys.readouterr()
    assert gpu.main(["--results", str(tmp_path / "new"), "--rest"]) == 0
    assert f"{before.name} is of commit 0ld, this is " in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "new").iterdir()}
    stem = "abacus-9-2026-01-02"
    assert names == {f"gpu-{stem}.jsonl", f"gpu-{stem}.log", f"ops-{stem}.json"}


def test_rest_ends_a_step_whose_tests_had_all_passed(plan, tmp_path):
    plan(good=(60, PASSES + "import pytest\n@pytest.mark.skip\ndef test_no(): pass\n"))
    folder = tmp_path / "results"
    assert run_gpu(folder)[0] == 0
    (record,) = folder.glob("*.jsonl")
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if '"done"' not in line))  # killed before
    status, steps, tests = run_gpu(folder, "--rest")
    assert status == 0 and steps["good"]["state"] == "done"
    assert [line["outcome"] for line in tests] == ["passed", "skipped", "skipped"]


def test_contenders_called_eager_are_no_graph(monkeypatch):
    import bench_export
    import bench_step

    asked = []
    for bench in (bench_export, bench_step):
        monkeypatch.setattr(
            *(bench, "GuidedDenoiser", lambda *_, cuda_graph=None, **__: asked.append(cuda_graph))
        )
    step = bench_step.Step(PRESETS["small-T2V"], (1, 4, 8, 8, 8), torch.float32, "meta")
    step.ours()
    step.ours(cuda_graph=True)
    sample = bench_export.pipeline_of(step.model)
    with pytest.raises(AttributeError):  # of None, which has no step
        sample(bench_export.text_of(bench_export.random_text(bench_export.PROMPT)))
    assert asked == [False, True, False]


def test_a_row_of_compiled_peers_measures_no_eager_one_again(contest):
    import bench_step

    names = []

    def measured(*_, contenders, **__):
        names.extend(one.name for one in contenders)
        return {"contenders": {}, "amdahl_ceiling": 1.0, "work": ""}

    config = replace(PRESETS["small-T2V"], depth=1)
    shape = 1, 4, 8, 8, 8
    bench_step.compete(
        *(measured, contest, "a step", config, shape, torch.float32, ("compiled",)), eager=False
    )
    assert names == ["ours", "batched, torch.compile", "ours, compiled"]


def test_an_engine_that_cannot_run_is_absent_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "openvino.py").write_text("raise ImportError('libov.so:\\nno such file')")
    (tmp_path / "zentorch.py").write_text("import gone_engine")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("openvino", "zentorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert engine(OPENVINO, None).note == "openvino does not load: libov.so:"
    assert engine(ZENTORCH, None).note == "zentorch: gone_engine is not installed"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert engine(OPENVINO, None) == absent(OPENVINO, "openvino is not installed")

    def refuses():
        raise RuntimeError("no such operator\nin line 7")

    monkeypatch.setitem(sys.modules, "openvino", sys)
    assert engine(OPENVINO, refuses) == absent(OPENVINO, "RuntimeError: no such operator")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_openvino_takes_the_step_where_it_is_installed(contest, dtype):
    openvino = pytest.importorskip("openvino")
    shape, config = (1, 4, 2, 4, 4), replace(PRESETS["small-T2V"], depth=2)
    step = Step(config, shape, dtype, "cpu")
    (peer,) = (one for one in step.engines() if one.name == OPENVINO)
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == torch.bfloat16 and "BF16" not in capabilities:
        assert "this processor computes in" in peer.note and peer.run is None
        return
    row, _ = contest.measure(
        *("a step", shape, dtype),
        make=lambda randn: tuple(randn(*shape, dtype=torch.float32) for _ in range(2)),
        definition=step.definition,
        contenders=[Contender(OURS, step.ours()), peer],
    )
    entry = row["contenders"][OPENVINO]
    assert entry["error"] <= measuring.TOLERANCE[dtype] and entry["speedup"] > 0
    threads = torch.get_num_threads()
    assert entry["note"].startswith(f"{threads} thread") and "version 20" in entry["note"]
    # Of other texts and latents of these sizes it makes what the definition makes, too.
    step.text = step.text.map(lambda t: -t if t.is_floating_point() else t)
    latents, x0 = (-torch.rand(shape) for _ in range(2))
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    wanted, _ = step.definition(latents.to(wide), x0.to(wide))
    made, _ = peer.run(latents, x0)
    assert (made - wanted).norm() <= measuring.TOLERANCE[dtype] * wanted.norm()


def test_rows_are_of_as_many_threads_as_asked_for(tmp_path):
    (tmp_path / "told.py").write_text("""
import records

def pytest_collection_finish(session):
    print(records.device_name("cpu"))
""")
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "told", "--collect-only"]
    command += ["bench/bench_guided_step.py", "--threads"]
    paths = {"PYTHONPATH": str(tmp_path)}
    options = {"cwd": ROOT, "env": os.environ | paths, "capture_output": True, "text": True}
    one, none = (subprocess.run([*command, number], **options) for number in ("1", "0"))
    assert one.returncode == 0 and ", 1 thread)" in one.stdout, one.stdout + one.stderr
    assert none.returncode != 0 and "--threads must be at least 1, got 0" in none.stderr


def test_rows_survive_a_kill_in_the_middle(tmp_path):
    (tmp_path / "test_kept.py").write_text(f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {BENCH!r})

def test_measured():
    import records
    row = {{"device": "A", "time": "2026-01-02T03:04:05"}}
    records.append_row(os.environ["RESULTS"], "ops", row)

def test_hangs():
    Path({str(tmp_path)!r}, "partial").write_text(str(os.getpid()))
    os.rename(Path({str(tmp_path)!r}, "partial"), Path({str(tmp_path)!r}, "pid"))
    time.sleep(600)
""")
    code = f"""
import gpu
from pathlib import Path
folder = Path({str(tmp_path)!r})
gpu.SCRATCH, gpu.BUILT = folder / "scratch", {{}}
step = gpu.Step("kept", 60, ("-q", str(folder / "test_kept.py")))
gpu.run_plan([step], folder / "gpu-a.jsonl", 60)
"""
    run = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": BENCH})
    pid = tmp_path / "pid"
    assert within(60, pid.exists)
    run.kill()
    run.wait()
    assert within(5, lambda: not Path("/proc", pid.read_text()).exists())
    assert len(records.read_rows(tmp_path / "ops-a-2026-01-02.json")) == 1
    record = tmp_path / "gpu-a.jsonl"
    with record.open("a") as torn:
        torn.write('{"step": "kept", "state": "do')
    lines, step = gpu.lines_of(record), gpu.Step("kept", 60, ())
    assert gpu.left_over([step], lines) == (step,)
    assert [Path(test).name for test in gpu.passed(lines, "kept")] == [
        "test_kept.py::test_measured"
    ]


def within(seconds: float, is_so) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_so()


@pytest.mark.parametrize("shares", [2])
def test_shares_of_a_step_run_each_test_once(plan, tmp_path, monkeypatch, shares):
    (step,) = plan(many=(60, "".join(f"def test_{i}(): pass\n" for i in range(5))))
    monkeypatch.setattr(gpu, "PLAN", (replace(step, shares=shares),))
    _, steps, tests = run_gpu(tmp_path / "results")
    assert steps["many"]["tests"] == {"passed": 5} and len({line["test"] for line in tests}) == 5


SETUP = """
import sys
from pathlib import Path
lib = Path(sys.argv[sys.argv.index("--build-lib") + 1])
for name in ("gentron_kernels/libgentron.so", "gentron_fast/_runtime.so"):
    (lib / name).parent.mkdir(parents=True)
    (lib / name).write_text(name)
"""


def test_the_code_is_built_beside_the_steps_and_put_in_place_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "SCRATCH", tmp_path / "scratch")
    files = list(gpu.BUILT.items())[:2]
    monkeypatch.setattr(gpu, "BUILT", dict(files))
    for _, target in files:
        (tmp_path / target).parent.mkdir()
    (tmp_path / "setup.py").write_text("print('cc: error: no header')\nraise SystemExit(1)\n")
    failing = gpu.Build()
    reason = "the C++ does not build here: cc: error: no header"
    assert failing.wait(60) == reason == failing.wait(0)
    (tmp_path / "setup.py").write_text(HANGS + "test()\n")
    endless = gpu.Build()
    assert endless.wait(0.1) == "the C++ was not built within 0 s"
    process = endless.process
    endless.end()
    assert process.returncode == -signal.SIGKILL
    (tmp_path / "setup.py").write_text(SETUP)
    assert gpu.Build().wait(60) is None
    assert [(tmp_path / target).read_text() for _, target in files] == [name for name, _ in files]
    assert gpu.Build().process is None


def test_the_checkout_runs_in_place(tmp_path):
    for target in gpu.INPLACE.values():
        (tmp_path / target).mkdir()
    for _ in range(2):
        folder = gpu.inplace(tmp_path)
    assert {link.name: link.resolve() for link in folder.iterdir()} == {
        name: tmp_path / target for name, target in gpu.INPLACE.items()
    }


def test_copies_of_a_model_are_made_where_it_runs(monkeypatch):
    devices = []
    monkeypatch.setattr(
        GenTron, "_initialise", lambda self: devices.append(self.patch_embed.weight.device.type)
    )
    step = Step(PRESETS["small-T2V"], (1, 4, 2, 4, 4), torch.bfloat16, "meta")
    wide, compiled = step.copy(torch.float32), step.batched_blocks_compiled().keywords["forward"]
    assert wide.patch_embed.weight.dtype == torch.float32
    assert compiled.blocks[0]._compiled_call_impl is not None
    assert devices == ["meta"] * 3


def test_a_brief_contest_compiles_in_one_mode_and_takes_few_rounds(contest, monkeypatch):
    monkeypatch.setattr(measuring, "BRIEF_ROUNDS", (2, 2))
    monkeypatch.setitem(measuring.COMPILE_MODES, "cpu", ["default", "max-autotune"])
    assert [c.note for c in contest.compiled(double)] == ["default", "max-autotune"]
    contest.brief = True
    assert [c.note for c in contest.compiled(double)] == ["default"]
    assert measure(contest, [Contender(OURS, double)])["contenders"][OURS]["samples"] == 2


def test_work_is_counted_by_source():
    counted = work.work("small-T2V", lambda_m=1.0)
    shares = dict(counted["saved"])
    altogether = shares.pop("altogether")
    assert altogether == pytest.approx(sum(shares.values())) and counted["flops"] > 1e9
    assert list(shares) == list(work.SOURCES) and altogether > 0.35
    assert shares["branches that weigh nothing"] == pytest.approx(1 / 3, abs=0.02)


def test_the_gpu_run_is_rehearsed_and_fits_its_minutes():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which need not be pretended")
    command = [sys.executable, "bench/gpu.py", "--dry"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    walked = {line[0]: line[1] for line in lines if line[1:2] in (["well"], ["failed"])}
    assert walked == dict.fromkeys((step.name for step in gpu.PLAN), "well")
    (total,) = (line for line in lines if line[:1] == ["all"])
    assert 300 < float(total[1]) < gpu.LIMIT == float(total[3])


def test_the_rehearsal_has_what_a_clone_has(tmp_path, monkeypatch):
    root, copy = tmp_path / "root", tmp_path / "copy"
    for name in ("kept/a.py", "kernels/libgentron.so", "notes.txt", "gone.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / ".gitignore").write_text("notes.txt\n*.so\n")
    subprocess.run(["git", "init", "-q", root], check=True)
    subprocess.run(["git", "-C", root, "add", "gone.py"], check=True)
    (root / "gone.py").unlink()
    rehearsal.copy_checkout(root, copy)
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert files == {".gitignore", "kept/a.py", "kernels/libgentron.so"}


def test_the_rehearsal_finds_what_would_waste_minutes(tmp_path):
    """A package that is not there, a file that is not, and a wrong argument."""
    faults = {
        "bench_layernorm_modulate.py": ("import math\n", "import math\nimport matplotlib\n"),
        "bench_step.py": ("texts = self.text, self.null_text", "texts = self.text, self.null_tex"),
    }
    rehearsal.copy_checkout(ROOT, tmp_path)
    for name, (right, wrong) in faults.items():
        text = (tmp_path / "bench" / name).read_text()
        assert text.count(right) == 1
        (tmp_path / "bench" / name).write_text(text.replace(right, wrong))
    (tmp_path / "bench/bench_train.py").unlink()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    steps = "chain", "small-step", "training-step"
    code = f"import gpu, rehearsal\nrehearsal.rehearse([gpu.PARTS[n] for n in {steps}], 500)"
    command = [sys.executable, "-c", code]
    paths = {"PYTHONPATH": str(tmp_path / "bench")}
    run = subprocess.run(
        command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True
    )
    lines = iter(run.stdout.splitlines())
    errors = {line.split()[0]: next(lines).strip() for line in lines if "  failed" in line[:24]}
    assert errors == {
        "chain": "ModuleNotFoundError: import of matplotlib halted; None in sys.modules",
        "small-step": "AttributeError: 'Step' object has no attribute 'null_tex'",
        "training-step": "no such file: bench/bench_train.py",
    }


def test_the_rehearsal_takes_no_argument_that_torch_2_11_lacks():
    assert rehearsal._compile(double, fullgraph=True, mode="default") is double
    with pytest.raises(TypeError, match="recompile_limit"):
        rehearsal._compile(double, recompile_limit=64)


@pytest.mark.parametrize("part", ["ops", "step"])
def test_every_benchmark_of_a_part_runs(part):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--benchmark-disable", "--full", *gpu.EVERY_ROW[part], "-k", "not slice"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_table_on_paper_is_the_scripts(tmp_path):
    page = tmp_path / "scaling.md"
    page.write_bytes(scale.PAGE.read_bytes())
    scale.main(page)
    assert page.read_text() == scale.PAGE.read_text(), "docs/scaling.md: python bench/scale.py"
    page.write_text("no table")
    with pytest.raises(ValueError, match="must hold the lines"):
        scale.main(page)


def test_waits_are_those_of_queueing_theory():
    # One server: Pollaczek and Khinchine. Many: half of Erlang's C, in a textbook's figures.
    assert scale.mean_wait(1, 2.0, 0.9) == pytest.approx(9.0)
    assert scale.mean_wait(2, 1.0, 0.5) == pytest.approx(1 / 3 / 2 / 2 / 0.5)
    assert scale.mean_wait(512, 10.0, 0.9) < 0.1


def test_a_measured_step_takes_the_place_of_the_predicted_one(monkeypatch):
    row = row_of(operator=f"guided step, {scale.MODEL}", device="NVIDIA H200", dtype="bfloat16")
    row |= {"shape": list(scale.SHAPE), "flops": 50, "plain_flops": 60}
    ms = row["contenders"][OURS]["ms"]
    monkeypatch.setattr(scale, "newest_rows", lambda *_: [row])
    assert scale.step_seconds() == pytest.approx((ms / 1e3, "measured", 0.4 * ms / 1e3))


def test_the_benchmark_of_serving_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_serve, "WARM_UP", 1)
    monkeypatch.setattr(bench_serve, "STEPS", (1, 3))
    options = "--requests 4 --rounds 2 --batch 2"
    monkeypatch.setattr(sys, "argv", ["bench_serve.py", *options.split()])
    monkeypatch.setenv("RESULTS", str(tmp_path))
    bench_serve.main()
    (path,) = tmp_path.glob("serve-*.json")
    (row,) = records.read_rows(path)
    ways = {"one at a time", "equal requests", "static batches", "scheduler"}
    assert row["served"].keys() == ways
    assert (row["max_batch"], row["requests"]) == (2, 8)
    for figures in row["served"].values():
        assert all(figures[name] > 0 for name in ("a_minute", "p50", "p95"))
        assert figures["p50"] <= figures["p95"]
    assert "× static batches; at most 2 at a time" in capsys.readouterr().out


def test_the_benchmark_of_a_busy_machine_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_busy, "QUIET_STEPS", 1)
    monkeypatch.setattr(bench_busy, "WARM_UP", 0)
    monkeypatch.setattr(sys, "argv", ["bench_busy.py", "--turns", "1", "--steps", "1"])
    monkeypatch.setenv("RESULTS", str(tmp_path))
    bench_busy.main()
    (path,) = tmp_path.glob("busy-*.json")
    (row,) = records.read_rows(path)
    assert tuple(row["busy"]) == bench_busy.WAYS
    for figures in row["busy"].values():
        assert 0 < figures["quiet"] <= figures["quiet_p90"]
        assert 0 < figures["busy"] <= figures["busy_p90"]
    assert row["busy"][bench_busy.DEFAULTS]["quiet_of_defaults"] == 1.0
    assert capsys.readouterr().out.count(" × quiet") == len(bench_busy.WAYS)
