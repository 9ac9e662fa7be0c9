"""Which run a trace is of: the samples that belong to it, and the older traces that it went on from.

The date of a trace is that at which its run began, the date of results and samples that at which it ended; the results
say how long it took. All three are by the clock of the machine that ran it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from lm_eval_deepen.errors import ResultError
from lm_eval_deepen.results.aggregation import to_number
from lm_eval_deepen.results.files import TaskRun, dated_results, fingerprint, read_results, tasks_with_samples
from lm_eval_deepen.results.traces import TraceFile

_SLACK = timedelta(seconds=1)  # between the end that the results count to, and their date


@dataclass(frozen=True)
class Evaluation:
    """A run that came to its end."""

    began: datetime  # when; the earliest of all where its results do not say how long it took
    ended: datetime  # when
    results: Mapping[str, Any]  # its results file
    tasks: Mapping[str, TaskRun]  # those with samples

    def has(self, task: str, ensemble: Any) -> bool:
        """Return whether it evaluated a task by the ensemble of this fingerprint."""
        return task in self.results["configs"] and fingerprint(self.results) == ensemble

    @property
    def goes_on(self) -> bool:
        """Whether it had a response cache, and may have gone on from a run that was killed."""
        return bool((self.results.get("config") or {}).get("use_cache"))


@dataclass(frozen=True)
class TracedRun:
    """What there is of a task in the latest run that was traced."""

    files: Sequence[TraceFile]  # its traces, and those of killed runs that it went on from, the newest first
    samples: TaskRun | None  # its samples
    notes: Sequence[str]  # what was left out, or could not be paired


def evaluations(folder: Path, notes: list[str]) -> list[Evaluation]:
    """Return the evaluations below a folder in the order in which they ended; what cannot be read is noted."""
    ended_runs = []
    for path, date in dated_results(folder):
        try:
            results = read_results(path, "evaluate again")
        except ResultError as error:
            notes.append(f"left out: {error}")
            continue
        ended = _moment(date)
        config = results.get("config") or {}
        try:
            seconds = float(results["total_evaluation_time_seconds"])
        except (LookupError, TypeError, ValueError, OverflowError):
            seconds = math.nan
        # a model that was made by hand may be older than the evaluation
        known = to_number(seconds) is not None and config.get("model_args")
        began = datetime.min
        if known and 0 <= seconds < (ended - datetime.min).total_seconds() - 1:
            began = ended - timedelta(seconds=seconds) - _SLACK
        ended_runs.append(Evaluation(began, ended, results, tasks_with_samples(path, date, results)))
    return sorted(ended_runs, key=lambda one: one.ended)


def traced_run(task: str, files: Sequence[TraceFile], every: Sequence[Evaluation]) -> TracedRun:
    """Return what there is of the latest run of a task that was traced.

    `files` are its traces by one ensemble, the newest first; `every` are the evaluations beside them, the last to end
    at the end.
    """
    own = [one for one in every if one.has(task, files[0].head.get("fingerprint"))]

    def run_of(file: TraceFile) -> Evaluation | None:
        return next((one for one in own if one.began <= _moment(file.date) <= one.ended), None)

    run, kept, notes = run_of(files[0]), [files[0]], []
    for file in files[1:]:
        other = run_of(file)
        if other is not run if other is not None else run is not None and not run.goes_on:
            break
        kept.append(file)
    if len(kept) < len(files):
        notes.append(f"{task}: {len(files) - len(kept)} older traces of other runs are left out")
    after = [one for one in own if one.goes_on and one.began > _moment(files[0].date)]
    shown = run or next(iter(after), None)
    samples = None if shown is None else shown.tasks.get(task)
    if samples is None:
        others = ", those beside it are of other runs," if any(task in one.tasks for one in own) else ""
        notes.append(f"{task}: there are no samples of this run (--log_samples){others} so no scores are shown")
    elif run is None:
        notes.append(
            f"{task}: the run that was traced left no samples; those shown are of {samples.results_path.name}, which "
            "had a response cache to go on from"
        )
    return TracedRun(kept, samples, notes)


def _moment(date: str) -> datetime:
    """Return the moment of a date in a file's name; the earliest of all for one that is none."""
    day, _, time = date.partition("T")
    try:
        return datetime.fromisoformat(f"{day}T{time.replace('-', ':')}")
    except ValueError:
        return datetime.min
