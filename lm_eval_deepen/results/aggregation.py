"""From the values of documents to the score of a task, as the harness aggregates them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm_eval_deepen.errors import NotPairedError, ResultError
from lm_eval_deepen.results.samples import Key, Sample
from lm_eval_deepen.results.statistics.intervals import (
    CONFIDENCE,
    Interval,
    is_binary,
    mean_interval,
    paired_interval,
    pseudo_values,
    score_interval,
    standard_error,
)
from lm_eval_deepen.results.statistics.paired import Statistic, Values, mean_of_first

_LN2 = math.log(2)
_AGREES = 1e-6  # relative: a score of the results file and the same one from its samples

# Aggregations of `lm_eval.api.metrics` that depend on the documents through means: (values of a document, function).
AGGREGATIONS: Mapping[str, tuple[int, Statistic]] = {
    "mean": (1, mean_of_first),
    "perplexity": (1, lambda means: np.exp(-means[..., 0])),
    "weighted_perplexity": (2, lambda means: np.exp(-means[..., 0] / means[..., 1])),
    "bits_per_byte": (2, lambda means: -means[..., 0] / means[..., 1] / _LN2),
}
_LEAST = {
    AGGREGATIONS[name][1]: least
    for name, least in (("perplexity", 1.0), ("weighted_perplexity", 1.0), ("bits_per_byte", 0.0))
}
# What the harness takes where a task's configuration names none, and of these what is over a whole corpus at once.
_DEFAULTS = {
    "perplexity": "perplexity",
    "word_perplexity": "weighted_perplexity",
    "byte_perplexity": "weighted_perplexity",
    "bits_per_byte": "bits_per_byte",
    **{name: name for name in ("f1", "bleu", "chrf", "chrf++", "ter", "bypass")},
    "mcc": "matthews_corrcoef",
}


@dataclass(frozen=True)
class Scores:
    """One metric of one system on given documents."""

    values: Values  # one row per document [n, k]; k is 1 but for sums over words or bytes
    statistic: Statistic = mean_of_first  # from the means of the columns to the score
    averaged: bool = True  # whether the score is the plain mean of the documents' values
    # of a group whose tasks count alike, every document's task [n]; the values are weighted, so that their mean counts
    tasks: NDArray[np.int64] | None = None

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.values)

    @property
    def score(self) -> float:
        """The aggregated score."""
        return float(self.statistic(self.values.mean(axis=0)))

    @property
    def stderr(self) -> float | None:
        """Standard error of the score, as the harness has it; None with fewer than two documents."""
        return standard_error(self.values, self.statistic) if self.tasks is None else self.interval().stderr

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """Return the score with its confidence interval."""
        if self.tasks is None:
            interval = score_interval(self.values, self.statistic, confidence)
            least = min(_LEAST.get(self.statistic, -math.inf), interval.estimate)
            return interval if interval.low is None else replace(interval, low=max(least, interval.low))
        return mean_interval([part.interval(confidence) for part in self._parts(self.tasks)])

    def change(self, first: Scores, confidence: float = CONFIDENCE) -> Interval:
        """Return the score less that of `first`, of the same documents, with its confidence interval."""
        if self.tasks is None:
            return paired_interval(first.values, self.values, first.statistic, confidence)
        pairs = zip(self._parts(self.tasks), first._parts(self.tasks), strict=True)
        return mean_interval([own.change(other, confidence) for own, other in pairs])

    def _parts(self, tasks: NDArray[np.int64]) -> list[Scores]:
        """Return the scores of each task of a group."""
        own = self.values / _weights(tasks)[:, None]
        return [Scores(own[tasks == task]) for task in range(tasks.max() + 1)]

    @property
    def shares(self) -> Values:
        """Every document's share in the score [n]: their mean is the score; of an average, the documents' values."""
        return pseudo_values(self.values, self.statistic)

    @property
    def binary(self) -> bool:
        """Whether every document is right or wrong, 1 or 0, and the score their mean."""
        return self.averaged and is_binary(self.values)

    @property
    def per_document(self) -> Values:
        """The score of every document alone [n]."""
        return self.statistic(self.values)


def mean_scores(values: Sequence[float]) -> Scores:
    """Return the scores of a metric that is averaged, from one number per document."""
    return Scores(np.asarray(values, dtype=np.float64)[:, None])


def group_scores(tasks: Sequence[Scores], by_size: bool) -> Scores:
    """Return a group's score as a mean over the documents of its tasks, whose scores are averages.

    `by_size`: every document counts alike; else every task, and a document by what it is of its task.
    """
    values = np.concatenate([task.values for task in tasks])
    if by_size:
        return Scores(values)
    owners = np.repeat(np.arange(len(tasks)), [task.documents for task in tasks])
    return Scores(_weights(owners)[:, None] * values, tasks=owners)


def _weights(tasks: NDArray[np.int64]) -> Values:
    """Return how much every document [n] counts where tasks count alike: 1 on the average."""
    sizes = np.bincount(tasks)
    return (len(tasks) / (len(sizes) * sizes))[tasks]


def scores_of(
    table: Mapping[Key, Sample], keys: Sequence[Key], metric: str, aggregation: str | None, where: str
) -> Scores:
    """Return the values of a metric for the documents `keys` of a run, in that order.

    `aggregation` is its name in the task's configuration, None for the harness's default; `where` is for messages.

    Raises:
        NotPairedError: a metric that is not compared document by document (BLEU, F1 over a corpus, a mean of the
            documents that have a value).
        ResultError: a value that is no finite number.
    """
    name = aggregation or _DEFAULTS.get(metric, "mean")
    if name not in (aggregation, _DEFAULTS.get(metric)) and any(
        isinstance(table[key].values[metric], (list, tuple, dict)) for key in keys
    ):
        raise NotPairedError(f"{where}: {metric} has values that are no numbers, which the task aggregates by itself")
    if name == "nanmean":
        if any(table[key].values[metric] != table[key].values[metric] for key in keys):
            raise NotPairedError(f"{where}: {metric} has documents without a value (NaN), which its mean leaves out")
        name = "mean"  # the same where every value is a number
    if name not in AGGREGATIONS:
        raise NotPairedError(
            f"{where}: {metric} is aggregated by {name!r}, which is not a function of means over documents; compare "
            f"another metric. Supported: {', '.join(AGGREGATIONS)}."
        )
    width, statistic = AGGREGATIONS[name]
    rows = []
    for sample in (table[key] for key in keys):
        value = sample.values[metric]
        row = list(value) if isinstance(value, (list, tuple)) else [value]
        numbers = [number for number in map(to_number, row) if number is not None]
        if not len(row) == len(numbers) == width:
            expected = "a finite number" if width == 1 else f"{width} finite numbers"
            raise ResultError(
                f"{where}: {metric} of document {sample.doc_id} should be {expected}, got {value!r:.40}; the file is "
                "damaged, or the model fails there: evaluate the task again, or leave the metric out with --metric."
            )
        rows.append(numbers)
    return Scores(np.array(rows, dtype=np.float64), statistic, name == "mean")


def configured_aggregation(task_config: Mapping[str, Any], metric: str) -> str | None:
    """Return the aggregation that a task's configuration names for a metric, or None."""
    listed = task_config.get("metric_list")
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, Mapping) and entry.get("metric") == metric:
            aggregation = entry.get("aggregation")
            # A function of the task's own is written as its source: the task says what it does, not we.
            return None if aggregation is None else str(aggregation).strip().partition("\n")[0]
    return None


def agrees(reported: Any, computed: float) -> bool:
    """Return whether a score of the results file is the one that its samples give."""
    number = to_number(reported)
    return number is not None and math.isclose(number, computed, rel_tol=_AGREES, abs_tol=_AGREES)


def to_number(value: Any) -> float | None:
    """Return a finite number of a results file; None for anything else."""
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return number if math.isfinite(number) else None
