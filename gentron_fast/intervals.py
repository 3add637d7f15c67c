"""Intervals of shares and medians."""

import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL = 0.95


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of the share count / total, 95 %, trials taken as independent."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, weight = count / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / weight
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / weight
    # At 0 and all of them rounding would leave 1e-17 and 1 - 1e-16.
    return (0.0 if count == 0 else centre - half, 1.0 if count == total else centre + half)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Between two of the values, by their ranks, 95 %: half of all are below the median. Fewer than
    six have all of them as their interval, which is less. ValueError for none."""
    if not len(values):
        raise ValueError("no values have no median")
    z, count, ranked = NormalDist().inv_cdf((1 + LEVEL) / 2), len(values), sorted(values)
    low = max(math.floor((count - z * math.sqrt(count)) / 2) - 1, 0)
    return ranked[low], ranked[count - 1 - low]
