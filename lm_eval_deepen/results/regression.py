"""Whether a candidate is worse than its baseline: one-sided paired tests, corrected over everything tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lm_eval_deepen.results.aggregation import Scores
from lm_eval_deepen.results.rows import MCNEMAR, SIGN_FLIP, Column
from lm_eval_deepen.results.statistics.correction import holm
from lm_eval_deepen.results.statistics.intervals import Interval, paired_interval
from lm_eval_deepen.results.statistics.paired import RESAMPLES, Alternative, discordant, mcnemar, sign_flip
from lm_eval_deepen.results.statistics.power import detectable_drop, detectable_shift

ROUNDING = 1e-9  # 0.5 - 0.4 is a drop of 0.1


@dataclass(frozen=True)
class Pair(Column):
    """One metric of one task in two runs: the same documents in the same order."""

    baseline: Scores
    candidate: Scores

    @property
    def binary(self) -> bool:
        """Whether every document is right or wrong in both runs."""
        return self.baseline.binary and self.candidate.binary

    @cached_property
    def changes(self) -> tuple[int, int]:
        """On how many documents the candidate does worse, and better."""
        below, above = discordant(self.baseline.per_document, self.candidate.per_document)
        return (below, above) if self.higher_is_better else (above, below)

    @cached_property
    def interval(self) -> Interval:
        """The difference, candidate less baseline, with its paired 95 % interval."""
        return paired_interval(self.baseline.values, self.candidate.values, self.baseline.statistic)


@dataclass(frozen=True)
class GateRule:
    """When a difference counts as a regression."""

    alpha: float = 0.05  # the chance of calling any regression where there is none, over everything tested
    min_effect: float = 0.0  # a smaller drop of the score, in the metric's unit, never counts, however significant
    power: float = 0.8  # the chance of detection that the minimal detectable effect is stated for
    resamples: int = RESAMPLES  # of the permutation test
    seed: int = 0  # seeds it


@dataclass(frozen=True)
class Tested:
    """The outcome for one pair."""

    pair: Pair
    test: str  # which test gave `p`
    p: float  # one-sided p-value of "not worse"
    p_holm: float  # the same, corrected over all pairs
    regressed: bool  # `p_holm` is at most alpha, and the loss at least the minimal effect
    among: int  # how many pairs were tested
    rule: GateRule  # by which

    @cached_property
    def detectable(self) -> float | None:
        """The smallest true drop that this comparison finds, see `detectable`."""
        return detectable(self.pair, self.among, self.rule)

    @property
    def difference(self) -> float:
        """Score of the candidate less that of the baseline."""
        return self.pair.candidate.score - self.pair.baseline.score


def decide(pairs: Sequence[Pair], rule: GateRule) -> list[Tested]:
    """Return the outcome for every pair. A regression of any of them is one of the whole."""
    tested = [_test(pair, rule) for pair in pairs]
    outcomes = []
    for pair, (test, p), p_holm in zip(pairs, tested, holm([p for _, p in tested]), strict=True):
        loss = (pair.baseline.score - pair.candidate.score) * (1 if pair.higher_is_better else -1)
        regressed = p_holm <= rule.alpha and loss > 0 and loss >= rule.min_effect - ROUNDING
        outcomes.append(Tested(pair, test, p, p_holm, regressed, len(pairs), rule))
    return outcomes


def _test(pair: Pair, rule: GateRule) -> tuple[str, float]:
    if pair.binary:
        return MCNEMAR, mcnemar(*pair.changes, "less")
    towards: Alternative = "less" if pair.higher_is_better else "greater"
    first, second = pair.baseline, pair.candidate
    return SIGN_FLIP, sign_flip(first.values, second.values, first.statistic, towards, rule.resamples, rule.seed)


def detectable(pair: Pair, tested: int, rule: GateRule) -> float | None:
    """Return the smallest true drop that a comparison finds with chance `rule.power`; None where it cannot be told.

    The level is the one that Holm gives the smallest p-value: alpha over the number of pairs, `tested`.
    """
    documents, level = pair.baseline.documents, rule.alpha / tested
    if pair.binary:
        return detectable_drop(documents, sum(pair.changes) / documents, level, rule.power, rule.min_effect)
    if not pair.interval.stderr:  # runs without any difference say nothing about how much real-valued scores scatter
        return None
    return detectable_shift(pair.interval.stderr, documents, level, rule.power, rule.min_effect)
