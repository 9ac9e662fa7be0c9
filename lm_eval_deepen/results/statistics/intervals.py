"""Confidence intervals of a score, and of the difference of two scores on the same documents.

All are score intervals: a hypothesised value is in the interval if the observed one is not too far from it, measured by
the variance under the hypothesis. The observed variance would be no measure: where few documents differ it is 0, or
nearly so, in many samples, and an interval made of it then misses the truth. `docs/ci.md` has the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from lm_eval_deepen.results.statistics.distributions import binomial_window, bisected, student_quantile
from lm_eval_deepen.results.statistics.paired import Statistic, Values, discordant, mean_of_first

CONFIDENCE = 0.95
# Of a document: by exact enumeration, the lowest coverage of differences of 0/1 values is 0.935 instead of 0.930.
CONTINUITY = 0.075
FEW = 10  # documents
_GRID = 32
_CONSTANT = 1e-12  # relative: values that differ less are the same number, summed in another order


@dataclass(frozen=True)
class Interval:
    """A score or a difference of scores with its confidence interval.

    Its ends are None where they cannot be told: of fewer than two documents, or if there is no difference on any of
    them and no known range, which says nothing of how much they could differ.
    """

    estimate: float  # the observed value
    low: float | None  # lower end
    high: float | None  # upper end
    stderr: float | None  # standard error; None with fewer than two documents
    confidence: float  # nominal coverage


def paired_interval(
    first: Values, second: Values, statistic: Statistic = mean_of_first, confidence: float = CONFIDENCE
) -> Interval:
    """Return the interval of the score of `second` less that of `first`.

    Of two outcomes, right and wrong: Tango's score interval for the difference of paired proportions (1998, Statistics
    in Medicine 17:891-908), with a continuity correction of `CONTINUITY` of a document. Of anything else:
    `change_interval`.

    Args:
        first: values of a document, one row each [n, k].
        second: the same documents' values from the other system [n, k].
        statistic: from the means of the columns [..., k] to the score [...].
        confidence: nominal coverage.
    """
    if statistic is mean_of_first and len(first) > 1:
        change = second - first
        if outcomes := _outcomes(first, second):
            scale = outcomes[1] - outcomes[0]
            below, above = discordant(first[:, 0], second[:, 0])
            low, high = paired_proportions(below, above, len(first), confidence)
            return Interval(float(change.mean()), scale * low, scale * high, _stderr_of_mean(change[:, 0]), confidence)
        return change_interval(change, statistic, confidence, (-1.0, 1.0) if _in_unit(first, second) else None)
    columns = first.shape[1]
    return change_interval(
        np.hstack([first, second]),
        lambda means: statistic(means[..., columns:]) - statistic(means[..., :columns]),
        confidence,
    )


def score_interval(values: Values, statistic: Statistic = mean_of_first, confidence: float = CONFIDENCE) -> Interval:
    """Return the interval of a score over documents [n, k].

    Of two outcomes, right and wrong: Blaker's exact interval, which lies between them. Of anything else:
    `change_interval`; of values within [0, 1] it stays within [0, 1].
    """
    averaged = statistic is mean_of_first and len(values) > 1
    if averaged and (outcomes := _outcomes(values)):
        wrong, right = outcomes
        low, high = proportion_interval(int((values == right).sum()), len(values), confidence)
        ends = (wrong + (right - wrong) * low, wrong + (right - wrong) * high)
        return Interval(float(values.mean()), *ends, _stderr_of_mean(values[:, 0]), confidence)
    interval = change_interval(values, statistic, confidence, (0.0, 1.0) if averaged and _in_unit(values) else None)
    # One value on every document says nothing of how much others could differ.
    return replace(interval, low=None, high=None) if interval.low == interval.high else interval


def change_interval(
    values: Values,
    statistic: Statistic = mean_of_first,
    confidence: float = CONFIDENCE,
    limits: tuple[float, float] | None = None,
) -> Interval:
    """Return the interval of any smooth function of means over documents [n, k].

    A document's share in the figure is its jackknife pseudo-value; of a mean that is its value. A hypothesised mean is
    tested with the variance of the likeliest distribution that has this mean (Owen 2001, Empirical Likelihood, chapter
    2), whose support is the observed values and, without weight of their own, two more: as far from the mean as the
    farthest value, on either side, so that it is not taken for granted that every kind of document was seen. Of fewer
    than `FEW` documents they are farther, by as much as Student's variance is larger than the normal one: else the
    interval of two would end at their values, and hold in half of all cases. Of the three values -1, 0 and 1 this is
    Tango's interval. Quantiles are Student's.

    Args:
        values: one row a document.
        statistic: from the means of the columns [..., k] to the figure [...].
        confidence: nominal coverage.
        limits: the least and the largest value that a document can have, if known.
    """
    estimate = float(statistic(values.mean(axis=0))) if len(values) else math.nan
    if len(values) < 2:
        return Interval(estimate, None, None, None, confidence)
    shares = pseudo_values(values, statistic)
    stderr = _stderr_of_mean(shares)
    reach = float(np.abs(shares - estimate).max()) if np.isfinite(shares).all() else math.nan
    if math.isnan(reach) or not (limits or np.any(shares)):
        return Interval(estimate, None, None, stderr, confidence)
    n = len(shares)
    quantile = student_quantile((1 + confidence) / 2, n - 1)
    wider = (quantile / NormalDist().inv_cdf((1 + confidence) / 2)) ** 2 if n < FEW else 1.0
    ends = (estimate - wider * reach, estimate + wider * reach)
    if reach <= _CONSTANT * max(1.0, abs(estimate)):  # the same on every document
        if limits is None:
            return Interval(estimate, estimate, estimate, 0.0, confidence)
        ends = limits
    elif limits is not None:
        ends = (max(limits[0], ends[0]), min(limits[1], ends[1]))
    squared = quantile**2 * n / (n - 1)
    low = score_end(shares - estimate, squared, ends[0] - estimate)
    high = score_end(estimate - shares, squared, estimate - ends[1])
    return Interval(estimate, estimate + low, estimate - high, stderr, confidence)


def mean_interval(parts: Sequence[Interval]) -> Interval:
    """Return the interval of the mean of figures of other documents each, off their own intervals.

    Each end is as far from the mean as the root of the summed squares of how far the parts' ends are from them, over
    their number (Zou and Donner 2008, Statistics in Medicine 27:1693-1702). So it stays where the parts' intervals
    stay, and the standard error is that of the harness. It cannot be told where that of a part cannot.
    """
    count, estimate = len(parts), sum(part.estimate for part in parts) / len(parts)
    errors = [part.stderr for part in parts if part.stderr is not None]
    stderr = math.hypot(*errors) / count if len(errors) == count else None
    below = [part.estimate - part.low for part in parts if part.low is not None]
    above = [part.high - part.estimate for part in parts if part.high is not None]
    if len(below) < count or len(above) < count:
        return Interval(estimate, None, None, stderr, parts[0].confidence)
    low, high = estimate - math.hypot(*below) / count, estimate + math.hypot(*above) / count
    return Interval(estimate, low, high, stderr, parts[0].confidence)


def standard_error(values: Values, statistic: Statistic = mean_of_first) -> float | None:
    """Return the standard error of a score over documents [n, k]; None with fewer than two.

    Of a mean, that of the harness: the sample standard deviation over the root of n. Of other scores the jackknife's.
    """
    return _stderr_of_mean(pseudo_values(values, statistic)) if len(values) > 1 else None


def pseudo_values(values: Values, statistic: Statistic = mean_of_first) -> Values:
    """Return every document's share in a score [n]: their mean is the score, their scatter that of the score.

    Tukey's jackknife, shifted so that the mean is the score itself and not the one corrected for bias.
    """
    if statistic is mean_of_first:
        return values[:, 0]
    n = len(values)
    if n < 2:
        return statistic(values)
    with np.errstate(over="ignore", invalid="ignore"):  # a score that is not finite has no interval
        without = statistic((values.sum(axis=0) - values) / (n - 1))
        return float(statistic(values.mean(axis=0))) + (n - 1) * (without.mean() - without)


def is_binary(values: Values) -> bool:
    """Return whether every value is 0 or 1."""
    return bool(((values == 0) | (values == 1)).all())


@lru_cache(maxsize=65536)
def proportion_interval(right: int, documents: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact interval of a proportion, `right` of `documents`.

    Blaker's (2000, Canadian Journal of Statistics 28:783-798): it covers at least as often as it says, and less often
    more than that than Clopper and Pearson's, in which it lies.
    """
    alpha = 1 - confidence
    return _blaker_low(right, documents, alpha), 1 - _blaker_low(documents - right, documents, alpha)


