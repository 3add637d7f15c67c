"""The page of the findings: verdicts of made-up results, and that the page here is its files'."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up import PROMPTS, made_up
from PIL import Image

from gentron_train.findings import claims, page, pictures, scoring
from gentron_train.findings.claims import (
    FAILS,
    HOLDS,
    OPEN,
    beside,
    findings,
    sentence,
    verdict,
    verdicts_of,
)
from gentron_train.findings.paired import Interval
from gentron_train.findings.scoring import (
    MEASURES,
    read_records,
    result_name,
    write_record,
)
from gentron_train.findings.table import read_table
from gentron_train.small_world.picture import LINE
from gentron_train.small_world.renderer import DIRECTIONS, FPS, make_scene, render_clip

ROOT = Path(__file__).parents[3]
FIRST = "first training"


@pytest.fixture(scope="module")
def table():
    return read_table()


@pytest.fixture(scope="module")
def records(table):
    return made_up(table, (*table.seeds, table.pilot[0]))


def test_the_page_is_what_its_files_say(table):
    records = read_records(ROOT / "bench/results/findings")
    page.check_records(records, table)
    text = (ROOT / "docs/findings.md").read_text()
    wanted = page.page(records, table, ROOT / "docs/findings.md", ROOT / "bench/results/findings")
    assert text == wanted, "python -m gentron_train.findings --page"
    for name in re.findall(r"!\[.*\]\((.*finding-.*)\)", text):
        with Image.open(ROOT / "docs" / name) as picture:
            made_of = picture.info[pictures.MADE_OF]
        number = int(re.search(r"\d+", name)[0])
        assert made_of == pictures.digest(number, page.counted(records, table), table), name
    sheet = pictures.sheet_models(ROOT / "docs/findings/clips.png")
    digests = {r["run"]: r["made_of"] for r in records if r["seed"] == sheet["seed"]}
    for run, model in sheet["models"].items():
        known, start = digests[run].get("model", FIRST), table.runs[run].start
        assert known in (model, FIRST), run  # of the first trainings no digest was kept
        if start is not None:
            assert digests[run]["start_model"] in (sheet["models"][start], FIRST), run


def test_what_holds_what_fails_and_what_cannot_be_told(table, records):
    (comparison,) = findings(table)[0].comparisons
    names = comparison.measures + comparison.others
    said = {name: verdict(comparison, name, records, table.seeds) for name in names}
    assert said["alignment"].says == HOLDS and said["psnr"].says == FAILS
    assert said["broken"].says == said["colour"].says == OPEN
    assert said["alignment"].difference.mean == pytest.approx(30, abs=1)  # per cent
    assert said["psnr"].means == pytest.approx((21, 24), abs=0.1)
    assert len(said["psnr"].by_seed) == len(table.seeds)
    assert sum(said["psnr"].by_seed) / len(table.seeds) == pytest.approx(
        said["psnr"].difference.mean
    )
    text = sentence(list(said.values()))
    start = "In part it holds: cross-attention ahead of adaLN-zero (what was asked for +"
    assert text.startswith(start) and " points); it fails" in text
    opposite = "it fails, the opposite is seen: adaLN-zero ahead of cross-attention"
    assert re.search(rf"{opposite} \(PSNR \+\d\.\d\d dB\)\.$", text)
    assert "colour" not in text  # the paper's sentence is of what was asked for and how it looks
    open_ = replace(said["colour"], comparison=replace(comparison, measures=("colour",)))
    told = "It cannot be told: cross-attention ahead of adaLN-zero."
    assert sentence([open_]) == told


def test_less_loss_is_better_and_an_image_is_its_own_frame(table, records):
    by_title = {finding.title: finding.comparisons for finding in findings(table)}
    size = [verdict(c, "loss", records, table.seeds) for c in by_title["Size"]]
    assert [one.says for one in size] == [HOLDS, HOLDS]
    assert all(one.difference.high < 0 for one in size)
    harm = by_title["Clips, images and motion-free samples"][0]
    assert verdict(harm, "frame psnr", records, table.seeds).says == HOLDS


def test_a_sentence_names_a_side_once(table, records):
    comparisons = findings(table)[3].comparisons
    said = [verdict(c, name, records, table.seeds) for c in comparisons for name in c.measures]
    wanted = [HOLDS, FAILS, HOLDS, HOLDS, *[OPEN] * 8]
    said = [replace(one, says=says) for one, says in zip(said, wanted, strict=True)]
    asked, psnr = "what was asked for in one frame", "PSNR of one frame"
    assert re.fullmatch(
        rf"In part it holds: T2I not trained longer \({asked} .+ points\) and T2I trained longer "
        rf"\({asked} .+ points, {psnr} .+ dB\) ahead of clips alone; it fails, the opposite is "
        rf"seen: clips alone ahead of T2I not trained longer \({psnr} .+ dB\); it cannot be told: "
        r"clips \+ images, clips \+ motion-free, clips \+ motion-free at λ_M 1.3 or all three "
        r"ahead of clips alone\.",
        sentence(said),
    )


def test_motion_and_steadiness_are_told_besides(table, records):
    steadier = {"place jitter": [0.1] * PROMPTS}
    changed = [
        record | {"scores": record["scores"] | steadier} if record["run"] == "t2v-both" else record
        for record in records
    ]
    text = beside(verdicts_of(findings(table)[3], changed, table))
    assert text == (
        "Besides, of motion, jitter of place, jitter of size and jitter of colour: all three ahead "
        "of clips alone (jitter of place -0.40 px); the rest cannot be told."
    )
    assert beside(verdicts_of(findings(table)[0], records, table)) == ""


def test_one_seed_and_no_results_are_not_measured(table, records):
    (comparison,) = findings(table)[0].comparisons
    one = [record for record in records if record["seed"] in table.seeds[:1]]
    assert verdict(comparison, "psnr", one, table.seeds) is None
    assert sentence([None, None]) == "Not measured yet."
    some = [verdict(comparison, "psnr", records, table.seeds), None]
    assert sentence(some).endswith("; the rest is not measured yet.")


def test_a_scale_of_guidance_is_held_against_the_mean_of_the_best(table, records):
    changed = [
        record
        if record["lambda_m"] != 3
        else record | {"scores": record["scores"] | {"psnr": [10.0] * PROMPTS}}
        for record in records
    ]
    finding = findings(table)[4]
    assert [c.behind.scales for c in finding.comparisons] == [(0.0,), (0.5,), (2.0,), (3.0,)]
    assert finding.comparisons[0].ahead.scales == (None, 1.3)
    says = [verdict(c, "psnr", changed, table.seeds).says for c in finding.comparisons]
    assert says == [OPEN, OPEN, OPEN, HOLDS]


def test_the_whole_page_and_its_pictures(table, records, tmp_path):
    text = page.page(records, table, tmp_path / "a.md", tmp_path / "results")
    assert "Not measured" not in text and "Not run" not in text
    assert "are equal to the bit" in text
    assert "| 5.3 of images, 24.0 of clips | from both; p_motion_free: 0.2 p_image: 0.2 |" in text
    assert "Depth grows 2 and 1.5 times, width, and with it the MLP, 1.45 and 1.38 times." in text
    assert "†" not in text
    noted = records[0] | {"made_of": records[0]["made_of"] | {"note": "told"}}
    text_of_note = page.page([noted, *records[1:]], table, tmp_path / "a.md", tmp_path)
    assert "| cpu† | cpu | cpu |" in text_of_note and text_of_note.endswith("\n† told.\n")
    assert "From λ_M 0 to 3 the way goes from 12.0 to 9.0 px" in text and "| 1.3 | 10.7 |" in text
    for seed in table.seeds:
        assert f"(results/{result_name('t2v-both', seed, 0.5)})" in text
    own = page.counted(records, table)
    drawn = pictures.draw(own, table, tmp_path / "findings")
    named = re.findall(r"!\[.*\]\(findings/(.*)\)", text)
    assert [path.name for path in drawn] == named == [f"finding-{n}.png" for n in range(1, 7)]
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_comparisons_across_different_trainings_of_the_start_are_told(table, records, tmp_path):
    seed = table.seeds[1]
    digests = {"both": {"model": "a"}, "both-on": {"start_model": "a"}, "t2v-both": {}}
    digests |= {"t2v-clips": {"start_model": "b"}, "t2v-images": {"start_model": "b"}}
    changed = [
        record | {"made_of": digests[record["run"]]}
        if record["seed"] == seed and record["run"] in digests
        else record
        for record in records
    ]
    text = page.page(changed, table, tmp_path / "a.md", tmp_path / "results")
    (told,) = re.findall(r"^T2I was trained more than once .*$", text, re.MULTILINE)
    # Of t2v-both, whose result names none, nothing is said.
    assert told.partition(": ")[2] == (
        f"T2I not trained longer ahead of clips alone (seed {seed}); T2I trained longer ahead of "
        f"clips alone (seed {seed}); T2I trained longer ahead of clips + images (seed {seed})."
    )
    assert text.index("## 4.") < text.index(told) < text.index("## 5.")
    plain = page.page(records, table, tmp_path / "a.md", tmp_path / "results")
    assert "was trained more than once" not in plain


def test_the_sheet_has_a_row_for_each_run_of_clips_and_its_scales(table, records, tmp_path):
    sampled = []

    def sample(run, scale):
        sampled.append((run, scale))
        frames = 8 if table.runs[run].stage == "t2v" else 1
        return np.full((6, frames, 64, 64, 3), 7 * len(sampled), np.uint8)

    (tmp_path / "findings").mkdir()
    models = dict.fromkeys(("both", "t2v-clips"), "a1")
    pictures.draw_sheet(table, 1, sample, models, tmp_path / "findings" / "clips.png")
    assert pictures.sheet_models(tmp_path / "findings" / "clips.png")["models"] == models
    assert sampled[:2] == [("both", 1), ("both-on", 1)]
    assert sampled[2:4] == [("t2v-clips", 1), ("t2v-images", 1)]
    assert sampled[4:6] == [("t2v-motion-free", 1), ("t2v-motion-free", 1.3)]
    assert [scale for run, scale in sampled if run == "t2v-both"] == [0, 0.5, 1, 1.3, 2, 3]
    picture = np.asarray(Image.open(tmp_path / "findings" / "clips.png"))
    assert len(sampled) == 12 and len(picture) == 12 * (64 + LINE)
    assert picture[5 * (64 + LINE) + LINE + 32, 5, 0] == 7 * 6
    with pytest.raises(ValueError, match="the table lacks both, both-on, clip, larger"):
        pictures.sheet_rows(replace(table, runs={"adaln": table.runs["adaln"]}))
    text = page.page(records, table, tmp_path / "a.md", tmp_path / "results")
    assert "Of seed 1, each row with its model's digest. First" in text
    scored = [r | {"made_of": {"model": {"both": "b2"}.get(r["run"], "a1")}} for r in records]
    text = page.page(scored, table, tmp_path / "a.md", tmp_path / "results")
    assert " Of both the tables score another training. " in text
    assert "(findings/clips.png)" in text and scoring.prompts_of(2)[0][-1] in text


def test_loss_for_as_many_flops(table, records):
    """The smaller run ends where the middle one is at half of its steps."""
    curves = {
        "smaller": (1, [[10, 3.0], [18, 0.5], [20, 0.5]]),
        "both": (2, [[5, 4.0], [9, 0.7], [10, 0.7], [20, 0.1]]),
    }
    for record in (records := [dict(record) for record in records]):
        if record["run"] in curves:
            record["flops"], record["curve"] = curves[record["run"]]
            record["flops"] *= 10**12
    text = page.page(records, table, Path("a.md"), Path("results"))
    wanted = (
        "For as many FLOPs, 20 TFLOP, the loss of the middle model is 0.7000, that of the smaller "
        "model 0.5000; but"
    )
    assert wanted in text


def test_the_pilot_tells_hours_and_the_smallest_difference(table, records):
    slower = [record | {"seed": table.pilot[1], "train_seconds": 900} for record in records]
    slower = [record for record in slower if record["run"] == "clip"][:1]
    hours = page.estimate([*slower, *records], table)
    scorings = sum(len(table.scales(run)) for run in table.runs.values())
    once = (len(table.runs) * 600 + scorings * 60) / 3600
    assert hours.hours == pytest.approx(once * len(table.seeds))  # by the faster one
    assert hours.pilot_hours == pytest.approx(once + (900 + 60) / 3600)
    (comparison,) = findings(table)[0].comparisons
    least, has_spread = claims.smallest(comparison, "psnr", records, table)
    assert not has_spread and 0 < least < 0.1
    again = [r for r in made_up(table, table.pilot[1:]) if r["run"] in table.again]
    for record, more in zip(again, (1.0, -1.0, 1.0, -1.0), strict=True):
        record["scores"]["psnr"] = [value + more for value in record["scores"]["psnr"]]
    wider, has_spread = claims.smallest(comparison, "psnr", [*records, *again], table)
    assert has_spread and wider > 2.8
    text = page.page([*records, *again[:2]], table, Path("a.md"), Path("results"))
    assert f"{again[0]['run']} and {again[1]['run']}, from 2 degrees of freedom" in text
    assert claims.smallest(comparison, "psnr", [], table) is None
    size = findings(table)[2].comparisons[0]
    assert claims.smallest(size, "loss", records, table) is None  # one figure, one seed


def test_results_are_read_as_they_were_written(records, tmp_path):
    for record in records:
        name = result_name(record["run"], record["seed"], record["lambda_m"])
        write_record(tmp_path / name, record)
    read = read_records(tmp_path)
    assert sorted(read, key=str) == sorted(records, key=str)
    one = next(tmp_path.iterdir())
    shutil.copy(one, tmp_path / "other-seed1.json")
    with pytest.raises(ValueError, match=r"other-seed1\.json holds run"):
        read_records(tmp_path)
    (tmp_path / "other-seed1.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other-seed1\.json lacks"):
        read_records(tmp_path)


def test_results_of_other_settings_are_refused(table, records):
    page.check_records(records, table)
    settings = records[0]["settings"] | {"steps": 3}
    with pytest.raises(ValueError, match=r"made with steps 3, the table says"):
        page.check_records([records[0] | {"settings": settings}], table)
    with pytest.raises(ValueError, match="is of no run of the table"):
        page.check_records([records[0] | {"run": "other"}], table)
    fewer = {"psnr": records[0]["scores"]["psnr"][:5]}
    with pytest.raises(ValueError, match=r"on 5 prompts, here it is .* on 300: move it"):
        page.check_records([records[0] | {"scores": fewer}], table)
    for other, words in (
        ({"device": "cuda:0"}, "another device are no pairs"),
        ({"made_of": {"vae": "abc"}}, "another autoencoder are no pairs"),
        ({"made_of": {"shards": {"seed": 1}}}, "another folder of shards are no pairs"),
        ({"made_of": {"text_encoder_2": "abc"}}, "another T5 are no pairs"),
    ):
        with pytest.raises(ValueError, match=words):
            page.check_records([records[0] | other, *records[1:]], table)


def test_the_worlds_own_way_is_what_its_clips_move(table):
    few = replace(table, prompts=4)
    moving = [scene for scene in scoring.prompts_of(4)[1] if scene.motion in DIRECTIONS]
    clips = [render_clip(scene, every=FPS // 4)[:8] for scene in moving]
    ways = [scoring.score_clip(*pair)["travel"] for pair in zip(clips, moving, strict=True)]
    assert claims.own_way(few) == pytest.approx(np.mean(ways), rel=0.1)
    assert claims.own_way(table) == pytest.approx(20.7, abs=0.05)


def test_an_axis_is_logarithmic_where_one_interval_reaches_far():
    from matplotlib.figure import Figure

    for last, scale in ((13.0, "symlog"), (5.0, "linear")):
        axis = Figure().subplots()
        pictures._spread_out(axis, [Interval(0.5, 0.1, 1.7), Interval(last / 2, 0.7, last)])
        assert axis.get_xscale() == scale
    assert pictures._rounded_up(1.73) == 2 and pictures._rounded_up(0.02) == 0.02


def test_scores_of_a_clip_and_of_its_frame():
    texts = scoring.prompts_of(2)[0]
    assert len(texts) == 6 and scoring.prompts_of(2)[0] == texts
    scene = make_scene(np.random.default_rng(0), "circle", "red", "left")
    clip = render_clip(scene, every=FPS // 4)[:8]
    figures = scoring.score_clip(clip, scene)
    assert figures["alignment"] == figures["motion"] == figures["frame alignment"] == 1
    assert figures["psnr"] > 30 and figures["travel"] > 14 and figures["broken"] == 0
    assert figures.keys() <= MEASURES.keys() | {"all"}
    image = scoring.score_clip(clip[:1], scene)
    assert "motion" not in image and "frame psnr" not in image
    blue = replace(scene, objects=(replace(scene.objects[0], colour="blue"),))
    assert scoring.score_clip(clip, blue)["alignment"] == 0.5
