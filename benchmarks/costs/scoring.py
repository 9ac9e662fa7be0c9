"""Scoring: an ensemble against its members under `hf`, and tokens forwarded against nodes of the prefix tree."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

from costs.counts import floor, hf_tokens, tree_counts
from costs.figures import Figure, spread
from costs.sides import HF_BATCH_SIZES, Bench, head_share
from costs.workloads import Shape, scoring

LABELS = {
    "arc_differing": "ARC-C, few-shots differing per document",
    "arc_fixed": "ARC-C, {n} documents, 8 fixed few-shots",
    "arc_zero": "ARC-C, {n} documents, zero-shot",
    "piqa": "PIQA, {n} documents, zero-shot",
}
GOALS = {"arc_differing": 0.15, "arc_fixed": 0.08, "arc_zero": 0.3, "piqa": 0.75}
SMALLER_GOAL = 0.6


@dataclass
class Times:
    """Seconds of every repeat: ours, and each member's under `hf`, scaled to all documents.

    Attributes:
        ours, theirs: per repeat; per member and repeat.
        batch_sizes: the faster one of each member.
        scale: all documents' `hf` tokens over those of the timed ones, per member.
        tried: seconds of the timed documents by batch size in the first repeat, per member.
        ours_cpu, theirs_cpu: processor time, as `ours` and `theirs`.
        body_shares: the body's share of `hf`'s time, per member and repeat.
    """

    ours: list[float] = field(default_factory=list)
    theirs: list[list[float]] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)
    tried: list[dict[int, float]] = field(default_factory=list)
    ours_cpu: list[float] = field(default_factory=list)
    theirs_cpu: list[list[float]] = field(default_factory=list)
    body_shares: list[list[float]] = field(default_factory=list)

    def sums(self) -> list[float]:
        """Return the sum over the members, per repeat."""
        return [sum(times) for times in zip(*self.theirs, strict=True)]

    def against(self, theirs: Sequence[float]) -> dict[str, float]:
        """Return the spread of ratios to `theirs`, repeat by repeat."""
        return spread([a / b for a, b in zip(self.ours, theirs, strict=True)])


def measure_shape(bench: Bench, name: str) -> list[Figure]:
    """Time one scoring shape on both sides; figures against the sum of the members, and for one also the smaller."""
    shape = bench.shapes[name]
    times = _times(bench, shape)
    counts = tree_counts(bench.pair, shape.documents)
    shares = [head_share(lm.model) for lm in bench.hf]
    tokens = [hf_tokens(lm, shape.documents) for lm in bench.hf]
    measured = [1 - median(found) for found in times.body_shares]
    floors, by_time = ([floor(*f) for f in zip(s, counts, tokens, strict=True)] for s in (shares, measured))
    typical = [median(theirs) for theirs in times.theirs]
    least, least_by_time = (sum(a * b for a, b in zip(f, typical, strict=True)) for f in (floors, by_time))
    details = _details(bench, shape, times)
    details["floor_of_member"] = dict(zip(bench.settings.names, floors, strict=True))
    details["floor_by_time_of_member"] = dict(zip(bench.settings.names, by_time, strict=True))
    details["hf_tokens"] = dict(zip(bench.settings.names, tokens, strict=True))
    details["positions_read"] = dict(zip(bench.settings.names, [c.positions for c in counts], strict=True))
    label = LABELS[name].format(n=len(shape.documents))
    sums = times.sums()
    figures = [
        Figure(
            name,
            f"{label}: ensemble / sum of both under hf",
            goal=GOALS[name],
            floor=least / sum(typical),
            floor_by_time=least_by_time / sum(typical),
            details={**details, "ratio_of_medians": median(times.ours) / median(sums)},
            **times.against(sums),
        )
    ]
    if name == "arc_differing":
        smaller = times.theirs[bench.smaller]
        figures.append(
            Figure(
                f"{name}_smaller",
                f"{label}: ensemble / smaller member alone under hf",
                goal=SMALLER_GOAL,
                floor=least / median(smaller),
                floor_by_time=least_by_time / median(smaller),
                **times.against(smaller),
                details={
                    "member": bench.settings.names[bench.smaller],
                    "ratio_of_medians": median(times.ours) / median(smaller),
                },
            )
        )
    return figures


def _times(bench: Bench, shape: Shape) -> Times:
    """Time both sides in alternating order; `hf` at both batch sizes at first, then at each member's faster one."""
    asked = scoring(shape.timed)
    members = range(len(bench.hf))
    scale = [hf_tokens(lm, shape.documents) / hf_tokens(lm, shape.timed) for lm in bench.hf]
    times = Times(
        theirs=[[] for _ in members],
        theirs_cpu=[[] for _ in members],
        body_shares=[[] for _ in members],
        batch_sizes=[0 for _ in members],
        scale=scale,
    )

    def ours() -> None:
        times.ours.append(bench.score(shape))
        times.ours_cpu.append(bench.cpu_seconds)

    def theirs() -> None:
        for m in members:
            first = not times.batch_sizes[m]
            taken = {}
            for size in HF_BATCH_SIZES if first else (times.batch_sizes[m],):
                seconds, body = bench.hf_score(m, size, asked)
                taken[size] = (seconds, bench.cpu_seconds, body)
            times.batch_sizes[m] = min(taken, key=lambda size: taken[size][0])
            if first:
                times.tried.append({size: seconds for size, (seconds, _, _) in taken.items()})
            seconds, cpu, body = taken[times.batch_sizes[m]]
            times.theirs[m].append(scale[m] * seconds)
            times.theirs_cpu[m].append(scale[m] * cpu)
            times.body_shares[m].append(body)

    alternate(bench, shape.name, [ours, theirs])
    return times


