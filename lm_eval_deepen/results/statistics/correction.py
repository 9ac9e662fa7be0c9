"""Correction for looking at several comparisons, and for picking the reference on the same documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lm_eval_deepen.results.statistics.paired import Values

_DRAWS = 2_000


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down procedure, in the order given.

    Calling significant what is at most alpha keeps the chance of any false call among all of them below alpha, however
    they depend on each other (Holm 1979, Scandinavian Journal of Statistics 6:65-70).

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    (adjusted,) = step_down([Comparisons(tuple(p_values), (False,) * len(p_values))])
    return adjusted


@dataclass(frozen=True)
class Comparisons:
    """Systems that are compared with one reference on the same documents."""

    p_values: tuple[float, ...]  # of the systems
    # which of them might have been the reference themselves: the best of these and the reference was made the
    # reference, by its score on these documents. None of them where the reference was given
    candidates: tuple[bool, ...]

    def still_true(self, rejected: Sequence[bool]) -> int:
        """Return how many comparisons could have been shown whose two systems may be equal, given those that are not.

        Any candidate might have been the reference. Equal systems form groups, and one that differs from the reference
        is in another group: most pairs are equal if there are two groups, and the one of the reference is as large or
        as small as it can be.
        """
        others = len(self.p_values) - sum(self.candidates)  # never the reference
        candidates = 1 + sum(self.candidates)
        gone = [candidate for candidate, out in zip(self.candidates, rejected, strict=True) if out]
        return round(
            max(
                _pairs(x, y) + _pairs(candidates - x, others - y)
                for x in (1, candidates - sum(gone))
                for y in (0, others - (len(gone) - sum(gone)))
            )
        )


def step_down(columns: Sequence[Comparisons]) -> list[list[float]]:
    """Return p-values adjusted over all columns together, in the order given.

    The chance of any false call at level alpha is at most alpha, however the comparisons depend on each other and
    whichever candidate is best: a p-value is multiplied by the number of *all* comparisons that might have been shown
    and may be true, given that those with smaller p-values are false (Shaffer 1986, Journal of the American Statistical
    Association 81:826-831). With references that were given this is Holm's procedure.

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    every = [(p, c, i) for c, column in enumerate(columns) for i, p in enumerate(column.p_values)]
    if not all(0 <= p <= 1 for p, _, _ in every):
        raise ValueError(f"p-values lie in [0, 1], got {[p for p, _, _ in every]}")
    rejected = [[False] * len(column.p_values) for column in columns]
    adjusted = [[0.0] * len(column.p_values) for column in columns]
    left = [column.still_true(out) for column, out in zip(columns, rejected, strict=True)]
    largest = 0.0
    for p, c, i in sorted(every):
        largest = max(largest, min(1.0, sum(left) * p))
        adjusted[c][i] = largest
        rejected[c][i] = True
        left[c] = columns[c].still_true(rejected[c])
    return adjusted


def _pairs(candidates: float, others: float) -> float:
    """Return how many pairs with at least one candidate there are."""
    return candidates * (candidates - 1) / 2 + candidates * others


def level_of_each(confidence: float, systems: int, rivals: float) -> float:
    """Return the confidence of each interval of a difference to a picked reference, for `confidence` on the average.

    The best of several is best by luck, too, and its differences to the others are larger than the true ones. The
    intervals that are shown, one for each other system, are a choice from those of all pairs with a candidate. At the
    level 1 - (1 - `confidence`) * shown / all, the share of the shown intervals that miss is at most 1 - `confidence`
    (Benjamini and Yekutieli 2005, Journal of the American Statistical Association 100:71-81).

    Args:
        confidence: of the intervals that are shown.
        systems: how many there are, the reference among them.
        rivals: how many of them compete for being the reference; not always a whole number.
    """
    shown = systems - 1
    return 1 - (1 - confidence) * shown / max(shown, _pairs(rivals, systems - rivals))


def rivals(values: Values, higher_is_better: bool = True, seed: int = 0) -> float:
    """Return how many systems compete for being the best: 1 where it is beyond doubt which is, else up to all.

    It is the number of equally likely winners (Hill 1973, Ecology 54:427-432, of order 1/2) that has the diversity of
    the chances with which systems win when documents are drawn anew; these chances are simulated, scores being nearly
    normal.

    Args:
        values: each document's share in each system's score [n, systems].
        higher_is_better: which way is good.
        seed: seeds the draws.
    """
    n, systems = values.shape
    if systems < 2 or n < 2:
        return 1.0
    if not np.isfinite(values).all():
        return float(systems)  # nothing is known
    scores = values.mean(axis=0)
    covariance = np.atleast_2d(np.cov(values, rowvar=False)) / n
    variances, axes = np.linalg.eigh(covariance)
    draws = np.random.default_rng(seed).standard_normal((_DRAWS, systems))
    drawn = scores + draws * np.sqrt(np.maximum(variances, 0)) @ axes.T
    best = (drawn if higher_is_better else -drawn).argmax(axis=1)
    chances = np.bincount(best, minlength=systems) / _DRAWS
    return float(np.sqrt(chances).sum() ** 2)
