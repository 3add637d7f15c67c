"""The text encoders' training: what captions say, and that it resumes, learns and is read back."""

import numpy as np
import pytest
import torch
from faults import cut_off_at_its_first_state, holder_of
from safetensors.torch import load_file

from gentron_fast.text import TextEncoder
from gentron_train.small_world import text_encoders as text_training
from gentron_train.small_world.renderer import Scene, Thing, caption, sample_scene
from gentron_train.small_world.text_encoders import (
    FACTS,
    TextTraining,
    batches,
    draw,
    facts_said,
    main,
    train,
)

TRAINING = TextTraining(steps=4, batch=4, save_every=2, warmup=2)


def answers(scene: Scene, text: str) -> dict[str, str]:
    """The facts that are said, in words."""
    said = zip(FACTS.items(), facts_said(scene, text), strict=True)
    return {name: words[number - 1] for (name, words), number in said if number}


def thing(shape: str, colour: str, fill: str = "plain", size: str | None = "small") -> Thing:
    return Thing(shape, colour, fill, size, 30.0, 30.0, 7.0)


@pytest.mark.parametrize(
    "text,more",
    [
        ("a red circle", {}),
        ("a red circle is moving to the left", {"motion": "left"}),
        ("a small red circle going left", {"first size": "small", "motion": "left"}),
        ("a striped red circle", {"first fill": "striped"}),
        ("on a grey background, a red circle", {"background": "grey"}),
    ],
)
def test_what_a_caption_of_one_object_says(text, more):
    scene = Scene((thing("circle", "red", "striped"),), "grey", "left")
    assert answers(scene, text) == {"first shape": "circle", "first colour": "red"} | more


def test_what_a_caption_of_two_objects_says():
    objects = thing("star", "blue", "dotted"), thing("star", "green", "striped")
    scene = Scene(objects, "white", "still", "left of")
    said = answers(
        scene, "a dotted blue star to the left of a small striped green star, both at rest"
    )
    first = {"first shape": "star", "first colour": "blue", "first fill": "dotted"}
    second = {"second shape": "star", "second colour": "green", "second fill": "striped"}
    more = {"second size": "small", "motion": "still", "relation": "left of"}
    assert said == first | second | more


def test_a_fact_that_is_told_is_in_the_caption():
    """Of many captions: whatever is said can be found in the text as a word."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = sample_scene(rng)
        text = caption(scene, rng, motion=False)
        told = answers(scene, text)
        assert "motion" not in told
        for name, word in told.items():
            assert name == "relation" or word in text.split(), (name, word, text)
        assert ("relation" in told) == (len(scene.objects) == 2)


def test_every_step_has_its_captions_whatever_came_before():
    whole = [captions for captions, _ in batches(TRAINING, 0)]
    assert len(whole) == 4 and len({text for captions in whole for text in captions}) > 8
    assert [captions for captions, _ in batches(TRAINING, 3)] == whole[3:]


def test_an_interrupted_run_ends_as_a_whole_one(tmp_path):
    train(tmp_path / "whole", TRAINING, "cpu", resume=False)
    with cut_off_at_its_first_state(text_training):
        train(tmp_path / "parts", TRAINING, "cpu", resume=False)
    assert not (tmp_path / "parts").exists()
    train(tmp_path / "parts", TRAINING, "cpu", resume=True)
    assert not (tmp_path / "parts.training").exists()
    for name in ("clip", "t5"):
        whole, parts = (
            load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "parts")
        )
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_what_no_training_wrote_beside_is_refused_and_stays(tmp_path):
    out = tmp_path / "out"
    for own in (tmp_path / "out.log.jsonl", tmp_path / "out.training" / "state.safetensors"):
        own.parent.mkdir(exist_ok=True)
        own.write_text("mine")
        with pytest.raises(ValueError, match="move it"):
            train(out, TRAINING, "cpu", resume=False)
        assert own.read_text() == "mine" and not out.exists()
        own.unlink()


def test_a_folder_has_one_training(tmp_path):
    out = tmp_path / "text"
    with holder_of(tmp_path / "text.training") as holder:
        with pytest.raises(ValueError, match=f"in use by process {holder.pid} on"):
            train(out, TRAINING, "cpu", resume=True)
        assert not out.exists()


def test_it_learns_and_is_read_back(tmp_path, capsys):
    main(["--out", str(tmp_path / "text"), "--steps", "60", "--batch", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        [name, part] for name in ("clip", "t5") for part in ("tokens", "pooled")
    ]
    # Of five shapes one is right by chance; CLIP knows every word as one token.
    told = float(lines[0].partition("first shape")[2].split()[0])
    assert told > 50
    folders = {name: (tmp_path / "text" / name,) * 2 for name in ("clip", "t5")}
    encoder = TextEncoder.from_pretrained(**folders)
    captions, _ = draw(3, 0)
    assert encoder.encode(captions).batch == 3
