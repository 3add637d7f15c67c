"""Differences between two runs that share seeds and prompts, with 95 % intervals.

A model that is trained with another seed is another model, and other prompts would have given
another mean: both count. Over the seeds, which are few, Student's t; over the prompts, which are
many and the same for every seed, a bootstrap. The error of a single pair of seed and prompt is in
both, so an interval is a little wide, never narrow.
"""

# Shapes: S seeds, P prompts, R draws of the bootstrap.

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
TAILS = (2.5, 97.5)  # per cent
T_DRAWS = 1_000_000  # of Student's t, to know its quantiles
POWER = 80.0  # per cent: how often a difference is to be seen


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """In another unit; below 0 the ends change places."""
        ends = sorted((self.low * factor, self.high * factor))
        return Interval(self.mean * factor, *ends)


def paired_interval(first: Sequence, second: Sequence) -> Interval:
    """Of the mean of first - second, each (S, P) with NaN where a prompt has no value.

    A mean is of the seeds' means. P = 1: of figures that a run has one of, over the seeds alone.
    ValueError for fewer than two seeds, other shapes, or a seed without a pair.
    """
    pairs = differences(first, second)
    seeds = len(pairs)
    if seeds < 2:
        raise ValueError(f"{seeds} seed has no interval, wanted at least 2")
    means = np.nanmean(pairs, 1)
    error = means.std(ddof=1) / math.sqrt(seeds)
    spread = error * _students_t(seeds - 1, DRAWS)
    low, high = np.percentile(_resampled_means(pairs) + spread, TAILS)
    return Interval(float(means.mean()), float(low), float(high))


def differences(first: Sequence, second: Sequence) -> np.ndarray:
    """first - second (S, P); ValueError where they are no pairs."""
    first, second = (np.asarray(part, dtype=np.float64) for part in (first, second))
    if first.shape != second.shape or first.ndim != 2 or not first.size:
        raise ValueError(
            f"figures of {first.shape} and {second.shape} are no pairs: wanted (seeds, prompts)"
        )
    pairs = first - second
    if np.isnan(pairs).all(1).any():
        raise ValueError("a seed has no prompt with figures of both runs")
    return pairs


@functools.lru_cache(maxsize=4)
def _students_t(freedom: int, draws: int) -> np.ndarray:
    """The quantiles (R,) of Student's t in equal steps, in a random order: as many values drawn at
    random would have ends of an interval 4 % off."""
    generator = np.random.default_rng(0)
    drawn = generator.standard_t(freedom, T_DRAWS)
    quantiles = np.quantile(np.concatenate([drawn, -drawn]), (np.arange(draws) + 0.5) / draws)
    return generator.permutation(quantiles)


@functools.lru_cache(maxsize=4)
def _times_drawn(prompts: int, draws: int) -> np.ndarray:
    """How often each prompt is drawn, (R, P): the same for every comparison."""
    generator = np.random.default_rng(1)
    return generator.multinomial(prompts, np.full(prompts, 1 / prompts), draws).astype(np.float64)


def _resampled_means(pairs: np.ndarray) -> np.ndarray:
    """Means (R,) with the prompts drawn anew, the same ones for every seed."""
    count = pairs.shape[1]
    if count == 1:
        return np.full(DRAWS, pairs.mean())
    times = _times_drawn(count, DRAWS)
    there = ~np.isnan(pairs)
    weight = times @ there.T
    sums = times @ np.where(there, pairs, 0.0).T
    # A seed none of whose prompts were drawn keeps its own mean.
    means = np.where(weight > 0, sums / np.maximum(weight, 1), np.nanmean(pairs, 1))
    return means.mean(1)


def prompt_error(first: Sequence, second: Sequence) -> float:
    """The standard error that the prompts alone leave in the mean of first - second, (S, P)."""
    pairs = differences(first, second)
    return float(_resampled_means(pairs).std())


def seed_spread(scores: Sequence[Sequence[float]]) -> float:
    """The deviation of a difference between two runs from seed to seed, as if the runs had nothing
    in common: from means of runs (N, S), each trained with the same S seeds. Degrees of freedom:
    N · (S - 1)."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores of {scores.shape}, wanted (runs, at least 2 seeds)")
    return float(np.sqrt(2 * scores.var(1, ddof=1).mean()))


def smallest_difference(spread: float, error: float, seeds: int) -> float:
    """The smallest true difference whose interval leaves out 0 in 80 of 100 repetitions, for a
    deviation `spread` from seed to seed and a standard error `error` of the prompts."""
    generator = np.random.default_rng(0)
    seed_error = spread / math.sqrt(seeds)
    normal = generator.standard_normal((2, DRAWS))
    widths = seed_error * _students_t(seeds - 1, DRAWS) + error * normal[0]
    estimates = math.hypot(seed_error, error) * normal[1]
    return float(np.percentile(widths, TAILS[1]) + np.percentile(estimates, POWER))
