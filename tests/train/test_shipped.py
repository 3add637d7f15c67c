"""The model that ships in one run: cut off, resumed, assembled with the defaults of its sweep."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gentron_fast import GenTronPipeline
from gentron_fast.files import LOCK_NAME, MARK, read_json, write_json
from gentron_train import shipped, stages
from gentron_train.checkpoint import checkpoints_folder


def written(path, commands):
    path.write_text(json.dumps(commands))
    return path


def test_the_configuration_is_every_stage_in_order():
    commands = stages.read_stages(shipped.CONFIG, Path("/a b"))
    assert list(commands) == [
        *("shards", "autoencoder", "text encoders", "t2i", "t2v"),
        *("sweep", "assembly", "distillation", "figures", "picture"),
    ]
    words = [word for lines in commands.values() for line in lines for word in line]
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


def test_what_a_command_took_counts_however_often_it_was_cut_off(tmp_path, monkeypatch, capsys):
    """A command that is killed goes on; so does its time, and every commit is named."""
    monkeypatch.setattr(stages, "NOTED", 0.02)
    clock = iter(range(0, 100_000, 50))
    monkeypatch.setattr(stages.time, "monotonic", lambda: next(clock))
    line = "python -c 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)'"
    config = written(tmp_path / "a.yaml", {"one": [line], "two": ["python -c ''"]})
    arguments = ["--out", str(tmp_path / "out"), "--config", str(config)]
    spent = 0
    for name in ("aaa", "bbb", "bbb"):
        monkeypatch.setattr(stages, "commit", lambda name=name: name)
        assert shipped.main(arguments) == 2
        assert "stage one ended with exit code -9" in capsys.readouterr().err
        begun = json.loads((tmp_path / "out" / stages.STATE).read_text())["begun"]
        assert begun["seconds"] > spent
        spent = begun["seconds"]
    assert begun["commit"] == "aaa, bbb" and begun["machine"] == stages.machine()
    other = written(tmp_path / "a.yaml", {"one": [f"{line} --resume"]})
    assert shipped.main(["--out", str(tmp_path / "out"), "--config", str(other)]) == 2
    assert "was made by other commands" in capsys.readouterr().err


def test_what_was_cut_off_goes_on_to_the_next(tmp_path):
    ready, out = tmp_path / "ready", tmp_path / "out"
    first = f"import sys, os; sys.exit(not os.path.exists({str(ready)!r}))"
    commands = {"one": [["python", "-c", first]], "two": [["python", "-c", ""]]}
    with pytest.raises(ValueError, match="stage one ended with exit code 1"):
        stages.run_stages(commands, out)
    ready.touch()
    stages.run_stages(commands, out)
    state = json.loads((out / stages.STATE).read_text())
    assert [stage["stage"] for stage in state["done"]] == ["one", "two"] and "begun" not in state


def test_what_a_command_needs_and_what_it_makes_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_call", lambda command, note: 0)
    training = {"t2i": [["deepspeed", "train/t2i.py", "--run", str(tmp_path / "run")]]}
    with pytest.raises(ValueError, match=r"t2i ended without .*/run/pipeline"):
        stages.run_stages(training, tmp_path / "out")
    training["t2i"][0] += ["--data", str(tmp_path / "shapes")]
    with pytest.raises(ValueError, match=r"shapes/index\.json is gone"):
        stages.run_stages(training, tmp_path / "other")


def test_two_at_once_are_refused_and_what_is_killed_leaves_none_behind(tmp_path):
    """Its command ends with it, so that the next run is not beside it."""
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"
    config = written(tmp_path / "a.yaml", {"one": [f'python -c "{code}"']})
    run = f"""
