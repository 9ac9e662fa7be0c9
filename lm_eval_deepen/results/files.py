"""Finds the runs in a folder of result files, as ``lm_eval run --output_path ... --log_samples`` leaves them.

One folder per model, in it ``results_<date>.json`` and ``samples_<task>_<date>.jsonl`` for every evaluation. An
ensemble and its main member alone go to the *same* folder (the harness names it after `pretrained`), so a run is what
one model with one set of arguments left there, not what a folder holds.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lm_eval_deepen.errors import ResultError, StorageError, did_you_mean
from lm_eval_deepen.results.aggregation import Scores, agrees, configured_aggregation, scores_of
from lm_eval_deepen.results.samples import Key, Samples, read_samples
from lm_eval_deepen.storage import read_json

DEVELOPMENT = "development"  # of a leaderboard's folder: what its members score on development splits
_DATED = re.compile(r"(?P<stem>.+)_(?P<date>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?)\.json$")


@dataclass(frozen=True)
class TaskRun:
    """One task as one run evaluated it: the results file that describes it, and the file of its samples."""

    task: str
    results_path: Path
    samples_path: Path
    results: Mapping[str, Any]

    @cached_property
    def samples(self) -> Samples:
        """The task's samples, read on first use."""
        return read_samples(self.samples_path)

    @property
    def where(self) -> str:
        """Task and file, for messages."""
        return f"{self.task} in {self.results_path}"

    @property
    def config(self) -> Mapping[str, Any]:
        """The task's own configuration."""
        return self.results["configs"].get(self.task, {})

    @property
    def columns(self) -> list[tuple[str, str]]:
        """What was measured, as (metric, filter), in the order of the results file; nothing with --predict_only."""
        keys = [key.partition(",") for key in self.results["results"].get(self.task, {})]
        named = [(metric, flt) for metric, comma, flt in keys if comma and not metric.endswith("_stderr")]
        return [(metric, flt) for metric, flt in named if metric != "bypass"]

    def higher_is_better(self, metric: str) -> bool | None:
        """Return which way a metric is good; None where the results file does not say."""
        said = (self.results.get("higher_is_better") or {}).get(self.task, {}).get(metric)
        return said if isinstance(said, bool) else None

    def scores(self, metric: str, flt: str, keys: Sequence[Key]) -> Scores:
        """Return the metric's values for the documents `keys`."""
        aggregation = configured_aggregation(self.config, metric)
        return scores_of(self.samples.under(flt), keys, metric, aggregation, self.where)

    def contradiction(self, metric: str, flt: str) -> str | None:
        """Say so where the score of the results file is not what all samples give; the samples count."""
        table = self.samples.under(flt)
        keys = [key for key, sample in table.items() if metric in sample.values]
        if not keys:
            return None
        reported = self.results["results"].get(self.task, {}).get(f"{metric},{flt}")
        computed = self.scores(metric, flt, keys).score
        if agrees(reported, computed):
            return None
        return f"{self.where}: {metric} is {reported} there, but its samples give {computed:.6g}; the samples count"


@dataclass(frozen=True)
class Run:
    """Everything one model with one set of arguments left in a folder: the latest evaluation of every task."""

    label: str  # how tables call it
    folder: Path  # where it lies
    tasks: Mapping[str, TaskRun]  # by name; the latest evaluation of each
    notes: tuple[str, ...] = ()  # what was left out, and why

    def task(self, name: str) -> TaskRun:
        """Return one task; raises ResultError where this run has no samples of it."""
        if name not in self.tasks:
            known = ", ".join(self.tasks)
            raise ResultError(
                f"{self.folder}: no samples of task {name!r}; there are: {known}.{did_you_mean(name, self.tasks)}"
            )
        return self.tasks[name]


def find_runs(path: Path, label: str | None = None) -> list[Run]:
    """Return the runs under a folder, one per sub-folder of a model, or the run of one results file.

    Of several evaluations of a task the latest counts. What other arguments left in the same folder is left out, with a
    note: they are another model.
    """
    if not path.exists():
        raise ResultError(f"{path}: no such file or folder; give what --output_path was given to lm_eval.")
    files = _json_files(path)
    series: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for file in files:
        if match := _DATED.match(file.name):
            series[file.parent, match["stem"]].append(file)
    if not series:
        raise ResultError(
            f"{path}: holds no results_<date>.json of the harness; evaluate with --output_path and --log_samples."
        )
    runs = [_read_series(paths, where[0]) for where, paths in series.items()]
    evaluated = [run for run in runs if run.tasks]
    if not evaluated:
        raise ResultError(
            f"{path}: results without samples ({files[-1].name}), so no document can be paired; evaluate again with "
            "--log_samples."
        )
    dropped = tuple(note for run in runs if not run.tasks for note in run.notes)
    own_name = path.resolve().stem if path.is_file() else path.resolve().name
    names = _labels(label or own_name, evaluated)
    return [
        Run(name, run.folder, run.tasks, run.notes + (dropped if run is evaluated[0] else ()))
        for name, run in zip(names, evaluated, strict=True)
    ]


