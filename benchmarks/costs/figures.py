"""One measured figure with its spread, goal and floor, and how figures are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

UNAVAILABLE = "not available"
BELOW = "below the floor"


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    Attributes:
        name: key in the JSON line.
        label: what is measured, in words.
        value: median over the repeats; None where it cannot be measured.
        low, high: the spread over the repeats.
        unit: of these, empty for a ratio.
        goal: the value should not be above it; None where there is no goal.
        floor: for scoring, the least share of `hf`'s work, with parameters standing for time.
        floor_by_time: the same with the split of time that `hf` was measured to have. A value below it asks for an
            explanation: a disturbed clock, work left out, or tokens that cost less in larger batches.
        seconds: how long the measure took.
        details: how the value came about.
    """

    name: str
    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    goal: float | None = None
    floor: float | None = None
    floor_by_time: float | None = None
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether the goal is met."""
        if self.value is None:
            return UNAVAILABLE
        words = [] if self.goal is None else ["met" if self.value <= self.goal else "missed"]
        if self.floor_by_time is not None and self.value < self.floor_by_time:
            words.append(BELOW)
        return ", ".join(words)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, with numbers of four significant digits."""
        return {**rounded(asdict(self)), "verdict": self.verdict}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return value (median), low and high of repeats."""
    return {"value": median(values), "low": min(values), "high": max(values)}


def rounded(value: Any) -> Any:
    """Return data whose floats have four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


HEADINGS = ("measure", "value", "spread", "goal", "floor", "floor by time", "")


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a figure, given as plain data."""
    value, goal, floor, unit = row["value"], row["goal"], row["floor"], row["unit"]
    suffix = f" {unit}" if unit else ""
    many = row["low"] is not None and row["low"] != row["high"]
    return (
        row["label"],
        "" if value is None else f"{number(value)}{suffix}",
        f"{number(row['low'])} to {number(row['high'])}" if many else "",
        "" if goal is None else f"<= {number(goal)}{suffix}",
        "" if floor is None else number(floor),
        "" if row["floor_by_time"] is None else number(row["floor_by_time"]),
        row["verdict"],
    )


def number(value: float) -> str:
    """Return three significant digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{float(f'{value:.3g}'):g}"


def plain(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as aligned text."""
    lines = [HEADINGS, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)])
