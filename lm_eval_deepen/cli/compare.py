"""``lm-eval-deepen compare A B ...``: result folders of the harness side by side, paired by document."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lm_eval_deepen.cli.arguments import Names, add_json, add_seed, adder, share, whole
from lm_eval_deepen.errors import NotPairedError, ResultError, did_you_mean
from lm_eval_deepen.results import report
from lm_eval_deepen.results.files import Run, find_runs
from lm_eval_deepen.results.pairing import groups, measure, tasks_in_common, wanted_columns
from lm_eval_deepen.results.rows import ScoreRow, corrected, rows_of
from lm_eval_deepen.results.statistics.paired import MOST_RESAMPLES, RESAMPLES
from lm_eval_deepen.storage import json_text, write_text

HELP = (
    "Compare result folders of the harness (written with --log_samples), of any origin and any model type: scores, "
    "paired differences with intervals, tests corrected over the table, agreement, oracle."
)
BEST = "best"
FORMATS = ("text", "md", "json", "html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    add = adder(parser)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="DIR",
        help="a result folder (each model's sub-folder is a run of its own) or one results_*.json",
    )  # fmt: skip
    add("--names NAME ...", "names for the tables, one per DIR")
    add("--against NAME", f"the run to compare the others with: its name, or {BEST!r}, the best run of each metric "
        "(default: the first run)")  # fmt: skip
    add("--tasks TASK ...", "tasks to compare (default: all that the runs have in common)", action=Names)
    add("--metric NAME ...", "metrics to compare, as acc or exact_match,strict-match (default: all)")
    add("--alpha P", "level of significance (default: %(default)s)", type=share, default=0.05)
    add("--mid-p", "use McNemar's test with mid-p instead of exact p-values")
    add("--resamples N", "number of resamples of the permutation test of real-valued metrics "
        "(default: %(default)s)", type=whole(1, MOST_RESAMPLES), default=RESAMPLES)  # fmt: skip
    add_seed(parser)
    add("--format", "format of the table (default: %(default)s)", choices=FORMATS, default="text")
    add_json(parser, file=False)
    add("--output FILE", "write to this file instead of the terminal", type=Path)


def run(args: argparse.Namespace) -> int:
    """Print or write the table."""
    runs = read_runs(args.runs, args.names)
    reference = reference_of(runs, args.against)
    notes = [note for run in runs for note in run.notes]
    tasks = tasks_in_common(runs, args.tasks, notes)
    rows: list[ScoreRow] = []
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
    told = corrected(rows), args.alpha, list(dict.fromkeys(notes))
    args.facts = report.to_dict(*told)
    text = rendered(*told, "json" if args.json else args.format)
    if args.output:
        write_text(args.output, text + "\n")
    else:
        print(text)
    return 0


def read_runs(paths: Sequence[Path], names: Sequence[str] | None) -> list[Run]:
    """Return the runs of all folders, each under a name of its own."""
    if names and len(names) != len(paths):
        raise ResultError(f"--names: {len(names)} names for {len(paths)} folders; give one for each.")
    runs = [run for i, path in enumerate(paths) for run in find_runs(path, names[i] if names else None)]
    if len(runs) < 2:
        raise ResultError(f"{paths[0]}: one run alone cannot be compared; give a second result folder.")
    labels = [run.label for run in runs]
    if len(set(labels)) < len(labels):
        if names:
            raise ResultError(f"--names: {', '.join(labels)} are not all different.")
        places = [str(run.folder) for run in runs]
        labels = [f"{p} ({places[:i].count(p) + 1})" if places.count(p) > 1 else p for i, p in enumerate(places)]
        runs = [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
    return runs


def reference_of(runs: Sequence[Run], against: str | None) -> list[str]:
    """Return the names whose best is the reference; raises ResultError where no run has that name."""
    labels = [run.label for run in runs]
    if against == BEST:
        return labels
    if against is not None and against not in labels:
        near = did_you_mean(against, [*labels, BEST])
        raise ResultError(f"--against {against!r}: the runs are {', '.join(labels)}, or {BEST}.{near}")
    return [against or labels[0]]


def rendered(rows: Sequence[ScoreRow], alpha: float, notes: Sequence[str], fmt: str) -> str:
    """Return the table in one of `FORMATS`."""
    if fmt == "json":
        return json_text(report.to_dict(rows, alpha, notes))
    if fmt == "html":
        from lm_eval_deepen.results.page import html

        return html(rows, alpha, notes)
    return (report.markdown if fmt == "md" else report.plain)(rows, alpha, notes)
