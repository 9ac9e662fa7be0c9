"""One self-contained HTML page of measured and compared systems: tables that sort, charts, nothing fetched.

The page is `templates/page.html.j2`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lm_eval_deepen.results.chart import Look, Point, chart, is_drawn
from lm_eval_deepen.results.report import cells, columns, extras, head, heading, number, reading, signed
from lm_eval_deepen.results.rows import ScoreRow
from lm_eval_deepen.results.templates import render

MARKS = (
    "A diamond is the reference; a hollow mark is not significantly different from it after correction over the table, "
    "a filled one is."
)


@dataclass(frozen=True)
class Figure:
    """A chart, as an SVG element, and what it shows."""

    drawing: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """One task and metric: its table, headings first, and its charts."""

    column: str
    caption: str
    lines: Sequence[Sequence[str]]
    figures: Sequence[Figure]


def html(
    rows: Sequence[ScoreRow],
    alpha: float,
    notes: Sequence[str] = (),
    title: str = "Comparison",
    facts: Mapping[str, str] | None = None,
    summary: Sequence[Sequence[str]] = (),
    told: Sequence[str] = (),
    link: Callable[[ScoreRow], str | None] = lambda row: None,
) -> str:
    """Return the page: for every task and metric the table, and two charts with error bars that say the same.

    `facts` say where the numbers come from; `summary`, a table of all columns, comes first, with the sentences `told`
    below it; `link` returns where a row's documents are shown, if they are.
    """
    names = extras(rows)
    by_place = {(row.system, row.column): row for row in rows}
    top = summary[0] if summary else ()
    linked = [
        [_linked(cell, by_place.get((line[0], column)), link) for column, cell in zip(top, line, strict=True)]
        for line in summary[1:]
    ]
    return render(
        "page.html.j2",
        title=title,
        facts=facts or {},
        summary=[top, *linked] if summary else (),
        told=told,
        sections=[_section(i, group, alpha, names, link) for i, group in enumerate(columns(rows).values(), 1)],
        reading=" ".join([f"Significance at {alpha:g}.", *reading(rows)]),
        notes=notes,
    )


def _linked(cell: str, row: ScoreRow | None, link: Callable[[ScoreRow], str | None]) -> str:
    """Return a cell that leads to the documents of a row, where there is one and they are shown."""
    where = None if row is None else link(row)
    return cell if where is None else Markup('<a href="{}">{}</a>').format(where, cell)


def _section(
    index: int, group: Sequence[ScoreRow], alpha: float, names: Sequence[str], link: Callable[[ScoreRow], str | None]
) -> Section:
    own, column = extras(group), group[0].column
    headings = [name for name in head(group) if name not in own] + list(names)
    looks: dict[str, Look] = {}  # a system has one mark in every chart
    for row in group:
        close = row.verdict(alpha) == "not significant"
        looks[row.system] = "diamond" if row.comparison is None else "hollow" if close else "dot"
    drawn = [row for row in group if is_drawn(row.score, row.low, row.high)]
    scores = [Point(row.system, row.score, row.low, row.high, number(row.score), looks[row.system]) for row in drawn]
    caption = f"Score with its 95 % interval over documents. {MARKS}"
    figures = [Figure(Markup(chart(f"c{index}", f"Scores, {column}", caption, scores)), caption)] if drawn else []
    compared = [
        (row.system, one) for row in group if (one := row.comparison) and is_drawn(one.difference, one.low, one.high)
    ]
    if compared:
        caption = f"Difference to {compared[0][1].reference} with its paired 95 % interval. {MARKS}"
        points = [
            Point(system, one.difference, one.low, one.high, signed(one.difference), looks[system])
            for system, one in compared
        ]
        drawing = chart(f"d{index}", f"Differences, {column}", caption, points, zero=True)
        figures.append(Figure(Markup(drawing), caption))
    lines: list[list[str]] = [headings]
    for row in group:
        first, score, *others = cells(row, alpha, names)
        lines.append([first, _linked(score, row, link), *others])
    return Section(column, heading(group), lines, figures)
