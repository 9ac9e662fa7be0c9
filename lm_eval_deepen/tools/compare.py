"""``lm-eval-deepen compare A B ...``: result folders of the harness side by side, paired by document."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lm_eval_deepen.errors import NotPairedError, ResultError, did_you_mean
from lm_eval_deepen.runs import Measured, Row, Run, Scores, common_keys, corrected, find_runs, rows_of
from lm_eval_deepen.runs.aggregation import agrees, group_scores, to_number
from lm_eval_deepen.runs.samples import mismatch
from lm_eval_deepen.statistics import paired_interval
from lm_eval_deepen.statistics.paired import LARGEST_SEED, MOST_RESAMPLES, RESAMPLES
from lm_eval_deepen.storage import write_text
from lm_eval_deepen.tools import report
from lm_eval_deepen.tools.arguments import share, whole
from lm_eval_deepen.tools.gate import wanted_columns

HELP = (
    "Compare result folders of the harness (written with --log_samples), ours or anyone's, of any model type: "
    "scores, paired differences with intervals, tests corrected over the table, agreement, oracle."
)
BEST = "best"
FORMATS = ("text", "md", "json", "html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="DIR",
        help="a result folder (each model's sub-folder is a run of its own) or one results_*.json",
    )  # fmt: skip
    parser.add_argument("--names", nargs="+", metavar="NAME", help="names for the tables, one per DIR")
    parser.add_argument(
        "--against", metavar="NAME",
        help=f"the reference: a run's name, or {BEST!r}, the best of each metric (default: the first run)",
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks to compare (default: all in common)")
    parser.add_argument(
        "--metric", nargs="+", metavar="NAME",
        help="metrics to compare, as acc or exact_match,strict-match (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--alpha", type=share, default=0.05, metavar="P", help="level of significance (default: %(default)s)"
    )
    parser.add_argument("--mid-p", action="store_true", help="McNemar's test with mid-p instead of exact p-values")
    parser.add_argument(
        "--resamples", type=whole(1, MOST_RESAMPLES), default=RESAMPLES, metavar="N",
        help="of the permutation test of real-valued metrics (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=whole(0, LARGEST_SEED), default=0, metavar="N", help="of resampling (default: %(default)s)"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the table (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there instead of the terminal")


def run(args: argparse.Namespace) -> int:
    """Print or write the table."""
    runs = read_runs(args.runs, args.names)
    reference = reference_of(runs, args.against)
    notes = [note for run in runs for note in run.notes]
    tasks = tasks_in_common(runs, args.tasks, notes)
    rows: list[Row] = []
    for column in wanted_columns(runs, tasks, args.metric):
        try:
            measured = measure(runs, *column, notes)
        except NotPairedError as error:
            if args.metric:
                raise
            notes.append(f"not compared: {error}")
            continue
        rows += rows_of(measured, reference, resamples=args.resamples, seed=args.seed, mid_p=args.mid_p)
    if not rows:
        raise ResultError("nothing to compare:\n  " + "\n  ".join(notes))
    notes += groups(runs, reference)
    text = rendered(corrected(rows), args.alpha, list(dict.fromkeys(notes)), args.format)
    if args.output:
        write_text(args.output, text + "\n")
    else:
        print(text)
    return 0


def read_runs(paths: Sequence[Path], names: Sequence[str] | None) -> list[Run]:
    """Return the runs of all folders, each under a name of its own.

    Raises:
        ResultError: fewer than two runs, or names that do not fit.
    """
    if names and len(names) != len(paths):
        raise ResultError(f"--names: {len(names)} names for {len(paths)} folders; give one for each.")
    found = [run for i, path in enumerate(paths) for run in find_runs(path, names[i] if names else None)]
    if len(found) < 2:
        raise ResultError(f"{paths[0]}: one run alone cannot be compared; give a second result folder.")
    labels = [run.label for run in found]
    if len(set(labels)) < len(labels):
        if names:
            raise ResultError(f"--names: {', '.join(labels)} are not all different.")
        found = [Run(str(run.folder), run.folder, run.tasks, run.notes) for run in found]
    return found


def reference_of(runs: Sequence[Run], against: str | None) -> list[str]:
    """Return the names whose best is the reference.

    Raises:
        ResultError: no run has that name.
    """
    labels = [run.label for run in runs]
    if against == BEST:
        return labels
    if against is not None and against not in labels:
        near = did_you_mean(against, [*labels, BEST])
        raise ResultError(f"--against {against!r}: the runs are {', '.join(labels)}, or {BEST}.{near}")
    return [against or labels[0]]


def tasks_in_common(runs: Sequence[Run], asked: Sequence[str] | None, notes: list[str]) -> list[str]:
    """Return the tasks that all runs have; what is left out is noted.

    Raises:
        ResultError: a task that was asked for is missing from a run, or no task is common to all.
    """
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
        NotPairedError: no common document, a metric missing from a run or not comparable by document.
        ResultError: a file that is damaged.
    """
    found = [run.task(task) for run in runs]
    keys = common_keys([run.samples for run in found], flt, metric)
    scores = {run.label: one.scores(metric, flt, keys) for run, one in zip(runs, found, strict=True)}
    for run, one in zip(runs, found, strict=True):
        total = len(one.samples.under(flt))
        if total != len(keys):
            notes.append(f"{task}: {run.label} has {total} documents, {len(keys)} of them are compared in {metric}")
        doubt = one.contradiction(metric, flt)
        notes.extend([doubt] if doubt else [])
        other = mismatch(found[0].samples, one.samples)
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
    return Measured(task, metric, flt, found[0].higher_is_better(metric), scores)


