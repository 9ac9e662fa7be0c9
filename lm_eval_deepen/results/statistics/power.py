"""What a paired comparison can see: power of McNemar's test, and the smallest effect it detects."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from lm_eval_deepen.results.statistics.distributions import binomial, bisected, student_quantile

_NEGLIGIBLE = 1e-12  # probability of numbers of changed documents that are left out
_ROUNDING = 1e-9
_STEPS = 30  # of bisection: far below one document


def mcnemar_power(documents: int, discordance: float, drop: float, alpha: float, min_observed: float = 0.0) -> float:
    """Return the chance that the exact one-sided test finds a true drop, computed exactly.

    Every document changes with probability `discordance`; of the changes, those for the worse exceed those for the
    better by `drop` of all documents.

    Args:
        documents: number of paired documents.
        discordance: share of documents on which the two systems differ, at least `drop`.
        drop: share of documents lost, net.
        alpha: level of the test, one-sided.
        min_observed: observed drops below this share do not count as found.

    Raises:
        ValueError: shares that are not ``0 <= drop <= discordance <= 1``.
    """
    if not 0 <= drop <= discordance <= 1:
        raise ValueError(f"need 0 <= drop <= discordance <= 1, got drop {drop} and discordance {discordance}")
    if discordance == 0:
        return 0.0
    worse = (discordance + drop) / (2 * discordance)  # given that a document changed
    chances = binomial(documents, discordance)
    counts = np.flatnonzero(chances > _NEGLIGIBLE)
    power = 0.0
    for changed in map(int, counts):
        large = math.ceil((changed + min_observed * documents) / 2 - _ROUNDING)  # worse less better is enough
        power += chances[changed] * binomial(changed, worse)[max(_critical(changed, alpha), large) :].sum()
    return float(power)


def detectable_drop(
    documents: int, discordance: float, alpha: float, power: float = 0.8, min_observed: float = 0.0
) -> float | None:
    """Return the smallest drop, as a share of documents, that the exact one-sided test finds with chance `power`.

    `discordance` is what the two runs at hand show. The documents that a drop costs are taken to differ in addition to
    these, which is at most so, and so for runs that are equal otherwise.

    Returns:
        None where even losing every document would not be found: too few documents for this level.
    """
    if mcnemar_power(documents, 1.0, 1.0, alpha, min_observed) < power:
        return None

    def is_found(drop: float) -> bool:
        return mcnemar_power(documents, min(1.0, discordance + drop), drop, alpha, min_observed) >= power

    return bisected(0.0, 1.0, is_found, _STEPS)


def detectable_shift(
    stderr: float, documents: int, alpha: float, power: float = 0.8, min_observed: float = 0.0
) -> float | None:
    """Return the smallest shift of a real-valued score that the one-sided permutation test finds with chance `power`.

    The test compares the difference with its own scatter, as Student's does; the chance is that of the noncentral
    distribution, in its normal approximation (Johnson and Welch 1940, Biometrika 31:362-389).

    Args:
        stderr: standard error of the paired difference, in the score's unit.
        documents: number of paired documents.
        alpha: level of the test, one-sided.
        power: chance of detection.
        min_observed: observed shifts below this do not count as found.

    Returns:
        None where no shift would be found: too few documents to exchange for this level.
    """
    if documents < 2 or documents * math.log(2) < -math.log(alpha):
        return None
    normal = NormalDist().inv_cdf
    degrees = documents - 1
    critical = student_quantile(1 - alpha, degrees) if alpha < 0.5 else normal(1 - alpha)
    needed = critical * (1 - 1 / (4 * degrees)) + normal(power) * math.sqrt(1 + critical**2 / (2 * degrees))
    return max(needed * stderr, min_observed + normal(power) * stderr)


def paired_needs(differences: ArrayLike, alpha: float, power: float) -> tuple[float | None, float | None]:
    """Return what a two-sided paired comparison can see, in the normal approximation.

    Args:
        differences: of the documents, two or more; their mean is the measured difference.
        alpha: level of the test.
        power: chance of detection.

    Returns:
        The smallest true difference that these documents would show, and how many documents would show a true
        difference as large as the measured one. None for both with fewer than two documents, or where all differ
        alike, which says nothing of their scatter; for the second where they differ by 0 on average, too.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2 or not np.ptp(values) >= _NEGLIGIBLE:
        return None, None
    normal = NormalDist().inv_cdf
    per_root = (normal(1 - alpha / 2) + normal(power)) * float(values.std(ddof=1))
    mean = abs(float(values.mean()))
    return per_root / math.sqrt(len(values)), math.ceil((per_root / mean) ** 2) if mean > _NEGLIGIBLE else None


@lru_cache(maxsize=4096)
def _critical(changed: int, alpha: float) -> int:
    """Return the fewest changes for the worse, of `changed`, that the one-sided test calls significant."""
    tails = binomial(changed, 0.5)[::-1].cumsum()[::-1]  # P(X >= k)
    significant = np.flatnonzero(tails <= alpha)
    return int(significant[0]) if len(significant) else changed + 1
