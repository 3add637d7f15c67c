"""Intervals of shares."""

import math
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
