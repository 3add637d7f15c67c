import numpy as np
import pytest

from gentron_train.shapes_table import COLUMNS, Judge, draw_prompts, main
from gentron_train.small_world.renderer import render_clip


def clip(scene):
    return render_clip(scene, every=6)


@pytest.mark.parametrize("column", COLUMNS)
def test_the_judge_of_a_column_knows_right_from_wrong(column):
    drawn = draw_prompts(column, 12, seed=0)
    scenes = dict(drawn)
    texts = list(scenes)
    score = Judge(column, scenes)([clip(scene) for scene in scenes.values()], texts)
    assert np.mean(score) >= 0.9
    others = [clip(scene) for scene in scenes.values()]
    wrong = Judge(column, scenes)(others[1:] + others[:1], texts)
    assert np.mean(wrong) < 0.6


def test_prompts_of_the_fill_column_name_a_fill():
    assert all("striped" in text or "dotted" in text for text, _ in draw_prompts("fill", 9, 0))


def test_the_command_scores_a_pipeline_and_goes_on(tiny_pipeline_folder, tmp_path, capsys):
    run = tmp_path / "ours"
    arguments = [str(tiny_pipeline_folder), "--out", str(run), "--prompts", "1", "--steps", "1"]
    arguments += ["--device", "cpu", "--json", str(tmp_path / "table.json")]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert f"| per cent of 1 prompts | {' | '.join(COLUMNS)} |" in table
    assert len(list(run.glob("*/samples/*.mp4"))) == 6 and (tmp_path / "table.json").is_file()
    assert main(arguments) == 0
    assert "skipped      6 of 6 clips" in capsys.readouterr().out
    assert main(["--clean", "--out", str(run), "--prompts", "1"]) == 2
    assert "begun with pipeline" in capsys.readouterr().err


def test_clean_renders_are_the_ceiling(tmp_path, capsys):
    assert main(["--clean", "--out", str(tmp_path), "--prompts", "2"]) == 0
    assert "100.0 (34–100) | 100.0" in capsys.readouterr().out
