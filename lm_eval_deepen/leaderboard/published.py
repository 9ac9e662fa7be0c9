"""Published tables: what others measured, beside what is measured here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator

from lm_eval_deepen.config import FrozenDict, Keys, Shown
from lm_eval_deepen.errors import ConfigError, did_you_mean
from lm_eval_deepen.leaderboard.rows import Row

PUBLISHED, DISTANCE = "published", "from published (SE)"
# Metrics that are published as the harness gives them: in per cent, or as no share at all.
AS_GIVEN = frozenset("bleu chrf ter perplexity word_perplexity byte_perplexity bits_per_byte".split())
AGREES = 2.0  # standard errors
Verdict = Literal["agrees", "differs", "cannot be told"]


class PublishedTable(Keys):
    """The scores of one published table or picture."""

    table: str = Field(min_length=1, description="The table or figure of the publication.")
    read_in: str = Field(min_length=1, description="The source in which the scores were read.")
    note: str | None = Field(None, description="Other remarks.")
    metric: str | None = Field(
        None,
        description="The metric of the scores, such as `acc` or `exact_match,strict-match`; by default the only one "
        "that is shown.",
    )
    scores: Annotated[FrozenDict, Shown("a mapping of task to row to score, in per cent")] = Field(
        description="The scores by task, then by row; perplexities and bits are not in per cent."
    )

    def fits(self, metric: str, flt: str) -> bool:
        """Return whether its scores may be those of a column."""
        return self.metric in (None, metric, f"{metric},{flt}")

    @field_validator("scores")
    @classmethod
    def _are_numbers(cls, scores: FrozenDict) -> FrozenDict:
        for task, rows in scores.items():
            if not isinstance(rows, Mapping) or not rows:
                raise ConfigError(f"scores of {task} must be a mapping of row to score; got {rows!r}", key="scores")
            for row, score in rows.items():
                if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
                    raise ConfigError(f"scores: {task}: {row}: a score must be a number; got {score!r}", key="scores")
        return scores


def check_published(tables: Sequence[PublishedTable], tasks: Sequence[str], rows: Iterable[Row]) -> None:
    """Raise ConfigError where a table names a task or a row that the recipe has not, or a score stands twice."""
    groups = {row.group: row for row in rows}
    has = {(row.group, task) for row in rows for task in tasks if row.has(task)}
    seen: dict[tuple[str, str], list[str | None]] = {}
    for i, table in enumerate(tables):
        for task, scores in table.scores.items():
            if task not in tasks:
                near = did_you_mean(task, tasks)
                raise ConfigError(f"expected[{i}]: {task!r} is no task of the recipe.{near} Tasks: {', '.join(tasks)}")
            for name in scores:
                if name not in groups:
                    near = did_you_mean(name, groups)
                    raise ConfigError(
                        f"expected[{i}]: {name!r} is no row of the recipe.{near} Rows: {', '.join(groups)}"
                    )
                if (name, task) not in has:
                    raise ConfigError(f"expected[{i}]: row {name!r} does not have the column {task!r}")
                others = seen.setdefault((name, task), [])
                if any(_may_be_one(table.metric, other) for other in others):
                    raise ConfigError(f"expected[{i}]: the score of row {name!r} on {task!r} stands twice")
                others.append(table.metric)


def _may_be_one(first: str | None, second: str | None) -> bool:
    """Return whether two metrics, as tables say them, may be the same column."""
    (a, _, one), (b, _, two) = ((metric or "").partition(",") for metric in (first, second))
    return not (a and b) or (a == b and (not (one and two) or one == two))


def told_apart(
    tables: Iterable[PublishedTable], task: str, columns: Iterable[tuple[str, str]]
) -> tuple[tuple[PublishedTable, ...], list[str]]:
    """Return the tables but those whose scores of a task fit several columns, or none, and what is said of these.

    The columns of the task are given by metric and filter.
    """
    kept, unclear = [], []
    for table in tables:
        fitting = [f"{metric},{flt}" for metric, flt in columns if table.fits(metric, flt)]
        if task not in table.scores or len(fitting) == 1:
            kept.append(table)
        elif fitting:
            unclear.append(
                f"{table.table}: its scores of {task} stand beside none of {' and '.join(fitting)}: its metric fits all"
            )
        else:
            unclear.append(f"{table.table}: its scores of {task} are of {table.metric}, which is no column here")
    return tuple(kept), unclear


def figure(tables: Iterable[PublishedTable], row: str, task: str, metric: str, flt: str) -> float | None:
    """Return the published score of a row in a column, in the unit of the harness's metric; None where there is none.

    Shares are published in per cent.
    """
    for table in tables:
        score = table.scores.get(task, {}).get(row)
        if score is not None and table.fits(metric, flt):
            return float(score) if metric in AS_GIVEN else score / 100
    return None


def distance(measured: float, stderr: float | None, right: int, published: float) -> float | None:
    """Return measured less published in standard errors of the measured score; None where these are not known.

    The standard error is over documents. Where all documents have the same score it is 0, which says nothing; then it
    is that of `right` documents, if these are right or wrong (else 0), were the published share of right answers true.
    """
    if not stderr and right and 0 < published < 1:
        stderr = math.sqrt(published * (1 - published) / right)
    return (measured - published) / stderr if stderr else None


def verdict(distance: float | None) -> Verdict:
    """Return whether a score agrees with the published one within two standard errors."""
    if distance is None:
        return "cannot be told"
    return "agrees" if abs(distance) <= AGREES else "differs"
