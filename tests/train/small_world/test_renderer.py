"""The small world: what is in a scene, what is said of it, and the shards it is written to."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from samples import decoded

from gentron_fast import files
from gentron_train.small_world import renderer
from gentron_train.small_world.renderer import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    FILLS,
    FPS,
    MOTIONS,
    PHRASES,
    REACH,
    SHAPES,
    SIZE,
    SPAN,
    Scene,
    Thing,
)


def scene_of(seed, index=0):
    return renderer.sample_scene(np.random.default_rng([seed, index]))


@pytest.fixture(scope="module")
def scenes():
    return [scene_of(7, index) for index in range(3000)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    renderer.write_shards(folder, images=6, clips=4, shard_size=3, processes=2, progress=False)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_one_combination_in_ten_is_held_out():
    held = renderer.held_out()
    assert len(held) == 24
    assert all(renderer.is_held_out(*triple) for triple in held)
    assert ("circle", "red", "left") not in held
    assert {motion: sum(t[2] == motion for t in held) for motion in MOTIONS} == dict.fromkeys(
        MOTIONS, 3
    )


def test_training_shows_all_but_what_is_held_out(scenes):
    shown = {(o.shape, o.colour, s.motion) for s in scenes for o in s.objects}
    assert not shown & renderer.held_out()
    assert len(shown) == 240 - 24


def test_prompts_are_seen_or_unseen():
    for draw, unseen in ((renderer.seen_prompts, False), (renderer.unseen_prompts, True)):
        prompts = draw(200, seed=3)
        assert prompts == draw(200, seed=3) != draw(200, seed=4)
        for text, scene in prompts:
            (thing,) = scene.objects
            assert renderer.is_held_out(thing.shape, thing.colour, scene.motion) == unseen
            assert thing.shape in text
            assert thing.colour in text
            assert any(phrase in text for phrase in PHRASES[scene.motion])


def test_readme_prompt_is_one_of_the_captions():
    rng = np.random.default_rng(0)
    scene = renderer.make_scene(rng, "circle", "red", "left", usual=1.0)
    assert "a red circle moving left" in {renderer.caption(scene, rng) for _ in range(300)}


def test_captions_are_true_short_and_of_known_words(scenes):
    rng, words = np.random.default_rng(1), set()
    for scene in scenes:
        text = renderer.caption(scene, rng)
        assert text == text.lower()
        assert len(text.encode()) <= renderer.TEXT_BYTES
        assert len(text.replace(",", " ,").split()) <= 75  # CLIP's 77 tokens less the two ends
        said = text.replace(",", "").split()
        words.update(said)
        for thing in scene.objects:
            assert f"{thing.colour} {thing.shape}" in text
        assert any(phrase in text for phrase in PHRASES[scene.motion])
        assert set(said) & set(FILLS) <= {thing.fill for thing in scene.objects}
        assert set(said) & set(renderer.RADII) <= {thing.size for thing in scene.objects}
        if "background" in said:
            assert set(said) & set(BACKGROUNDS) == {scene.background}
        if scene.relation:
            assert any(
                f" {phrase} a " in text for phrase in renderer.RELATION_PHRASES[scene.relation]
            )
    assert words == set(renderer.vocabulary())


def test_what_a_caption_leaves_out_has_its_usual_value(scenes):
    rng, usual = np.random.default_rng(3), 0
    for scene in scenes:
        said = renderer.caption(scene, rng).replace(",", "").split()
        values = [scene.background, *(thing.fill for thing in scene.objects)]
        if len(scene.objects) == 1:  # two are always small
            values += [thing.size for thing in scene.objects if thing.size]
        unusual = [value for value in values if value not in renderer.USUAL.values()]
        assert set(unusual) <= set(said)
        usual += not unusual
    assert 0.05 < usual / len(scenes) < 0.3  # both kinds are common


def test_caption_without_motion_names_none(scenes):
    rng = np.random.default_rng(2)
    phrases = [phrase for known in PHRASES.values() for phrase in known]
    for scene in scenes[:300]:
        text = renderer.caption(scene, rng, motion=False)
        assert not any(phrase in text for phrase in phrases)


def test_objects_move_far_enough_and_stay_in_the_frame(scenes):
    sampled = 42 / FPS  # from the first to the last of eight frames, every sixth
    times = np.linspace(0, SPAN, 9)
    for scene in scenes:
        for thing in scene.objects:
            x, y, radius, _ = thing.pose(times)
            reach = REACH[thing.shape] * radius
            for centre in (x, y):
                assert (centre - reach).min() >= 1
                assert (centre + reach).max() <= SIZE - 1
            if scene.motion in DIRECTIONS:
                moved = np.multiply(thing.velocity, sampled)
                assert np.dot(moved, DIRECTIONS[scene.motion]) >= 14
            elif scene.motion in ("growing", "shrinking"):
                early, late = (thing.pose(t)[2] for t in (5 / FPS, 5 / FPS + sampled))
                assert max(early / late, late / early) >= 1.6
            elif scene.motion == "spinning":
                assert 60 <= abs(np.degrees(thing.spin)) <= 120
                assert (thing.shape, thing.fill) != ("circle", "plain")


def test_two_objects_differ_in_colour_and_do_not_touch(scenes):
    pairs = [scene for scene in scenes if len(scene.objects) == 2]
    assert 0.2 < len(pairs) / len(scenes) < 0.3
    for scene in pairs:
        first, second = scene.objects
        assert first.colour != second.colour
        assert first.velocity == second.velocity
        away = np.subtract((first.x, first.y), (second.x, second.y))
        reach = sum(REACH[thing.shape] * thing.radius for thing in scene.objects)
        assert np.dot(away, renderer.RELATIONS[scene.relation]) > reach


@pytest.mark.parametrize("shape", SHAPES)
def test_render_covers_the_area_of_its_shape(shape):
    thing = Thing(shape, "red", "plain", None, 32, 32, 13.0)
    frame = renderer.render_frame(Scene((thing,), "black", "still"))
    area = (frame[..., 0] - 15.0).sum() / (COLOURS["red"][0] - 15)
    polygon = {
        "circle": np.pi,
        "square": (2 * 0.886) ** 2,
        "triangle": 0.75 * np.sqrt(3) * 1.4**2,
        "star": 5 * 0.45 * 1.4**2 * np.sin(np.pi / 5),
        "cross": 8 * 1.1 * 0.42 - 4 * 0.42**2,
    }[shape]
    assert area == pytest.approx(polygon * 13**2, rel=0.02)
    assert np.abs(frame - np.flip(frame, 1).astype(float)).max() <= 1  # left is right


def test_only_objects_are_coloured():
    for background in BACKGROUNDS:
        thing = Thing("star", "cyan", "striped", None, 20, 20, 8.0)
        scene = Scene((thing,), background, "still", tilt=1.0)
        clip = renderer.render_clip(scene, clean=False, rng=np.random.default_rng(0)).astype(int)
        chroma = clip.max(-1) - clip.min(-1)
        assert chroma[:, 5:35, 5:35].max() > 50
        assert chroma[:, 35:].max() == chroma[:, :, 35:].max() == 0


def test_clips_are_blurred_and_marked_and_clean_ones_are_frames():
    scene = renderer.make_scene(np.random.default_rng(3), "square", "blue", "right")
    clean = renderer.render_clip(scene)
    assert clean.shape == (48, 64, 64, 3)
    assert clean.dtype == np.uint8
    assert (clean[12] == renderer.render_frame(scene, 12 / FPS)).all()
    real = renderer.render_clip(scene, clean=False, rng=np.random.default_rng(0))
    background = (clean == clean[0, 0, 0]).all((0, 3))
    assert (real != clean).any(-1)[:, background].any()  # the watermark
    assert (real != clean).any(-1)[:, ~background].any()  # the blur
    with pytest.raises(ValueError, match="needs an rng"):
        renderer.render_clip(scene, clean=False)


def test_wrong_words_are_refused():
    with pytest.raises(ValueError, match="'hexagon' is not one of circle"):
        renderer.make_scene(np.random.default_rng(0), "hexagon", "red", "left")


@pytest.mark.parametrize("kind", ["images", "clips"])
def test_samples_depend_on_seed_kind_and_index_alone(kind):
    sample = renderer.make_sample(5, kind, 2)
    assert sample == renderer.make_sample(5, kind, 2)
    assert sample["json"] != renderer.make_sample(5, kind, 3)["json"]
    assert sample["json"] != renderer.make_sample(6, kind, 2)["json"]


def test_image_that_names_its_motion_shows_its_first_frame():
    named = 0
    for index in range(40):
        sample = renderer.make_sample(0, "images", index)
        facts = json.loads(sample["json"])
        said = any(phrase in sample["txt"].decode() for phrase in PHRASES[facts["motion"]])
        assert said == facts["named"]
        assert facts["time"] == 0 or not said
        named += said
    assert 10 < named < 30


def test_shards_are_the_same_bytes_from_any_number_of_processes(shards, tmp_path):
    paths = renderer.write_shards(tmp_path, 6, 4, shard_size=3, processes=1, progress=False)
    assert [path.name for path in paths] == [
        "images-00000.tar",
        "images-00001.tar",
        "clips-00000.tar",
        "clips-00001.tar",
    ]
    assert contents(tmp_path) == contents(shards)
    assert set(contents(shards)) == {"index.json", *(path.name for path in paths)}


def test_cut_off_run_goes_on(shards, tmp_path, monkeypatch):
    shutil.copytree(shards, tmp_path / "copy")
    lost, kept = tmp_path / "copy" / "clips-00001.tar", tmp_path / "copy" / "images-00000.tar"
    lost.unlink()
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    monkeypatch.setattr(os, "getpid", lambda: killed.pid)
    partial_of_killed = files.partial_path(lost)
    monkeypatch.undo()
    partial_of_killed.write_bytes(b"half")
    before = kept.stat().st_mtime_ns
    renderer.write_shards(tmp_path / "copy", 6, 4, shard_size=3, progress=False)
    assert kept.stat().st_mtime_ns == before
    assert contents(tmp_path / "copy") == contents(shards)


def test_the_share_of_images_with_two_objects(shards, tmp_path):
    def objects(kind, **options):
        samples = [renderer.make_sample(0, kind, index, **options) for index in range(30)]
        return [len(json.loads(sample["json"])["objects"]) for sample in samples]

    assert set(objects("images", pairs=1.0)) == {2} and set(objects("images", pairs=0.0)) == {1}
    assert objects("clips", pairs=1.0) == objects("clips")
    renderer.write_shards(tmp_path, 2, 0, processes=1, progress=False, pairs=1.0)
    assert (
        renderer.make_sample(0, "images", 1, 1.0)["png"] in contents(tmp_path)["images-00000.tar"]
    )
    with pytest.raises(ValueError, match="choose another folder"):
        renderer.write_shards(tmp_path, 2, 0, progress=False)
    # Shards of earlier versions do not say it.
    old = tmp_path / "old"
    shutil.copytree(shards, old)
    index = json.loads((old / "index.json").read_text())
    assert index.pop("pairs") == 0.25 and index.pop("spinning") == 0.125
    assert index.pop("clean") is False
    (old / "index.json").write_text(json.dumps(index))
    renderer.write_shards(old, 6, 4, shard_size=3, progress=False)
    renderer.ensure_shards(old)


def test_clean_clips_show_the_same_scenes_as_they_are(tmp_path):
    usual, clean = (renderer.make_sample(0, "clips", 3, clean=clean) for clean in (False, True))
    assert usual["txt"] == clean["txt"] and usual["json"] == clean["json"]
    rng = np.random.default_rng([0, 1, 3])
    rendered = renderer.render_clip(renderer.sample_scene(rng, renderer.PAIRS)).astype(float)
    errors = [np.mean((decoded(sample["mp4"]) - rendered) ** 2) for sample in (usual, clean)]
    assert errors[1] < 255**2 / 10**4 < errors[0]  # 40 dB
    renderer.write_shards(tmp_path, 0, 4, processes=1, progress=False, clean=True)
    assert clean["mp4"] in contents(tmp_path)["clips-00000.tar"]
    with pytest.raises(ValueError, match=r"'clean': True.*'clean': False"):
        renderer.write_shards(tmp_path, 0, 4, progress=False)


def test_the_share_of_clips_that_spin(tmp_path):
    rng = np.random.default_rng(0)
    scenes = [renderer.sample_scene(rng, 0.0, 0.5) for _ in range(400)]
    assert np.mean([s.motion == "spinning" for s in scenes]) == pytest.approx(0.5, abs=0.06)
    assert {s.motion for s in scenes} == set(renderer.MOTIONS)

    def motions(kind, **options):
        samples = [renderer.make_sample(0, kind, index, **options) for index in range(8)]
        facts = [json.loads(sample["json"]) for sample in samples]
        return {one["motion"] for one in facts if len(one["objects"]) == 1}

    assert motions("clips", spinning=1.0) == {"spinning"}
    assert motions("images", spinning=1.0) == motions("images") != {"spinning"}
    renderer.write_shards(tmp_path / "clips", 0, 6, processes=1, progress=False, spinning=1.0)
    spins, usual = (
        [renderer.make_sample(0, "clips", index, **options)["mp4"] for index in range(6)]
        for options in ({"spinning": 1.0}, {})
    )
    assert spins != usual
    assert all(clip in contents(tmp_path / "clips")["clips-00000.tar"] for clip in spins)
    for share in (0.1, 1.5):
        with pytest.raises(ValueError, match="spinning"):
            renderer.write_shards(tmp_path / "out", 1, 1, progress=False, spinning=share)
    assert not (tmp_path / "out").exists()


def test_other_parameters_need_another_folder(shards):
    with pytest.raises(ValueError, match="choose another folder"):
        renderer.write_shards(shards, 6, 4, seed=1, shard_size=3, progress=False)


def test_webdataset_reads_the_shards(shards):
    webdataset = pytest.importorskip("webdataset")
    av = pytest.importorskip("av")
    from PIL import Image

    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 10
    for sample in samples:
        facts = json.loads(sample["json"])
        assert all(thing["colour"] in sample["txt"].decode() for thing in facts["objects"])
        if "png" in sample:
            assert Image.open(io.BytesIO(sample["png"])).size == (64, 64)
        else:
            with av.open(io.BytesIO(sample["mp4"])) as container:
                stream = container.streams.video[0]
                assert stream.average_rate == FPS
                frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
            assert np.shape(frames) == (48, 64, 64, 3)


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "gentron_train.shapes", str(tmp_path / "out")]
    options = ["--images", "2", "--clips", "1", "--seed", "3", "--processes", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 shards" in done.stdout
    assert (
        renderer.make_sample(3, "clips", 0)["mp4"]
        in (tmp_path / "out" / "clips-00000.tar").read_bytes()
    )


@pytest.mark.parametrize(
    "text",
    ['{"version": 2, "shards": []}', '{"__kind__": "wids-shard-index-v1", "shardlist": []}'],
)
def test_another_tools_index_is_left_as_it_is(text, tmp_path):
    (tmp_path / "index.json").write_text(text)
    renderer.ensure_shards(tmp_path, 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]
    assert (tmp_path / "index.json").read_text() == text
    with pytest.raises(ValueError, match="choose another folder"):
        renderer.write_shards(tmp_path, 1, 1, processes=1, progress=False)


@pytest.mark.parametrize("text", ["[]", "{", '{"images": "many"}', '{"images": 1e99}', "[" * 9999])
def test_an_index_that_is_wrong_is_named(text, tmp_path):
    path = tmp_path / "index.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        renderer.ensure_shards(tmp_path, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: out"),
        (["OUT", "--images", "many"], "invalid int value: 'many'"),
        (["OUT", "--clips", "-1"], "clips is -1, wanted a whole number from 0 to"),
        (["OUT", "--shard-size", "0"], "shard_size is 0, wanted a whole number from 1 to"),
        (["OUT", "--processes", "0"], "processes is 0, must be at least 1"),
        (["FILE"], "exists"),
        (["SHARDS", "--seed", "9"], "choose another folder"),
    ],
    ids=str,
)
def test_wrong_input_gives_one_line_and_exit_code_2(arguments, message, shards, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    places = {
        "OUT": str(tmp_path / "out"),
        "FILE": str(tmp_path / "file"),
        "SHARDS": str(shards),
    }
    assert renderer.main([places.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("to_all", [True, False], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_command_is_told_and_ends(to_all, tmp_path):
    command = [sys.executable, "-m", renderer.NAME, str(tmp_path / "out"), "--processes", "2"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # As a shell starts a command, whatever a background job has inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not list(tmp_path.glob("out/.*.part.tar")):
            assert process.poll() is None
            time.sleep(0.05)
        if to_all:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        told = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"{renderer.NAME}: stopped; the same command goes on\n" in told
