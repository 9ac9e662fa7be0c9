"""Measured and compared systems as plain text, Markdown and JSON: pure functions of their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from lm_eval_deepen.results.rows import ScoreRow
from lm_eval_deepen.results.tables import aligned, literal, markdown_table, printable

_HEAD = (
    "system", "score [95 % interval]", "difference [95 % interval]", "p", "p (corrected)", "verdict", "agreement",
    "oracle",
)  # fmt: skip
READING = (
    "Intervals are over documents; the difference is to the reference, paired by document.",
    "p: two-sided, of {tests}, for this comparison alone; p (corrected): for all comparisons shown, by Holm's "
    "procedure. p (corrected) gives the verdict. Near 0.05 an interval and p may disagree: the test is stricter or, of "
    "real-valued scores, the interval.",
    "agreement: documents with the reference's score; oracle: the best of {pool} on every document.",
)
PICKED = (
    "The reference is the best of {candidates} on these very documents, which favours it. So p (corrected) also counts "
    "comparisons with the others that could have been the reference, and the intervals are wider: 95 % of those shown "
    "contain the true difference. p alone does not allow for this."
)

OWN_POOL = "the reference and the row's own system"


def number(value: float) -> str:
    """Return a score with four decimals, or four digits where it is large."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.5g}"


def signed(value: float) -> str:
    """Return a difference with its sign."""
    return f"{value:+.4f}" if abs(value) < 1000 else f"{value:+.5g}"


def probability(value: float | None) -> str:
    """Return a p-value; small ones as a bound."""
    if value is None:
        return "-"
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def columns(rows: Sequence[ScoreRow]) -> dict[str, list[ScoreRow]]:
    """Return the rows by task, metric and filter, in order."""
    grouped: dict[str, list[ScoreRow]] = {}
    for row in rows:
        grouped.setdefault(row.column, []).append(row)
    return grouped


def heading(rows: Sequence[ScoreRow]) -> str:
    """Return what a column is: task and metric, which way is good, documents, reference."""
    first = rows[0]
    way = {True: "higher is better", False: "lower is better", None: "which way is good is unknown"}
    reference = next((row.system for row in rows if row.comparison is None), None)
    against = f", reference: {reference}" if reference else ""
    return f"{first.column} ({way[first.higher_is_better]}), {first.documents} documents{against}"


def with_interval(value: float, low: float | None, high: float | None, shown: Callable[[float], str] = signed) -> str:
    """Return a difference, or a score if `shown` is `number`, and its interval, if that can be told."""
    return shown(value) + ("" if low is None or high is None else f" [{shown(low)}, {shown(high)}]")


def extras(rows: Sequence[ScoreRow]) -> list[str]:
    """Return the headings of further figures, in order."""
    return list(dict.fromkeys(name for row in rows for name in row.extra))


def head(rows: Sequence[ScoreRow]) -> list[str]:
    """Return the headings of the table."""
    return [*_HEAD, *extras(rows)]


def verdict(row: ScoreRow, alpha: float) -> str:
    """Return the verdict in words; the reference's row says so."""
    word = row.verdict(alpha)
    if word is None:
        return "reference"
    return "not significantly different" if word == "not significant" else f"significantly {word}"


def cells(row: ScoreRow, alpha: float, names: Sequence[str]) -> list[str]:
    """Return one row as text, in the order of `head`."""
    compared = row.comparison
    shown = [row.system, with_interval(row.score, row.low, row.high, number)]
    if compared is None:
        shown += ["-", "-", "-", verdict(row, alpha), "-"]
    else:
        agreement = "-" if compared.agreement is None else f"{compared.agreement:.3f}"
        shown.append(with_interval(compared.difference, compared.low, compared.high))
        shown += [probability(compared.p), probability(compared.p_holm), verdict(row, alpha), agreement]
    shown.append("-" if row.oracle is None else number(row.oracle))
    for name in names:
        value = row.extra.get(name)
        shown.append("-" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}")
    return shown


def reading(rows: Sequence[ScoreRow]) -> list[str]:
    """Return how to read the table, in sentences."""
    pools: dict[str, str] = {}
    for group in columns(rows).values():
        own = {" ".join(sorted(row.pool)): ", ".join(row.pool) for row in group if row.oracle is not None}
        pools |= {"": OWN_POOL} if len(own) > 1 else own
    pool = " or ".join(pools.values()) or OWN_POOL
    tests = " or ".join(dict.fromkeys(row.comparison.test for row in rows if row.comparison))
    told = [line.format(pool=pool, tests=tests or "no test") for line in READING]
    picked = list(dict.fromkeys(row.comparison.candidates for row in rows if row.comparison))
    if any(len(names) > 1 for names in picked):
        systems = {row.system for row in rows}
        listed = "all systems" if all(set(names) == systems for names in picked) else ", ".join(picked[0])
        told.insert(2, PICKED.format(candidates=listed if len(picked) == 1 else "several"))
    return told


def plain(rows: Sequence[ScoreRow], alpha: float, notes: Sequence[str] = ()) -> str:
    """Return a table per task and metric for a terminal."""
    names, blocks = extras(rows), []
    for group in columns(rows).values():
        table = aligned([head(rows), *(cells(row, alpha, names) for row in group)])
        blocks.append(f"{printable(heading(group))}\n{table}")
    blocks.append("\n".join([f"Significance at {alpha:g}.", *map(printable, reading(rows))]))
    if notes:
        blocks.append("\n".join(["Notes:", *(f"  - {printable(note)}" for note in notes)]))
    return "\n\n".join(blocks)


def markdown(rows: Sequence[ScoreRow], alpha: float, notes: Sequence[str] = ()) -> str:
    """Return a table per task and metric as GitHub's Markdown."""
    names, blocks = extras(rows), []
    for group in columns(rows).values():
        table = markdown_table([head(rows), *(cells(row, alpha, names) for row in group)])
        blocks.append(f"#### {literal(heading(group))}\n\n{table}")
    blocks.append(" ".join([f"Significance at {alpha:g}.", *(literal(line, code=True) for line in reading(rows))]))
    if notes:
        blocks.append(markdown_table([["note"], *([note] for note in notes)], code=True))
    return "\n\n".join(blocks)


def to_dict(rows: Sequence[ScoreRow], alpha: float, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return everything as JSON data."""
    listed = []
    for row in rows:
        entry = {**asdict(row), "pool": list(row.pool), "verdict": row.verdict(alpha) or "reference"}
        entry["filter"] = entry.pop("flt")
        listed.append(entry)
    return {"alpha": alpha, "rows": listed, "notes": list(notes)}
