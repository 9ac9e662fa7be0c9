"""A chart of points with error bars, one line per system, as an SVG element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Look = Literal["dot", "hollow", "diamond"]
_WIDTH, _LINE, _TOP, _BOTTOM, _RIGHT = 720, 26, 10, 34, 90
_CHARACTER = 7  # width of one in a label, about
_LABELS = (60, 300)  # least and most room for labels
_TICKS = 5
_LARGEST = 1e100  # beyond it a width is no finite number


@dataclass(frozen=True)
class Point:
    """One line of a chart: a value, the ends of its error bar if it has one, its text, and its mark."""

    label: str
    value: float
    low: float | None
    high: float | None
    text: str
    look: Look


def is_drawn(*values: float | None) -> bool:
    """Return whether a point can be drawn, by its value and the ends of its error bar: none is beyond all bounds."""
    return all(abs(value) <= _LARGEST for value in values if value is not None)


def chart(identity: str, title: str, description: str, points: Sequence[Point], zero: bool = False) -> str:
    """Return the SVG element: a labelled image for screen readers, with a line at zero if asked for."""
    left = min(max(_LABELS[0], _CHARACTER * max(len(point.label) for point in points)), _LABELS[1]) + 10
    ticks = _ticks([x for p in points for x in (p.value, p.low, p.high) if x is not None] + ([0.0] if zero else []))
    low, high, most = ticks[0], ticks[-1], _LABELS[1] // _CHARACTER
    bottom = _TOP + _LINE * len(points)

    def at(value: float) -> float:
        return round(left + (value - low) / (high - low) * (_WIDTH - left - _RIGHT), 1)

    all_points = "; ".join(f"{point.label}: {point.text}" for point in points)
    parts = [
        f'<svg role="img" aria-labelledby="{identity}t {identity}d" viewBox="0 0 {_WIDTH} {bottom + _BOTTOM}" '
        f'width="{_WIDTH}" xmlns="http://www.w3.org/2000/svg">',
        f'<title id="{identity}t">{escape(title)}</title>',
        f'<desc id="{identity}d">{escape(description)} {escape(all_points)}</desc>',
    ]
    for tick in ticks:
        parts.append(f'<line class="axis" x1="{at(tick)}" x2="{at(tick)}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="soft" x="{at(tick)}" y="{bottom + 18}" text-anchor="middle">{tick:.6g}</text>')
    if zero:
        parts.append(f'<line class="zero" x1="{at(0)}" x2="{at(0)}" y1="{_TOP}" y2="{bottom}"/>')
    for index, point in enumerate(points):
        y = _TOP + _LINE * index + _LINE // 2
        told, label = f"<title>{escape(f'{point.label}: {point.text}')}</title>", point.label
        if len(label) > most:  # its two ends tell systems apart
            label = f"{label[: most // 2 - 1]}…{label[-(most - most // 2) :]}"
        parts.append(f'<g>{told}<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(label)}</text>')
        if point.low is not None and point.high is not None:
            a, b = at(point.low), at(point.high)
            parts.append(f'<path class="bar" d="M{a} {y}H{b}M{a} {y - 5}V{y + 5}M{b} {y - 5}V{y + 5}"/>')
        x = at(point.value)
        if point.look == "diamond":
            parts.append(f'<path class="diamond" d="M{x} {y - 7}L{x + 7} {y}L{x} {y + 7}L{x - 7} {y}Z"/>')
        else:
            parts.append(f'<circle class="{point.look}" cx="{x}" cy="{y}" r="4.5"/>')
        parts.append(f'<text class="soft" x="{_WIDTH - _RIGHT + 12}" y="{y + 4}">{escape(point.text)}</text></g>')
    return "\n".join([*parts, "</svg>"])


def _ticks(values: Sequence[float]) -> list[float]:
    """Return about `_TICKS` round numbers that enclose the values; shares stay between 0 and 1."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        are_shares = low >= 0 and high <= 1
        low, high = low - 0.05 * max(1.0, abs(low)), high + 0.05 * max(1.0, abs(high))
        if are_shares:
            low, high = max(0.0, low), min(1.0, high)
    rough = (high - low) / (_TICKS - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
