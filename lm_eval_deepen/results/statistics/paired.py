"""Tests of one system against another on the same documents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Alternative = Literal["two-sided", "less", "greater"]
Values = NDArray[np.float64]
# From the mean of each column [..., k] to one score [...].
Statistic = Callable[[Values], Values]

RESAMPLES = 10_000
MOST_RESAMPLES = 1_000_000
LARGEST_SEED = 2**32 - 1
_CHUNK = 4_000_000  # random numbers held at a time
_TIE = 1e-12  # relative
_TILTS = (2.0, 4.0, 6.0)  # standard deviations of the difference to which exchanges are drawn


def discordant(first: Values, second: Values) -> tuple[int, int]:
    """Return on how many documents `second` [n] is below and above `first` [n]."""
    return int((second < first).sum()), int((second > first).sum())


@lru_cache(maxsize=65536)
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
    tried where there are no more of them than `resamples`. Otherwise random ones are drawn, half of them with equal
    chances, half with chances that favour one system, and weighed by how much too often they are drawn so: small
    p-values, which a correction for many comparisons needs, are not bounded by the number of resamples. The observed
    exchange counts with its own weight, which makes the p-value valid, whatever is drawn (Harrison 2012, Biometrika
    99:57-69).

    Args:
        first: values of a document, one row each [n, k].
        second: the same documents' values from the other system [n, k].
        statistic: from the means of the columns [..., k] to the score [...].
        alternative: ``less``: `second` scores less.
        resamples: random exchanges, 1 to `MOST_RESAMPLES`.
        seed: seeds them, 0 to `LARGEST_SEED`.

    Raises:
        ValueError: a number of resamples or a seed outside these bounds.
    """
    check_resampling(resamples, seed)
    differences = second - first
    changed = differences[(differences != 0).any(axis=1)] / len(first)  # [m, k]
    if not len(changed):
        return 1.0
    low, high = first.mean(axis=0), second.mean(axis=0)
    observed = float(statistic(high) - statistic(low))
    if not math.isfinite(observed):  # a score without bound: no exchange is known to be less extreme
        return 1.0
    # Sums of the same numbers in another order are ties; they are as exact as the scores are large.
    slack = _TIE * max(1.0, abs(float(statistic(high))), abs(float(statistic(low))))

    def extreme(exchanged: Values) -> NDArray[np.bool_]:
        moved = exchanged @ changed  # [r, m] @ [m, k]
        sums = statistic(high - moved) - statistic(low + moved)
        if alternative == "two-sided":
            return np.abs(sums) >= abs(observed) - slack
        return sums <= observed + slack if alternative == "less" else sums >= observed - slack

    if 2 ** min(len(changed), 62) <= resamples:
        every_exchange = (np.arange(2 ** len(changed))[:, None] >> np.arange(len(changed))) & 1  # [2^m, m]
        return float(extreme(every_exchange.astype(np.float64)).mean())
    # What a document moves at first order; its sign, and nothing else of it, depends on which system is which.
    middle = (low + high) / 2
    moves = statistic(middle + changed / 2) - statistic(middle - changed / 2)  # [m]
    drawn = _Exchanges.of(np.abs(moves), alternative)
    total = drawn.weight(moves.sum())
    for exchanged, weight in drawn.draw(moves, resamples, seed):
        total += float(weight[extreme(exchanged)].sum())
    return min(1.0, float(total) / (1 + resamples))


def check_resampling(resamples: int, seed: int) -> None:
    """Raise ValueError for numbers that resampling cannot take."""
    if not 1 <= resamples <= MOST_RESAMPLES:
        raise ValueError(f"resamples must lie between 1 and {MOST_RESAMPLES:,}; got {resamples}")
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed must lie between 0 and {LARGEST_SEED}; got {seed}")


@dataclass(frozen=True)
class _Exchanges:
    """A mixture of distributions of exchanges, and how far it is from equal chances.

    Under the tilt t, a document that moves the difference by a moves it upwards with odds exp(2 t a). How likely all
    moves are together, against equal chances, is then a function of their sum S alone: exp(t S) / product of cosh(t a).
    """

    sizes: Values  # of the documents' moves [m]
    tilts: Values  # of the parts of the mixture [q]
    shares: Values  # of the parts [q]
    norms: Values  # logarithms of the products of cosh(t a) [q]

    @classmethod
    def of(cls, sizes: Values, alternative: Alternative) -> _Exchanges:
        steps = np.array(_TILTS)
        towards = {"greater": steps, "less": -steps, "two-sided": np.concatenate([steps, -steps])}[alternative]
        scale = math.sqrt(float((sizes**2).sum()))
        tilts = np.concatenate([[0.0], towards / scale if scale > 0 else 0 * towards])
        shares = np.concatenate([[0.5], np.full(len(towards), 0.5 / len(towards))])
        bent = np.abs(tilts[:, None] * sizes)
        norms = (bent + np.log1p(np.exp(-2 * bent)) - math.log(2)).sum(axis=1)
        return cls(sizes, tilts, shares, norms)

    def weight(self, sums: Values) -> Values:
        """Return how much likelier sums of moves are under equal chances than under the mixture."""
        logs = np.multiply.outer(sums, self.tilts) - self.norms + np.log(self.shares)
        top = logs.max(axis=-1)
        return np.exp(-top) / np.exp(logs - top[..., None]).sum(axis=-1)

    def draw(self, moves: Values, resamples: int, seed: int) -> Iterator[tuple[Values, Values]]:
        """Yield exchanges [r, m], 1: exchanged, and their weights [r]."""
        generator = np.random.default_rng(seed)
        rows = max(1, _CHUNK // len(moves))
        for tilt, count in zip(self.tilts, generator.multinomial(resamples, self.shares), strict=True):
            # The chance that a document is exchanged: that it then moves the difference the other way.
            chances = 1 / (1 + np.exp(2 * tilt * moves))
            for start in range(0, count, rows):
                exchanged = (generator.random((min(rows, count - start), len(moves))) < chances).astype(np.float64)
                yield exchanged, self.weight(moves.sum() - 2 * exchanged @ moves)
