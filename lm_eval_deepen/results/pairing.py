"""Runs side by side: the tasks, metrics and groups that they have in common, paired by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_deepen.errors import NotPairedError, ResultError, did_you_mean
from lm_eval_deepen.results import report
from lm_eval_deepen.results.aggregation import Scores, agrees, group_scores, to_number
from lm_eval_deepen.results.files import Run
from lm_eval_deepen.results.rows import Measured
from lm_eval_deepen.results.samples import common_keys, mismatch


def wanted_columns(
    runs: Sequence[Run], tasks: Sequence[str], metrics: Sequence[str] | None
) -> list[tuple[str, str, str]]:
    """Return what to compare as (task, metric, filter): all that any run measured, or what `metrics` names."""
    every = dict.fromkeys(
        (task, metric, flt) for task in tasks for run in runs if task in run.tasks
        for metric, flt in run.tasks[task].columns
    )  # fmt: skip
    if not metrics:
        return list(every)
    known = dict.fromkeys(name for _, metric, flt in every for name in (metric, f"{metric},{flt}"))
    for name in metrics:
        if name not in known:
            raise ResultError(
                f"metric {name!r}: in none of the tasks {', '.join(tasks)} of {runs[0].folder}; "
                f"there are: {', '.join(known)}.{did_you_mean(name, known)}"
            )
    return [column for column in every if column[1] in metrics or f"{column[1]},{column[2]}" in metrics]


def tasks_in_common(runs: Sequence[Run], asked: Sequence[str] | None, notes: list[str]) -> list[str]:
    """Return the tasks that all runs have; what is left out is noted."""
    if asked:
        for run in runs:
            for task in asked:
                run.task(task)
        return list(dict.fromkeys(asked))
    every = dict.fromkeys(task for run in runs for task in run.tasks)
    shared = [task for task in every if all(task in run.tasks for run in runs)]
    if not shared:
        told = "; ".join(f"{run.label}: {', '.join(run.tasks)}" for run in runs)
        raise ResultError(f"the runs have no task in common: {told}")
    notes.extend(
        f"{task} is left out: not in {', '.join(run.label for run in runs if task not in run.tasks)}"
        for task in every if task not in shared
    )  # fmt: skip
    return shared


def measure(runs: Sequence[Run], task: str, metric: str, flt: str, notes: list[str]) -> Measured:
    """Return one metric of all runs over the documents that they have in common; differences are noted.

    Raises:
        NotPairedError: no common document, a metric missing from a run, not comparable by document, or aggregated
            otherwise by some run.
        ResultError: a file that is damaged.
    """
    task_runs = [run.task(task) for run in runs]
    keys = common_keys([run.samples for run in task_runs], flt, metric)
    scores = {run.label: one.scores(metric, flt, keys) for run, one in zip(runs, task_runs, strict=True)}
    for label, own in scores.items():
        if own.statistic is not scores[runs[0].label].statistic:
            raise NotPairedError(f"{task}: {label} aggregates {metric} otherwise than {runs[0].label}")
    for run, one in zip(runs, task_runs, strict=True):
        total = len(one.samples.under(flt))
        if total != len(keys):
            notes.append(f"{task}: {run.label} has {total} documents, {len(keys)} of them are compared in {metric}")
        doubt = one.contradiction(metric, flt)
        notes.extend([doubt] if doubt else [])
        other = mismatch(task_runs[0].samples, one.samples)
        if other.prompts:
            notes.append(
                f"{task}: {run.label} was asked otherwise than {runs[0].label} in {other.prompts} of {other.shared} "
                "documents (other template, few-shots or description): systems are compared, not models alone"
            )
        if other.targets:
            notes.append(
                f"{task}: {run.label} was judged by other expected answers than {runs[0].label} in {other.targets} of "
                f"{other.shared} documents"
            )
    return Measured(task, metric, flt, task_runs[0].higher_is_better(metric), scores)


def groups(runs: Sequence[Run], candidates: Sequence[str]) -> list[str]:
    """Return what the results files report of groups: their tasks are compared, the groups are not.

    Where a group's score is a mean over documents, of all its tasks alike or task by task, its differences to the best
    of `candidates` are told with their intervals.
    """
    told: dict[tuple[str, str], dict[str, float]] = {}
    for run in runs:
        for results in {id(task.results): task.results for task in run.tasks.values()}.values():
            for group, values in (results.get("groups") or {}).items():
                if any(task in run.tasks and run.tasks[task].results is not results for task in leaves(results, group)):
                    continue  # of tasks that were evaluated again later
                for key, value in values.items():
                    number = to_number(value) if "," in key and "_stderr," not in key else None
                    if number is not None:
                        told.setdefault((group, key), {})[run.label] = number
    return [
        f"group {group}, {key.removesuffix(',none')}, as reported, over all documents and without a test: "
        + ", ".join(f"{label} {report.number(value)}" for label, value in values.items())
        + (group_differences(runs, group, key, candidates) if len(values) == len(runs) else "")
        for (group, key), values in told.items()
    ]


def group_differences(runs: Sequence[Run], group: str, key: str, candidates: Sequence[str]) -> str:
    """Return the differences in a group's score with their intervals, paired by document; nothing if it is no mean."""
    measured, tasks = measured_group(runs, group, key)
    if measured is None:
        return ""
    reference, level = measured.best(candidates), measured.level(candidates)
    first = measured.scores[reference]
    changes = []
    for label, scores in measured.scores.items():
        if label != reference:
            change = scores.change(first, level)
            changes.append(f"{label} {report.with_interval(change.estimate, change.low, change.high)}")
    return f"; against {reference}, paired over {first.documents} documents of {tasks} tasks: {', '.join(changes)}"


