"""Sources' distributions on the target's tokens, and the one distribution per position that the target learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm_eval_deepen.build.distill.store import BlockRows
from lm_eval_deepen.build.distill.token_alignment import KINDS, NONE, VocabularyMap

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Entries:
    """Sparse distributions over the target's ids at the T positions of a block, an entry each."""

    row: NDArray[np.int64]  # position [n]
    ids: NDArray[np.int64]  # id of the target [n]; no id twice in a row
    p: Floats  # probability [n]
    covered: NDArray[np.bool_]  # whether a position has a distribution at all [T]

    @property
    def rest(self) -> Floats:
        """Mass of everything without an entry [T]; 0 where a position has no distribution."""
        held = np.bincount(self.row, weights=self.p, minlength=len(self.covered))
        return np.where(self.covered, (1 - held).clip(min=0), 0).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Targets:
    """What the target learns at the T positions of a block."""

    ids: NDArray[np.int64]  # ids of the target, 0 where there is no entry [T, K]
    p: Floats  # their probabilities, 0 where there is no entry [T, K]
    rest: Floats  # mass of all other ids together [T]
    covered: NDArray[np.bool_]  # whether there is anything to learn [T]


def project(rows: BlockRows, at: NDArray[np.int64], mapping: VocabularyMap) -> Entries:
    """Return a source's distributions at the target's positions, over the target's ids.

    Ids of the source that go to one id of the target add up. Mass of ids that go nowhere is left to the rest.

    Args:
        rows: the source's distributions [S, k].
        at: the source's position for each position of the target, -1 for none [T].
        mapping: where its ids go.
    """
    place = np.flatnonzero(at >= 0)
    ids = mapping.target[rows.ids[at[place]]]
    row = np.broadcast_to(place[:, None], ids.shape)
    p = np.exp(rows.logp[at[place]].astype(np.float32))
    known = ids >= 0
    covered = np.zeros(len(at), dtype=bool)
    covered[place[known.any(1)]] = True
    return _added(row[known], ids[known], p[known], covered)


def _added(row: NDArray[np.int64], ids: NDArray[np.int64], p: Floats, covered: NDArray[np.bool_]) -> Entries:
    """Return entries, equal ids of a row added up."""
    width = int(ids.max(initial=0)) + 1
    keys, inverse = np.unique(row * width + ids, return_inverse=True)
    mass = np.bincount(inverse.reshape(-1), weights=p, minlength=len(keys)).astype(np.float32)
    return Entries(keys // width, keys % width, mass, covered)


def shares(nats: Sequence[float], tokens: int, fusion: str) -> list[float]:
    """Return how much each source counts in a block.

    All sources predict the same bytes, so the sums of their nats compare, whatever they cut the text into: ``mince``
    takes the source that needs fewest bits per byte. Nats per own token, as published, would favour short tokens.
    ``avgce`` weights them by exp(-CE), with the cross-entropy per token of the target: the inverse of a perplexity.
    The published weights are the softmax of exp(-CE), which lies between 0 and 1, so that they are nearly uniform.

    Args:
        nats: what each source needs for the block.
        tokens: tokens of the target in it.
        fusion: ``mince`` or ``avgce``.
    """
    if fusion == "mince":
        best = int(np.argmin(nats))  # the first of equals
        return [float(n == best) for n in range(len(nats))]
    weights = np.exp(-(np.array(nats) - min(nats)) / tokens)
    return (weights / weights.sum()).tolist()


def fuse(parts: Sequence[Entries], weights: Sequence[float], tail: str) -> Targets:
    """Return one distribution per position from those of the sources.

    A position that no source of positive weight covers has none. Where some cover it, their weights are renormalised.
    """
    positions = len(parts[0].covered)
    used = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight > 0]
    total = np.sum([weight * part.covered for part, weight in used], axis=0)
    covered = total > 0
    scale = [np.divide(weight * part.covered, total, out=np.zeros(positions), where=covered) for part, weight in used]
    row = np.concatenate([part.row for part, _ in used])
    ids = np.concatenate([part.ids for part, _ in used])
    p = np.concatenate([part.p * own[part.row] for (part, _), own in zip(used, scale, strict=True)])
    fused = _added(row, ids, p.astype(np.float32), covered)
    return _padded(fused, tail)


def _padded(entries: Entries, tail: str) -> Targets:
    positions = len(entries.covered)
    counts = np.bincount(entries.row, minlength=positions)
    column = np.arange(len(entries.row)) - (np.cumsum(counts) - counts)[entries.row]  # rows ascend
    shape = (positions, max(1, int(counts.max(initial=0))))
    ids, p = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    ids[entries.row, column], p[entries.row, column] = entries.ids, entries.p
    held, rest = p.sum(1), entries.rest
    covered = entries.covered & (held > 0)
    over = np.maximum(held, 1.0) if tail == "rest" else np.where(covered, held, 1.0)  # fp16 may sum to above 1
    p /= over.astype(np.float32)[:, None]
    return Targets(ids, p, rest if tail == "rest" else np.zeros_like(rest), covered)


def mass_by_kind(rows: BlockRows, at: NDArray[np.int64], mapping: VocabularyMap) -> dict[str, float]:
    """Return the probability at aligned positions, summed, by how its ids were matched; ``dropped``: not stored."""
    used = rows.ids[at[at >= 0]]
    p = np.exp(rows.logp[at[at >= 0]].astype(np.float64))
    kinds = mapping.kind[used]
    mass = {what: float(p[kinds == kind].sum()) for kind, what in KINDS.items() if kind != NONE}
    mass["nothing"] = float(p[kinds == NONE].sum())
    return {**mass, "not stored": max(0.0, len(used) - float(p.sum()))}
