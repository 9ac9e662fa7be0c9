"""``lm-eval-deepen gate``: has a candidate become worse than its baseline? For CI; see docs/ci.md."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lm_eval_deepen.cli.arguments import Names, add_json, add_seed, adder, nonnegative, positive, share
from lm_eval_deepen.results.gate import judge, single_run
from lm_eval_deepen.results.gate_report import Status, github_errors, junit, markdown, plain
from lm_eval_deepen.results.regression import GateRule
from lm_eval_deepen.storage import append_text, write_text

HELP = (
    "Test whether the candidate's evaluation is worse than the baseline's, paired by document. "
    "Exit status: 0 pass, 1 regressed, 2 wrong usage, unreadable results or an output that cannot be written, 3 no "
    "verdict: not comparable, or too small for --max-detectable."
)
EXIT: dict[Status, int] = {"pass": 0, "regressed": 1, "too small": 3, "not comparable": 3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    add = adder(parser)
    add("--baseline DIR", "result folder of the baseline", type=Path, required=True)
    add("--candidate DIR", "result folder of the candidate", type=Path, required=True)
    add("--alpha P", "largest chance of a false alarm, over all tests together "
        "(default: %(default)s)", type=share, default=0.05)  # fmt: skip
    add("--min-effect X", "smallest observed drop that counts, in the metric's unit "
        "(default: %(default)s)", type=nonnegative, default=0.0)  # fmt: skip
    add("--power P", "chance of detection for the minimal detectable effect "
        "(default: %(default)s)", type=share, default=0.8)  # fmt: skip
    add("--max-detectable X", "a drop that the check must be able to detect, in the metric's unit; if it cannot, it is "
        "no pass (exit status 3)", type=positive)  # fmt: skip
    add("--metric NAME ...", "metrics to test, as acc or exact_match,strict-match (default: all; with fewer, smaller "
        "drops are detected)")  # fmt: skip
    add("--tasks TASK ...", "tasks to test (default: all of the baseline)", action=Names)
    add("--allow-config-change", "accept a changed ensemble configuration (fingerprint) in the candidate, and name the "
        "changes")  # fmt: skip
    add_seed(parser)
    add_json(parser)
    add("--junit FILE", "write the outcome as JUnit XML", type=Path)
    add("--summary FILE", "append the outcome as Markdown (default: $GITHUB_STEP_SUMMARY, if set)", type=Path)


def run(args: argparse.Namespace) -> int:
    """Judge, print, write the files asked for; returns 0, 1 or 3."""
    rule = GateRule(args.alpha, args.min_effect, args.power, seed=args.seed)
    baseline, candidate = single_run(args.baseline), single_run(args.candidate)
    report = judge(baseline, candidate, rule, args.tasks, args.metric, args.allow_config_change, args.max_detectable)
    print(plain(report))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        print("\n".join(github_errors(report)))
    if args.junit:
        write_text(args.junit, junit(report))
    summary = args.summary or os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        append_text(Path(summary), markdown(report) + "\n")
    args.facts = {**report.to_dict(), "exit_status": EXIT[report.status]}  # last: what is not written changes it
    return EXIT[report.status]