def measured_group(runs: Sequence[Run], group: str, key: str) -> tuple[Measured | None, int]:
    """Return a group's score as a mean over documents, and of how many tasks; None where it is no such mean."""
    metric, _, flt = key.partition(",")
    reports = [task.results for task in runs[0].tasks.values() if group in (task.results.get("groups") or {})]
    tasks = leaves(reports[0], group) if reports else []
    if not tasks or not all(
        task in run.tasks and (metric, flt) in run.tasks[task].columns for task in tasks for run in runs
    ):
        return None, 0
    parts: dict[str, list[Scores]] = {run.label: [] for run in runs}
    try:
        for task in tasks:
            task_runs = [run.tasks[task] for run in runs]
            keys = common_keys([one.samples for one in task_runs], flt, metric)
            for run, one in zip(runs, task_runs, strict=True):
                parts[run.label].append(one.scores(metric, flt, keys))
    except ResultError:
        return None, 0
    if not all(part.averaged for own in parts.values() for part in own):
        return None, 0
    reported = [(run.tasks[tasks[0]].results.get("groups") or {}).get(group, {}).get(key) for run in runs]
    by_way = [{label: group_scores(own, by_size) for label, own in parts.items()} for by_size in (True, False)]
    # The first run decides; where both ways give its score, as 0 where all is wrong, the others do.
    fits = [[agrees(said, one.score) for said, one in zip(reported, own.values(), strict=True)] for own in by_way]
    best = max((0, 1), key=lambda at: (fits[at][0], sum(fits[at])))
    if not fits[best][0]:
        return None, 0
    return Measured(group, metric, flt, runs[0].tasks[tasks[0]].higher_is_better(metric), by_way[best]), len(tasks)


def leaves(results: Mapping[str, Any], group: str) -> list[str]:
    """Return the tasks of a group of a results file, those of the groups in it among them."""
    children: Mapping[str, Sequence[str]] = results.get("group_subtasks") or {}
    names: list[str] = []
    open_groups, seen = [group], set()
    while open_groups:
        name = open_groups.pop()
        for child in children.get(name) or ():
            if child not in seen:
                seen.add(child)
                (open_groups if children.get(child) else names).append(child)
    return sorted(names)
