"""A sweep over guidance: every combination once, resumed, a rule for the default."""

import json
import shutil

import pytest
from PIL import Image

from gentron_train import shapes_score
from gentron_train.small_world import renderer
from gentron_train.small_world import sweep as module
from gentron_train.small_world.sweep import choose, parse_grid


def test_the_grid_is_every_combination():
    grid = parse_grid(["lambda_t=1.5,3", "rescale=0,0.7"])
    assert grid == [
        {"lambda_t": 1.5, "rescale": 0},
        {"lambda_t": 1.5, "rescale": 0.7},
        {"lambda_t": 3, "rescale": 0},
        {"lambda_t": 3, "rescale": 0.7},
    ]


@pytest.mark.parametrize("word", ["steps=3", "lambda_t", "lambda_t=", "lambda_t=a", "lambda_t=nan"])
def test_what_is_no_grid_is_refused(word, tmp_path, capsys):
    assert shapes_score.main(["--sweep", word, "--out", str(tmp_path / "sweep.json")]) == 2
    assert "--sweep" in capsys.readouterr().err


def test_nothing_of_the_users_is_drawn_over(tiny_pipeline_folder, tmp_path, capsys):
    arguments = [str(tiny_pipeline_folder), "--sweep", "lambda_t=1", "--out"]
    (tmp_path / "mine.png").write_bytes(b"mine")
    assert shapes_score.main([*arguments, str(tmp_path / "mine.json")]) == 2
    assert "mine.png would be drawn over" in capsys.readouterr().err
    assert shapes_score.main([*arguments, str(tmp_path / "mine.png")]) == 2
    assert "does not end in .json" in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_bytes() == b"mine"


def row(alignment, psnr, motion=0.9):
    figures = {"all": alignment, "psnr": psnr, "motion": motion}
    return {f"{column} {name}": v for column in ("seen", "unseen") for name, v in figures.items()}


def test_the_rule_takes_the_most_right_of_those_that_look_as_good():
    burnt, plain, right, turning = (
        *(row(0.95, 20.0), row(0.80, 25.0)),
        *(row(0.90, 24.6), row(0.90, 24.5, motion=0.95)),
    )
    assert choose([burnt, plain, right]) is right
    assert choose([burnt, plain, right, turning]) is turning
    assert choose([burnt, plain]) is plain


def test_a_sweep_is_written_and_resumed(tiny_pipeline_folder, tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(
        module, "evaluate", lambda *a, **o: calls.append(o) or shapes_score.evaluate(*a, **o)
    )
    out = tmp_path / "sweep.json"
    arguments = [str(tiny_pipeline_folder), "--prompts", "2", "--steps", "1", "--out", str(out)]
    assert shapes_score.main([*arguments, "--sweep", "lambda_t=1,3"]) == 0
    assert [call["lambda_t"] for call in calls] == [1, 3]
    published = renderer.seen_prompts(500) + renderer.unseen_prompts(500)
    assert calls[0]["without"] == {text for text, _ in published}
    assert shapes_score.main([*arguments, "--sweep", "lambda_t=1,3,5", "rescale=0"]) == 0
    assert [call["lambda_t"] for call in calls] == [1, 3, 5]
    rows = json.loads(out.read_text())["rows"]
    assert [(r["lambda_t"], r["lambda_m"], r["rescale"]) for r in rows] == [
        (1, 1.2, 0),
        (3, 1.2, 0),
        (5, 1.2, 0),
    ]
    table = capsys.readouterr().out
    assert "chosen: λ_T" in table and "jitter" not in table
    for name in ("sweep.png", "sweep-clips.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 200
    assert shapes_score.main([*arguments, "--seed", "1", "--sweep", "lambda_t=1"]) == 2
    assert "holds a sweep of other settings" in capsys.readouterr().err
    # Nor does another model's, of the same settings, go on.
    other = tmp_path / "other"
    shutil.copytree(tiny_pipeline_folder, other)
    values = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    values["few_step_timesteps"] = [[900, 400]]
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    assert shapes_score.main([str(other), *arguments[1:], "--sweep", "lambda_t=1"]) == 2
    assert "holds a sweep of other settings" in capsys.readouterr().err


def test_of_one_image_there_is_a_sweep_too(tiny_t2i_folder, tmp_path, capsys):
    """Without motion, and without a distance of sets."""
    arguments = [str(tiny_t2i_folder), "--prompts", "1", "--steps", "1", "--sweep", "lambda_t=1,2"]
    assert shapes_score.main([*arguments, "--out", str(tmp_path / "sweep.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[5] == lines[1].split()[-1] == "-"
    assert "chosen: λ_T" in lines[-1]
