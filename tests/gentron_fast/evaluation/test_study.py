"""A study's folder, its server, its votes and its report."""

import csv
import json
import os
import signal
import sqlite3
import sys
import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from studies import PROMPTS, TABLE, call, pictures, served, small_study

from gentron_fast.evaluation.layout import compbench, vbench, write_manifest
from gentron_fast.evaluation.pairs import Prompt, pair_folders, prompts_of, read_prompts
from gentron_fast.evaluation.study import Study, main
from gentron_fast.media import write_media

pytest.importorskip("bottle")


def made(folder, *options):
    """The exit status of `make` of folder/a and folder/b."""
    (folder / "prompts.tsv").write_text(TABLE)
    paths = [str(folder / name) for name in ("a", "b", "prompts.tsv", "study")]
    return main(["make", *paths[:2], "--prompts", paths[2], "--out", paths[3], *options])


def test_names_are_hidden_and_sides_are_drawn_by_seed(tmp_path):
    study = small_study(tmp_path)
    assert [pair.prompt for pair in study.pairs] == PROMPTS
    assert [pair.category for pair in study.pairs] == ["Arts", "Arts", "Animals", "People"]
    assert sum(pair.left for pair in study.pairs) == 2  # A is on the left in half of the pairs
    for pair in study.pairs:
        shades = [Image.open(study.folder / "media" / name).getpixel((0, 0)) for name in pair.media]
        assert shades == [(60,) * 3, (200,) * 3]
    files = os.listdir(study.folder / "media")
    assert len(files) == 8 and not any(prompt in file for prompt in PROMPTS for file in files)
    sides = {}
    for seed in (0, 0, 1, 2, 3):
        assert made(tmp_path, "--seed", str(seed)) == 0
        left = tuple(pair.left for pair in Study.read(tmp_path / "study").pairs)
        assert sides.setdefault(seed, left) == left
    assert len(set(sides.values())) > 1


def test_each_rater_has_an_order_of_their_own(tmp_path):
    study = small_study(tmp_path)
    orders = [tuple(pair.id for pair in study.order(rater)) for rater in ("Ada", "Bo", "Cy", "Ada")]
    assert orders[0] == orders[3] and len(set(orders)) > 1
    assert {frozenset(order) for order in orders} == {frozenset(p.id for p in study.pairs)}


def _wrong_folder(kind, folder):
    a, b = folder / "a", folder / "b"
    pictures(a, 60)
    pictures(b, 200)
    one = b / f"{PROMPTS[1]}_000000.png"
    if kind == "empty":
        for path in b.iterdir():
            path.unlink()
    elif kind == "missing":
        one.unlink()
    elif kind == "cut off":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(one)
        one.write_bytes(one.read_bytes()[:-4000])
    elif kind == "cut off GIF":
        for side in (a, b):
            (side / one.name).unlink()
            noise = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), np.uint8)
            write_media(side / one.with_suffix(".gif").name, noise, 4)
        cut = one.with_suffix(".gif")
        cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 3])
    elif kind == "no picture":
        one.write_text("<html>404</html>")
    elif kind == "a TIFF in a PNG's place":
        Image.new("RGB", (32, 24)).save(one, "TIFF")
    elif kind == "unknown prompt":
        for side in (a, b):
            pictures(side, 0, ["a cat"])
    elif kind in ("clip and picture", "unplayable clip"):
        one.unlink()
        write_media(one.with_suffix(".mp4"), np.zeros((4, 32, 32, 3), np.uint8), 4)
    if kind == "unplayable clip":
        import av

        for side in (a, b):
            (side / one.name).unlink(missing_ok=True)
            with av.open(str(side / one.with_suffix(".mp4").name), "w") as container:
                stream = container.add_stream("mpeg4", rate=4)
                stream.width = stream.height = 32
                frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
                container.mux(stream.encode())


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("empty", "b holds no image and no clip"),
        ("missing", "b has no 'a red circle number 2_000000'"),
        ("cut off", "number 2_000000.png (image file is truncated"),
        ("cut off GIF", "number 2_000000.gif (image file is truncated"),
        ("no picture", "number 2_000000.png (cannot identify image file"),
        ("a TIFF in a PNG's place", "number 2_000000.png (TIFF, which not every browser shows)"),
        ("unknown prompt", "none of the 4 prompts: 'a cat_000000'"),
        ("clip and picture", "a clip and an image are no pair: 'a red circle number 2_000000'"),
        ("unplayable clip", "mpeg4 in yuv420p, which not every browser plays"),
    ],
)
def test_what_cannot_be_judged_is_told_before_anyone_votes(tmp_path, capsys, kind, told):
    _wrong_folder(kind, tmp_path)
    assert made(tmp_path) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "study").exists()


