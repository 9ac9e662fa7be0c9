"""Rows of a table: a system's score and its paired comparison with a reference, corrected over the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from lm_eval_deepen.results.aggregation import Scores
from lm_eval_deepen.results.statistics.correction import Comparisons, level_of_each, rivals, step_down
from lm_eval_deepen.results.statistics.intervals import CONFIDENCE
from lm_eval_deepen.results.statistics.paired import RESAMPLES, discordant, mcnemar, sign_flip

Verdict = Literal["better", "worse", "not significant"]
MCNEMAR, MCNEMAR_MID_P, SIGN_FLIP = "exact McNemar test", "mid-p McNemar test", "paired permutation test"


@dataclass(frozen=True)
class Comparison:
    """A system against a reference on the same documents."""

    reference: str  # the reference's name
    difference: float  # score less the reference's score, in the metric's unit
    low: float | None  # lower end of its confidence interval; None where it cannot be told (see `statistics.Interval`)
    high: float | None  # upper end
    # confidence of the interval by itself: 0.95 against a reference that was given, more against one that was picked,
    # so that 95 % of the intervals shown beside each other hold (see `statistics.level_of_each`)
    level: float
    test: str  # which test gave `p`
    p: float  # two-sided p-value of this comparison, as if it were the only one and its reference given
    # the same, corrected over the table and for the choice of the reference; None before `corrected`
    p_holm: float | None
    # of which systems the reference is the best on these documents, its own name included; its name alone where it was
    # given
    candidates: tuple[str, ...]
    below: int  # documents on which the system scores below the reference
    above: int  # documents on which it scores above
    agreement: float | None  # share of documents with the same score; None where scores are not averages of documents


@dataclass(frozen=True)
class Column:
    """One metric of one task."""

    task: str  # name of the task
    metric: str  # name of the metric
    flt: str  # name of the harness's filter
    higher_is_better: bool | None  # which way is good; None if unknown

    @property
    def shown_metric(self) -> str:
        """Metric, and the filter where there is one."""
        return self.metric + (f" ({self.flt})" if self.flt != "none" else "")

    @property
    def column(self) -> str:
        """Task, metric, and the filter where there is one."""
        return f"{self.task} {self.shown_metric}"


@dataclass(frozen=True)
class ScoreRow(Column):
    """One system on one metric of one task."""

    system: str  # name of the system
    documents: int  # how many were scored, the same for every row of a column
    score: float  # the aggregated score over these
    stderr: float | None  # its standard error; None with fewer than two documents
    low: float | None  # lower end of the score's 95 % interval; None where it cannot be told
    high: float | None  # upper end
    # the score of whoever does best on each document, among the systems of `pool`; None if unknown
    oracle: float | None
    pool: tuple[str, ...]  # whose best `oracle` is
    comparison: Comparison | None  # against the reference; None in the reference's own row
    # further figures to show, by heading: seconds per document, tokens per document
    extra: Mapping[str, float | None] = field(default_factory=dict)

    def verdict(self, alpha: float) -> Verdict | None:
        """Return what the corrected p-value allows to say; None in the reference's row.

        Where it is not known which way is good, a significant difference upwards reads ``better``.
        """
        if self.comparison is None:
            return None
        p = self.comparison.p if self.comparison.p_holm is None else self.comparison.p_holm
        if p > alpha:
            return "not significant"
        return "better" if (self.comparison.difference > 0) == (self.higher_is_better is not False) else "worse"


@dataclass(frozen=True)
class Measured(Column):
    """One metric of one task, measured for several systems on the same documents in the same order."""

    scores: Mapping[str, Scores]  # by system
    # further figures by system, then by heading
    extra: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    def best(self, systems: Sequence[str]) -> str:
        """Return the system with the best score, the first of several."""
        sign = -1.0 if self.higher_is_better is False else 1.0
        return max(systems, key=lambda system: sign * self.scores[system].score)

    def level(self, candidates: Sequence[str], seed: int = 0) -> float:
        """Return the confidence of each interval of a difference to the best of `candidates`, see `Comparison`."""
        if len(candidates) < 2:
            return CONFIDENCE
        shares = np.stack([self.scores[name].shares for name in candidates], axis=1)
        competing = rivals(shares, self.higher_is_better is not False, seed)
        return level_of_each(CONFIDENCE, len(self.scores), competing)


def rows_of(
    measured: Measured,
    candidates: Sequence[str] | None = None,
    pool: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    mid_p: bool = False,
) -> list[ScoreRow]:
    """Return a row per system, each compared with the best of `candidates`.

    A leaderboard passes its single members as `candidates` and `pool`: every row then states its difference to the
    best single member, and the oracle "any member right". The best is picked on these documents, which `corrected` and
    the intervals allow for.

    Args:
        measured: the metric's scores by system.
        candidates: the best of these is the reference; one name fixes it. Default: all systems.
        pool: whose oracle is given. Default: the reference and the row's own system.
        resamples: of the permutation test.
        seed: seeds it, and the draws that tell how many candidates compete for being the reference.
        mid_p: McNemar's test with mid-p instead of exact p-values.
    """
    names = tuple(dict.fromkeys(candidates or measured.scores))
    reference, level = measured.best(names), measured.level(names, seed)
    return [
        ScoreRow(
            task=measured.task,
            metric=measured.metric,
            flt=measured.flt,
            higher_is_better=measured.higher_is_better,
            system=system,
            documents=scores.documents,
            score=scores.score,
            stderr=scores.stderr,
            low=interval.low,
            high=interval.high,
            oracle=oracle(measured, members),
            pool=members,
            comparison=None
            if system == reference
            else compare(reference, measured.scores[reference], scores, resamples, seed, mid_p, level, names),
            extra=measured.extra.get(system, {}),
        )
        for system, scores in measured.scores.items()
        for interval in [scores.interval()]
        for members in [tuple(pool) if pool else tuple(dict.fromkeys((reference, system)))]
    ]


def compare(
    reference: str,
    first: Scores,
    second: Scores,
    resamples: int = RESAMPLES,
    seed: int = 0,
    mid_p: bool = False,
    level: float = CONFIDENCE,
    candidates: tuple[str, ...] = (),
) -> Comparison:
    """Return the paired comparison of `second` with `first`, the reference: same documents, same order."""
    below, above = discordant(first.per_document, second.per_document)
    if first.binary and second.binary:
        test, p = MCNEMAR_MID_P if mid_p else MCNEMAR, mcnemar(below, above, mid_p=mid_p)
    else:
        test = SIGN_FLIP
        p = sign_flip(first.values, second.values, first.statistic, resamples=resamples, seed=seed)
    interval = second.change(first, level)
    return Comparison(
        reference=reference,
        difference=interval.estimate,
        low=interval.low,
        high=interval.high,
        level=level,
        test=test,
        p=p,
        p_holm=None,
        candidates=candidates or (reference,),
        below=below,
        above=above,
        agreement=1 - (below + above) / first.documents if first.averaged else None,
    )


def oracle(measured: Measured, pool: Sequence[str]) -> float | None:
    """Return the mean over documents of the best score among `pool`: for right and wrong, "any of them right".

    None for one system alone, where the score is no average of documents, or where it is unknown which way is good.
    """
    if len(pool) < 2:
        return None
    members = [measured.scores[name] for name in pool]
    if measured.higher_is_better is None or not all(scores.averaged for scores in members):
        return None
    stacked = np.stack([scores.per_document for scores in members])
    return float((stacked.max(axis=0) if measured.higher_is_better else stacked.min(axis=0)).mean())


def corrected(rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """Return the rows with p-values corrected over all comparisons among them, and for how references were picked."""
    columns: dict[tuple[str, str, str], list[int]] = {}
    for at, row in enumerate(rows):
        if row.comparison:
            columns.setdefault((row.task, row.metric, row.flt), []).append(at)
    families = []
    for places in columns.values():
        pairs = [(rows[at].system, one) for at in places if (one := rows[at].comparison) is not None]
        picked = tuple(system in one.candidates for system, one in pairs)
        families.append(Comparisons(p_values=tuple(one.p for _, one in pairs), candidates=picked))
    adjusted = step_down(families)
    p_holm: dict[int, float] = {}
    for places, p_values in zip(columns.values(), adjusted, strict=True):
        p_holm.update(zip(places, p_values, strict=True))
    return [
        replace(row, comparison=replace(row.comparison, p_holm=p_holm[at])) if row.comparison else row
        for at, row in enumerate(rows)
    ]
