"""Whether the statistics hold their level: false alarms of whole tables, and coverage of every interval shown.

    python benchmarks/statistics_level.py [--repetitions 1000] [--real 400] [--state FILE] [--into docs/ci.md]

Systems answer simulated documents; the tables, tests, intervals and the gate's decisions are those of the package
(`rows_of`, `corrected`, `decide`, `detectable`). A document is easy or hard for all systems alike, which is what pairs
them: a system gives the common answer to it, or with some chance one of its own.

* equal: all systems are equally good. unequal: one is better, one is worse, the rest are equal.
* a given reference, the best of all systems, or the best of the first two (a leaderboard of two members).
* right/wrong with many, some or few documents that differ; near-copies of each other; the mean of three seeds;
  F1 between 0 and 1; bits per byte of documents of very different lengths.

A false alarm is a table in which a system that is as good as the reference is called better or worse, or in which one
that is better is called worse, or the other way round. Coverage is the share of the intervals shown that hold the
truth. Intervals of right and wrong answers of two systems are checked by exact enumeration, too. With --state, finished
parts are kept there, and the same command goes on. The last line is JSON; --into fills the markers of a Markdown file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_deepen.results.aggregation import AGGREGATIONS, Scores, group_scores
from lm_eval_deepen.results.regression import GateRule, Pair, decide, detectable
from lm_eval_deepen.results.rows import Measured, corrected, rows_of
from lm_eval_deepen.results.statistics.distributions import binomial
from lm_eval_deepen.results.statistics.intervals import paired_interval, proportion_interval

ALPHA = 0.05
DOCUMENTS = (30, 100, 300, 1000)
SYSTEMS = (2, 3, 5, 10, 20)
BEGIN, END = "<!-- levels: begin -->", "<!-- levels: end -->"


@dataclass(frozen=True)
class Population:
    """How systems answer documents.

    Attributes:
        name: for the table.
        draw: from a generator, documents and each system's own quality to the scores by system.
        truth: from a system's own quality to its true score.
        steps: own qualities: worse, equal, better.
        higher_is_better: which way is good.
        real: whether the permutation test is used, which takes longer.
    """

    name: str
    draw: Callable[[np.random.Generator, int, Sequence[float]], list[Scores]]
    truth: Callable[[float], float]
    steps: tuple[float, float, float]
    higher_is_better: bool = True
    real: bool = False


def right_or_wrong(name: str, own: float, copies: bool = False, seeds: int = 1, step: float = 0.2) -> Population:
    """Return systems that are right on half of the documents, and give an answer of their own to a share `own`."""

    def answers(generator: np.random.Generator, n: int, qualities: Sequence[float]) -> np.ndarray:
        common = generator.random(n) < 0.5
        family = np.where(generator.random(n) < 0.5, generator.random(n) < 0.5, common)
        found = []
        for at, quality in enumerate(qualities):
            # Every second system follows the first one's family, and so the others of it, in nearly everything.
            base = family if copies and at % 2 else common
            found.append(np.where(generator.random(n) < own, generator.random(n) < quality, base))
        return np.array(found, dtype=np.float64)

    def draw(generator: np.random.Generator, n: int, qualities: Sequence[float]) -> list[Scores]:
        if seeds == 1:
            return [Scores(row[:, None]) for row in answers(generator, n, qualities)]
        common = generator.random(n) < 0.5
        return [
            Scores(
                np.mean(
                    [np.where(generator.random(n) < own, generator.random(n) < q, common) for _ in range(seeds)], axis=0
                )[:, None]
            )
            for q in qualities
        ]

    steps = (0.5 - step, 0.5, 0.5 + step)
    return Population(name, draw, lambda quality: (1 - own) * 0.5 + own * quality, steps, real=seeds > 1)


def f1(name: str, own: float) -> Population:
    """Return systems whose answers score between 0 and 1: a third none, a third all, the rest anything between."""

    def values(generator: np.random.Generator, n: int, full: float) -> np.ndarray:
        luck = generator.random(n)
        return np.where(luck < 0.35, 0.0, np.where(luck < 0.35 + full, 1.0, generator.beta(2, 2, size=n)))

    def draw(generator: np.random.Generator, n: int, qualities: Sequence[float]) -> list[Scores]:
        common = values(generator, n, 0.3)
        return [
            Scores(np.where(generator.random(n) < own, values(generator, n, q), common)[:, None]) for q in qualities
        ]

    def mean(full: float) -> float:
        return full + (0.65 - full) / 2

    return Population(name, draw, lambda full: (1 - own) * mean(0.3) + own * mean(full), (0.15, 0.3, 0.45), real=True)


def bits_per_byte(name: str, spread: float) -> Population:
    """Return systems that need about 0.9 bits per byte; `spread` is that of the logarithms of document lengths."""

    def draw(generator: np.random.Generator, n: int, qualities: Sequence[float]) -> list[Scores]:
        sizes = np.ceil(np.exp(generator.normal(5, spread, size=n)))
        hardness = 0.9 + 0.2 * generator.standard_normal(n)
        bits = [sizes * (hardness + q + 0.04 * generator.standard_normal(n)) for q in qualities]
        statistic = AGGREGATIONS["bits_per_byte"][1]
        return [Scores(np.stack([-b * math.log(2), sizes], axis=1), statistic, averaged=False) for b in bits]

    return Population(name, draw, lambda q: 0.9 + q, (0.02, 0.0, -0.02), higher_is_better=False, real=True)


POPULATIONS = (
    right_or_wrong("right/wrong, a fifth differ", 0.225),
    right_or_wrong("right/wrong, 4 % differ", 0.0408),
    right_or_wrong("right/wrong, near-copies", 0.05, copies=True),
    right_or_wrong("right/wrong, mean of 3 seeds", 0.225, seeds=3),
    f1("F1, a fifth differ", 0.15),
    f1("F1, all differ", 1.0),
    bits_per_byte("bits per byte", 0.7),
)
REFERENCES: Mapping[str, Callable[[Sequence[str]], Sequence[str]]] = {
    "given": lambda names: names[:1],
    "best of two": lambda names: names[:2],
    "best of all": lambda names: names,
}


def qualities(population: Population, systems: int, truth: str) -> list[float]:
    """Return each system's own quality."""
    worse, equal, better = population.steps
    if truth == "equal":
        return [equal] * systems
    return [better, *[equal] * (systems - 2), worse] if systems > 2 else [better, equal]


