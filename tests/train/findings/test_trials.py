"""The trials: their table differs in one thing a run, and the page is its files'."""

from pathlib import Path

import numpy as np
import pytest
from made_up import made_up

from gentron_train import trials
from gentron_train.findings.scoring import read_records, result_name, write_record
from gentron_train.findings.table import read_table
from gentron_train.flops import parameter_count

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def table():
    return read_table(trials.TABLE)


def test_runs_are_as_long_and_of_as_many_parameters(table):
    base = table.runs["base"]
    assert not base.changes
    minutes = {run.settings(table.config).minutes for run in table.runs.values()}
    assert len(minutes) == 1 and None not in minutes
    size = parameter_count(table.model(base))
    for name, run in table.runs.items():
        assert abs(parameter_count(table.model(run)) / size - 1) < 0.05, name
    jobs = [(run.name, seed) for run, seed in table.jobs(pilot=True)]
    first, *others = table.pilot
    assert jobs == [(name, first) for name in table.runs] + [("base", seed) for seed in others]


def test_the_page_tells_differences_and_what_a_seed_does(table, tmp_path):
    records = made_up(table, table.pilot)
    ahead = next(r for r in records if (r["run"], r["seed"]) == ("deeper", table.pilot[0]))
    ahead["scores"]["shape"] = (np.array(ahead["scores"]["shape"]) + 0.2).tolist()
    for record in records:
        if record["run"] != "wider":
            write_record(tmp_path / result_name(record["run"], record["seed"]), record)
    argv = ["--page", "--results", str(tmp_path), "--document", str(tmp_path / "page.md")]
    assert trials.main(argv) == 0
    page = (tmp_path / "page.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| [")]
    rows = {line[3:].split("]")[0]: line.split(" | ") for line in lines}
    assert float(rows["deeper"][5].split(" ± ")[0]) == pytest.approx(20, abs=1)
    assert rows["base"][3] == "" and "wider" not in rows
    assert "1 of 19 runs are not trained yet." in page
    assert "T2I | steps" in page and "Not run yet" not in page
    assert "base with the seeds 1, 2: what was asked for" in page


def test_the_page_here_is_its_files(table):
    records = read_records(ROOT / "bench/results/trials")
    assert (ROOT / "docs/trials.md").read_text() == trials.page(records, table)


def test_results_of_other_settings_are_refused(table, tmp_path, capsys):
    record = made_up(table, table.pilot[:1])[0]
    record["settings"]["lr"] = 5.0
    write_record(tmp_path / result_name(record["run"], record["seed"]), record)
    argv = ["--page", "--results", str(tmp_path), "--document", str(tmp_path / "page.md")]
    assert trials.main(argv) == 2
    assert "was made with lr 5.0, the table says 0.002: move it" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_wrong_input_is_one_line(tmp_path, capsys):
    for argv, words in (
        (["--table", "nowhere.yaml"], "no such configuration"),
        (["--document", "/dev/null/x"], "cannot write into"),
        (["--jobs", "0"], "wanted a whole number"),
    ):
        assert trials.main(argv) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