def _blaker_low(right: int, documents: int, alpha: float) -> float:
    """Return the least proportion that is accepted."""
    if right == 0:
        return 0.0
    # It lies between the lower ends of the one-sided intervals of level alpha / 2 and alpha.
    first, last = (_tail_reaches(right, documents, level) for level in (alpha / 2, alpha))
    places = np.linspace(first, last, _GRID)
    accepted = [_acceptability(right, documents, float(p)) > alpha for p in places]
    at = accepted.index(True) if True in accepted else _GRID - 1
    if at == 0:
        return first
    low, high = map(float, places[at - 1 : at + 1])
    return bisected(low, high, lambda p: _acceptability(right, documents, p) > alpha)


def _tail_reaches(right: int, documents: int, level: float) -> float:
    """Return the proportion under which `right` or more have chance `level`."""
    return bisected(0.0, right / documents, lambda chance: _tail(right, *binomial_window(documents, chance)) >= level)


def _tail(right: int, start: int, chances: Values) -> float:
    """Return the chance of `right` or more, from the chances of `start` and what follows it."""
    return float(chances[max(0, right - start) :].sum())


def _acceptability(right: int, documents: int, chance: float) -> float:
    """Return the chance of `right` or more, and of as many low counts as are together no likelier."""
    start, chances = binomial_window(documents, chance)
    tail = _tail(right, start, chances)
    lower = chances.cumsum()
    return tail + float(lower[lower <= tail * (1 + 1e-12)].max(initial=0.0))