def _json_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    table = (path / "leaderboard.json").is_file()  # its rows are not compared with what their weights were made from
    return sorted(file for file in path.rglob("*.json") if not table or file.relative_to(path).parts[0] != DEVELOPMENT)


def dated_results(path: Path) -> list[tuple[Path, str]]:
    """Return every results file of the harness under a folder, with the date in its name."""
    return [(file, match["date"]) for file in _json_files(path) if (match := _DATED.match(file.name))]


def tasks_with_samples(path: Path, date: str, results: Mapping[str, Any]) -> dict[str, TaskRun]:
    """Return the tasks of a results file of a date whose samples lie beside it."""
    return {
        task: TaskRun(task, path, samples, results)
        for task in results["configs"]
        if (samples := path.parent / f"samples_{task}_{date}.jsonl").is_file()
    }


def _labels(base: str, runs: Sequence[Run]) -> list[str]:
    """Return one name per run: the folder's, and where it holds several models, theirs beside it."""
    if len(runs) == 1:
        return [base]
    names: list[str] = []
    for run in runs:
        results = next(iter(run.tasks.values())).results
        model = Path(str(results.get("model_name") or run.folder.name)).name
        name = f"{base}/{model}"
        names.append(name if name not in names else f"{base}/{run.folder.name}-{len(names) + 1}")
    return names


def _read_series(paths: Sequence[Path], folder: Path) -> Run:
    """Read the evaluations of one model, the latest first."""
    tasks: dict[str, TaskRun] = {}
    notes: list[str] = []
    identity: str | None = None
    for path in sorted(paths, key=_date, reverse=True):
        results = read_results(path, "evaluate again.")
        here = tasks_with_samples(path, _date(path), results)
        if not here:
            notes.append(f"{path}: left out, it has no samples (--log_samples)")
            continue
        if identity is None:
            identity = _identity(results)
        elif _identity(results) != identity:
            notes.append(f"{path}: left out, it is of other model arguments than the latest evaluation beside it")
            continue
        for task in results["configs"]:
            if task in tasks:
                notes.append(f"{path}: its {task} is left out, {tasks[task].results_path.name} is later")
            elif task in here:
                tasks[task] = here[task]
            else:
                notes.append(f"{path}: {task} has no samples")
    return Run(folder.name, folder, tasks, tuple(notes))


def _date(path: Path) -> str:
    match = _DATED.match(path.name)
    return match["date"] if match else ""


def _identity(results: Mapping[str, Any]) -> str:
    config = results.get("config") or {}
    told = [config.get("model"), config.get("model_args"), fingerprint(results)]
    return json.dumps(told, sort_keys=True)


def fingerprint(results: Mapping[str, Any]) -> str | None:
    """Return the ensemble's fingerprint, or None for a model of another type."""
    return ((results.get("config") or {}).get("deepen") or {}).get("fingerprint")


def read_results(path: Path, remedy: str) -> dict[str, Any]:
    """Return a results file of the harness, of which whatever is read here or in `comparable` has the right type."""
    try:
        results = read_json(path)
    except StorageError as error:
        raise ResultError(f"{error}; {remedy}") from error
    if not isinstance(results, dict) or "results" not in results or "configs" not in results:
        raise ResultError(f"{path}: not a results file of the harness, it has no 'results' and 'configs'.")
    try:
        _Results.model_validate(results)
    except ValidationError as error:
        odd = ": ".join(map(str, error.errors()[0]["loc"]))
        raise ResultError(
            f"{path}: {odd} is of another type than the harness writes; the file is damaged, {remedy}"
        ) from None
    return results


class _Ensemble(BaseModel):
    options: dict | None = None
    members: list[dict] | None = None


class _Config(BaseModel):
    deepen: _Ensemble | None = None


class _Results(BaseModel):
    """The types of what is read of a results file."""

    results: dict[str, dict]
    configs: dict[str, dict]
    higher_is_better: dict[str, dict] | None = None
    groups: dict[str, dict] | None = None
    group_subtasks: dict[str, list[str]] | None = None
    config: _Config | None = None
