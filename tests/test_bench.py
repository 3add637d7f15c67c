"""The measuring: who is timed and how, where rows go, the report, and the parts of the GPU run."""

import ast
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import contest as measuring
import gpu
import pytest
import records
import report
import torch
import work
from bench_step import Step
from contest import OURS, Contender, Contest, absent

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
    row = measure(contest, [*contenders, absent("peer", "not installed")], preset="XL/2", floor=3)
    ours, eager, peer = row["contenders"].values()
    assert ours["gbs"] == pytest.approx(1024 / ours["ms"] / 1e6)
    assert ours["tflops"] == pytest.approx(128 / ours["ms"] / 1e9)
    assert eager["tflops"] == pytest.approx(256 / eager["ms"] / 1e9)
    assert ours["percent_of_copy"] == pytest.approx(100 * row["copy"]["ms"] / ours["ms"])
    assert eager["speedup"] == pytest.approx(eager["ms"] / ours["ms"]) and "speedup" not in ours
    assert ours["iqr"][0] <= ours["ms"] <= ours["iqr"][1] and ours["samples"] >= 3
    assert eager["note"] == "added" and peer == {"absent": "not installed"}
    assert (row["shape"], row["dtype"], row["floor"]) == ([4, 32], "float32", 3)
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


def test_the_headline_is_of_the_device_measured_last():
    assert report.headline([]) == "Nothing has been measured yet.\n"
    title, beside, operator, preset, direction, contender = report.HEADLINES[0]
    kind = {"operator": operator, "preset": preset, "direction": direction}
    contenders = {OURS: {"ms": 1.0}, contender: {"ms": 4.5, "speedup": 4.5}}
    row = row_of(**kind, contenders=contenders)
    older = row_of(**kind, contenders=contenders, device="Older", time="2025-01-02T03:04:05")
    lines = report.headline([row, older, row_of()]).splitlines()
    assert lines[0] == "Abacus 9:"
    assert lines[2] == "| ours | beside | float32 | bfloat16 |"
    assert lines[4:] == [f"| {title} | {beside} | – | 4.50 × |"]


ROW_HEAD = {"device": "Abacus 9", "time": "2026-01-02T03:04:05"}


def test_the_report_leaves_the_rest_of_the_readme_alone():
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.replace_section(readme, "new\n")
    assert once == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.replace_section(once, "new\n") == once
    with pytest.raises(ValueError, match="must hold the lines"):
        report.replace_section("no markers", "new\n")
    assert report.replace_section((ROOT / "README.md").read_text(), "new\n")


def test_the_roofline_is_a_picture_of_rows_with_flops(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "docs/roofline.png"
    assert not report.plot_roofline([row_of(flops=None)], path) and not path.exists()
    rows = [row_of(operator=f"operator {i}") for i in range(12)]
    assert report.plot_roofline([*rows, row_of(dtype="float32")], path)
    assert path.read_bytes().startswith(b"\x89PNG") and list(path.parent.iterdir()) == [path]


def test_without_cuda_the_gpu_run_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["ops"]) == 2
    assert capsys.readouterr().out.startswith("make gpu: no CUDA device here")
    assert gpu.main([]) == gpu.main(["all"]) == 1
    assert "PART=test|ops|step|train|export" in capsys.readouterr().out


def test_a_part_without_benchmarks_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setitem(gpu.PARTS, "step", ["bench/bench_of_tomorrow.py"])
    assert gpu.main(["step"]) == 3
    assert "nothing in part step yet: bench/bench_of_tomorrow.py" in capsys.readouterr().out


def test_part_test_writes_a_row_a_file(tmp_path, monkeypatch):
    for name, body in {"a": "assert True", "b": "assert False"}.items():
        (tmp_path / f"test_{name}.py").write_text(f"def test(): {body}\n")
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setitem(gpu.PARTS, "test", [str(tmp_path / f"test_{name}.py") for name in "ab"])
    assert gpu.main(["test", str(tmp_path / "results")]) == 1
    (written,) = (tmp_path / "results").iterdir()
    outcomes = [row["outcomes"] for row in records.read_rows(written)]
    assert outcomes == [{"passed": 1}, {"failed": 1}]


def test_a_part_that_runs_too_long_is_ended(tmp_path, monkeypatch, capsys):
    endless, started = tmp_path / "test_endless.py", []
    endless.write_text("import time\ndef test(): time.sleep(600)\n")
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "LIMIT", 0.5)
    monkeypatch.setitem(gpu.PARTS, "test", [str(endless)])
    assert gpu.main(["test", str(tmp_path)]) == 124
    assert "part test was ended after 0.5 s" in capsys.readouterr().out
    assert started[0].poll() == -signal.SIGKILL


def test_the_checkout_runs_in_place(tmp_path):
    for target in gpu.INPLACE.values():
        (tmp_path / target).mkdir()
    for _ in range(2):
        folder = gpu.inplace(tmp_path)
    assert {link.name: link.resolve() for link in folder.iterdir()} == {
        name: tmp_path / target for name, target in gpu.INPLACE.items()
    }


def test_part_test_needs_no_package_that_may_be_absent():
    absent_there = {"diffusers", "transformers", "deepspeed", "webdataset", "av", "tqdm", "PIL"}
    paths = [ROOT / path for path in gpu.PARTS["test"]]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    for file in files:
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
        assert not names & absent_there, file


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


def test_a_part_whose_code_does_not_build_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "build", lambda: "g++: no such file")
    assert gpu.main(["test"]) == gpu.NO_BUILD
    assert "does not build here: g++: no such file" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["ops", "step"])
def test_every_benchmark_of_a_part_runs(part):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--benchmark-disable", "--full", *gpu.PARTS[part], "-k", "not slice"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
