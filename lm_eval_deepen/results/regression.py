"""Whether a candidate is worse than its baseline: one-sided paired tests, corrected over everything tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lm_eval_deepen.results.aggregation import Scores
from lm_eval_deepen.results.rows import MCNEMAR, SIGN_FLIP
from lm_eval_deepen.results.statistics import (
    detectable_drop,
    detectable_shift,
    discordant,
    holm,
    mcnemar,
    paired_interval,
    sign_flip,
)
from lm_eval_deepen.results.statistics.paired import RESAMPLES

ROUNDING = 1e-9  # 0.5 - 0.4 is a drop of 0.1


@dataclass(frozen=True)
class Pair:
    """One metric of one task in two runs: the same documents in the same order."""

    task: str
    metric: str
    flt: str
    higher_is_better: bool
    baseline: Scores
    candidate: Scores

    @property
    def column(self) -> str:
        """Metric and filter, as tables name them."""
        return self.metric + (f" ({self.flt})" if self.flt != "none" else "")


@dataclass(frozen=True)
class GateRule:
    """When a difference counts as a regression."""

    alpha: float = 0.05  # the chance of calling any regression where there is none, over everything tested
    min_effect: float = 0.0  # a smaller drop of the score, in the metric's unit, never counts, however significant
    power: float = 0.8  # the chance of detection that the minimal detectable effect is stated for
    resamples: int = RESAMPLES  # of the permutation test
    seed: int = 0  # seeds it


@dataclass(frozen=True)
class Decision:
    """The outcome for one pair: by how much the candidate is worse, and whether that counts."""

    drop: float  # loss in the metric's unit, positive where the candidate is worse, whichever way is good
    test: str  # which test gave `p`
    p: float  # one-sided p-value of "not worse"
    p_holm: float  # the same, corrected over all pairs
    regressed: bool  # `p_holm` is at most alpha and `drop` at least the minimal effect


@dataclass(frozen=True)
class Details:
    """What is shown beside a decision."""

    # lower end of the paired 95 % interval of the difference, candidate less baseline; None where it cannot be told
    # (see `statistics.Interval`)
    low: float | None
    high: float | None  # upper end
    worse: int  # documents on which the candidate does worse
    better: int  # documents on which it does better
    # smallest true drop that this comparison finds with chance `Rule.power` at the level that Holm gives the smallest
    # p-value, alpha over the number of pairs; None where it cannot be told
    detectable: float | None


def decide(pairs: Sequence[Pair], rule: GateRule) -> list[Decision]:
    """Return a decision per pair. A regression of any of them is one of the whole."""
    tested = [_test(pair, rule) for pair in pairs]
    adjusted = holm([p for _, p in tested])
    drops = [(pair.baseline.score - pair.candidate.score) * (1 if pair.higher_is_better else -1) for pair in pairs]
    return [
        Decision(drop, test, p, p_holm, p_holm <= rule.alpha and drop > 0 and drop >= rule.min_effect - ROUNDING)
        for (test, p), p_holm, drop in zip(tested, adjusted, drops, strict=True)
    ]


def _test(pair: Pair, rule: GateRule) -> tuple[str, float]:
    worse, better = _changes(pair)
    if pair.baseline.binary and pair.candidate.binary:
        return MCNEMAR, mcnemar(worse, better, "less")
    p = sign_flip(
        pair.baseline.values,
        pair.candidate.values,
        pair.baseline.statistic,
        "less" if pair.higher_is_better else "greater",
        rule.resamples,
        rule.seed,
    )
    return SIGN_FLIP, p


def _changes(pair: Pair) -> tuple[int, int]:
    below, above = discordant(pair.baseline.per_document, pair.candidate.per_document)
    return (below, above) if pair.higher_is_better else (above, below)


def details(pair: Pair, tested: int, rule: GateRule) -> Details:
    """Return interval, counts and minimal detectable effect of one pair among `tested` ones."""
    interval = paired_interval(pair.baseline.values, pair.candidate.values, pair.baseline.statistic)
    worse, better = _changes(pair)
    level = rule.alpha / tested
    drop: float | None
    if pair.baseline.binary and pair.candidate.binary:
        share = (worse + better) / pair.baseline.documents
        drop = detectable_drop(pair.baseline.documents, share, level, rule.power, rule.min_effect)
    else:
        # Runs without any difference say nothing about how much real-valued scores scatter.
        scatter = interval.stderr
        drop = (
            detectable_shift(scatter, pair.baseline.documents, level, rule.power, rule.min_effect) if scatter else None
        )
    return Details(interval.low, interval.high, worse, better, drop)
