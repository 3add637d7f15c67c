"""Intervals, the sign test and Krippendorff's α against published values and exact ones."""

import math

import numpy as np
import pytest

from gentron_fast.evaluation.preference import (
    bootstrap_intervals,
    krippendorff_alpha,
    sign_test,
)
from gentron_fast.intervals import median_interval, wilson_interval


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, Table I, method 3: the score, not corrected.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(count, total, low, high):
    assert wilson_interval(count, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(total - count, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_median_interval():
    """Of 100 values, the 40th and the 61st: the binomial distribution of those below the median."""
    assert median_interval(range(100, 0, -1)) == (40, 61)
    assert median_interval([3.0, 1.0, 2.0]) == (1, 3)
    draws = np.random.default_rng(0).standard_exponential((2000, 60))
    intervals = [median_interval(row) for row in draws.tolist()]
    assert 0.94 < np.mean([low <= math.log(2) <= high for low, high in intervals]) < 0.98


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(8, 2, 2 * (1 + 10 + 45) / 1024), (2, 8, 112 / 1024), (5, 0, 2 / 32), (3, 3, 1), (0, 0, 1)],
)
def test_sign_test(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p)


def test_sign_test_of_many():
    assert 0 < sign_test(1632, 0) < 1e-300 or sign_test(1632, 0) == 0
    assert sign_test(850, 782) == pytest.approx(0.0972, abs=2e-3)  # normal: 2 Φ(-67 / √1632)


# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section D: four observers,
# twelve units, missing data.
OBSERVERS = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""


def test_krippendorff_alpha():
    rows = [line.split() for line in OBSERVERS.strip().splitlines()]
    units = [[int(value) for value in unit if value != "."] for unit in zip(*rows, strict=True)]
    assert krippendorff_alpha(units, ordinal=False) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units) == pytest.approx(0.815, abs=5e-4)


def test_krippendorff_alpha_by_hand():
    # Section B of the same: two observers, ten units, two values.
    first, second = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    units = list(zip(first, second, strict=True))
    assert krippendorff_alpha(units, ordinal=False) == pytest.approx(0.095, abs=5e-4)
    assert krippendorff_alpha([[0, 0], [2, 2], [1, 1]]) == 1
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None  # nothing could have differed
    assert krippendorff_alpha([[0], [1], [2]]) is None


def binomial_quantile(total: int, share: float, level: float) -> float:
    mass = 0.0
    for count in range(total + 1):
        mass += math.comb(total, count) * share**count * (1 - share) ** (total - count)
        if mass >= level:
            return count / total
    raise AssertionError


def test_bootstrap_of_one_vote_a_prompt_is_the_binomial():
    counts = np.repeat(np.eye(3, dtype=int), [30, 12, 8], axis=0)
    for (low, high), share in zip(bootstrap_intervals(counts), (0.6, 0.24, 0.16), strict=True):
        assert low == pytest.approx(binomial_quantile(50, share, 0.025), abs=0.021)
        assert high == pytest.approx(binomial_quantile(50, share, 0.975), abs=0.021)


def test_bootstrap_keeps_a_prompts_votes_together():
    counts = np.repeat(np.eye(3, dtype=int), [30, 12, 8], axis=0)
    # Five raters who agree on every prompt know no more than one does.
    assert bootstrap_intervals(5 * counts) == bootstrap_intervals(counts)
    spread = bootstrap_intervals(np.full((50, 3), 2))
    assert spread == [(pytest.approx(1 / 3), pytest.approx(1 / 3))] * 3