from pathlib import Path
from gentron_train import stages
stages.ROOT = Path({str(tmp_path)!r})
commands = stages.read_stages(Path({str(config)!r}), Path("/a"))
stages.run_stages(commands, stages.ROOT / "out")
"""
    with subprocess.Popen([sys.executable, "-c", run]) as process:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        with pytest.raises(ValueError, match=f"in use by process {process.pid}"):
            stages.run_stages({}, tmp_path / "out")
        process.kill()
    wait_until(lambda: not is_running(int((tmp_path / "pid").read_text())))


def wait_until(is_so):
    for _ in range(300):
        if is_so():
            return
        time.sleep(0.1)
    raise AssertionError("waited for 30 seconds")


def is_running(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_run_that_was_cut_off_before_its_first_note_begins(tmp_path):
    (tmp_path / LOCK_NAME).touch()
    stages.run_stages({}, tmp_path)
    assert json.loads((tmp_path / stages.STATE).read_text()) == {"done": []}


@pytest.mark.parametrize("content", ["{}", "[]", '{"done": [{}]}', '{"done": 5}', "{"])
def test_damaged_stages_are_one_line(content, tmp_path, capsys):
    (tmp_path / stages.STATE).write_text(content)
    assert shipped.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert stages.STATE in error and error.count("\n") == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "score.json").write_text("mine")
    assert shipped.main(["--out", str(tmp_path)]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["score.json"]


def test_a_training_that_was_cut_off_is_resumed(tmp_path, monkeypatch):
    words = ["deepspeed", "train/t2v.py", "--run", str(tmp_path)]
    assert stages.program(words)[-1] == str(tmp_path)
    (checkpoints_folder(tmp_path) / "step-00000005").mkdir(parents=True)
    assert stages.program(words)[-1] == "--resume"
    port = stages.program(words).index("--master_port") + 1  # two trainings share a machine
    assert stages.program(words)[port] != stages.program(words)[port]
    monkeypatch.chdir(tmp_path)  # commands run in the checkout, wherever they are asked for
    monkeypatch.setattr(stages, "ROOT", tmp_path.parent)
    assert stages.program([*words[:-1], tmp_path.name])[-1] == "--resume"
    assert stages.program(["python", "-m", "x"]) == [sys.executable, "-m", "x"]


def test_the_pipeline_has_the_sweeps_choice_and_its_page(
    tiny_pipeline_folder, tmp_path, monkeypatch, capsys
):
    shutil.copytree(tiny_pipeline_folder, tmp_path / "t2v" / "pipeline")
    shares = {"all": 0.5, "shape": 0.6, "motion": 0.7, "broken": 0.1, "psnr": 20.0, "fréchet": 9.0}
    row = {f"{column} {name}": v for column in ("seen", "unseen") for name, v in shares.items()}
    rows = [row | {"lambda_t": 7.5, "lambda_m": 1.2, "rescale": 0, "seen psnr": 10.0}]
    rows.append(row | {"lambda_t": 2, "lambda_m": 1.2, "rescale": 0.5})
    settings = {"prompts": 100, "steps": 8, "solver": "dpm++"}
    settings |= {"lambda_t": 2, "lambda_m": 1.2, "rescale": 0.5}
    write_json(tmp_path / "sweep.json", {"settings": settings, "rows": rows})
    shares = {"all": 0.5, "colour": 1.0, "shape": 0.94, "motion": 0.88}
    fidelity = {"psnr": 25.0, "psnr low": 24.0, "psnr high": 26.0, "broken": 0.02}
    column = {"shares": shares, "counts": dict.fromkeys(shares, 100), "fidelity": fidelity}
    for name in ("score", "fast", "ceiling", "score-16", "fast-16"):
        content = {"settings": settings, "scores": {"seen": column}}
        write_json(tmp_path / f"{name}.json", content)
    done = {"stage": "shards", "command": f"x {tmp_path}/y", "seconds": 7200, "commit": "abc, d"}
    done["machine"] = "2 cores of Abacus"
    second = {"commit": "d, e", "machine": "3 cores of Abacus"}
    write_json(tmp_path / stages.STATE, {"done": [done, done | second]})

    assert shipped.main(["--assemble", "--out", str(tmp_path)]) == 0
    pipeline = tmp_path / "pipeline"
    defaults = GenTronPipeline.from_pretrained(pipeline).defaults
    assert (defaults.lambda_t, defaults.lambda_m, defaults.rescale) == (2, 1.2, 0.5)
    assert defaults.steps == 8  # those of the sweep
    shutil.copytree(pipeline, pipeline / "fast")
    page = shipped.model_page(tmp_path)
    assert "in 8 steps of one branch" in page
    for words in (
        "in 4.0 hours on 2 cores of Abacus, 3 cores of Abacus, at abc, d, e:",
        "x OUT/y    # 120 min",
        "25.00 (24.00–26.00)",
    ):
        assert words in page
    for line in ("chosen: λ_T 2, λ_M 1.2, φ 0.5", "16 by --fast: colour 100 shape 94 motion 88"):
        assert line in page
    assert "| seen, colour | ≥ 99 % | 100.0 % | met |" in page
    assert "| seen, broken | ≤ 1 % | 2.0 % | not met |" in page
    assert "| pairs, all | 85 % | not measured | |" in page

    # What is not made to its end is not shipped; what is goes where it belongs, without our mark.
    places = {name: tmp_path / "ships" / name for name in shipped.SHIPS_AS}
    monkeypatch.setattr(shipped, "SHIPS_AS", places)
    monkeypatch.setattr(shipped, "ASSETS", tmp_path / "ships")
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{shipped.BEGIN}\nold\n{shipped.END}\nafter\n")
    monkeypatch.setattr(shipped, "README", readme)
    assert shipped.main(["--ship", "--out", str(tmp_path)]) == 2
    assert not (tmp_path / "ships").exists()
    for name in places.keys() - {"score.json", "fast.json", "ceiling.json", "sweep.json"}:
        (tmp_path / name).write_text(name)
    (tmp_path / "ships").mkdir()
    (tmp_path / "ships" / "old.json").write_text("old")
    capsys.readouterr()
    assert shipped.main(["--ship", "--out", str(tmp_path)]) == 0
    assert "left         ships/old.json" in capsys.readouterr().out
    assert "| colour | 100.0 (96–100) | - | - | 100.0 / - / - |" in readme.read_text()
    assert readme.read_text().endswith("after\n") and "old" not in readme.read_text()
    shipped_index = (tmp_path / "ships" / "fast" / "model_index.json").read_text()
    assert shipped_index == (pipeline / "model_index.json").read_text()
    assert (tmp_path / "ships" / "MODEL.md").read_text() == "MODEL.md"
    assert not list((tmp_path / "ships").rglob(MARK)) and (pipeline / MARK).exists()


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


def test_the_readme_has_the_figures_of_what_ships():
    results = stages.ROOT / "bench/results"
    score, ceiling = (read_json(results / f"judge-small-{n}.json") for n in ("t2v", "ceiling"))
    assert shipped.readme_table(score, ceiling) in (stages.ROOT / "README.md").read_text()
