"""Samples on their way from a worker process: whole, and with one file descriptor at most."""

import os

import pytest
import torch

from gentron_fast.model import EncodedText, TextCondition
from gentron_train.data.broken import Broken
from gentron_train.data.loader import background
from gentron_train.data.packing import SMALL, packed, unpacked
from gentron_train.data.sources import Point, Sample


def text(tokens: int) -> TextCondition:
    mask = torch.arange(tokens)[None] < 3
    states = torch.randn(1, tokens, 5).bfloat16()
    return TextCondition(None, EncodedText(states, mask, states.mean(1)))


SAMPLES = {
    "pixels": Sample("a star", pixels=torch.randint(256, (3, 5, 7, 3), dtype=torch.uint8)),
    "row": Sample(7, posterior=(torch.randn(4, 1, 8, 8).half(), torch.zeros(4, 0, 8, 8).half())),
    "point": Sample(
        text(9),
        posterior=(torch.randn(4, 8, 2, 2).half().movedim(0, 1), torch.rand(4, 8, 2, 2).half()),
        point=Point(torch.randn(3), torch.randn(3), torch.tensor(40), torch.tensor([2.0, 1.0])),
    ),
    "large": Sample(text(SMALL)),
    "broken": Broken("no caption", "x", "y.tar", ""),
}


def flat(value) -> list:
    """All that is in a sample, tensors as dtype, shape and numbers."""
    if isinstance(value, torch.Tensor):
        return [value.dtype, tuple(value.shape), value.flatten().tolist()]
    if isinstance(value, Sample):
        return [type(value), *map(flat, vars(value).values())]
    if isinstance(value, tuple):
        return [type(value), *map(flat, value)]
    return [value]


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_comes_back_whole(name):
    there = packed(SAMPLES[name])
    assert isinstance(there.memory, torch.Tensor) == (name == "large")
    assert flat(unpacked(there)) == flat(SAMPLES[name])


def test_what_comes_back_can_be_written_to_and_shares_nothing_with_what_was_given():
    given = Sample("a star", pixels=torch.zeros(1, 2, 2, 3, dtype=torch.uint8))
    there = unpacked(packed(given))
    there.pixels += 1
    assert there.pixels.all() and not given.pixels.any()


def test_workers_give_what_is_read_here_and_no_descriptor_stays_open():
    places = [*SAMPLES] * 4
    samples = background(SAMPLES, places, workers=2, ahead=2)
    first = next(samples)
    before = len(os.listdir("/proc/self/fd"))
    rest = [flat(sample) for sample in samples]
    assert [flat(first), *rest] == [flat(SAMPLES[name]) for name in places]
    assert len(os.listdir("/proc/self/fd")) <= before
