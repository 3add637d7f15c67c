"""The table of runs: what is trained, and which tables are refused."""

import dataclasses

import pytest
import yaml

from gentron_train.findings import __main__ as command
from gentron_train.findings.jobs import missing_jobs, trained_folder, training
from gentron_train.findings.scoring import result_name
from gentron_train.findings.table import SETTINGS, TABLE, read_table
from gentron_train.flops import parameter_count


def written(tmp_path, **changes):
    """The table with other fields, beside the settings."""
    (tmp_path / SETTINGS.name).write_text(SETTINGS.read_text())
    path = tmp_path / "runs.yaml"
    values = yaml.safe_load(TABLE.read_text())
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path


def test_compared_runs_differ_in_what_is_compared():
    table = read_table()
    models = {name: table.model(run) for name, run in table.runs.items()}
    sizes = {name: parameter_count(model) for name, model in models.items()}
    assert not models["adaln"].cross_attention and models["clip"].cross_attention
    assert abs(sizes["adaln"] / sizes["clip"] - 1) < 0.03
    assert [models[name].encoders for name in ("clip", "t5", "both")] == [
        *(("clip",), ("t5",), ("clip", "t5"))
    ]
    scaled = [models[name] for name in ("smaller", "both", "larger")]
    for name in ("depth", "width"):
        values = [getattr(model, name) for model in scaled]
        assert values == sorted(set(values))
    assert len({model.mlp_ratio for model in scaled}) == 1  # the MLP grows with the width
    for name, run in table.runs.items():
        changes = set(run.changes) - {"model"}
        assert changes <= {"p_image", "p_motion_free"} or name == "both-on", name
        assert models[name].temporal == (run.stage == "t2v")
    settings = {name: run.settings(table.config) for name, run in table.runs.items()}
    assert len({(one.steps, one.lr) for one in settings.values()}) == 2
    # T2I is trained on as T2V is, with as many images as that has frames.
    on, clips = settings["both-on"], settings["t2v-clips"]
    for name in ("steps", "lr", "decay_ratio", "max_loss_weight", "timestep_range_portion"):
        assert getattr(on, name) == getattr(clips, name), name
    for name in ("min_timestep", "max_timestep"):
        assert getattr(on, name) == getattr(clips, name), name
    assert on.batch * on.draws == clips.batch * clips.frames


def test_the_pilots_seeds_are_left_out():
    table = read_table()
    pilot, jobs = table.jobs(pilot=True), table.jobs(pilot=False)
    assert not {seed for _, seed in pilot} & {seed for _, seed in jobs}
    assert len(table.seeds) >= 3
    assert [run.name for run, seed in pilot if seed == table.pilot[0]] == list(table.runs)
    assert [run.name for run, seed in pilot if seed != table.pilot[0]] == list(table.again)
    assert table.scales(table.runs["both"]) == [None]
    assert table.sweep_run == "t2v-both"
    swept = table.lambda_m["t2v-both"]
    assert set(table.scales(table.runs["t2v-both"])) == {None, *swept} - {1.0}
    assert table.scales(table.runs["t2v-motion-free"]) == [None, 1.3]


RUN = {"stage": "t2i", "model": "depth=1 width=16"}
ON = {"stage": "t2i", "from": "a"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": []}, "seeds of {} is [], wanted a list of"),
        ({"seeds": [1, 1]}, "a seed is there twice"),
        ({"seeds": [0]}, "or in the pilot too"),
        ({"prompts": 0}, "prompts of {} is 0, wanted a whole number from 1"),
        ({"lambda_m": {"both": 1}}, "both of {} is 1, wanted a list of"),
        ({"seeds": None}, "seeds of {} is None"),
        ({"again": ["nobody"]}, "again and lambda_m name nobody, no run"),
        ({"more": 1}, "must hold seeds, pilot, again"),
        ({"runs": {"A b": RUN}}, "a run is named 'A b', wanted small letters"),
        ({"runs": {"a": {"stage": "t3i"}}}, "run a is {'stage': 't3i'}, wanted a stage"),
        ({"runs": {"a": RUN | {"seed": 5}}}, "run a sets seed, which are not a run's own"),
        ({"runs": {"a": RUN | {"model": "depth=0"}}}, "run a: --model depth=0: depth is 0"),
        ({"runs": {"a": RUN | {"model": "depth"}}}, "run a: --model takes NAME=VALUE"),
        ({"runs": {"a": RUN | {"bach": 5}}}, "unknown field bach in a"),
        ({"runs": {"a": {"stage": "t2v"}}}, "run a: T2V starts `from` a run"),
        ({"runs": {"a": {"stage": "t2v", "from": "b"}}}, "starts from b, no T2I run from nothing"),
        (
            {"runs": {"a": RUN, "b": ON, "c": {"stage": "t2v", "from": "b"}}},
            "run c starts from b, no T2I run from nothing above it",
        ),
        ({"runs": {"a": RUN, "b": ON | RUN}}, "run b has the model of a, and `model`"),
    ],
    ids=str,
)
def test_wrong_tables_are_one_line(changes, message, tmp_path, capsys):
    if "runs" in changes:
        changes = {"again": [], "lambda_m": {next(iter(changes["runs"])): [1]}} | changes
    path = written(tmp_path, **changes)
    assert command.main(["--plan", "--table", str(path)]) == 2
    error = capsys.readouterr().err
    assert message.replace("{}", str(path), 1 if " of {}" in message else 0) in error
    assert error.count("\n") == 1


def test_what_is_missing_comes_behind_what_it_starts_from(tmp_path):
    table = read_table()
    jobs = [job for job in table.jobs(pilot=False) if job[1] == 1]

    def names(out=tmp_path / "out"):
        return [run.name for run, _ in missing_jobs(jobs, table, out, tmp_path)]

    assert names() == list(table.runs)
    for name, run in table.runs.items():
        for scale in table.scales(run):
            (tmp_path / result_name(name, 1, scale)).write_text("{}")
    assert names() == []
    (tmp_path / "t2v-both-seed1-lambda3.json").unlink()
    assert names() == ["both", "t2v-both"]
    trained_folder(tmp_path / "out", "both", 1).joinpath("pipeline").mkdir(parents=True)
    assert names() == ["t2v-both"]


def test_the_commands_of_a_run(tmp_path):
    table = read_table()
    run = dataclasses.replace(table.runs["t2v-both"], changes={"p_image": 0.2, "in_memory": False})
    words = training(run, 3, table, tmp_path)
    assert words[:4] == [
        *("deepspeed", "train/t2v.py", "--config", "train/configs/findings/settings.yaml")
    ]
    assert words[-3:] == ["--p-image", "0.2", "--no-in-memory"]
    assert words[words.index("--init") + 1] == str(tmp_path / "both-seed3" / "train" / "pipeline")
    assert words[words.index("--run") + 1] == str(tmp_path / "t2v-both-seed3" / "train")


def test_the_plan_needs_no_training(capsys, tmp_path):
    assert command.main(["--plan", "--results", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "33 runs" in told and "before a pilot" in told and "t2v-motion-free" in told
