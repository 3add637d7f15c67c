"""A distilled model beside its teacher: figures that are kept, a table, pictures."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from gentron_fast import GenTronPipeline
from gentron_train.small_world import distilled
from gentron_train.small_world.evaluator import Scores


@pytest.fixture
def folder(make_model, tiny_config, tiny_pipeline_folder, tmp_path):
    pipeline = GenTronPipeline.from_pretrained(tiny_pipeline_folder)
    pipeline.transformer = make_model(replace(tiny_config, guidance_embedding=True), torch.float32)
    pipeline.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_figures_are_kept_and_told(folder, tiny_pipeline_folder, tmp_path, monkeypatch, capsys):
    asked = []

    def scored(pipeline, prompts, seed, columns, **options):
        asked.append((pipeline.transformer.config.guidance_embedding, prompts, seed, options))
        right = 0.9 if options["steps"] == 3 else 0.8
        shares = dict.fromkeys(("all", "shape", "motion"), right)
        figures = {"psnr": 25.0, "fréchet": 3.5}
        return {column: Scores(shares, {}, figures) for column in columns}

    monkeypatch.setattr(distilled, "evaluate", scored)
    monkeypatch.setattr(distilled, "POINTS", (("teacher", 3), ("student", 2)))
    monkeypatch.setattr(distilled, "ROUNDS", 1)
    out = tmp_path / "figures.json"
    command = ["--teacher", str(tiny_pipeline_folder), "--student", str(folder)]
    command += ["--prompts", "10", "--seed", "5", "--lambda-m", "1.3", "--out", str(out)]
    assert distilled.main(command) == 0
    options = {"lambda_t": 7.5, "lambda_m": 1.3, "solver": "few-step"}
    assert asked == [
        (False, 10, 5, options | {"steps": 3}),
        (True, 10, 5, options | {"steps": 2}),
    ]
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[1].split()[:4] == ["teacher", "3", "90.0", "(69.9–97.2)"]
    assert lines[2].split()[:3] == ["student", "2", "80.0"]
    rows = json.loads(out.read_text())["rows"]
    assert [row["steps"] for row in rows] == [3, 2] and all(row["seconds"] > 0 for row in rows)
    for name in ("figures.png", "figures-clips.png"):
        assert Image.open(tmp_path / name).size[0] > 100
    assert distilled.main(command) == 0
    assert len(asked) == 2  # nothing is scored again
    command[command.index("--seed") + 1] = "6"
    assert distilled.main(command) == 2
    assert "of other settings" in capsys.readouterr().err


def test_the_file_is_json(capsys):
    assert distilled.main(["--out", "figures.txt"]) == 2
    assert "figures.txt does not end in .json" in capsys.readouterr().err