def alternate(bench: Bench, name: str, sides: Sequence[Any]) -> None:
    """Run every side once per repeat, the order reversed in every other one."""
    for repeat in range(bench.scale.repeats):
        for side in sides[:: -1 if repeat % 2 else 1]:
            side()
        print(f"  {name}: repeat {repeat + 1} of {bench.scale.repeats}", file=sys.stderr, flush=True)


def _details(bench: Bench, shape: Shape, times: Times) -> dict[str, Any]:
    lengths = [bench.length(document.context) for document in shape.documents]
    options = [bench.length(text) for document in shape.documents for text in document.continuations]
    return {
        "documents": len(shape.documents),
        "requests": len(options),
        "mean_context_tokens": mean(lengths),
        "mean_continuation_tokens": mean(options),
        "ours_seconds": times.ours,
        "cpu_time_ratio": median(times.ours_cpu) / median(map(sum, zip(*times.theirs_cpu, strict=True))),
        "hf": {
            name: {
                "seconds": taken,
                "batch_size": size,
                "documents_timed": len(shape.timed),
                "scaled_by": scale,
                "first_by_batch_size": tried,
            }
            for name, taken, size, scale, tried in zip(
                bench.settings.names, times.theirs, times.batch_sizes, times.scale, times.tried, strict=True
            )
        },
    }


def measure_nodes(bench: Bench) -> list[Figure]:
    """Compare the tokens that every member forwarded with the distinct token prefixes it had to."""
    ratios: dict[str, float] = {}
    details: dict[str, Any] = {}
    for name, shape in bench.shapes.items():
        if name not in bench.forwarded:
            bench.score(shape)
        counts = tree_counts(bench.pair, shape.documents)
        for member, count, tokens in zip(bench.settings.names, counts, bench.forwarded[name], strict=True):
            ratios[f"{name} {member}"] = tokens / count.nodes
            details[f"{name} {member}"] = {"forwarded": tokens, "nodes": count.nodes}
        details[f"{name}, through the bodies with padding"] = bench.through[name]
    worst = max(ratios.values())
    label = "tokens forwarded / nodes of the prefix tree, worst of shapes and members"
    figure = Figure("nodes", label, worst, min(ratios.values()), worst, goal=1.0, details=details)
    return [figure]
