"""The whole of `make findings` in miniature: two runs of two steps, scored, and their page."""

import signal
import subprocess
import sys
import time

import pytest
import yaml

from gentron_fast import cores
from gentron_train.findings import __main__ as command
from gentron_train.findings import jobs
from gentron_train.findings.scoring import read_records
from gentron_train.findings.table import SETTINGS, TABLE, read_table

TINY = {"batch": 2, "draws": 1, "frames": 3, "warmup": 1, "dtype": "fp32", "windows_per_clip": 1}
TINY |= {"log_every": 1, "steps": 2}
RUNS = {
    "clip": {"stage": "t2i", "model": "depth=1 width=16 heads=2 encoders=clip"},
    "t2v-both": {"stage": "t2v", "from": "clip", "p_image": 0.2},
}


def test_two_steps_of_everything(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cores, "CORES", tmp_path / "cores")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = yaml.safe_load(SETTINGS.read_text())
    for stage in ("t2i", "t2v"):
        settings[stage] |= TINY
    (tmp_path / SETTINGS.name).write_text(yaml.safe_dump(settings))
    table = {"seeds": [1], "pilot": [0], "again": [], "images": 8, "clips": 4, "prompts": 1}
    table |= {"lambda_m": {"t2v-both": [1.0, 2.0]}, "runs": RUNS}
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    argv = ["--table", str(tmp_path / "runs.yaml"), "--out", str(tmp_path / "out")]
    argv += ["--results", str(tmp_path / "results"), "--document", str(tmp_path / "page.md")]

    assert command.main(argv) == 0, capfd.readouterr().err[-3000:]
    image, guided, clip = read_records(tmp_path / "results")
    assert (guided["lambda_m"], guided["sampling"]["lambda_m"]) == (2.0, 2.0)
    assert image["made_of"]["shards"]["images"] == 8 and image["made_of"]["vae"]
    assert clip["made_of"]["start_model"] == image["made_of"]["model"] != clip["made_of"]["model"]
    assert "start_model" not in image["made_of"]
    assert (image["run"], image["steps"], len(image["curve"])) == ("clip", 2, 2)
    assert image["start"] < 1e-5 and clip["start"] is None
    assert clip["model"]["temporal"] and clip["settings"]["p_image"] == 0.2
    assert len(image["scores"]["psnr"]) == len(clip["scores"]["frame psnr"]) == 3
    page = (tmp_path / "page.md").read_text()
    assert "was trained more than once" not in page
    assert "are equal to the bit" in page and "t2v-both-seed1.json" in page

    # What is there is neither trained nor scored again.
    capfd.readouterr()
    assert command.main(argv) == 0
    assert capfd.readouterr().out == f"wrote        {tmp_path / 'page.md'}\n"
    assert (tmp_path / "page.md").read_text() == page


