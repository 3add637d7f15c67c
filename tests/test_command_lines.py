"""Any command line ends well or in one line: never in a traceback.

`make faults` tries FAULTS times as many.
"""

import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_lines import command_lines
from configurations import ending
from faults import EXIT_CODES, FAULTS
from published import make_pixart

from gentron_fast import convert, export, generate, serve
from gentron_train import (
    add_fast,
    export_pipeline,
    few_steps,
    shapes,
    shapes_score,
    shipped,
    stages,
    trajectories,
    trials,
)
from gentron_train.data import precompute
from gentron_train.findings import __main__ as findings
from gentron_train.small_world import picture

EACH = 40 * FAULTS
NUMBERS = {name: ["1", "2"] for name in ("--steps", "--frames", "--seed", "--batch")}
SAMPLING = NUMBERS | {
    "--solver": ["ddim", "dpm++", "ddpm", "few-step"],
    "--lambda-t": ["3", "1.5"],
    "--lambda-m": ["1", "1.2"],
    "--device": ["cpu"],
}
DTYPES = ["float32", "bfloat16", "float16"]


pytestmark = pytest.mark.faults


@pytest.fixture
def assert_all_end_well_or_in_one_line(capfd, tally):
    def check(main, lines) -> None:
        capfd.readouterr()  # of what was made for it
        endings = {" ".join(line)[:400]: ending(main, line, capfd) for line in lines}
        wrong = {line: told for line, (_, told) in endings.items() if told}
        assert not wrong, json.dumps(wrong, indent=1)
        assert {code for code, _ in endings.values()} == {0, 2}
        for code, _ in endings.values():
            tally(EXIT_CODES[code])

    return check


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_generate(tiny_pipeline_folder, monkeypatch, assert_all_end_well_or_in_one_line):
    branches = SimpleNamespace(describe=lambda: "")
    monkeypatch.setattr("gentron_fast.pipeline.GuidedDenoiser", lambda *_, **__: branches)
    denoise = lambda self, denoiser, seeds, step_done: torch.zeros(len(seeds), 4, 1, 8, 8)  # noqa: E731
    monkeypatch.setattr("gentron_fast.pipeline.GenTronPipeline._denoise", denoise)
    with open("prompts.txt", "w") as file:
        file.write("a red circle\n# a comment\n")
    options = SAMPLING | {
        "--prompts": ["prompts.txt"],
        "--negative-prompt": ["blue", "two words"],
        "--image": [],
        "--size": ["64", "32"],
        "--clips": ["1", "2"],
        "--model": [str(tiny_pipeline_folder)],
        "--compiled": ["prompts.txt"],
        "--sha256": ["0" * 64],
        "--rescale": ["0.5"],
        "--guidance-range": ["0.2", "0.8"],
        "--eta": ["0"],
        "--reuse": ["1", "2"],
        "--dtype": DTYPES,
        "--fp8": [],
        "--offload": [],
        "--out": ["out/", "clip.mp4", "picture.png"],
        "--grid": [],
        "--fps": ["4"],
    }
    lines = command_lines(options, [["a red circle", "--image"]], range(EACH))
    given = (["--model", str(tiny_pipeline_folder), *line] for line in lines)
    assert_all_end_well_or_in_one_line(generate.main, given)


def test_serve(tiny_pipeline_folder, monkeypatch, assert_all_end_well_or_in_one_line):
    module = sys.modules[serve.main.__module__]
    pytest.importorskip("fastapi")
    model, scheduler = SimpleNamespace(size=(64, 64)), SimpleNamespace(is_broken=False)
    monkeypatch.setattr(module, "load", lambda *_: (model, scheduler))
    monkeypatch.setattr("gentron_fast.serving.server.Server.run", lambda *_: None)
    options = {
        **{"--host": ["127.0.0.1", "0.0.0.0"], "--port": ["0"], "--key": ["long-enough"]},
        **{"--name": ["small"], "--device": ["cpu"], "--dtype": DTYPES, "--max-batch": ["2"]},
        **{"--queue": ["2"], "--max-frames": ["8"], "--max-steps": ["50"], "--max-side": ["64"]},
        **{"--fps": ["4"], "--out": ["out"], "--keep": ["1.5"], "--most": ["3"], "--grace": ["1"]},
    }
    lines = command_lines(options, [[str(tiny_pipeline_folder)]], range(EACH))
    assert_all_end_well_or_in_one_line(serve.main, (["--port=0", *line] for line in lines))