@lru_cache(maxsize=65536)
def paired_proportions(below: int, above: int, documents: int, confidence: float) -> tuple[float, float]:
    """Return Tango's interval of a difference, from the documents that one of two systems alone has right."""
    return _tango_low(below, above, documents, confidence), -_tango_low(above, below, documents, confidence)


def _tango_low(below: int, above: int, documents: int, confidence: float) -> float:
    """Return the least difference that is not refuted."""
    n, observed = documents, (above - below) / documents
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)

    def refuted(difference: float) -> bool:
        # The likeliest share of documents that get worse, given the difference (Tango's equation 6).
        b = (2 * n - above + below) * difference - above - below
        root = b * b + 8 * n * below * difference * (1 - difference)
        worse = (math.sqrt(max(0.0, root)) - b) / (4 * n)
        variance = max(0.0, (2 * worse + difference - difference**2) / n)
        return max(0.0, observed - difference - CONTINUITY / n) ** 2 > quantile**2 * variance

    return bisected(-1.0, observed, lambda difference: not refuted(difference)) if refuted(-1.0) else -1.0


def score_end(centred: Values, squared: float, limit: float) -> float:
    """Return the lower end for values [n] of mean 0, `limit` being the least value that is allowed for.

    The likeliest distribution with mean m weighs a value d by 1 / (d - c), for a c at or below `limit`; its mean is
    m = c + H, H being the harmonic mean of d - c, and its variance (m - c)(0 - m). The score test refutes m where
    n m^2 exceeds `squared` times the variance. At the end both are equal: m = `squared` c / (n + `squared`), and H over
    the arithmetic mean of d - c, which is -c, is n / (n + `squared`). Where no c below the limit gives that, c is the
    limit, which then has a weight of its own.
    """
    n = len(centred)
    target, span = n / (n + squared), -limit
    least = float(centred.min())

    def evenness(c: float) -> float:
        return float(n / (1 / (centred - c)).sum() / -c) if c < least else 0.0

    c = limit
    if evenness(limit) < target:  # bisect the logarithm of the distance below the limit, in spans
        c -= math.exp(bisected(-40.0, 40.0, lambda log: evenness(limit - math.exp(log) * span) >= target)) * span
    return squared * c / (n + squared)


def _stderr_of_mean(values: Values) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _outcomes(*systems: Values) -> tuple[float, float] | None:
    """Return the two values that documents have, the smaller first: 0 and 1, or others; None if there are more.

    One value alone is 0 or 1 where it is one of these; any other says nothing of the other one. Nor do two documents,
    which have at most two values of however many.
    """
    low, high = min(float(values.min()) for values in systems), max(float(values.max()) for values in systems)
    if not all(((values == low) | (values == high)).all() for values in systems):
        return None
    if {low, high} <= {0.0, 1.0}:
        return 0.0, 1.0
    return (low, high) if low < high and len(systems[0]) > 2 else None


def _in_unit(*systems: Values) -> bool:
    return all(((values >= 0) & (values <= 1)).all() for values in systems)
