"""Tests of one system against another on the same documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Alternative = Literal["two-sided", "less", "greater"]
Values = NDArray[np.float64]
# From the mean of each column [..., k] to one score [...].
Statistic = Callable[[Values], Values]

RESAMPLES = 10_000
_CHUNK = 4_000_000  # random numbers held at a time
_TIE = 1e-12  # relative: sums of the same numbers in another order are ties


def discordant(first: Values, second: Values) -> tuple[int, int]:
    """Return on how many documents `second` [n] is below and above `first` [n]."""
    return int((second < first).sum()), int((second > first).sum())


def mcnemar(below: int, above: int, alternative: Alternative = "two-sided", mid_p: bool = False) -> float:
    """Return the p-value of McNemar's conditional test, exact at every size.

    Given that a document changed, it is as likely to have changed either way if the systems are equally good, so that
    `above` is binomial with probability 1/2 (McNemar 1947, Psychometrika 12:153-157).

    Args:
        below: documents that the first system alone gets right.
        above: documents that the second system alone gets right.
        alternative: ``less`` asks whether the second system is worse, ``greater`` whether it is better.
        mid_p: count half of the probability of the observed table (Fagerland et al. 2013, BMC Medical Research
            Methodology 13:91): less conservative, but not certain to keep its level.

    Raises:
        ValueError: a negative count.
    """
    if min(below, above) < 0:
        raise ValueError(f"counts of documents cannot be negative, got {below} and {above}")
    if alternative == "two-sided":
        return min(1.0, 2 * _tail(min(below, above), below + above, mid_p))
    return _tail(above if alternative == "less" else below, below + above, mid_p)


def _tail(count: int, total: int, mid_p: bool) -> float:
    """Return P(X <= count) for X ~ Binomial(total, 1/2), in whole numbers until the last division."""
    term, cumulated = 1, 0  # term: total choose k
    for k in range(count + 1):
        cumulated += term
        last = term
        term = term * (total - k) // (k + 1)
    doubled = 2 * cumulated - (last if mid_p else 0)
    return doubled / 2 ** (total + 1)


def mean_of_first(means: Values) -> Values:
    """The score of a metric that is averaged: the mean of its only column."""
    return means[..., 0]


def sign_flip(
    first: Values,
    second: Values,
    statistic: Statistic = mean_of_first,
    alternative: Alternative = "two-sided",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """Return the p-value of the paired permutation test on the difference of scores, `second` less `first`.

    If the systems are equally good, exchanging their answers to a document changes nothing: the observed difference is
    one of those that random exchanges give (Fisher 1935, The Design of Experiments, section 21). All exchanges are
    tried where there are no more of them than `resamples`; otherwise the observed one is counted among random ones,
    (1 + hits) / (1 + resamples).

    Args:
        first: values of a document, one row each [n, k].
        second: the same documents' values from the other system [n, k].
        statistic: from the means of the columns [..., k] to the score [...].
        alternative: ``less``: `second` scores less.
        resamples: random exchanges.
        seed: seeds them.
    """
    differences = second - first
    changed = differences[(differences != 0).any(axis=1)] / len(first)  # [m, k]
    if not len(changed):
        return 1.0
    low, high = first.mean(axis=0), second.mean(axis=0)
    observed = float(statistic(high) - statistic(low))
    exact = 2 ** min(len(changed), 62) <= resamples
    hits = total = 0
    for exchanged in _exchanges(len(changed), resamples, seed, exact):  # [r, m], 1: exchanged
        moved = exchanged @ changed  # [r, k]
        found = statistic(high - moved) - statistic(low + moved)
        hits += int(_as_extreme(found, observed, alternative).sum())
        total += len(found)
    return hits / total if exact else (1 + hits) / (1 + total)


def _as_extreme(found: Values, observed: float, alternative: Alternative) -> NDArray[np.bool_]:
    slack = _TIE * max(1.0, abs(observed))
    if alternative == "two-sided":
        return np.abs(found) >= abs(observed) - slack
    return found <= observed + slack if alternative == "less" else found >= observed - slack


def _exchanges(pairs: int, resamples: int, seed: int, exact: bool) -> Iterator[Values]:
    if exact:
        numbers = np.arange(2**pairs)[:, None]
        yield ((numbers >> np.arange(pairs)) & 1).astype(np.float64)
        return
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // pairs)
    for start in range(0, resamples, rows):
        yield generator.integers(2, size=(min(rows, resamples - start), pairs)).astype(np.float64)
