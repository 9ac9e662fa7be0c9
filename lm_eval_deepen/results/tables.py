"""Results of several runs side by side, as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DemoCell:
    """One measured value; ``stderr`` is one standard error, or None where the harness gives none."""

    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        """Return ``0.512 ± 0.050``; the value alone where all items came out alike, which bounds no error by 0."""
        error = f" ± {self.stderr:.3f}" if self.stderr else ""
        return f"{self.value:.3f}{error}"


@dataclass(frozen=True)
class DemoRow:
    """One system: its cells by ``(task, metric)`` and the wall time of its run."""

    system: str
    cells: Mapping[tuple[str, str], DemoCell]
    seconds: float


def read_cells(results: Mapping[str, Any]) -> dict[tuple[str, str], DemoCell]:
    """Return every metric of the tasks (not groups) of one ``simple_evaluate`` result.

    Keys of the harness are ``metric,filter`` and ``metric_stderr,filter``; the filter ``none`` is not shown.
    """
    cells: dict[tuple[str, str], DemoCell] = {}
    for task in results["configs"]:
        scores = results["results"][task]
        for key, value in scores.items():
            metric, comma, flt = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = scores.get(f"{metric}_stderr,{flt}")
            label = metric if flt == "none" else f"{metric} ({flt})"
            cells[task, label] = DemoCell(value, stderr if isinstance(stderr, (int, float)) else None)
    return cells


def render(rows: Sequence[DemoRow]) -> str:
    """Return the table: one line per system, one column per task and metric, the wall time last.

    A system that was not measured on a column shows ``-`` there.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row.cells))
    body = [
        ["", *(task for task, _ in columns), "wall"],
        ["system", *(metric for _, metric in columns), "seconds"],
    ]
    for row in rows:
        values = [str(row.cells[column]) if column in row.cells else "-" for column in columns]
        body.append([row.system, *values, f"{row.seconds:.1f}"])
    widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in body]
    lines.insert(2, "-" * len(lines[1]))
    return "\n".join(line.rstrip() for line in lines)
