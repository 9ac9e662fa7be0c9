"""How often `lm-eval-deepen gate` calls a regression where there is none, and where there is one of known size.

    python benchmarks/gate_rates.py BASELINE CANDIDATE [--metric acc acc_norm] [--repetitions 10000]

Both are result folders of the harness with samples of the same tasks. No difference: the two runs' answers are swapped
within every document with chance 1/2, all metrics of a document together, which leaves two runs of equal quality that
differ as often as the two given ones do. A regression of known size: of such a pair, right answers of the candidate in
one metric are made wrong at random; the same is done to two identical runs. Metrics of real values are made worse by a
factor instead. Every repetition goes through the gate's own rule over all metrics. One JSON line last.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_deepen.results.gate import pairs_of, single_run
from lm_eval_deepen.results.pairing import wanted_columns
from lm_eval_deepen.results.regression import GateRule, Pair, decide, detectable

Background = Callable[[np.random.Generator], list[Pair]]


def read_pairs(args: argparse.Namespace) -> list[Pair]:
    """Return every metric of the two runs, document by document."""
    baseline, candidate = single_run(args.baseline), single_run(args.candidate)
    columns = wanted_columns([baseline], list(baseline.tasks), args.metric)
    pairs, reasons = pairs_of(baseline, candidate, columns, [], explicit=True)
    if reasons:
        raise SystemExit("\n".join(reasons))
    return pairs


def swapped(pairs: Sequence[Pair], generator: np.random.Generator) -> list[Pair]:
    """Exchange the runs' answers to documents drawn at random, in all metrics of a task alike."""
    masks: dict[str, np.ndarray] = {}
    result = []
    for pair in pairs:
        a, b = pair.baseline.values, pair.candidate.values
        mask = masks.setdefault(pair.task, generator.random((len(a), 1)) < 0.5)
        result.append(
            replace(
                pair,
                baseline=replace(pair.baseline, values=np.where(mask, b, a)),
                candidate=replace(pair.candidate, values=np.where(mask, a, b)),
            )
        )
    return result


def damaged(pair: Pair, size: float, generator: np.random.Generator) -> Pair:
    """Make `size` right answers of the candidate wrong, or a real-valued score worse by that factor."""
    values = pair.candidate.values.copy()
    if pair.candidate.binary:
        good = np.flatnonzero(values[:, 0] == float(pair.higher_is_better))
        values[generator.choice(good, size=int(size), replace=False)] = 1.0 - float(pair.higher_is_better)
        return replace(pair, candidate=replace(pair.candidate, values=values))
    tried = []
    for factor in (1 + size, 1 - size):
        moved = values.copy()
        moved[:, 0] *= factor
        tried.append(replace(pair.candidate, values=moved))
    worst = min(tried, key=lambda scores: scores.score * (1 if pair.higher_is_better else -1))
    return replace(pair, candidate=worst)


def rate(hits: int, total: int) -> dict[str, float]:
    """Return a share with its standard error."""
    share = hits / total
    return {"rate": round(share, 4), "stderr": round(math.sqrt(share * (1 - share) / total), 4)}


def alarms(background: Background, rule: GateRule, repetitions: int, seed: int) -> int:
    """Return how many repetitions the gate fails."""
    generator = np.random.default_rng(seed)
    return sum(any(found.regressed for found in decide(background(generator), rule)) for _ in range(repetitions))


def detection(
    pairs: Sequence[Pair], index: int, sizes: Sequence[float], rule: GateRule, repetitions: int, seed: int
) -> dict[str, Any]:
    """Return detection rates by size of a regression of one metric, against both backgrounds."""
    found: dict[str, Any] = {}
    identical = [replace(pair, candidate=pair.baseline) for pair in pairs]
    backgrounds: dict[str, Background] = {
        "runs that differ": lambda generator: swapped(pairs, generator),
        "identical runs": lambda generator: list(identical),
    }
    for name, background in backgrounds.items():
        for size in sizes:

            def broken(generator: np.random.Generator, make: Background = background, by: float = size) -> list[Pair]:
                made = make(generator)
                made[index] = damaged(made[index], by, generator)
                return made

            found.setdefault(name, {})[size] = rate(alarms(broken, rule, repetitions, seed), repetitions)
    return found


def main() -> None:
    """Measure, print a line per figure, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("--metric", nargs="+")
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--repetitions", type=int, default=10_000, help="for the false-alarm rate")
    parser.add_argument("--detections", type=int, default=2_000, help="repetitions per size")
    parser.add_argument("--answers", type=int, nargs="+", default=[2, 5, 8, 10, 15, 20, 25, 30, 40])
    parser.add_argument("--factors", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1])
    parser.add_argument("--resamples", type=int, default=1_000, help="of the permutation test")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pairs = read_pairs(args)
    rule = GateRule(alpha=args.alpha, resamples=args.resamples, seed=args.seed)
    report: dict[str, Any] = {"alpha": args.alpha, "repetitions": args.repetitions, "columns": []}
    false = {
        "all tests together": rate(
            alarms(lambda g: swapped(pairs, g), rule, args.repetitions, args.seed), args.repetitions
        )
    }
    for pair in pairs:
        one = rate(alarms(lambda g, p=pair: swapped([p], g), rule, args.repetitions, args.seed), args.repetitions)
        false[f"{pair.task} {pair.metric} alone"] = one
    report["false alarms"] = false
    for name, value in false.items():
        print(f"false alarms, {name}: {value}", flush=True)
    for index, pair in enumerate(pairs):
        sizes = [float(size) for size in (args.answers if pair.binary else args.factors)]
        same = replace(pair, candidate=pair.baseline)
        drops = {"runs that differ": pair, "identical runs": same}
        column = {
            "task": pair.task, "metric": pair.metric, "documents": pair.baseline.documents,
            "scores": [pair.baseline.score, pair.candidate.score], "changed": sum(pair.changes),
            "detectable_drop": {what: detectable(one, len(pairs), rule) for what, one in drops.items()},
            "detection": detection(pairs, index, sizes, rule, args.detections, args.seed),
        }  # fmt: skip
        print(column, flush=True)
        report["columns"].append(column)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
