"""``lm-eval-deepen gate``: has a candidate become worse than its baseline? For CI; see docs/ci.md."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lm_eval_deepen.cli.arguments import Names, add_json, add_seed, nonnegative, positive, share
from lm_eval_deepen.results.gate import judge, single_run
from lm_eval_deepen.results.gate_report import Status, markdown, plain
from lm_eval_deepen.results.junit import github_errors, junit
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
    parser.add_argument("--baseline", type=Path, required=True, metavar="DIR", help="result folder of the baseline")
    parser.add_argument("--candidate", type=Path, required=True, metavar="DIR", help="result folder of the candidate")
    parser.add_argument(
        "--alpha", type=share, default=0.05, metavar="P",
        help="largest chance of a false alarm, over all tests together (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--min-effect", type=nonnegative, default=0.0, metavar="X",
        help="smallest observed drop that counts, in the metric's unit (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--power", type=share, default=0.8, metavar="P",
        help="chance of detection for the minimal detectable effect (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-detectable", type=positive, metavar="X",
        help="a drop that the check must be able to detect, in the metric's unit; if it cannot, it is no pass (exit "
        "status 3)",
    )  # fmt: skip
    parser.add_argument(
        "--metric", nargs="+", metavar="NAME",
        help="metrics to test, as acc or exact_match,strict-match (default: all; with fewer, smaller drops are "
        "detected)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", action=Names, metavar="TASK", help="tasks to test (default: all of the baseline)"
    )
    parser.add_argument(
        "--allow-config-change", action="store_true",
        help="accept a changed ensemble configuration (fingerprint) in the candidate, and name the changes",
    )  # fmt: skip
    add_seed(parser)
    add_json(parser)
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the outcome as JUnit XML")
    parser.add_argument(
        "--summary", type=Path, metavar="FILE",
        help="append the outcome as Markdown (default: $GITHUB_STEP_SUMMARY, if set)",
    )  # fmt: skip


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
