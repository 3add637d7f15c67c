"""Hand-made probabilities and detections through every rule of T2I-CompBench."""

import pytest

from gentron_fast.evaluation.rules import (
    Detection,
    first_and_last_noun,
    locality_of,
    objects_about_locality,
    overlap,
    position_score,
    questions,
    spatial_score,
    three_in_one,
    vqa_score,
    without_adjectives,
    yes_share,
)


def box(x, y, half=10):
    return (x - half, y - half, x + half, y + half)


def tokens(text):
    """(word, kind) of words written word/KIND."""
    return [tuple(word.split("/")) for word in text.split()]


def test_questions_leave_out_places_and_stop_at_eight():
    chunks = ["a cat", "the left", "top", "the side", "the right", "the top", *"abcdefgh"]
    assert questions(chunks) == ["a cat?", "the top?", *(f"{c}?" for c in "abcdef")]


def test_vqa_score_is_the_product_of_rounded_shares():
    assert yes_share(0.2, 0.1) == 0.6667
    assert vqa_score([0.6667, 0.3333]) == 0.2222
    assert vqa_score([0.9, 0.5, 0.5]) == 0.225
    assert vqa_score([]) == 1.0  # a question that is not asked counts 1


@pytest.mark.parametrize(
    "prompt, locality",
    [
        ("a mouse on side of a key", "on side of"),
        ("a giraffe next to a lamp", "next to"),
        ("a cat near a chair", "near"),
        ("a cat on the left of a chair near a lamp", "near"),  # looked for in this order
        ("a bee on the right of a tree", "on the right of"),
        ("a girl on the top of a frog", "on the top of"),
        ("a cup on the bottom of a shelf", "on the bottom of"),
        ("the hat was on top of the rack", "on top of"),
        ("a cat and a dog", None),
    ],
)
def test_locality(prompt, locality):
    assert locality_of(prompt) == locality


A = box(100, 100)


@pytest.mark.parametrize(
    "locality, other, score",
    [
        ("next to", box(249, 900), 1.0),  # one of the two distances is enough
        ("next to", box(250, 250), 1.0),  # 150 both ways: 150 / 150
        ("near", box(400, 300), 0.5),
        ("on side of", box(700, 300), 0.25),
        ("on the left of", box(200, 150), 1.0),
        ("on the left of", box(200, 200), 0.0),  # a tie is neither
        ("on the left of", box(50, 100), 0.0),
        ("on the right of", box(50, 100), 1.0),
        ("on the right of", box(200, 100), 0.0),
        ("on the bottom of", box(100, 50), 1.0),
        ("on the bottom of", box(100, 150), 0.0),
        ("on the top of", box(100, 150), 1.0),
        ("on the top of", box(100, 50), 0.0),
        ("on top of", box(100, 150), 0.0),  # is found and never scores
        (None, box(100, 150), 0.0),
    ],
)
def test_position(locality, other, score):
    assert position_score(locality, A, other) == score


def test_position_falls_with_the_overlap_from_a_tenth_on():
    # Boxes of 20 x 20, shifted: IoU = (20 - d) / (20 + d).
    assert overlap(A, box(110, 100)) == pytest.approx(1 / 3)
    assert position_score("on the left of", A, box(110, 100)) == pytest.approx(0.3)
    tenth = (0, 0, 110, 100), (90, 0, 200, 100)  # 2000 of 20000
    assert overlap(*tenth) == 0.1 and position_score("on the left of", *tenth) == 1.0
    less = (0, 0, 110, 100), (91, 0, 200, 100)
    assert overlap(*less) < 0.1 and position_score("on the left of", *less) == 1.0


CUP, CAT = Detection("cup", 0.9, A), Detection("cat", 0.7, box(200, 100))


@pytest.mark.parametrize(
    "detections, score",
    [
        ([CUP, CAT], 0.9),  # 0.225 + 0.175 + 0.5
        ([Detection("cup", 0.6, A), CUP, CAT], 0.825),  # the first of a name counts
        ([CUP], 0.0),  # 0.225 alone is under 0.5
        ([], 0.0),
        ([CUP, Detection("cat", 0.7, box(20, 100))], 0.0),  # 0.4 without position
        ([CUP, Detection("cat", 1.0, box(20, 100))], 0.0),  # 0.475
        ([Detection("cup", 1.0, A), Detection("cat", 1.0, box(20, 100))], 0.5),  # not under 0.5
        ([CUP, Detection("cat", 0.7, box(110, 100))], 0.55),  # position 0.3
    ],
)
def test_spatial_score(detections, score):
    found = spatial_score("a cup on the left of a cat", ["cup", "cat"], detections)
    assert found == pytest.approx(score, abs=1e-9)


def test_spatial_score_without_two_objects():
    assert spatial_score("a cup near", [], [CUP]) == 0.0


def test_objects_of_a_spatial_prompt():
    text = "a/DET girl/NOUN on/ADP the/DET top/NOUN of/ADP a/DET frog/NOUN"
    assert first_and_last_noun(tokens(text)) == ("person", "frog")
    for person in ("boy", "man", "woman"):
        assert first_and_last_noun(tokens(f"{person}/NOUN near/ADP women/NOUN")) == (
            "person",
            "women",
        )
    assert first_and_last_noun(tokens("cat/NOUN")) == ("cat", "cat")
    assert first_and_last_noun(tokens("red/ADJ")) == ()


def test_objects_of_a_complex_prompt():
    text = "The/DET red/ADJ hat/NOUN was/AUX On/ADP top/NOUN of/ADP a/DET coat/NOUN rack/NOUN"
    assert objects_about_locality(tokens(text)) == ("hat", "coat")
    text = "a/DET wool/NOUN cat/NOUN on/ADP the/DET left/NOUN of/ADP a/DET woman/NOUN"
    assert objects_about_locality(tokens(text)) == ("cat", "person")
    assert objects_about_locality(tokens("a/DET cat/NOUN on/ADP a/DET mat/NOUN")) == ()
    assert objects_about_locality(tokens("it/PRON is/AUX near/ADP a/DET mat/NOUN")) == ()
    assert without_adjectives(tokens("the/DET soft/ADJ grey/ADJ mat/NOUN")) == "the mat"


def test_three_in_one():
    spatial, action = {"the hat is near", "both"}, {"a dog runs", "both"}

    def score(prompt):
        return three_in_one(prompt, 0.6, 0.3, 0.9, spatial, action)

    assert score("The Hat is near. Really.") == 0.75  # up to the first full stop, lower-case
    assert score("a dog runs") == pytest.approx(0.45)
    assert score("both") == 0.75  # the spatial list comes first
    assert score("neither") == pytest.approx(0.6)
