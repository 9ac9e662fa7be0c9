"""Rows that are repeated over seeds: one line of the table with their mean and spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lm_eval_deepen.results.aggregation import Scores
from lm_eval_deepen.results.rows import Measured

SEEDS, SPREAD = "seeds", "sd over seeds"


def averaged(measured: Measured, groups: Mapping[str, Sequence[str]]) -> Measured:
    """Return the metric with the rows of every group replaced by one, which has the group's name.

    Its value of a document is the mean of the seeds' values, its further figures are means, and beside them stand
    the number of seeds and the standard deviation (n - 1) of the seeds' scores. The standard error of such a row is
    over documents alone. All or none of a group's rows are measured; a row alone only gets the group's name.
    """
    of_row = {name: group for group, names in groups.items() for name in names}
    scores: dict[str, Scores] = {}
    extra: dict[str, Mapping[str, float | None]] = {}
    for name in measured.scores:
        group = of_row.get(name, name)
        rows = groups.get(group, [name])
        if len(rows) == 1:
            scores[group], extra[group] = measured.scores[name], measured.extra.get(name, {})
        elif group not in scores:
            own = [measured.scores[row] for row in rows]
            scores[group] = replace(own[0], values=np.mean([one.values for one in own], axis=0))
            figures = [measured.extra.get(row, {}) for row in rows]
            means: dict[str, float | None] = {}
            for key in figures[0]:
                known = [value for one in figures if (value := one.get(key)) is not None]
                means[key] = float(np.mean(known)) if known else None
            extra[group] = {**means, SEEDS: float(len(rows)), SPREAD: spread([one.score for one in own])}
    return replace(measured, scores=scores, extra=extra)


def spread(scores: Sequence[float]) -> float | None:
    """Return the standard deviation (n - 1); None of one score."""
    return float(np.std(scores, ddof=1)) if len(scores) > 1 else None
