"""Intervals of paired differences: how often they hold the truth, known cases, degenerate data."""

import math

import numpy as np
import pytest

from gentron_train.findings import paired
from gentron_train.findings.paired import (
    Interval,
    paired_interval,
    prompt_error,
    seed_spread,
    smallest_difference,
)


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(paired, "DRAWS", 500)


def drawn(rng, seeds, prompts, of_seeds, of_prompts, of_pairs, truth=1.0):
    """Scores of two runs, (S, P) each, whose difference has these deviations."""
    difference = (
        truth
        + of_seeds * rng.standard_normal((seeds, 1))
        + of_prompts * rng.standard_normal((1, prompts))
        + of_pairs * rng.standard_normal((seeds, prompts))
    )
    second = rng.standard_normal((seeds, prompts))  # what the two have in common
    return second + difference, second


@pytest.mark.parametrize(
    "seeds, deviations, most",
    [
        (3, (0.5, 0.0, 1.0), 0.99),
        (3, (0.1, 1.0, 1.0), 1.0),
        (3, (0.0, 0.0, 1.0), 1.0),
        (5, (0.3, 0.5, 1.0), 0.995),
    ],
    ids=str,
)
def test_the_interval_holds_the_truth_in_95_of_100(few_draws, seeds, deviations, most):
    rng, trials, inside = np.random.default_rng(1), 400, 0
    for _ in range(trials):
        interval = paired_interval(*drawn(rng, seeds, 60, *deviations))
        inside += interval.low <= 1 <= interval.high
    assert 0.93 <= inside / trials <= most


def half_width(interval):
    return (interval.high - interval.low) / 2


def test_seeds_alone_are_students_interval():
    """Three seeds, one figure each: the mean ± 4.303 standard errors."""
    first, second = [[1.0], [2.0], [6.0]], [[0.0], [0.0], [0.0]]
    interval = paired_interval(first, second)
    half = 4.303 * math.sqrt(7) / math.sqrt(3)
    assert interval.mean == 3
    assert interval.low == pytest.approx(3 - half, rel=0.01)
    assert interval.high == pytest.approx(3 + half, rel=0.01)


def test_prompts_alone_are_the_bootstraps_interval():
    """Seeds that agree to the bit leave the prompts: the mean ± 1.96 standard errors."""
    values = np.random.default_rng(0).standard_normal(400) + 2
    interval = paired_interval([values, values], np.zeros((2, 400)))
    half = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert half_width(interval) == pytest.approx(half, rel=0.06)
    assert prompt_error([values], np.zeros((1, 400))) == pytest.approx(half / 1.96, rel=0.05)


def test_what_both_runs_share_is_no_error():
    rng = np.random.default_rng(0)
    shared = 100 * rng.standard_normal((3, 50))
    assert half_width(paired_interval(shared + 0.5, shared)) < 1e-9
    assert paired_interval(shared, shared) == Interval(0, 0, 0)


def test_a_prompt_without_a_figure_is_left_out():
    rng = np.random.default_rng(0)
    first, second = drawn(rng, 3, 40, 0.1, 0.1, 0.1)
    first = np.concatenate([first, np.full((3, 5), np.nan)], 1)
    second = np.concatenate([second, np.ones((3, 5))], 1)
    with_gaps = paired_interval(first, second)
    alone = paired_interval(first[:, :40], second[:, :40])
    assert with_gaps.mean == pytest.approx(alone.mean)
    assert half_width(with_gaps) == pytest.approx(half_width(alone), rel=0.1)


@pytest.mark.parametrize(
    "first, second, message",
    [
        ([[1.0]], [[0.0]], "1 seed has no interval"),
        ([[1.0, 2.0]] * 2, [[1.0]] * 2, r"\(2, 2\) and \(2, 1\) are no pairs"),
        ([1.0, 2.0], [1.0, 2.0], "are no pairs"),
        ([[]], [[]], "are no pairs"),
        ([[math.nan], [1.0]], [[1.0], [1.0]], "a seed has no prompt with figures of both"),
    ],
)
def test_no_pairs(first, second, message):
    with pytest.raises(ValueError, match=message):
        paired_interval(first, second)


def test_the_smallest_difference_is_seen_in_80_of_100(monkeypatch):
    rng, prompts, seeds, of_seeds = np.random.default_rng(2), 60, 3, 0.3
    error = 1 / math.sqrt(prompts)
    truth = smallest_difference(of_seeds, error, seeds)
    monkeypatch.setattr(paired, "DRAWS", 500)
    trials = [
        paired_interval(*drawn(rng, seeds, prompts, of_seeds, 1.0, 0.0, truth=truth)).low > 0
        for _ in range(300)
    ]
    assert 0.7 < np.mean(trials) < 0.95
    assert smallest_difference(of_seeds, error, 6) < truth


def test_the_spread_of_a_difference_is_of_two_runs():
    rng = np.random.default_rng(0)
    scores = 3 * rng.standard_normal((400, 2))
    assert seed_spread(scores) == pytest.approx(3 * math.sqrt(2), rel=0.1)
    with pytest.raises(ValueError, match="at least 2 seeds"):
        seed_spread([[1.0]])


def test_another_unit():
    assert Interval(1, -1, 2).scaled(-2) == Interval(-2, -4, 2)
