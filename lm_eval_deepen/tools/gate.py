"""``lm-eval-deepen gate``: has a candidate become worse than its baseline? For CI; see docs/ci.md."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval_deepen.errors import NotPairedError, ResultError, did_you_mean
from lm_eval_deepen.runs import Run, common_keys, find_runs
from lm_eval_deepen.runs.comparable import objections
from lm_eval_deepen.runs.regression import Pair, Rule, decide, details
from lm_eval_deepen.statistics.paired import LARGEST_SEED
from lm_eval_deepen.storage import append_text, write_json
from lm_eval_deepen.tools.arguments import nonnegative, share, whole
from lm_eval_deepen.tools.gate_report import GateReport, Status, Tested, markdown, plain

HELP = (
    "Test whether the candidate's evaluation is worse than the baseline's, paired by document. "
    "Exit status: 0 pass, 1 regressed, 2 wrong usage, unreadable results or an output that cannot be written, 3 not "
    "comparable."
)
EXIT: dict[Status, int] = {"pass": 0, "regressed": 1, "not comparable": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    parser.add_argument("--baseline", type=Path, required=True, metavar="DIR", help="result folder of the baseline")
    parser.add_argument("--candidate", type=Path, required=True, metavar="DIR", help="result folder of the candidate")
    parser.add_argument(
        "--alpha", type=share, default=0.05, metavar="P",
        help="chance of an alarm without a cause, over all tests together (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--min-effect", type=nonnegative, default=0.0, metavar="X",
        help="smallest observed drop that counts, in the metric's unit (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--power", type=share, default=0.8, metavar="P",
        help="chance of detection that the minimal detectable effect is stated for (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--metric", nargs="+", metavar="NAME",
        help="metrics to test, as acc or exact_match,strict-match (default: all; fewer see smaller drops)",
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks to test (default: all of the baseline)")
    parser.add_argument(
        "--allow-config-change", action="store_true",
        help="accept another ensemble configuration (fingerprint) in the candidate, and name it",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=whole(0, LARGEST_SEED), default=0, metavar="N", help="of resampling (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome as JSON")
    parser.add_argument(
        "--summary", type=Path, metavar="FILE",
        help="append the outcome as Markdown (default: $GITHUB_STEP_SUMMARY, if set)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Judge, print, write the files asked for; returns 0, 1 or 3."""
    rule = Rule(args.alpha, args.min_effect, args.power, seed=args.seed)
    baseline, candidate = single_run(args.baseline), single_run(args.candidate)
    report = judge(baseline, candidate, rule, args.tasks, args.metric, args.allow_config_change)
    print(plain(report))
    if args.json:
        write_json(args.json, {**report.to_dict(), "exit_status": EXIT[report.status]})
    summary = args.summary or os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        append_text(Path(summary), markdown(report) + "\n")
    return EXIT[report.status]


def single_run(path: Path) -> Run:
    """Return the only run in a folder.

    Raises:
        ResultError: there are several.
    """
    runs = find_runs(path)
    if len(runs) > 1:
        inside = ", ".join(str(run.folder) for run in runs)
        raise ResultError(f"{path}: holds the results of {len(runs)} models; give one of them: {inside}")
    return runs[0]


def judge(
    baseline: Run,
    candidate: Run,
    rule: Rule,
    tasks: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    allow_config_change: bool = False,
) -> GateReport:
    """Return the outcome of the check.

    Raises:
        ResultError: the baseline lacks a task or metric that was asked for, or a file cannot be read.
    """
    chosen = list(dict.fromkeys(tasks)) if tasks else list(baseline.tasks)
    for task in chosen:
        baseline.task(task)
    columns = wanted_columns([baseline], chosen, metrics)
    found = objections(baseline, candidate, chosen, allow_config_change)
    notes = [*baseline.notes, *candidate.notes, *found.notes]
    report: dict[str, Any] = {"baseline": baseline.label, "candidate": candidate.label, "rule": rule}
    if found.reasons:
        return GateReport(status="not comparable", reasons=found.reasons, notes=tuple(notes), tests=(), **report)
    pairs, reasons = pairs_of(baseline, candidate, columns, notes, explicit=bool(metrics))
    if reasons:
        return GateReport(status="not comparable", reasons=tuple(reasons), notes=tuple(notes), tests=(), **report)
    tests = tuple(
        Tested(pair, decision, details(pair, len(pairs), rule))
        for pair, decision in zip(pairs, decide(pairs, rule), strict=True)
    )
    status: Status = "regressed" if any(test.decision.regressed for test in tests) else "pass"
    return GateReport(status=status, reasons=(), notes=tuple(notes), tests=tests, **report)


def wanted_columns(
    runs: Sequence[Run], tasks: Sequence[str], metrics: Sequence[str] | None
) -> list[tuple[str, str, str]]:
    """Return what to compare as (task, metric, filter): all that any run measured, or what `metrics` names.

    Raises:
        ResultError: a metric that none of the tasks has.
    """
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


def pairs_of(
    baseline: Run, candidate: Run, columns: Sequence[tuple[str, str, str]], notes: list[str], explicit: bool
) -> tuple[list[Pair], list[str]]:
    """Return what can be tested and why the rest prevents a verdict; what is merely left out goes to `notes`."""
    pairs: list[Pair] = []
    reasons: list[str] = []
    for task, metric, flt in columns:
        one, two = baseline.tasks[task], candidate.tasks[task]
        good = one.higher_is_better(metric)
        if (metric, flt) not in two.columns:
            reasons.append(f"{task}: {two.results_path} has no {metric},{flt}")
            continue
        values = [sum(metric in sample.values for sample in run.samples.under(flt).values()) for run in (one, two)]
        if len(set(values)) > 1:
            reasons.append(f"{task}: {metric} is given for {values[0]} and {values[1]} documents")
            continue
        try:
            if good is None:
                raise NotPairedError(f"{one.where}: it is unknown which way {metric} is good (higher_is_better)")
            keys = common_keys([one.samples, two.samples], flt, metric)
            pair = Pair(task, metric, flt, good, one.scores(metric, flt, keys), two.scores(metric, flt, keys))
            doubts = [run.contradiction(metric, flt) for run in (one, two)]
        except NotPairedError as error:
            # Asked for by name, it must be tested; otherwise the other metrics still can be.
            (reasons if explicit else notes).append(f"not tested: {error}")
            continue
        notes.extend(doubt for doubt in doubts if doubt)
        pairs.append(pair)
    if not pairs and not reasons:
        reasons.append("no metric of the chosen tasks can be tested document by document, see the notes")
    return pairs, reasons
