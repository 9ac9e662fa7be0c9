"""Confidence intervals of a score and of a paired difference, by resampling documents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from lm_eval_deepen.statistics.paired import RESAMPLES, Statistic, Values, mean_of_first

_FEW = 64  # distinct rows up to which drawing how often each occurs is cheaper than drawing documents
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A difference with its bias-corrected and accelerated (BCa) bootstrap interval.

    Attributes:
        estimate: the observed difference.
        low: lower end; None with fewer than two documents.
        high: upper end; None with fewer than two documents.
        stderr: standard deviation over the resamples.
        confidence: nominal coverage.
    """

    estimate: float
    low: float | None
    high: float | None
    stderr: float | None
    confidence: float


def paired_bootstrap(
    first: Values,
    second: Values,
    statistic: Statistic = mean_of_first,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the BCa interval of the score of `second` less that of `first`, documents drawn in pairs.

    Efron 1987, Journal of the American Statistical Association 82:171-185. Ties count half in the bias correction,
    which matters for 0/1 metrics. Runs that do not differ anywhere give an interval of no width: the data then hold
    no information about how much they could differ.

    Args:
        first: values of a document, one row each [n, k].
        second: the same documents' values from the other system [n, k].
        statistic: from the means of the columns [..., k] to the score [...].
        confidence: nominal coverage.
        resamples: number of resamples.
        seed: seeds them.
    """
    return _bca(np.hstack([first, second]), _difference(statistic, first.shape[1]), confidence, resamples, seed)


def standard_error(values: Values, statistic: Statistic = mean_of_first, seed: int = 0) -> float | None:
    """Return the standard error of a score over documents [n, k]; None with fewer than two.

    Of a mean, that of the harness: the sample standard deviation over the root of n. Of other scores by the bootstrap.
    """
    if len(values) < 2:
        return None
    if statistic is mean_of_first:
        return float(values[:, 0].std(ddof=1) / math.sqrt(len(values)))
    found = np.concatenate([statistic(means) for means in _resampled_means(values, RESAMPLES, seed)])
    return float(found.std(ddof=1))


def _difference(statistic: Statistic, columns: int) -> Statistic:
    return lambda means: statistic(means[..., columns:]) - statistic(means[..., :columns])


def _bca(values: Values, statistic: Statistic, confidence: float, resamples: int, seed: int) -> Interval:
    estimate = float(statistic(values.mean(axis=0)))
    if len(values) < 2:
        return Interval(estimate, None, None, None, confidence)
    found = np.concatenate([statistic(means) for means in _resampled_means(values, resamples, seed)])
    stderr = float(found.std(ddof=1))
    slack = 1e-12 * max(1.0, abs(estimate))
    below = float((found < estimate - slack).mean())
    ties = float((np.abs(found - estimate) <= slack).mean())
    if ties == 1:
        return Interval(estimate, estimate, estimate, 0.0, confidence)
    normal = NormalDist()
    share = min(max(below + ties / 2, 1 / (2 * resamples)), 1 - 1 / (2 * resamples))
    bias, acceleration = normal.inv_cdf(share), _acceleration(values, statistic)
    ends = []
    for level in ((1 - confidence) / 2, (1 + confidence) / 2):
        shifted = bias + normal.inv_cdf(level)
        ends.append(normal.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = np.quantile(found, ends)
    return Interval(estimate, float(low), float(high), stderr, confidence)


def _acceleration(values: Values, statistic: Statistic) -> float:
    """Return a sixth of the skewness of the jackknife values (Efron 1987, section 6)."""
    without = (values.sum(axis=0) - values) / (len(values) - 1)  # [n, k]
    scores = statistic(without)
    centred = scores.mean() - scores
    spread = float((centred**2).sum())
    return float((centred**3).sum() / (6 * spread**1.5)) if spread > 0 else 0.0


def _resampled_means(values: Values, resamples: int, seed: int) -> Iterator[Values]:
    """Yield means over documents drawn with replacement, [r, k] at a time."""
    generator = np.random.default_rng(seed)
    rows, counts = np.unique(values, axis=0, return_counts=True)
    if len(rows) <= _FEW:  # pairs of 0/1 values: four rows at most
        drawn = generator.multinomial(len(values), counts / len(values), size=resamples)
        yield drawn @ rows / len(values)
        return
    step = max(1, _CHUNK // values.size)
    for start in range(0, resamples, step):
        chosen = generator.integers(len(values), size=(min(step, resamples - start), len(values)))
        yield values[chosen].mean(axis=1)