def prompts_named(*texts):
    return [Prompt(text) for text in texts]


@pytest.mark.parametrize(
    "name",
    [
        *("A man. On the moon.", "A man. On the moon", "A man. On the moon._000012"),
        *("A man. On the moon_000012", "A man. On the moon.-3", "a-man-on-the-moon-e8b58480-seed5"),
    ],
)
def test_names_tell_the_prompt(name):
    prompts = prompts_named("A man.", "A man. On the moon.")
    assert prompts_of([name], prompts)[name].text == "A man. On the moon."


@pytest.mark.filterwarnings("ignore:.* has no shape_val.txt")
def test_runs_of_evaluate_are_paired_with_prompts_that_no_file_name_holds(tmp_path):
    prompts = ["a red and/or blue car.", "snake_case on a sign", "a green car"]
    (tmp_path / "color_val.txt").write_text("\n".join(prompts))
    layouts = compbench(tmp_path, images=2), vbench(tmp_path / "color_val.txt")
    for layout, inside in zip(layouts, ("color/samples", "videos"), strict=True):
        for run in ("one", "two"):
            for sample in layout.samples:
                path = tmp_path / run / sample.name
                write_media(path.with_suffix(".png"), np.zeros((1, 8, 8, 3), np.uint8), 4)
            (tmp_path / run / "manifest.json").unlink(missing_ok=True)
            write_manifest(tmp_path / run, layout, {})
        one, two = tmp_path / "one" / inside, tmp_path / "two" / inside
        pairs = pair_folders(one, two, prompts_named(*prompts))
        assert len(pairs) == len(layout.samples)
        by_stem = {Path(sample.name).stem: sample.prompt for sample in layout.samples}
        assert {pair.name: pair.prompt.text for pair in pairs} == by_stem


def test_numbers_are_lines_where_all_are_there():
    prompts = prompts_named("one", "two", "three")
    for first in (0, 1):
        names = [f"{first + index:05}" for index in range(3)]
        found = prompts_of(names, prompts)
        assert [found[name].text for name in names] == ["one", "two", "three"]
    with pytest.raises(ValueError, match="none of the 3 prompts"):
        prompts_of(["00001", "00002"], prompts)  # counted from 0 or from 1?


def test_quotes_are_a_part_of_partiprompts(tmp_path):
    (tmp_path / "p.tsv").write_text(
        'Prompt\tCategory\tChallenge\tNote\n"Text" here\tArts\tBasic\t"\nb\n'
    )
    assert read_prompts(tmp_path / "p.tsv") == [('"Text" here', "Arts", "Basic"), ("b", None, None)]


def test_one_folder_is_no_pair(tmp_path, capsys):
    small_study(tmp_path)
    a = str(tmp_path / "a")
    prompts, out = str(tmp_path / "prompts.tsv"), tmp_path / "other"
    assert main(["make", a, f"{a}/../a", "--prompts", prompts, "--out", str(out)]) == 2
    assert "are one folder" in capsys.readouterr().err and not out.exists()


