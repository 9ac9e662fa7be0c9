"""Bits per byte side by side, compared on the same documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lm_eval_deepen.results.statistics.correction import level_of_each, rivals
from lm_eval_deepen.results.statistics.intervals import CONFIDENCE, change_interval
from lm_eval_deepen.results.tables import aligned


@dataclass(frozen=True)
class Change:
    """How much larger one total is than another, as a share, with its confidence interval over documents."""

    share: float  # a / b - 1
    low: float  # lower end of the interval; minus infinity where it cannot be told
    high: float  # upper end of the interval; infinity where it cannot be told
    level: float = CONFIDENCE  # confidence of this interval by itself

    @property
    def better(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.high < 0

    @property
    def worse(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    def __str__(self) -> str:
        """Return ``-1.23 % [-2.34, -0.12]``; the share alone where the interval cannot be told."""
        interval = f" [{100 * self.low:+.2f}, {100 * self.high:+.2f}]" if math.isfinite(self.high) else ""
        return f"{100 * self.share:+.2f} %{interval}"


def compare(a: Tensor, b: Tensor, level: float = CONFIDENCE) -> Change:
    """Compare bits per document [D] of two systems.

    One document says nothing of how much documents scatter, nor do systems without any difference: the interval then
    spans everything.
    """
    bits = np.stack([a.double().numpy(), b.double().numpy()], axis=1)
    change = change_interval(bits, lambda means: means[..., 0] / means[..., 1] - 1, level)
    if change.low is None or change.high is None:
        return Change(change.estimate, -math.inf, math.inf, level)
    return Change(change.estimate, change.low, change.high, level)


@dataclass(frozen=True)
class Line:
    """One system: its bits per document [D], and what is said of it."""

    system: str
    bits: Tensor
    note: str = ""


def best(candidates: Sequence[Line]) -> Line:
    """Return the system that needs fewest bits, the first of several."""
    return min(candidates, key=lambda line: float(line.bits.sum()))


def level(lines: Sequence[Line], candidates: Sequence[Line]) -> float:
    """Return the confidence of each interval against the best of `candidates`, which was picked on these documents.

    It is such that 95 % of the intervals shown hold; see `statistics.level_of_each`.
    """
    bits = np.stack([line.bits.double().numpy() for line in candidates], axis=1)
    return level_of_each(CONFIDENCE, len(lines), rivals(bits, higher_is_better=False))


def table(lines: Sequence[Line], reference: Line, num_bytes: int, level: float = CONFIDENCE) -> str:
    """Return bits per byte of every system, each against `reference`, which is one of them, as plain text.

    `level` is the confidence of each interval by itself; see the function for a reference that was picked.
    """
    body = [["", "bits/byte", f"against {reference.system}", ""]]
    for line in lines:
        change = "" if line is reference else str(compare(line.bits, reference.bits, level))
        body.append([line.system, f"{float(line.bits.sum()) / num_bytes:.4f}", change, line.note])
    return aligned(body, left=4, rule=False)


def facts(line: Line, reference: Line, num_bytes: int, level: float = CONFIDENCE) -> dict[str, Any]:
    """Return a system's figures for a JSON file."""
    change = compare(line.bits, reference.bits, level)
    return {
        "system": line.system,
        "bits_per_byte": float(line.bits.sum()) / num_bytes,
        "against_reference": change.share,
        "interval": [change.low, change.high] if math.isfinite(change.high) else None,
        "level": level,
        "note": line.note,
    }
