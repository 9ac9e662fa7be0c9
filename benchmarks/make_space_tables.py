"""Put what benchmarks/spaces.py and anchors.py found into docs/relative-space.md.

    python benchmarks/make_space_tables.py DIR

Only the text between the markers `<!-- NAME -->` and `<!-- end NAME -->` changes, NAME being a part of the study.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "relative-space.md"
KINDS = ("prose", "gsm8k", "arc", "nq", "piqa")
Found = dict[str, list[dict[str, Any]]]


def read(folder: Path) -> Found:
    """What every part has found, latest last."""
    files = sorted(folder.glob("*.jsonl"))
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def short(name: str) -> str:
    return {"SmolLM2-135M-Instruct": "SmolLM2", "gemma-3-270m": "Gemma"}.get(name, name)


def ordered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (KINDS.index(row["kind"]), row["main"] != row.get("best_member")))


def table(head: Sequence[str], rows: Iterator[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def tuned(found: Found) -> list[str]:
    untuned = {(row["kind"], row["main"]): row for row in found["defaults"]}

    def rows() -> Iterator[Sequence[object]]:
        for row in ordered(found["tuned"]):
            best, main = row["best_member"], row["main"]
            plain = untuned[row["kind"], main]
            yield (
                f"{row['kind']} ({row['bytes']:,})", short(main) + (" (better)" if main == best else ""),
                f"{short(best)} {row['alone_fitted'][best]:.4f}", plain["linear"], plain["geometric"], row["tuned"],
                row["chosen"], row["controls"]["linear"], row["controls"]["geometric"],
            )  # fmt: skip

    head = ("text (test bytes)", "main member", "better member, fitted", "default", "geometric", "tuned",
            "chosen on dev", "control: linear mixture", "control: geometric mixture")  # fmt: skip
    return table(head, rows())


def spaces(found: Found) -> list[str]:
    cells = {(row["space"], row["kind"], short(row["main"])): row for row in found["spaces"]}
    kinds = [kind for kind in KINDS if any(key[1] == kind for key in cells)]
    names = list(dict.fromkeys(row["space"] for row in found["spaces"]))

    def rows(main: str) -> Iterator[Sequence[object]]:
        for name in names:
            line = [cells.get((name, kind, main)) for kind in kinds]
            yield name, *(f"{c['chosen']} (w {c['weights'][0]:g})" if c else "" for c in line)

    lines: list[str] = []
    for main in ("SmolLM2", "Gemma"):
        lines += [f"Main member {main}:", "", *table(("space, average, solver", *kinds), rows(main)), ""]
    return lines[:-1]


def solvers(found: Found) -> list[str]:
    def rows() -> Iterator[Sequence[object]]:
        for row in found["solvers"]:
            rate = "" if row["learning_rate"] is None else f"{row['learning_rate']:g}"
            yield (short(row["main"]), row["inverse"], row["steps"], rate, f"{row['residual_kl']:.4f}",
                   f"{row['ms_per_row']:.1f}")  # fmt: skip

    return table(("main member", "solver", "steps", "η", "residual KL (nats)", "ms a row"), rows())


def anchors(found: Found) -> list[str]:
    rows = found["anchors"]
    columns = list(dict.fromkeys((short(row["main"]), row["kind"]) for row in rows))
    cells = {(row["anchors"], row["space"], short(row["main"]), row["kind"]): row for row in rows}
    names = list(dict.fromkeys((row["anchors"], row["count"], row["space"]) for row in rows))

    def lines() -> Iterator[Sequence[object]]:
        for name, count, space in names:
            line = [cells.get((name, space, *column)) for column in columns]
            yield (name, f"{count:,}" if count else "", space,
                   *(f"{100 * (c['bits_per_byte'] / c['alone'] - 1):+.2f} %" if c else "" for c in line))  # fmt: skip

    return table(("anchors common to", "number", "rows, average", *(f"{m}, {k}" for m, k in columns)), lines())


PARTS = {"tuned": tuned, "spaces": spaces, "solvers": solvers, "anchors": anchors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    found, text = read(parser.parse_args().folder), PAGE.read_text()
    for name, make in PARTS.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if name in found:
            before, after = text.split(start)[0], text.split(end)[1]
            text = "".join((before, start, "\n", "\n".join(make(found)), "\n\n", end, after))
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
