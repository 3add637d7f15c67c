"""The evaluator reads back what the renderer drew, and scores what a pipeline makes."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
from samples import decoded

from gentron_fast.index import ASSETS
from gentron_fast.vae import VideoVAE
from gentron_train import shapes_score
from gentron_train.small_world import evaluator, renderer
from gentron_train.small_world.evaluator import judge, score
from gentron_train.small_world.reading import read_clip, read_image, read_objects
from gentron_train.small_world.renderer import FPS, Scene, Thing


def training_scenes(count, seed):
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        yield renderer.sample_scene(rng), rng


def test_clean_clips_are_read_right():
    clips, scenes, farthest = [], [], 0.0
    for scene, rng in training_scenes(320, seed=11):
        start = rng.integers(6)
        clips.append(renderer.render_clip(scene)[start::6])
        scenes.append(scene)
        middle = (start + 21) / FPS
        reading = read_clip(clips[-1])
        positions = [thing.pose(middle)[:2] for thing in scene.objects]
        farthest = max(farthest, min(math.dist(p, reading.position) for p in positions))
    shares = score(clips, scenes)
    for name in ("colour", "shape", "motion", "direction", "relation", "all"):
        assert shares[name] >= 0.99, name
    assert farthest < 2  # pixels


def test_clean_images_are_read_right():
    frames, scenes = [], []
    for scene, _ in training_scenes(320, seed=12):
        frames.append(renderer.render_frame(scene)[None])
        scenes.append(scene)
    shares = score(frames, scenes)
    assert set(shares) == {"colour", "shape", "relation", "all"}
    assert shares["colour"] >= 0.99
    assert shares["shape"] >= 0.99
    assert shares["all"] >= 0.99


def test_training_clips_are_read_nearly_right():
    clips, scenes = [], []
    for scene, rng in training_scenes(60, seed=13):
        clip = renderer.render_clip(scene, clean=False, rng=rng)
        clips.append(decoded(renderer.encode_mp4(clip, 26))[2::6])
        scenes.append(scene)
    shares = score(clips, scenes)
    assert shares["colour"] >= 0.98
    assert shares["shape"] >= 0.9
    assert shares["motion"] >= 0.95
    assert shares["direction"] >= 0.98


def test_position_radius_and_colour_of_an_image():
    thing = Thing("circle", "purple", "dotted", None, 20.0, 41.5, 9.0)
    reading = read_image(renderer.render_frame(Scene((thing,), "grey", "still")))
    assert (reading.shape, reading.colour, reading.motion) == ("circle", "purple", None)
    assert reading.position == pytest.approx((20.0, 41.5), abs=0.3)
    assert reading.radius == pytest.approx(9.0, abs=0.8)


@pytest.mark.parametrize("length", [2, 4, 8, 16, 32])
def test_motion_is_read_at_any_number_of_frames(length):
    taken = np.linspace(0, 47, length).round().astype(int)
    for motion in ("left", "down", "growing", "still"):
        scene = renderer.make_scene(np.random.default_rng(length), "star", "green", motion)
        assert read_clip(renderer.render_clip(scene)[taken]).motion == motion


def test_backwards_is_the_other_motion():
    for motion, other in (("left", "right"), ("up", "down"), ("growing", "shrinking")):
        scene = renderer.make_scene(np.random.default_rng(1), "cross", "red", motion)
        clip = renderer.render_clip(scene)[::6]
        assert read_clip(clip).motion == motion
        assert read_clip(clip[::-1]).motion == other


def test_specks_do_not_matter():
    scene = renderer.make_scene(np.random.default_rng(2), "triangle", "blue", "still")
    clip = renderer.render_clip(scene)[::6]
    x, y = (int(v) for v in (scene.objects[0].x, scene.objects[0].y))
    clip[:, (y + 30) % 64, (x + 30) % 64] = (40, 70, 230)
    clip[:, (y + 34) % 64, (x + 30) % 64] = (220, 30, 30)
    assert all(judge(clip, scene).values())
    assert len(read_objects(clip)) == 1


@pytest.mark.parametrize("value", [0, 128, 255])
def test_empty_frames_hold_nothing(value):
    frames = np.full((8, 64, 64, 3), value, dtype=np.uint8)
    assert read_clip(frames) is None
    scene = renderer.make_scene(np.random.default_rng(0), "star", "cyan", "up")
    assert not any(judge(frames, scene).values())


def test_noise_is_judged_without_failing():
    frames = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    scene = renderer.make_scene(np.random.default_rng(0), "star", "cyan", "up")
    assert set(judge(frames, scene)) == {"colour", "shape", "motion"}


def test_score_counts_each_class():
    def clip_of(motion, colour):
        scene = renderer.make_scene(np.random.default_rng(4), "square", colour, motion)
        return renderer.render_clip(scene)[::6], scene

    left, left_scene = clip_of("left", "red")
    up, up_scene = clip_of("up", "red")
    still, still_scene = clip_of("still", "blue")
    shares = score([left, left, still], [left_scene, up_scene, still_scene])
    assert shares == pytest.approx(
        {
            "colour": 1,
            "shape": 1,
            "motion": 2 / 3,
            "direction": 1 / 2,
            "all": 2 / 3,
            "motion still": 1,
            "motion left": 1,
            "motion up": 0,
        }
    )
    assert score([up], [still_scene])["colour"] == 0


def test_wrong_frames_are_refused():
    with pytest.raises(ValueError, match=r"float32 \(8, 64, 64, 3\), must be uint8"):
        read_clip(np.zeros((8, 64, 64, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="0 clips and 0 scenes"):
        score([], [])


class Painter:
    """Stands in for a pipeline: knows the prompts' scenes and paints them."""

    def __init__(self, prompts):
        self.scenes = dict(prompts)
        self.seeds = []
        self.vae = VideoVAE.from_pretrained(ASSETS / "vae").eval()

    def __call__(self, prompt, *, seed, progress, frames):
        self.seeds += seed
        clips = [renderer.render_clip(self.scenes[text])[::6][:frames] for text in prompt]
        return type("Output", (), {"frames": np.stack(clips)})


