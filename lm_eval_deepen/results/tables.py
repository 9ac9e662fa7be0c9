"""Every table that a command prints: lines of cells as plain text or Markdown, whatever names are made of.

On pages, the macro `table` of `templates/page.html.j2` draws the same lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_BREAKS = re.compile(r"[\r\n\t\v\f\x1c-\x1e\x85\u2028\u2029]+")
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ENTITY = re.compile(r"&(?=#?\w+;)")
_WHOLE_TAG = re.compile(r"<([A-Za-z/!?][^<>]*)>")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")  # "<0.0001" begins none
_LINK = re.compile(r"\]([(\[])")
_MARKS = re.compile(r"[`*]|~(?=~)")


def aligned(table: Sequence[Sequence[str]], left: int = 1, heads: int = 1, rule: bool = True) -> str:
    """Return the table for a terminal, in columns: lines of cells, of which the first `heads` are headings.

    The text of the first `left` columns stands at the left, that of the others at the right.
    """
    shown = [[printable(cell) for cell in line] for line in table]
    widths = [max(len(line[i]) for line in shown) for i in range(len(shown[0]))]
    lines = [
        "  ".join([*map(str.ljust, line[:left], widths), *map(str.rjust, line[left:], widths[left:])]).rstrip()
        for line in shown
    ]
    if rule:
        lines.insert(heads, "-" * max(map(len, lines)))
    return "\n".join(lines)


def markdown_table(table: Sequence[Sequence[str]], left: int = 1, code: bool = False) -> str:
    """Return the table as GitHub's Markdown; `left` as in `aligned`, `code` as in `literal`."""
    lines = ["| " + " | ".join(literal(cell, code) for cell in line) + " |" for line in table]
    lines.insert(1, "|" + "|".join("---" if i < left else "---:" for i in range(len(table[0]))) + "|")
    return "\n".join(lines)


def printable(text: str) -> str:
    """Return a text in one line, what would steer a terminal (or turn the text around) spelt out."""
    return _STEERING.sub(lambda match: ascii(match[0])[1:-1], _BREAKS.sub(" ", text))


def literal(text: str, code: bool = False) -> str:
    """Return what GitHub's Markdown shows as this text, in one line, whatever names are made of.

    `code`: words between backticks are code, as in the sentences here.
    """
    shown = printable(text).replace("\\", "\\\\").replace("|", "\\|")
    shown = _ENTITY.sub("&amp;", shown)
    shown = _TAG.sub("&lt;", _WHOLE_TAG.sub(r"&lt;\1&gt;", shown))
    shown = _LINK.sub(r"]\\\1", shown)
    return shown if code else _MARKS.sub(r"\\\g<0>", shown)
