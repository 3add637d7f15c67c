"""The model that ships in one run: cut off, resumed, assembled with the defaults of its sweep."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from gentron_fast import GenTronPipeline
from gentron_fast.files import write_json
from gentron_train import shipped
from gentron_train.checkpoint import checkpoints_folder


def written(path, stages):
    path.write_text(json.dumps(stages))
    return path


def test_the_configuration_is_every_stage_in_order():
    stages = shipped.read_stages(shipped.CONFIG, Path("/a b"))
    assert list(stages) == [
        *("shards", "autoencoder", "text encoders", "t2i", "t2v"),
        *("sweep", "assembly", "distillation", "figures", "picture"),
    ]
    words = [word for commands in stages.values() for words in commands for word in words]
    assert "/a b/shapes" in words and not [word for word in words if "{" in word]


def test_a_run_goes_on_behind_what_is_done(tmp_path, capsys):
    count = tmp_path / "out" / "count"

    def stage(text, code=0):
        return f'python -c \'open("{count}", "a").write("{text}"); exit({code})\''

    config = written(tmp_path / "a.yaml", {"one": [stage(1), stage(2)], "two": [stage(3, code=1)]})
    arguments = ["--out", str(tmp_path / "out"), "--config", str(config)]
    assert shipped.main(arguments) == 2
    assert "stage two ended with exit code 1" in capsys.readouterr().err
    assert shipped.main(arguments) == 2
    assert count.read_text() == "1233"  # the last again, the others once
    other = written(tmp_path / "a.yaml", {"one": [stage(7)]})
    assert shipped.main(["--out", str(tmp_path / "out"), "--config", str(other)]) == 2
    assert "was made by other commands" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{}", "[]", '{"done": [{}]}', '{"done": 5}', "{"])
def test_damaged_stages_are_one_line(content, tmp_path, capsys):
    (tmp_path / shipped.STATE).write_text(content)
    assert shipped.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert shipped.STATE in error and error.count("\n") == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "score.json").write_text("mine")
    assert shipped.main(["--out", str(tmp_path)]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["score.json"]


def test_a_training_that_was_cut_off_is_resumed(tmp_path, monkeypatch):
    words = ["deepspeed", "train/t2v.py", "--run", str(tmp_path)]
    assert shipped.program(words)[-1] == str(tmp_path)
    (checkpoints_folder(tmp_path) / "step-00000005").mkdir(parents=True)
    assert shipped.program(words)[-1] == "--resume"
    port = shipped.program(words).index("--master_port") + 1  # two trainings share a machine
    assert shipped.program(words)[port] != shipped.program(words)[port]
    monkeypatch.chdir(tmp_path)  # commands run in the checkout, wherever they are asked for
    monkeypatch.setattr(shipped, "ROOT", tmp_path.parent)
    assert shipped.program([*words[:-1], tmp_path.name])[-1] == "--resume"
    assert shipped.program(["python", "-m", "x"]) == [sys.executable, "-m", "x"]


def test_the_pipeline_has_the_sweeps_choice_and_its_page(tiny_pipeline_folder, tmp_path):
    shutil.copytree(tiny_pipeline_folder, tmp_path / "t2v" / "pipeline")
    shares = {"all": 0.5, "shape": 0.6, "motion": 0.7, "broken": 0.1, "psnr": 20.0, "fréchet": 9.0}
    row = {f"{column} {name}": v for column in ("seen", "unseen") for name, v in shares.items()}
    rows = [row | {"lambda_t": 7.5, "lambda_m": 1.2, "rescale": 0, "seen psnr": 10.0}]
    rows.append(row | {"lambda_t": 2, "lambda_m": 1.2, "rescale": 0.5})
    settings = {"prompts": 100, "steps": 8}
    write_json(tmp_path / "sweep.json", {"settings": settings, "rows": rows})
    column = {"shares": {"all": 0.5}, "counts": {"all": 100}, "fidelity": {"psnr": 20.0}}
    for name in ("score", "fast", "ceiling"):
        content = {"settings": settings, "scores": {"seen": column}}
        write_json(tmp_path / f"{name}.json", content)
    done = {"stage": "shards", "command": f"x {tmp_path}/y", "seconds": 7200, "commit": "abc"}
    write_json(tmp_path / shipped.STATE, {"done": [done]})

    assert shipped.main(["--assemble", "--out", str(tmp_path)]) == 0
    defaults = GenTronPipeline.from_pretrained(tmp_path / "pipeline").defaults
    assert (defaults.lambda_t, defaults.lambda_m, defaults.rescale) == (2, 1.2, 0.5)
    page = shipped.model_page(tmp_path)
    assert "in 8 steps of one branch" in page
    for words in ("in 2.0 hours at abc", "x OUT/y", "chosen: λ_T 2, λ_M 1.2, φ 0.5", "20.00"):
        assert words in page


@pytest.mark.parametrize(
    "content",
    [None, "stages: [", "5", "a: [5]", "a: ['{x}']", "a: ['{']", "a: [rm x]", "a: ['']"],
)
def test_a_wrong_configuration_is_one_line(content, tmp_path, capsys):
    path = tmp_path / "a.yaml"
    if content is not None:
        path.write_text(content)
    assert shipped.main(["--config", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error
