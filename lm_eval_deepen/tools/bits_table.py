"""Bits per byte side by side, compared by a paired bootstrap over documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Change:
    """How much larger one total is than another, as a share, with a paired bootstrap interval.

    Attributes:
        share: a / b - 1.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    share: float
    low: float
    high: float

    @property
    def better(self) -> bool:
        """Whether the whole interval is below 0."""
        return self.high < 0

    @property
    def worse(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    def __str__(self) -> str:
        """Return ``-1.23 % [-2.34, -0.12]``."""
        return f"{100 * self.share:+.2f} % [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"


def compare(a: Tensor, b: Tensor, seed: int = 0) -> Change:
    """Compare bits per document [D] of two systems; documents are resampled, both systems together.

    One document has no interval: it spans everything.
    """
    share = float(a.sum() / b.sum() - 1)
    if len(a) < 2:
        return Change(share, float("-inf"), float("inf"))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(a), (RESAMPLES, len(a)), generator=generator)
    shares = a[drawn].sum(1) / b[drawn].sum(1) - 1
    edges = torch.quantile(shares, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=shares.dtype))
    return Change(share, *edges.tolist())


@dataclass(frozen=True)
class Line:
    """One system: its bits per document [D], and what is said of it."""

    system: str
    bits: Tensor
    note: str = ""


def table(lines: Sequence[Line], reference: Line, num_bytes: int) -> str:
    """Return bits per byte of every system, each against `reference`, as plain text."""
    body = [["", "bits/byte", f"against {reference.system}", ""]]
    for line in lines:
        change = "" if line is reference else str(compare(line.bits, reference.bits))
        body.append([line.system, f"{float(line.bits.sum()) / num_bytes:.4f}", change, line.note])
    widths = [max(len(row[i]) for row in body) for i in range(4)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in body)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def facts(line: Line, reference: Line, num_bytes: int) -> dict[str, Any]:
    """Return a system's figures for a JSON file."""
    change = compare(line.bits, reference.bits)
    return {
        "system": line.system,
        "bits_per_byte": float(line.bits.sum()) / num_bytes,
        "against_reference": change.share,
        "interval": [change.low, change.high] if len(line.bits) > 1 else None,
        "note": line.note,
    }
