"""Timesteps that are fitted to a model: a known minimum is found, and a folder takes them."""

import json
import shutil

import pytest

from gentron_fast import GenTronPipeline
from gentron_train.few_steps import fit_timesteps, main


def test_a_known_minimum_is_found():
    tried = []

    def distance(timesteps):
        tried.append(timesteps)
        assert all(a > b for a, b in zip(timesteps, [*timesteps[1:], -1], strict=True))
        return 1 + sum(
            (t - wanted) ** 2 for t, wanted in zip(timesteps, (960, 510, 90), strict=True)
        )

    fitted, found = fit_timesteps(distance, [999, 666, 333], 1000)
    assert all(abs(t - wanted) <= 4 for t, wanted in zip(fitted, (960, 510, 90), strict=True))
    assert found == distance(fitted) == min(map(distance, list(tried)))
    assert len(tried) < 200
    # What can be moved nowhere stays.
    assert fit_timesteps(lambda timesteps: 1.0, [2, 1, 0], 3) == ([2, 1, 0], 1.0)


def test_a_folder_takes_what_is_fitted(tiny_pipeline_folder, tmp_path, capsys):
    folder, prompts = tmp_path / "pipeline", tmp_path / "prompts.txt"
    shutil.copytree(tiny_pipeline_folder, folder)
    prompts.write_text("a red circle\na star\n")
    path = folder / "scheduler" / "scheduler_config.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"few_step_timesteps": [[999, 5], [999, 500, 250]]}))
    command = [str(folder), f"--prompts={prompts}", "--many=6", "--device=cpu"]
    assert main([*command, "--steps", "2", "1"]) == 0
    after = json.loads(path.read_text())
    one, two, three = after.pop("few_step_timesteps")
    assert after == before and (len(one), len(two), three) == (1, 2, [999, 500, 250])
    assert two[0] > two[1] and f"{two[0]} {two[1]}" in capsys.readouterr().out

    pipeline = GenTronPipeline.from_pretrained(folder)
    for solver, taken in (("few-step", True), ("dpm++", False)):
        table = pipeline.sampling("a star", steps=2, solver=solver).table
        assert (table.timesteps.tolist() == two) == taken
    path.write_text(json.dumps({k: v for k, v in after.items() if k != "num_train_timesteps"}))
    assert main([*command, "--steps", "1", "--batch", "1"]) == 0  # diffusers' own number
    wrong = (
        ([str(folder), "--steps", "8", "--many", "8"], "--many is 8, must be more"),
        ([str(folder), "--steps", "21"], "from 1 to 20"),
        ([str(tmp_path)], "model_index.json"),
    )
    capsys.readouterr()
    for argv, words in wrong:
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


@pytest.mark.parametrize("folder", ["gentron_fast/assets", "gentron_fast/assets/fast"])
def test_what_ships_has_them(folder, pytestconfig):
    pipeline = GenTronPipeline.from_pretrained(pytestconfig.rootpath / folder)
    assert [len(own) for own in pipeline.scheduler["few_step_timesteps"]] == [4, 8]