def groups(runs: Sequence[Run], candidates: Sequence[str]) -> list[str]:
    """Return what the results files report of groups: their tasks are compared, the groups are not.

    Where a group's score is a mean over documents, of all its tasks alike or task by task, its differences to the best
    of `candidates` are told with their intervals.
    """
    told: dict[tuple[str, str], dict[str, float]] = {}
    for run in runs:
        for results in {id(task.results): task.results for task in run.tasks.values()}.values():
            for group, values in (results.get("groups") or {}).items():
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
    found = []
    for label, scores in measured.scores.items():
        if label != reference:
            change = paired_interval(first.values, scores.values, confidence=level)
            found.append(f"{label} {report.signed(change.estimate)}{report.signed_interval(change.low, change.high)}")
    return f"; against {reference}, paired over {first.documents} documents of {tasks} tasks: {', '.join(found)}"


def measured_group(runs: Sequence[Run], group: str, key: str) -> tuple[Measured | None, int]:
    """Return a group's score as a mean over documents, and of how many tasks; None where it is no such mean."""
    metric, _, flt = key.partition(",")
    tasks = leaves(runs[0], group)
    if not tasks or not all(
        task in run.tasks and (metric, flt) in run.tasks[task].columns for task in tasks for run in runs
    ):
        return None, 0
    parts: dict[str, list[Scores]] = {run.label: [] for run in runs}
    try:
        for task in tasks:
            found = [run.tasks[task] for run in runs]
            keys = common_keys([one.samples for one in found], flt, metric)
            for run, one in zip(runs, found, strict=True):
                parts[run.label].append(one.scores(metric, flt, keys))
    except ResultError:
        return None, 0
    if not all(part.averaged for own in parts.values() for part in own):
        return None, 0
    first = runs[0].tasks[tasks[0]]
    reported = (first.results.get("groups") or {}).get(group, {}).get(key)
    for by_size in (True, False):
        if agrees(reported, group_scores(parts[runs[0].label], by_size).score):
            scores = {label: group_scores(own, by_size) for label, own in parts.items()}
            return Measured(group, metric, flt, first.higher_is_better(metric), scores), len(tasks)
    return None, 0


def leaves(run: Run, group: str) -> list[str]:
    """Return the tasks of a group, those of the groups in it among them."""
    children: dict[str, Sequence[str]] = {}
    for task in run.tasks.values():
        children.update(task.results.get("group_subtasks") or {})
    found: list[str] = []
    open_groups, seen = [group], set()
    while open_groups:
        name = open_groups.pop()
        for child in children.get(name) or ():
            if child not in seen:
                seen.add(child)
                (open_groups if children.get(child) else found).append(child)
    return sorted(found)


def rendered(rows: Sequence[Row], alpha: float, notes: Sequence[str], fmt: str) -> str:
    """Return the table in one of `FORMATS`."""
    if fmt == "json":
        return json.dumps(report.to_dict(rows, alpha, notes), indent=2, ensure_ascii=False)
    if fmt == "html":
        from lm_eval_deepen.tools.report_html import html

        return html(rows, alpha, notes)
    return (report.markdown if fmt == "md" else report.plain)(rows, alpha, notes)