def test_who_waits_for_the_cores_gets_them_next(tmp_path, capsys):
    path, order = tmp_path / "cores", tmp_path / "order"
    code = (
        "import sys, time; from pathlib import Path; from gentron_fast.cores import all_cores\n"
        f"with all_cores(Path({str(path)!r})):\n"
        f"    print('mine', flush=True); time.sleep(1); open({str(order)!r}, 'a').write('1')"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "mine\n"
    start = time.monotonic()
    with cores.all_cores(path):
        assert order.read_text() == "1" and time.monotonic() - start > 0.5
    assert "waiting       for the cores" in capsys.readouterr().out
    assert other.wait() == 0


@pytest.fixture
def two_runs(tmp_path, monkeypatch):
    """What trains two runs side by side, each a process of the code that is given."""

    def train(code: str, runs: int = 2) -> None:
        monkeypatch.setattr(jobs, "program", lambda words: [sys.executable, "-c", code])
        monkeypatch.setattr(cores, "CORES", tmp_path / "cores")
        table, place = read_table(), jobs.Place(TABLE, *[tmp_path] * 3, "cpu")
        left = [(table.runs["clip"], 1), (table.runs["clip"], 2)][:runs]
        jobs._train_side_by_side(left, 2, 2, place, lambda: None)
        assert not left

    return train


def test_how_many_runs_share_the_cores(monkeypatch):
    for cores_here, on_cpu, on_gpu in ((16, 16, 8), (1, 1, 1)):
        monkeypatch.setattr(jobs, "available_cores", lambda count=cores_here: count)
        assert (jobs.default_at_once(True), jobs.default_at_once(False)) == (on_cpu, on_gpu)


def test_the_next_run_begins_when_one_ends_and_none_while_another_waits(
    tmp_path, monkeypatch, capsys
):
    """Four runs, two at a time, of which the second ends once the fourth has begun."""
    monkeypatch.setattr(cores, "CORES", tmp_path / "cores")
    monkeypatch.setattr(jobs, "POLL", 0.05)
    waits = f"""
import sys, time
from pathlib import Path
last = Path({str(tmp_path / "last")!r})
if sys.argv[1] == "4":
    last.touch()
for _ in range(200 if sys.argv[1] == "2" else 0):
    if last.exists():
        sys.exit()
    time.sleep(0.1)
sys.exit(sys.argv[1] == "2")
"""
    monkeypatch.setattr(
        jobs,
        "program",
        lambda words: [sys.executable, "-c", waits, words[words.index("--seed") + 1]],
    )
    table, place = read_table(), jobs.Place(TABLE, *[tmp_path] * 3, "cpu")
    left = [(table.runs["clip"], seed) for seed in range(1, 5)]
    jobs._train_side_by_side(left, 4, 2, place, lambda: None)
    assert not left
    assert "run          4 of 4: clip, seed 4" in capsys.readouterr().out

    left = [(table.runs["clip"], 1)]
    code = (
        "from pathlib import Path; from gentron_fast.cores import all_cores\n"
        f"with all_cores(Path({str(tmp_path / 'cores')!r})): pass"
    )
    with cores.all_cores():
        assert not cores.is_waited_for()
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            while not cores.is_waited_for():
                time.sleep(0.05)
            jobs._train_side_by_side(left, 1, 2, place, lambda: None)
            assert len(left) == 1  # not begun
            other.kill()
        assert not cores.is_waited_for()


def test_a_run_that_fails_is_told_with_what_it_said(two_runs, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"clip-seed[12].txt ends with: no luck$"):
        two_runs("import sys; print('no luck'); sys.exit(2)")
    out = capsys.readouterr().out
    assert out.count("failed       ") == 2 and "run          2 of 2: clip, seed 2" in out
    threads = "import os; assert os.environ['OMP_NUM_THREADS'] == '1'"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "available_cores", lambda: 2)
        patch.delenv("OMP_NUM_THREADS", raising=False)
        two_runs(threads)
        two_runs(threads, runs=1)  # one that is left over has no more than its share


def test_no_run_outlives_the_command(two_runs, tmp_path, monkeypatch):
    ended = []

    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.time, "sleep", stop)
    end = jobs._end
    monkeypatch.setattr(jobs, "_end", lambda process: (end(process), ended.append(process)))
    with pytest.raises(KeyboardInterrupt):
        two_runs("import time; time.sleep(60)")
    assert [process.returncode for process in ended] == [-signal.SIGTERM] * 2


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--pilot", "--plan"], "not allowed with argument"),
        (["--one", "nobody"], "--one takes a run of adaln, clip"),
        (["--one", "clip"], "and --seed"),
        (["--jobs", "0"], "wanted a whole number"),
        (["--table", "nowhere.yaml"], "no such configuration"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--document", "/dev/null/x"], "cannot write into"),
        (["--seed", "1"], "--seed is of --sheet alone"),
        (["--sheet", "--out", "nowhere"], "of seed 1 are not trained here: no "),
    ],
    ids=str,
)
def test_wrong_input_is_one_line(argv, message, capsys):
    assert command.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