def column(
    population: Population, generator: np.random.Generator, documents: int, own: Sequence[float], task: str = "t"
) -> Measured:
    """Return one simulated column of a table."""
    scores = population.draw(generator, documents, own)
    named = {f"s{i}": one for i, one in enumerate(scores)}
    return Measured(task, "m", "none", population.higher_is_better, named)


def simulate(
    population: Population,
    documents: int,
    systems: int,
    reference: str,
    truth: str,
    repetitions: int,
    columns: int = 1,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Return rates of false alarms of tables, and of coverage of the intervals in them, with standard errors."""
    generator = np.random.default_rng([seed, documents, systems, columns, len(population.name), len(reference)])
    own = qualities(population, systems, truth)
    if truth == "unequal" and reference == "given":
        own = [own[1], own[0], *own[2:]]  # the given one is one of the equal ones
    true = {f"s{i}": population.truth(q) for i, q in enumerate(own)}
    names = list(true)
    sign = 1 if population.higher_is_better else -1
    alarms, hits, shown, misses = 0, [], [], []
    for _ in range(repetitions):
        rows = []
        for c in range(columns):
            measured = column(population, generator, documents, own, f"t{c}")
            rows += rows_of(
                measured, REFERENCES[reference](names), resamples=resamples, seed=int(generator.integers(2**31))
            )
        alarm, held = False, []
        for row in corrected(rows):
            if row.low is not None and row.high is not None:
                hits.append(row.low - 1e-9 <= true[row.system] <= row.high + 1e-9)
            line = row.comparison
            if line is None:
                continue
            difference = true[row.system] - true[line.reference]
            verdict = row.verdict(ALPHA)
            claimed = {"better": 1, "worse": -1, "not significant": 0}[verdict or "not significant"] * sign
            alarm |= claimed != 0 and claimed * difference <= 1e-12
            if line.low is not None and line.high is not None:
                held.append(line.low - 1e-9 <= difference <= line.high + 1e-9)
            misses.append(
                (line.p <= ALPHA, line.low is not None and line.high is not None and line.low * line.high <= 0)
            )
        alarms += alarm
        shown.append(np.mean(held))
    apart = np.array(misses)
    return {
        "false alarms": rate(alarms, repetitions),
        "differences": {"coverage": round(float(np.mean(shown)), 4), "stderr": round(spread(shown), 4)},
        "scores": {"coverage": round(float(np.mean(hits)), 4)},
        "p at most 0.05, 0 inside": round(float((apart[:, 0] & apart[:, 1]).mean()), 4),
        "p above 0.05, 0 outside": round(float((~apart[:, 0] & ~apart[:, 1]).mean()), 4),
    }


def rate(hits: int, total: int) -> dict[str, float]:
    """Return a share with its standard error."""
    share = hits / total
    return {"rate": round(share, 4), "stderr": round(math.sqrt(share * (1 - share) / total), 4)}


def spread(values: Sequence[float]) -> float:
    """Return the standard error of a mean."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


# --- two systems, right and wrong: exact


def paired_coverage(documents: int, worse: float, better: float) -> float:
    """Return the exact coverage of the interval of a difference, given how many documents change either way."""
    total, changed = 0.0, worse + better
    zeros = np.zeros((documents, 1))
    for count, chance in enumerate(binomial(documents, changed)):
        if chance < 1e-7:
            continue
        for above, given in enumerate(binomial(count, better / changed)):
            if given * chance < 1e-9:
                continue
            first, second = zeros.copy(), zeros.copy()
            second[:above] = 1
            first[above:count] = 1
            found = paired_interval(first, second)
            assert found.low is not None and found.high is not None
            total += chance * given * (found.low - 1e-12 <= better - worse <= found.high + 1e-12)
    return round(float(total), 4)


def proportion_coverage(documents: int, chance: float) -> float:
    """Return the exact coverage of the interval of one proportion."""
    total = 0.0
    for right, given in enumerate(binomial(documents, chance)):
        if given > 1e-9:
            low, high = proportion_interval(right, documents)
            total += given * (low <= chance <= high)
    return round(float(total), 4)


def group_coverage(documents: int, by_size: bool, repetitions: int, seed: int = 0) -> dict[str, float]:
    """Return the coverage of the interval of a difference in a group of eight tasks of different sizes.

    Tasks differ in how hard they are and in what the second system gains in them.
    """
    generator = np.random.default_rng([seed, documents, by_size])
    sizes = np.maximum(2, np.round(documents * np.array([0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]))).astype(int)
    hardness, gains = np.linspace(0.3, 0.7, 8), np.linspace(-0.02, 0.05, 8)
    weights = sizes / sizes.sum() if by_size else np.full(8, 1 / 8)
    truth, held = float(weights @ gains), []
    for _ in range(repetitions):
        parts: tuple[list[Scores], list[Scores]] = ([], [])
        for size, easy, gain in zip(sizes, hardness, gains, strict=True):
            own = generator.random((2, size)) < 0.2
            common = generator.random(size) < easy
            for one, system in enumerate(parts):
                alone = generator.random(size) < easy + one * gain / 0.2
                system.append(Scores(np.where(own[one], alone, common).astype(np.float64)[:, None]))
        first, second = (group_scores(system, by_size) for system in parts)
        found = paired_interval(first.values, second.values)
        held.append(found.low is not None and found.high is not None and found.low <= truth <= found.high)
    return {"coverage": round(float(np.mean(held)), 4), "stderr": round(spread(held), 4)}


# --- the gate


def gate(documents: int, tests: int, changed: float, repetitions: int, seed: int = 0) -> dict[str, Any]:
    """Return the gate's false alarms, and how often it finds the drop that it calls detectable, right and wrong."""
    rule = GateRule()
    generator = np.random.default_rng([seed, documents, tests])

    def pair(worse: float, better: float, task: str = "t") -> Pair:
        luck = generator.random(documents)
        same = generator.random(documents) < 0.5
        first = np.where(luck < worse, 1.0, np.where(luck < worse + better, 0.0, same))
        second = np.where(luck < worse, 0.0, np.where(luck < worse + better, 1.0, same))
        return Pair(task, "acc", "none", True, Scores(first[:, None]), Scores(second[:, None]))

    half = changed / 2
    alarms = sum(
        any(found.regressed for found in decide([pair(half, half, str(t)) for t in range(tests)], rule))
        for _ in range(repetitions)
    )
    stated = [detectable(pair(half, half), tests, rule) for _ in range(40)]
    known = [drop for drop in stated if drop is not None]
    if len(known) < len(stated):
        return {"false alarms": rate(alarms, repetitions), "detectable": None}
    drop = float(np.mean(known))
    others = [pair(half, half, str(t)) for t in range(1, tests)]
    level = replace(rule, alpha=rule.alpha / tests)
    found = sum(decide([pair(min(half + drop, 1 - half), half)], level)[0].regressed for _ in range(repetitions))
    together = sum(
        decide([pair(min(half + drop, 1 - half), half), *others], rule)[0].regressed for _ in range(repetitions)
    )
    return {
        "false alarms": rate(alarms, repetitions), "detectable": round(drop, 4), "found": rate(found, repetitions),
        "found among the others": rate(together, repetitions),
    }  # fmt: skip


def gate_real(documents: int, tests: int, repetitions: int, seed: int = 0) -> dict[str, Any]:
    """Return the same of a real-valued metric, bits per byte."""
    rule = GateRule(resamples=200)
    population = bits_per_byte("", 0.7)
    generator = np.random.default_rng([seed, documents, tests, 1])

    def pair(loss: float, task: str = "t") -> Pair:
        first, second = population.draw(generator, documents, [0.0, loss])
        return Pair(task, "bits_per_byte", "none", False, first, second)

    alarms = sum(
        any(found.regressed for found in decide([pair(0.0, str(t)) for t in range(tests)], rule))
        for _ in range(repetitions)
    )
    known = [drop for _ in range(40) if (drop := detectable(pair(0.0), tests, rule)) is not None]
    if not known:
        return {"false alarms": rate(alarms, repetitions), "detectable": None}
    drop = float(np.mean(known))
    level = replace(rule, alpha=rule.alpha / tests)
    found = sum(decide([pair(drop)], level)[0].regressed for _ in range(repetitions))
    return {
        "false alarms": rate(alarms, repetitions), "detectable": round(drop, 4), "found": rate(found, repetitions),
    }  # fmt: skip


# --- everything, part by part


def parts(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield every part of the measurement by name."""
    for n, half in ((30, 0.05), (100, 0.02), (300, 0.005), (1000, 0.0015)):
        yield f"paired {n} {half}+{half}", lambda n=n, h=half: paired_coverage(n, h, h)
    for n in args.documents:
        for changed in (0.02, 0.1, 0.3):
            for share in (0.5, 0.7, 0.9):
                yield (
                    f"paired {n} {changed} {share}",
                    lambda n=n, q=changed, s=share: paired_coverage(n, q * (1 - s), q * s),
                )
        for chance in (0.5, 0.7, 0.9, 0.97, 0.99):
            yield f"proportion {n} {chance}", lambda n=n, p=chance: proportion_coverage(n, p)
    for n in args.documents:
        for tests in (1, 4, 20):
            yield f"gate {n} {tests}", lambda n=n, t=tests: gate(n, t, 0.2, args.repetitions)
            yield f"gate real {n} {tests}", lambda n=n, t=tests: gate_real(n, t, args.real)
        for by_size in (True, False):
            yield f"group {n} {by_size}", lambda n=n, b=by_size: group_coverage(n, b, args.repetitions)
    for population in POPULATIONS:
        count = args.real if population.real else args.repetitions
        for n in args.documents:
            for k in args.systems:
                if population is not POPULATIONS[0] and k not in (2, 5, 20):
                    continue
                for reference in REFERENCES:
                    if reference == "best of two" and (k == 2 or population is not POPULATIONS[0]):
                        continue
                    for truth in ("equal", "unequal"):
                        yield (
                            f"table|{population.name}|{n}|{k}|{reference}|{truth}",
                            lambda p=population, n=n, k=k, r=reference, t=truth, c=count: simulate(p, n, k, r, t, c),
                        )
    for n in args.documents:
        for reference in REFERENCES:
            yield (
                f"table|right/wrong, 4 columns|{n}|5|{reference}|equal",
                lambda n=n, r=reference: simulate(POPULATIONS[0], n, 5, r, "equal", args.repetitions, columns=4),
            )


def markdown(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table; the first `left` columns are text."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * left + "---:|" * (len(rows[0]) - left))
    return "\n".join(lines)


def between(values: Sequence[float]) -> str:
    """Return the range of shares in per cent."""
    shown = dict.fromkeys(f"{100 * value:.1f}" for value in (min(values), max(values)))
    return " to ".join(shown)


def tables_summary(found: Mapping[str, Any], documents: Sequence[int]) -> str:
    """Return the highest rate of false alarms by number of systems, and the coverage by number of documents."""
    rows: dict[tuple[str, str, str], dict[tuple[int, int], Any]] = {}
    for name, value in found.items():
        if name.startswith("table|"):
            _, population, n, k, reference, truth = name.split("|")
            rows.setdefault((population, reference, truth), {})[int(n), int(k)] = value
    counts = sorted({k for cells in rows.values() for _, k in cells})
    head = ["answers", "reference", "systems", *(f"k = {k}" for k in counts)]
    lines = [[*head, *(f"differences, n = {n}" for n in documents), "scores"]]
    for names, cells in rows.items():
        alarms = [[v["false alarms"]["rate"] for (_, systems), v in cells.items() if systems == k] for k in counts]
        covered = [[v["differences"]["coverage"] for (m, _), v in cells.items() if m == n] for n in documents]
        line = [*names, *(f"{100 * max(own):.1f}" if own else "" for own in alarms)]
        line += [between(own) if own else "" for own in covered]
        lines.append([*line, between([v["scores"]["coverage"] for v in cells.values()])])
    return markdown(lines, left=3)


def pairs_summary(found: Mapping[str, Any], documents: Sequence[int]) -> str:
    """Return the exact coverage of the interval of a difference of two systems, right and wrong."""
    kinds = dict.fromkeys(name.split(" ", 2)[2] for name in found if name.startswith("paired ") and "+" not in name)
    lines = [["documents that change", "of these for the better", *(f"n = {n}" for n in documents)]]
    for kind in kinds:
        changed, better = map(float, kind.split())
        cells = [f"{100 * found[f'paired {n} {kind}']:.1f}" for n in documents]
        lines.append([f"{100 * changed:g} %", f"{100 * better:g} %", *cells])
    return markdown(lines, left=2)


def named_pairs(found: Mapping[str, Any]) -> str:
    """Return the exact coverage where few documents change, as many for the better as for the worse."""
    told = []
    for name, coverage in found.items():
        if name.startswith("paired ") and "+" in name:
            _, n, halves = name.split(" ")
            first, second = (f"{100 * float(half):g}" for half in halves.split("+"))
            told.append(f"{first} + {second} % of {n} documents: {100 * coverage:.1f} %")
    return "; ".join(told) + "."


def scores_summary(found: Mapping[str, Any], documents: Sequence[int]) -> str:
    """Return the exact coverage of the interval of one score, right and wrong."""
    chances = dict.fromkeys(name.split(" ")[2] for name in found if name.startswith("proportion "))
    lines = [["true score", *(f"n = {n}" for n in documents)]]
    for chance in chances:
        lines.append([chance, *(f"{100 * found[f'proportion {n} {chance}']:.1f}" for n in documents)])
    return markdown(lines)


def groups_summary(found: Mapping[str, Any], documents: Sequence[int]) -> str:
    """Return the coverage of the interval of a difference in a group of eight tasks."""
    lines = [["eight tasks of different sizes", *(f"n = {n}" for n in documents)]]
    for by_size, label in ((True, "every document alike"), (False, "every task alike")):
        cells = [f"{100 * found[f'group {n} {by_size}']['coverage']:.1f}" for n in documents]
        lines.append([label, *cells])
    return markdown(lines)


def gate_summary(found: Mapping[str, Any]) -> str:
    """Return the gate's false alarms, the drop that it calls detectable, and how often it finds that drop."""
    lines = [["metric", "documents", "tests", "false alarms", "detectable drop", "found"]]
    for name, value in found.items():
        if name.startswith("gate "):
            *kind, n, tests = name.split(" ")
            metric = "bits per byte" if "real" in kind else "right/wrong, a fifth differ"
            drop = "" if value["detectable"] is None else f"{value['detectable']:.4f}"
            hits = "" if value["detectable"] is None else f"{100 * value['found']['rate']:.1f}"
            lines.append([metric, n, tests, f"{100 * value['false alarms']['rate']:.1f}", drop, hits])
    return markdown(
        [lines[0], *sorted(lines[1:], key=lambda line: (line[0] == "bits per byte", int(line[1]), int(line[2])))]
    )


def summary(found: Mapping[str, Any], documents: Sequence[int]) -> str:
    """Return what was found as Markdown."""
    return "\n\n".join(
        [
            "**Tables.** Per cent of tables with a false alarm at 0.05, the highest of all numbers of documents; per "
            "cent of the intervals that contain the truth, lowest to highest of all numbers of systems k.",
            tables_summary(found, documents),
            "**The difference of two systems, right and wrong**, exactly. Per cent of the intervals that contain the "
            f"truth. {named_pairs(found)}",
            pairs_summary(found, documents),
            "**One score, right and wrong**, exactly:",
            scores_summary(found, documents),
            "**Groups** whose score is a mean; tasks differ in what a system gains:",
            groups_summary(found, documents),
            "**The gate**, per cent: false alarms of all tests together; how often the drop is found that it states.",
            gate_summary(found),
        ]
    )


def main() -> None:
    """Measure what is missing, print a line per part, the table, and one JSON line last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1_000, help="tables, where answers are right or wrong")
    parser.add_argument("--real", type=int, default=400, help="tables, where scores are real-valued")
    parser.add_argument("--documents", type=int, nargs="+", default=list(DOCUMENTS))
    parser.add_argument("--systems", type=int, nargs="+", default=list(SYSTEMS))
    parser.add_argument("--only", metavar="TEXT", help="the parts whose names contain this, to share the work")
    parser.add_argument("--state", type=Path, help="JSON lines of finished parts: kept, and gone on from")
    parser.add_argument("--into", type=Path, help=f"Markdown file with {BEGIN} and {END}")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    if args.state and args.state.is_file():
        found = dict(json.loads(line) for line in args.state.read_text("utf-8").splitlines())
    for name, measure in parts(args):
        if name in found or (args.only and args.only not in name):
            continue
        start = time.perf_counter()
        found[name] = measure()
        print(f"{name}: {json.dumps(found[name])} ({time.perf_counter() - start:.1f} s)", flush=True)
        if args.state:
            with args.state.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, found[name]]) + "\n")
    text = summary(found, args.documents)
    print(text)
    if args.into:
        document = args.into.read_text("utf-8")
        head, tail = document.split(BEGIN)[0], document.split(END)[1]
        args.into.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", "utf-8")
    print(json.dumps({"repetitions": args.repetitions, "real": args.real, "parts": found}))


if __name__ == "__main__":
    main()