def test_evaluate_feeds_prompts_and_seeds_in_batches():
    prompts = (draw(5, 2) for draw in evaluator.COLUMNS.values())
    painter = Painter(itertools.chain.from_iterable(prompts))
    scores = evaluator.evaluate(painter, prompts=5, seed=2, batch=2, progress=False, frames=8)
    assert painter.seeds == [2, 3, 4, 5, 6] * 3
    for column in scores.values():
        assert column.shares["colour"] == 1 and column.counts["colour"] == 5
        assert column.fidelity["psnr"] > 40 and column.fidelity["broken"] == 0
    table = evaluator.format_table(scores)
    assert "colour" in table and "PSNR" in table
    assert "100.0 (56.6–100.0)" in table  # Wilson's interval of 5 of 5
    assert f" of {scores['seen'].counts['direction']}  " in table
    assert len({len(line) for line in table.splitlines()}) == 1
    psnr = [scores["pairs"].fidelity[name] for name in ("psnr", "psnr low", "psnr high")]
    assert "{:.2f} ({:.2f}–{:.2f})".format(*psnr) in table and "0.0 (0.0–43.4)" in table


def test_captions_that_are_left_out_are_replaced_by_the_next():
    texts = [text for text, _ in evaluator.drawn_prompts("unseen", 30, 1)]
    assert texts == [text for text, _ in renderer.unseen_prompts(30, 1)]
    left = [text for text, _ in evaluator.drawn_prompts("unseen", 20, 1, without={texts[3]})]
    assert left == [text for text in texts if text != texts[3]][:20] and len(left) == 20


def test_command_line_scores_clips(tiny_pipeline_folder, tmp_path, capsys):
    out = tmp_path / "score.json"
    options = ["--prompts", "2", "--batch", "2", "--steps", "1", "--out", str(out)]
    assert shapes_score.main([str(tiny_pipeline_folder), *options]) == 0
    assert "motion" in capsys.readouterr().out
    figures = json.loads(out.read_text())
    assert figures["settings"]["steps"] == 1
    assert set(figures["scores"]) == {"seen", "unseen", "pairs"}
    assert {"motion", "relation"} <= set(figures["scores"]["pairs"]["shares"])
    assert [path.name for path in tmp_path.iterdir()] == ["score.json"]


def test_a_pipeline_is_scored_at_its_own_steps_and_its_ceiling_at_none(
    tiny_pipeline_folder, tmp_path, monkeypatch, capsys
):
    folder, out = tmp_path / "few", tmp_path / "score.json"
    shutil.copytree(tiny_pipeline_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"default_steps": 8}))
    for name in ("evaluate", "ceiling"):
        monkeypatch.setattr(shapes_score, name, lambda *_, **__: {})
    monkeypatch.setattr(shapes_score, "format_table", str)
    assert shapes_score.main([str(folder), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["settings"]["steps"] == 8
    assert shapes_score.main([str(folder), "--ceiling", "--out", str(out)]) == 0
    assert set(json.loads(out.read_text())["settings"]) == {"prompts", "seed", "frames"}
    with pytest.raises(SystemExit):
        shapes_score.main([str(folder), "--help"])
    assert "(8, the pipeline's)" in capsys.readouterr().out


def test_image_pipelines_have_no_motion(tiny_t2i_folder, capsys):
    arguments = [str(tiny_t2i_folder), "--prompts", "1", "--steps", "1"]
    assert shapes_score.main(arguments) == 0
    table = capsys.readouterr().out
    assert "shape" in table
    assert "motion" not in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "few"], "wanted a whole number of at least 1, got 'few'"),
        (["nowhere"], "no pipeline folder nowhere"),
        (["--prompts", "0"], "must be at least 1"),
        (["--out", "."], "cannot write .: it is a folder"),
        (["--device", "meta"], "unknown device 'meta': wanted cpu, cuda"),
        (["--out", "nowhere/score.json"], "no folder nowhere for score.json"),
    ],
    ids=str,
)
def test_wrong_input_gives_one_line_and_exit_code_2(arguments, message, capsys):
    assert shapes_score.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