def test_export(tiny_pipeline_folder, monkeypatch, assert_all_end_well_or_in_one_line):
    write = lambda path, *_, **__: path.write_bytes(b"")  # noqa: E731
    monkeypatch.setattr("gentron_fast.export.export_sampler", write)
    options = SAMPLING | {
        "--out": ["clip.gentron"],
        "--size": ["64", "32"],
        "--eta": ["0"],
        "--rescale": ["0.5"],
        "--whole": [],
        "--dtype": DTYPES,
    }
    lines = command_lines(options, [[str(tiny_pipeline_folder)]], range(EACH))
    given = (["--out", "sampler.gentron", *line] for line in lines)
    assert_all_end_well_or_in_one_line(export.main, given)


def test_convert(tiny_pipeline_folder, assert_all_end_well_or_in_one_line):
    make_pixart(sample_size=32).save_pretrained("pixart")
    options = {
        "--t5": [f"{tiny_pipeline_folder}/text_encoder_2"],
        "--clip": [f"{tiny_pipeline_folder}/text_encoder"],
        "--vae": [f"{tiny_pipeline_folder}/vae"],
        "--size": ["256"],
        "--heads": ["4"],
        "--no-ema": [],
        "--seed": ["1"],
    }
    commands = ["pixart", "pixart", "pixart", "dit", "export-diffusers"]
    places = commands, ["pixart", str(tiny_pipeline_folder)], [f"new{i}" for i in range(EACH)]
    lines = command_lines(options, places, range(EACH))
    assert_all_end_well_or_in_one_line(convert.main, lines)


def test_precompute(tiny_pipeline_folder, monkeypatch, assert_all_end_well_or_in_one_line):
    monkeypatch.setattr(precompute, "precompute", lambda *_, **__: {})
    with tarfile.open("images-0.tar", "w") as shard:
        shard.add(tiny_pipeline_folder / "model_index.json", "0.json")
    options = {
        "--pipeline": [str(tiny_pipeline_folder)],
        "--vae": [f"{tiny_pipeline_folder}/vae"],
        "--clip": ["nowhere/at/all"],
        "--t5": ["nowhere/at/all"],
        "--no-text": [],
        "--dtype": ["fp32", "bf16"],
        "--size": ["32x32", "32x32,32x64"],
        "--frames": ["8"],
        "--fps": ["4"],
        "--windows-per-clip": ["2"],
        "--crop": ["center", "random"],
        "--workers": ["1"],
        "--device": ["cpu"],
        "--max-broken": ["0.05"],
    }
    lines = command_lines(options, [["images-0.tar"], ["latents/"]], range(EACH))
    given = (["--pipeline", str(tiny_pipeline_folder), *line] for line in lines)
    assert_all_end_well_or_in_one_line(precompute.main, given)


def test_evaluator(tiny_pipeline_folder, monkeypatch, assert_all_end_well_or_in_one_line):
    module = sys.modules[shapes_score.main.__module__]
    for name in ("evaluate", "ceiling"):
        monkeypatch.setattr(module, name, lambda *_, **__: {})
    monkeypatch.setattr(module, "format_table", str)
    options = SAMPLING | {"--prompts": ["2"], "--ceiling": [], "--out": ["score.json"]}
    lines = command_lines(options, [[str(tiny_pipeline_folder)]], range(EACH))
    assert_all_end_well_or_in_one_line(shapes_score.main, lines)


def test_export_pipeline(assert_all_end_well_or_in_one_line, monkeypatch):
    monkeypatch.setattr(export_pipeline, "read_whole", lambda *_, **__: {})
    monkeypatch.setattr(export_pipeline, "_export", lambda *_: "written")
    options = {"--ema": [], "--dtype": ["fp32", "bf16"]}
    lines = command_lines(options, [["run"], [f"new{i}" for i in range(EACH)]], range(EACH))
    assert_all_end_well_or_in_one_line(export_pipeline.main, lines)


def test_shapes(assert_all_end_well_or_in_one_line, monkeypatch):
    module = sys.modules[shapes.main.__module__]
    monkeypatch.setattr(module, "_write_shard", lambda job: job[-1] - job[-2])
    options = {"--images": ["0", "3"], "--clips": ["0", "2"], "--seed": ["1"]}
    options |= {"--shard-size": ["2"], "--processes": ["1"]}
    lines = command_lines(options, [[f"new{i}" for i in range(EACH)]], range(EACH))
    assert_all_end_well_or_in_one_line(shapes.main, ([*line, "--processes=1"] for line in lines))


