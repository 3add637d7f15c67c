"""How T2I-CompBench turns probabilities, cosines and detections into scores: numbers only."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

MOST_QUESTIONS = 8
NO_QUESTIONS = ("top", "the side", "the left", "the right")  # noun chunks that name no object
PERSONS = ("girl", "boy", "man", "woman")  # which detectors call a person
NEAR = 150  # pixels
OVERLAP = 0.1  # the IoU below which two boxes lie apart
LEAST_SPATIAL = 0.5  # a lower spatial score becomes 0
BESIDE = ("on side of", "next to", "near")
# The first of these that stands in a prompt is its locality.
LOCALITIES = (
    *BESIDE,
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
# The first of these that stands in a complex prompt parts its two objects.
COMPLEX_LOCALITIES = (
    "on top of",
    "on bottom of",
    "on the left",
    "on the right",
    "next to",
    "on side of",
    "near",
)

Token = tuple[str, str]  # a word and its part of speech


class Detection(NamedTuple):
    """An object in an image: box is left, top, right, bottom in pixels."""

    label: str
    confidence: float
    box: tuple[float, float, float, float]


def questions(chunks: Sequence[str]) -> list[str]:
    """BLIP's questions about a prompt's noun chunks."""
    named = [chunk for chunk in chunks if chunk not in NO_QUESTIONS]
    return [f"{chunk}?" for chunk in named[:MOST_QUESTIONS]]


def yes_share(yes: float, no: float) -> float:
    """BLIP's answer to a question: P(yes) of yes and no, to four digits."""
    return round(yes / (yes + no), 4)


def vqa_score(answers: Sequence[float]) -> float:
    """The product of the answers to a prompt's questions, in single precision, to four digits."""
    product = np.float32(1)
    for answer in answers:
        product *= np.float32(answer)
    return round(float(product), 4)


def first_and_last_noun(tokens: Sequence[Token]) -> tuple[str, ...]:
    """The two objects of a spatial prompt, as a detector names them; none without a noun."""
    nouns = [text for text, kind in tokens if kind == "NOUN"]
    return tuple(as_label(noun) for noun in (nouns[0], nouns[-1])) if nouns else ()


def objects_about_locality(tokens: Sequence[Token]) -> tuple[str, ...]:
    """The two objects of a complex prompt: the last noun before the words that say where they lie,
    and the first one after; none where one of them is missing."""
    words = [text.lower() for text, _ in tokens]
    for phrase in COMPLEX_LOCALITIES:
        parts = phrase.split()
        for start in range(len(words) - len(parts) + 1):
            if words[start : start + len(parts)] == parts:
                before, after = tokens[:start], tokens[start + len(parts) :]
                first = [text for text, kind in before if kind == "NOUN"][-1:]
                second = [text for text, kind in after if kind == "NOUN"][:1]
                pair = tuple(map(as_label, first + second))
                return pair if len(pair) == 2 else ()
    return ()


def as_label(noun: str) -> str:
    """A noun as detectors name it."""
    return "person" if noun in PERSONS else noun


def without_adjectives(tokens: Sequence[Token]) -> str:
    """CLIP's text of a complex prompt."""
    return " ".join(text for text, kind in tokens if kind != "ADJ")


def locality_of(prompt: str) -> str | None:
    """How a prompt says that its objects lie."""
    return next((phrase for phrase in LOCALITIES if phrase in prompt), None)


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    union = sum(areas) - common
    return common / union if union > 0 else 0.0


def position_score(locality: str | None, one: Sequence[float], other: Sequence[float]) -> float:
    """How well two boxes lie as `locality` says, the first seen from the second: 0 to 1."""
    dx = (other[0] + other[2] - one[0] - one[2]) / 2
    dy = (other[1] + other[3] - one[1] - one[3]) / 2
    if locality in BESIDE:
        # "or": two objects above one another count as beside each other, however far.
        is_near = abs(dx) < NEAR or abs(dy) < NEAR
        return 1.0 if is_near else NEAR / max(abs(dx), abs(dy))
    is_right = {
        "on the right of": dx < 0 and abs(dx) > abs(dy),
        "on the left of": dx > 0 and abs(dx) > abs(dy),
        "on the bottom of": dy < 0 and abs(dy) > abs(dx),
        "on the top of": dy > 0 and abs(dy) > abs(dx),
    }
    if not is_right.get(locality, False):  # "on top of" never scores
        return 0.0
    shared = overlap(one, other)
    return 1.0 if shared < OVERLAP else OVERLAP / shared


def spatial_score(prompt: str, names: Sequence[str], detections: Sequence[Detection]) -> float:
    """Of an image: a quarter for the confidence in each object, half for their position."""
    if len(names) != 2:
        return 0.0
    found = [next((d for d in detections if d.label == name), None) for name in names]
    score = sum(detection.confidence / 4 for detection in found if detection)
    if all(found):
        score += position_score(locality_of(prompt), found[0].box, found[1].box) / 2
    return score if score >= LEAST_SPATIAL else 0.0


def complex_key(prompt: str) -> str:
    """A complex prompt as it is looked up in the lists of its kinds."""
    return prompt.partition(".")[0].lower()


def three_in_one(
    prompt: str,
    blip: float,
    clip: float,
    spatial: float,
    spatial_prompts: Collection[str],
    action_prompts: Collection[str],
) -> float:
    """The score of a complex prompt's image; the lists hold `complex_key` of each prompt."""
    key = complex_key(prompt)
    if key in spatial_prompts:
        return (spatial + blip) / 2
    if key in action_prompts:
        return (clip + blip) / 2
    return (blip + spatial + clip) / 3
