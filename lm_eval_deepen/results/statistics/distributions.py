"""Binomial probabilities and Student's quantiles, from numpy and the standard library alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_DEVIATIONS = 12.0  # beyond so many, and _MARGIN more, no count has a chance worth adding
_MARGIN = 60
_EXACT_DEGREES = 200
_STEPS = 100


def bisected(low: float, high: float, is_above: Callable[[float], bool], steps: int = 60) -> float:
    """Return where `is_above` becomes true between `low`, where it is false, and `high`, to 2^-`steps` of their gap."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return high


def binomial(total: int, chance: float) -> NDArray[np.float64]:
    """Return the probabilities of 0 to `total` successes [total + 1]."""
    return _binomial(total, chance, 0, total)


def binomial_window(total: int, chance: float) -> tuple[int, NDArray[np.float64]]:
    """Return the first count that has a chance worth adding, and the probabilities of the counts from there on."""
    reach = _DEVIATIONS * math.sqrt(total * chance * (1 - chance)) + _MARGIN
    first, last = max(0, math.floor(total * chance - reach)), min(total, math.ceil(total * chance + reach))
    return first, _binomial(total, chance, first, last)


def _binomial(total: int, chance: float, first: int, last: int) -> NDArray[np.float64]:
    k = np.arange(first, last + 1)
    if chance <= 0 or chance >= 1:
        return (k == (0 if chance <= 0 else total)).astype(np.float64)
    logs = _log_factorials(1 << total.bit_length())  # few sizes, so that few are computed
    return np.exp(logs[total] - logs[k] - logs[total - k] + k * math.log(chance) + (total - k) * math.log1p(-chance))


@lru_cache(maxsize=64)
def _log_factorials(size: int) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.log(np.arange(1, size + 1)).cumsum()])


@lru_cache(maxsize=4096)
def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's distribution, to about 1e-9 of its size.

    Args:
        probability: above 0.5.
        degrees: of freedom, at least 1.
    """
    z = NormalDist().inv_cdf(probability)
    if degrees > _EXACT_DEGREES:  # Abramowitz and Stegun 1964, 26.7.5
        terms = (
            z,
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
            (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
        )
        return sum(term / degrees**power for power, term in enumerate(terms))
    low, high = z, 1e9
    for _ in range(_STEPS):
        middle = math.sqrt(low * high) if low > 0 else high / 2
        low, high = (middle, high) if _student(middle, degrees) < probability else (low, middle)
    return high


def _student(value: float, degrees: int) -> float:
    """Return the chance of at most `value`, which is not negative (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(value / math.sqrt(degrees))
    squared = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= squared * k / (k + 1)
    within = math.sin(angle) * total
    return 0.5 + ((angle + within) / math.pi if odd else within / 2)