def test_picture(tiny_pipeline_folder, assert_all_end_well_or_in_one_line, monkeypatch):
    drawn = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(picture, "picture", lambda frames: drawn)
    frames = SimpleNamespace(frames=torch.zeros(1))
    monkeypatch.setattr("gentron_fast.GenTronPipeline.__call__", lambda *_, **__: frames)
    lines = command_lines({"--out": ["a.png"]}, [[str(tiny_pipeline_folder)]], range(EACH // 4))
    assert_all_end_well_or_in_one_line(picture.main, (["--out=b.png", *line] for line in lines))


def test_shipped(assert_all_end_well_or_in_one_line, monkeypatch):
    monkeypatch.setattr(stages, "_call", lambda command, note: 0)
    monkeypatch.setattr(shipped, "model_page", lambda out: "")
    with open("stages.yaml", "w") as file:
        file.write("one: [python -m x]")
    options = {"--out": ["out"], "--config": ["stages.yaml"], "--assemble": [], "--ship": []}
    lines = command_lines(options, [], range(EACH))
    assert_all_end_well_or_in_one_line(shipped.main, lines)


def test_trajectories(tiny_pipeline_folder, monkeypatch, assert_all_end_well_or_in_one_line):
    monkeypatch.setattr(trajectories, "Store", lambda *_: SimpleNamespace(left=[]))
    monkeypatch.setattr(trajectories, "new_paths", lambda *_: [])
    monkeypatch.setattr(trajectories, "find_shards", lambda *_, **__: [])
    options = {
        "--points": ["4"],
        "--p-null": ["0.05"],
        "--batch": ["16"],
        "--seed": ["0"],
        "--min-lambda-t": ["1"],
        "--max-lambda-t": ["8"],
        "--min-lambda-m": ["1"],
        "--max-lambda-m": ["1.3"],
        "--min-trajectory-steps": ["4"],
        "--max-trajectory-steps": ["50"],
        "--teacher-rescale": ["0.7"],
        "--dtype": ["fp32", "bf16"],
        "--device": ["cpu"],
    }
    lines = command_lines(options, [["shards.tar"], ["stored/"]], range(EACH))
    teacher = ["--teacher", str(tiny_pipeline_folder), "--max-lambda-t", "8"]
    given = ([*teacher, *line] for line in lines)
    assert_all_end_well_or_in_one_line(trajectories.main, given)


def test_few_steps(tiny_pipeline_folder, monkeypatch, assert_all_end_well_or_in_one_line):
    monkeypatch.setattr(few_steps, "fit", lambda *_: ([], 0.0, 0.0))
    monkeypatch.setattr(few_steps, "write_json", lambda *_: None)
    Path("prompts.txt").write_text("a red circle\n")
    options = {"--steps": ["4", "8"], "--many": ["9", "10"], "--device": ["cpu"]}
    options["--prompts"] = ["prompts.txt"]
    lines = command_lines(options, [[str(tiny_pipeline_folder)]], range(EACH))
    given = (["--prompts", "prompts.txt", "--many", "9", *line] for line in lines)
    assert_all_end_well_or_in_one_line(few_steps.main, given)


@pytest.mark.parametrize("command", [findings, trials], ids=["findings", "trials"])
def test_findings(command, tmp_path, monkeypatch, assert_all_end_well_or_in_one_line):
    monkeypatch.setattr(command, "train_jobs", lambda *_: None)
    (tmp_path / "runs.yaml").write_text(command.TABLE.read_text())
    options = {
        "--pilot": [],
        "--sheet": [],
        "--seed": ["1"],
        "--lambda-m": ["1.3"],
        "--out": ["runs"],
        "--results": ["results"],
        "--document": ["page.md"],
        "--table": ["runs.yaml", str(command.TABLE)],
        "--device": ["cpu"],
    }
    lines = command_lines(options, [], range(EACH))
    given = (["--results", "mine", "--document", "mine.md", *line] for line in lines)
    assert_all_end_well_or_in_one_line(command.main, given)


def test_add_fast(tiny_pipeline_folder, monkeypatch, assert_all_end_well_or_in_one_line):
    monkeypatch.setattr(add_fast, "add_fast", lambda *_: None)
    pairs = [[str(tiny_pipeline_folder), str(tiny_pipeline_folder)]]
    lines = command_lines({"--steps": ["4", "8"]}, pairs, range(EACH))
    assert_all_end_well_or_in_one_line(add_fast.main, lines)
