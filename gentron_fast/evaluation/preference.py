"""Win, draw and lose as statistics: intervals, a test, and how far raters agree."""

import math
from collections.abc import Sequence

import numpy as np

from gentron_fast.intervals import LEVEL

RESAMPLES = 10_000


def bootstrap_intervals(counts: np.ndarray) -> list[tuple[float, float]]:
    """Percentile intervals of each answer's share, 95 %: whole prompts are drawn again.

    counts (P, K): how often each of P prompts got each of K answers. The votes of a prompt stay
    together, so that several raters of one prompt do not count as independent.
    """
    generator = np.random.default_rng(0)
    prompts = len(counts)
    shares = []
    for _ in range(10):  # a tenth at a time: less memory
        drawn = generator.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES // 10)
        sums = drawn @ counts
        shares.append(sums / sums.sum(1, keepdims=True))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(np.concatenate(shares), [tail, 100 - tail], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p of so uneven a split, or more, where each side has chance 1/2."""
    total = wins + losses
    tail = sum(math.comb(total, count) for count in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**total)


def krippendorff_alpha(units: Sequence[Sequence[int]], ordinal: bool = True) -> float | None:
    """Krippendorff's α of several raters: 1 is full agreement, 0 that of chance.

    units: for each unit the ratings that it got, whole numbers from 0; units of fewer than two do
    not count. ordinal: two ratings differ by how many ratings lie between them; else any two that
    differ do so equally. None where α is not defined: no unit has two ratings, or all are the same.
    """
    units = [unit for unit in units if len(unit) > 1]
    if not units:
        return None
    values = 1 + max(map(max, units))
    counts = np.stack([np.bincount(unit, minlength=values) for unit in units]).astype(float)
    raters = counts.sum(1)
    totals = counts.sum(0)
    # How often two raters of a unit gave c and k, and how often any two ratings are c and k.
    observed = np.einsum("uc,uk,u->ck", counts, counts, 1 / (raters - 1))
    observed -= np.diag((counts / (raters - 1)[:, None]).sum(0))
    expected = (np.outer(totals, totals) - np.diag(totals)) / (totals.sum() - 1)
    if ordinal:
        middle = np.cumsum(totals) - totals / 2
        distance = (middle[:, None] - middle[None, :]) ** 2
    else:
        distance = 1 - np.eye(values)
    chance = (expected * distance).sum()
    return float(1 - (observed * distance).sum() / chance) if chance else None
