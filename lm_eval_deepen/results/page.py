"""One self-contained HTML page of measured and compared systems: tables that sort, charts, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from lm_eval_deepen.results.chart import Look, Point, chart
from lm_eval_deepen.results.report import cells, columns, extras, head, heading, number, reading, signed
from lm_eval_deepen.results.rows import ScoreRow

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #ffffff; --mark: #0550ae; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9da7b3; --line: #3d444d; --paper: #0d1117; --mark: #79c0ff; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.wide { overflow: auto; max-height: 85vh; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th[scope=row], thead th:first-child { text-align: left; position: sticky; left: 0; z-index: 1; }
th[scope=row], thead th { background: var(--paper); }
thead th { position: sticky; top: 0; z-index: 2; }
thead th:first-child { z-index: 3; }
thead button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: inherit; }
thead button::after { content: " ↕"; color: var(--soft); }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
:focus-visible { outline: 3px solid var(--mark); outline-offset: 1px; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem .8rem; overflow-wrap: anywhere; }
dt { font-weight: 600; }
dd { margin: 0; }
figure { margin: 1rem 0; }
figcaption, .reading { color: var(--soft); }
svg { max-width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .soft { fill: var(--soft); }
svg .axis { stroke: var(--line); }
svg .zero { stroke: var(--soft); stroke-dasharray: 4 3; }
svg .bar { stroke: var(--mark); stroke-width: 2; fill: none; }
svg .dot { fill: var(--mark); stroke: var(--mark); stroke-width: 2; }
svg .hollow { fill: var(--paper); stroke: var(--mark); stroke-width: 2; }
svg .diamond { fill: var(--ink); }
@media (max-width: 480px) {
  body { margin: 1rem auto; padding: 0 .6rem; }
  th, td { padding: .3rem .4rem; }
  th[scope=row], thead th:first-child { min-width: 6rem; max-width: 42vw; white-space: normal;
    overflow-wrap: anywhere; }
  td:nth-child(2) { white-space: normal; min-width: 5.5rem; }
}
"""
MARKS = (
    "A diamond is the reference; a hollow mark is not significantly different from it after correction over the table, "
    "a filled one is."
)
# Sorts a table by a column: by the first number of its cells where all have one, else as text; empty cells come last.
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button"; button.append(...head.childNodes); head.append(button);
    button.addEventListener("click", () => {
      const text = row => row.cells[at].textContent, value = row => parseFloat(text(row).replace("<", ""));
      const numbers = at > 0 && [...body.rows].some(row => !isNaN(value(row)));
      const before = head.getAttribute("aria-sort"), up = before ? before === "descending" : !numbers;
      const order = (x, y) => {
        if (!numbers) return text(x).localeCompare(text(y)) * (up ? 1 : -1);
        const a = value(x), b = value(y);
        return isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) : up ? a - b : b - a;
      };
      body.append(...[...body.rows].sort(order));
      heads.forEach(one => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
    });
  });
}
"""


def html(
    rows: Sequence[ScoreRow],
    alpha: float,
    notes: Sequence[str] = (),
    title: str = "Comparison",
    before: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> str:
    """Return the page: for every task and metric two charts with error bars, and the table that says the same.

    `before` is HTML that comes first; `facts` say where the numbers come from.
    """
    names = extras(rows)
    blocks = [_section(i, group, alpha, names) for i, group in enumerate(columns(rows).values(), 1)]
    told = " ".join([f"Significance at {alpha:g}.", *reading(rows)])
    remarks = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{escape(title)}</h1>",
            _facts(facts or {}),
            *before,
            *blocks,
            f'<p class="reading">{escape(told)}</p>',
            f"<h2>Notes</h2>\n<ul>{remarks}</ul>" if notes else "",
            "</main>",
            f"<script>{_SCRIPT}</script>",
            "</body>",
            "</html>",
        ]
    )


def _facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    told = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<details open><summary>Where these numbers come from</summary>\n<dl>\n{told}\n</dl></details>"


def _section(index: int, group: Sequence[ScoreRow], alpha: float, names: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<section aria-labelledby="s{index}">',
            f'<h2 id="s{index}">{escape(group[0].column)}</h2>',
            _table(group, alpha, names),
            _scores(f"c{index}", group, alpha),
            _differences(f"d{index}", group, alpha),
            "</section>",
        ]
    )


def _look(row: ScoreRow, alpha: float) -> Look:
    """Return the mark of a system, the same in every chart."""
    return "diamond" if row.comparison is None else "hollow" if row.verdict(alpha) == "not significant" else "dot"


def _scores(identity: str, group: Sequence[ScoreRow], alpha: float) -> str:
    points = [
        Point(
            label=row.system,
            value=row.score,
            low=row.low,
            high=row.high,
            text=number(row.score),
            look=_look(row, alpha),
        )
        for row in group
    ]
    caption = f"Score with its 95 % interval over documents. {MARKS}"
    return _figure(chart(identity, f"Scores, {group[0].column}", caption, points), caption)


def _differences(identity: str, group: Sequence[ScoreRow], alpha: float) -> str:
    points = [
        Point(
            label=row.system,
            value=row.comparison.difference,
            low=row.comparison.low,
            high=row.comparison.high,
            text=signed(row.comparison.difference),
            look=_look(row, alpha),
        )
        for row in group
        if row.comparison
    ]
    if not points:
        return ""
    reference = next(row.comparison.reference for row in group if row.comparison)
    caption = f"Difference to {reference} with its paired 95 % interval. {MARKS}"
    return _figure(chart(identity, f"Differences, {group[0].column}", caption, points, zero=True), caption)


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>\n{drawing}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _table(group: Sequence[ScoreRow], alpha: float, names: Sequence[str]) -> str:
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head_of(group, names))
    body = []
    for row in group:
        first, *rest = cells(row, alpha, names)
        body.append(
            f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        )
    return (
        f'<div class="wide"><table>\n<caption>{escape(heading(group))}</caption>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table></div>"
    )


def head_of(group: Sequence[ScoreRow], names: Sequence[str]) -> list[str]:
    """Return the headings of one table on a page whose rows have the further figures `names`."""
    own = extras(group)
    return [heading_ for heading_ in head(group) if heading_ not in own] + list(names)