def test_a_study_with_votes_is_not_made_again(tmp_path, capsys):
    study = small_study(tmp_path)
    study.votes()
    assert made(tmp_path) == 2
    assert "it holds votes.sqlite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v.pop("seed"), "wanted seed, names, pairs"),
        (lambda v: v["pairs"][0].update(left=2), "left of a pair in"),
        (
            lambda v: v["pairs"][0].update(media=["../study.json", "x"]),
            "which media/ does not hold",
        ),
        (lambda v: v["pairs"][0].pop("prompt"), "a pair in"),
    ],
)
def test_a_changed_study_is_refused(tmp_path, capsys, change, told):
    study = small_study(tmp_path)
    values = json.loads((study.folder / "study.json").read_text())
    change(values)
    (study.folder / "study.json").write_text(json.dumps(values))
    assert main(["serve", str(study.folder)]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def vote(pair, rater="Ada", quality="left", text="equal"):
    return {"id": uuid.uuid4().hex, "rater": rater, "pair": pair, "quality": quality, "text": text}


def test_the_server_keeps_each_vote_once(tmp_path):
    study = small_study(tmp_path)
    ids = {pair.id for pair in study.pairs}
    with served(study.folder) as (_, address):
        shown = call(address, "study?rater=Ada")[1]
        assert {pair["id"] for pair in shown["pairs"]} == ids
        assert set(shown["pairs"][0]) == {"id", "prompt", "left", "right"}  # nothing of A and B
        pair, other = (pair["id"] for pair in shown["pairs"][:2])
        first = vote(pair)
        for _ in range(3):
            assert call(address, "vote", first) == (200, {"done": [pair], "last": first["id"]})
        call(address, "vote", vote(pair, quality="right"))  # a second tab: the first vote stands
        assert [v.quality for v in study.votes().standing()] == ["left"]
        call(address, "vote", second := vote(other))
        undo = {"id": second["id"], "rater": "Ada"}
        for _ in range(2):
            assert call(address, "undo", undo)[1] == {"done": [pair], "last": first["id"]}
        assert call(address, "vote", second)[1]["done"] == [pair]  # a late copy: it is taken back
        again = vote(other, quality="right")
        assert call(address, "vote", again)[1]["done"] == [pair, other]
        assert call(address, "undo", {"id": again["id"], "rater": "Ada"})[1]["done"] == [pair]
        assert call(address, "undo", {"id": first["id"], "rater": "Bo"})[1]["done"] == []
        assert call(address, "study?rater=Ada")[1]["done"] == [pair]
        for wrong in (
            vote("nothing"),
            vote(pair, quality="ours"),
            vote(pair, rater=" "),
            vote(pair, rater="x" * 65),
            {**vote(pair), "id": 3},
            [],
        ):
            status, answer = call(address, "vote", wrong)
            assert status == 400 and answer["error"]
        assert (
            call(address, "vote", vote(pair, "Eve"), kind="text/plain")[0] == 400
        )  # another site's
        assert call(address, "media/..%2Fstudy.json")[0] == 404
        assert {v.rater for v in study.votes().standing()} == {"Ada"}


def test_votes_outlive_kill_9_in_the_middle(tmp_path):
    study = small_study(tmp_path)
    answered = []

    def rate(address, rater):
        try:
            while True:
                for pair in study.pairs:
                    sent = vote(pair.id, rater)
                    call(address, "vote", sent)
                    answered.append(sent["id"])
                    if len(answered) % 3:
                        continue
                    call(address, "undo", sent)
                    answered.remove(sent["id"])
                rater += "'"
        except (OSError, ValueError):
            return  # killed

    with served(study.folder) as (process, address):
        raters = [threading.Thread(target=rate, args=(address, name)) for name in "ABCD"]
        for thread in raters:
            thread.start()
        while len(answered) < 40:
            raters[0].join(0.01)
        process.send_signal(signal.SIGKILL)
        for thread in raters:
            thread.join()
    kept = {row.id for row in study.votes().standing()}
    # Of each rater one request was on its way; its answer, not its vote, may be lost.
    assert len(set(answered) - kept) <= 4 and len(kept - set(answered)) <= 4
    with sqlite3.connect(study.folder / "votes.sqlite") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = database.execute("SELECT id FROM votes").fetchall()
    assert set(answered) <= {row[0] for row in rows}


def test_others_need_the_token(tmp_path):
    study = small_study(tmp_path)
    with served(study.folder, "--host", "0.0.0.0") as (_, address):
        address, token = address.split("#")
        assert len(token) >= 16
        media = f"media/{study.pairs[0].media[0]}"
        for path, body in (("study?rater=A", None), (media, None), ("vote", {}), ("undo", {})):
            assert call(address, path, body)[0] == 403
            assert call(address, path, body, token="guess")[0] == 403
        assert call(address, "study?rater=A", token=token)[0] == 200
        # The file that says whose picture is whose is not served, nor are the votes.
        assert call(address, "study.json", token=token)[0] == 404


def test_only_this_machines_names_are_served_without_a_token(tmp_path):
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    study = small_study(tmp_path)
    with served(study.folder) as (_, address):
        port = address.rstrip("/").rpartition(":")[2]
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost"):
            urlopen(Request(f"{address}study?rater=A", headers={"Host": host}), timeout=30)
        with pytest.raises(HTTPError, match="403"):
            headers = {"Host": f"elsewhere.example:{port}"}
            urlopen(Request(f"{address}study?rater=A", headers=headers), timeout=30)
        assert call(address, "undo", {"id": "1", "rater": "\ud800"})[0] == 400


def test_a_report_is_not_written_over_another_file(tmp_path, capsys):
    study = small_study(tmp_path)
    cast(study, ("Ada", 0, "win", "draw"))
    mine = tmp_path / "elsewhere"
    mine.mkdir()
    (mine / "report.txt").write_text("mine")
    arguments = ["report", str(study.folder), "--out"]
    assert main([*arguments, str(mine)]) == 2
    assert "holds report.txt of no study" in capsys.readouterr().err
    assert (mine / "report.txt").read_text() == "mine"
    for _ in range(2):  # its own is made anew
        assert main([*arguments, str(tmp_path)]) == 0


@pytest.mark.parametrize("token", ["", "short", "with space"])
def test_a_token_too_easy_is_refused(tmp_path, capsys, token):
    study = small_study(tmp_path)
    assert main(["serve", str(study.folder), "--host", "0.0.0.0", "--token", token]) == 2
    assert "wanted 8 or more letters" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told(tmp_path, capsys):
    study = small_study(tmp_path)
    with served(study.folder) as (_, address):
        port = address.rstrip("/").rpartition(":")[2]
        assert main(["serve", str(study.folder), "--port", port]) == 2
    assert (
        f"cannot serve on 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err
    )


def cast(study, *answers):
    """Votes (rater, prompt number, quality for A, text for A), each win, draw or lose."""
    votes = study.votes()
    for rater, number, *said in answers:
        pair = study.pairs[number]
        sides = {
            "win": ("left", "right")[pair.left],
            "draw": "equal",
            "lose": ("right", "left")[pair.left],
        }
        votes.add(uuid.uuid4().hex, rater, pair.id, *(sides[word] for word in said))
    return votes.standing()


def test_report(tmp_path, capsys):
    study = small_study(tmp_path)
    cast(
        study,
        ("Ada", 0, "win", "draw"),
        ("Ada", 1, "win", "draw"),
        ("Ada", 2, "win", "lose"),
        ("Ada", 3, "lose", "win"),
        ("Bo", 0, "win", "draw"),
        ("Bo", 1, "draw", "win"),
        ("Bo", 2, "lose", "lose"),
    )
    assert main(["report", str(study.folder)]) == 0
    values = json.loads((study.folder / "report.json").read_text())
    assert (values["votes"], values["prompts"], values["raters"]) == (7, 4, {"Ada": 4, "Bo": 3})
    shares = [values["quality"][name]["votes"] for name in ("win", "draw", "lose")]
    assert shares == [4, 1, 2]
    assert values["quality"]["win"]["wilson"] == pytest.approx([0.2505, 0.8418], abs=1e-4)
    # Prompts 0 and 1 won, 2 even, 3 lost.
    assert values["quality"]["sign_test"] == {
        "prompts_won": 2,
        "prompts_lost": 1,
        "prompts_even": 1,
        "p": 1.0,
    }
    # Nominal, by hand: pairs win–win, win–draw, win–lose; n = 6 values, 4 win, 1 draw, 1 lose.
    # Observed disagreement 4 / 6, expected (4·1 + 4·1 + 1·1)·2 / (6·5) = 0.6.
    assert values["agreement"]["quality"]["alpha_nominal"] == pytest.approx(1 - (4 / 6) / 0.6)
    assert values["by_category"]["Arts"]["votes"] == 4
    assert values["by_category"]["Arts"]["quality"]["win"]["share"] == 0.75
    assert values["by_challenge"]["Complex"]["text"]["win"]["share"] == 1
    assert values["paper"]["quality"] == [0.511, 0.198, 0.291]
    text = (study.folder / "report.txt").read_text()
    assert "57.1" in text and "51.1" in text and max(map(len, text.splitlines())) <= 100
    assert text in capsys.readouterr().out
    assert Image.open(study.folder / "report.png").size[0] > 600
    with (study.folder / "votes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["quality_a"] for row in rows] == [
        "win",
        "win",
        "win",
        "lose",
        "win",
        "draw",
        "lose",
    ]
    for row in rows:
        if row["quality_a"] != "draw":
            chosen = row[row["quality_seen"]]
            assert chosen == ("ours $_$" if row["quality_a"] == "win" else "theirs")


def test_report_while_no_one_has_voted(tmp_path, capsys):
    study = small_study(tmp_path)
    assert main(["report", str(study.folder)]) == 2
    study.votes()
    assert main(["report", str(study.folder)]) == 2
    assert capsys.readouterr().err.count("no votes yet") == 2
    assert not (study.folder / "report.json").exists()


def test_report_without_matplotlib(tmp_path, capsys, monkeypatch):
    study = small_study(tmp_path)
    cast(study, ("Ada", 0, "win", "draw"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(study.folder), "--out", str(tmp_path / "out")]) == 0
    assert "no picture: matplotlib" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == ["report.json", "report.txt", "votes.csv"]
    assert "not defined" in (tmp_path / "out/report.txt").read_text()


def test_a_file_of_votes_that_is_none(tmp_path, capsys):
    study = small_study(tmp_path)
    (study.folder / "votes.sqlite").write_text("no database, but long enough to be looked at" * 9)
    assert main(["serve", str(study.folder)]) == 2
    assert "cannot use the votes in" in capsys.readouterr().err
