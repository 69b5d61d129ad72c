"""Student's t distribution: quantiles, and intervals of a mean over few scenes, without scipy."""

from __future__ import annotations

import functools
import math
from statistics import NormalDist

_SUMMED = 1000  # degrees of freedom up to which the finite sum is taken; beyond, four terms of the expansion are exact


@functools.lru_cache(maxsize=256)
def t_quantile(level: float, degrees: int) -> float:
    """The two-sided quantile: with probability `level`, Student's t lies between minus and plus this value.

    For whole degrees of freedom the probability is a finite sum of cosines (Abramowitz & Stegun, 26.7.3 and 26.7.4),
    which is inverted by bisection; above 1000 degrees the expansion around the normal quantile (26.7.5) is exact to
    rounding.

    Args:
        level: probability between the two values, above 0 and below 1.
        degrees: degrees of freedom, 1 or more.

    Raises:
        ValueError: `level` or `degrees` is out of range.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}, wanted a probability above 0 and below 1.")
    if not isinstance(degrees, int) or degrees < 1:
        raise ValueError(f"degrees is {degrees!r}, wanted a whole number of at least 1.")
    if degrees > _SUMMED:
        return _expanded(level, degrees)
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:  # until no number lies between
        low, high = (middle, high) if _between(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _between(angle: float, degrees: int) -> float:
    """Probability of ``|t| <= sqrt(degrees) tan(angle)``."""
    cosine, first = math.cos(angle), degrees % 2
    term = cosine if first else 1.0
    total = 0.0
    for k in range(first + 1, degrees, 2):  # one term for each two degrees: cos^(k-1) times a ratio of factorials
        total += term
        term *= cosine * cosine * k / (k + 1)
    if first:
        return (2 / math.pi) * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def _expanded(level: float, degrees: int) -> float:
    z = NormalDist().inv_cdf((1.0 + level) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def t_interval(mean: float, standard_error: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The interval that holds the true mean with probability `level`, where values are about normal.

    Args:
        mean: of the n values.
        standard_error: of the mean: their standard deviation (n - 1 in the denominator) divided by ``sqrt(n)``.
        n: number of values.
        level: confidence, above 0 and below 1.

    Returns:
        Lower and upper end; NaN for fewer than two values, which say nothing about their spread.
    """
    if n < 2 or math.isnan(standard_error):
        return math.nan, math.nan
    half = t_quantile(level, n - 1) * standard_error
    return mean - half, mean + half
