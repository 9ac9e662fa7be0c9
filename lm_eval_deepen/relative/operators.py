"""What a relative matrix R [V, A] can be asked: ``project`` is p R, ``back`` is R q.

Operators of some rows of a sparse matrix, others for each distribution, are here; those of all rows beside the
matrices. A stored row has room for m entries, but 16-bit storage makes most of them 0: 95 % in rows of likely pieces of
the demo pair. They change no sum, so a product touches a few entries per piece, and the anchors of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class Operator(Protocol):
    """R restricted to K rows per distribution: project [B, K] -> [B, A], back [B, A] -> [B, K].

    After `share_columns`, A stands for the columns that are left; ``num_anchors`` is always that of R.
    """

    @property
    def num_anchors(self) -> int:
        """Return A."""
        ...

    def project(self, p: Tensor) -> Tensor:
        """Return p R, [B, A]."""
        ...

    def back(self, q: Tensor) -> Tensor:
        """Return R q, [B, K]."""
        ...


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """Return table[ids] for a table [n] and ids of any shape; on a CPU, plain indexing is several times slower."""
    return table.index_select(0, ids.flatten()).view(ids.shape)


@dataclass(frozen=True, eq=False)
class GatheredOperator:
    """K rows of a matrix for each distribution, as N entries; a place without an entry has the value 0."""

    pieces: Tensor  # which of the K rows an entry belongs to [B, N]
    columns: Tensor  # its column [B, N]
    values: Tensor  # the entries [B, N]
    num_pieces: int  # K
    num_columns: int  # how many columns the products have, num_anchors or fewer; see `share_columns`
    num_anchors: int  # A

    def project(self, p: Tensor) -> Tensor:
        """Return p R, [B, num_columns]."""
        out = torch.zeros(len(p), self.num_columns, dtype=torch.float32, device=p.device)
        return out.scatter_add_(1, self.columns, p.gather(1, self.pieces).mul_(self.values))

    def back(self, q: Tensor) -> Tensor:
        """Return R q, [B, K], for q [B, num_columns]."""
        out = torch.zeros(len(q), self.num_pieces, dtype=torch.float32, device=q.device)
        return out.scatter_add_(1, self.pieces, q.gather(1, self.columns).mul_(self.values))


@dataclass(frozen=True, eq=False)
class Entries:
    """The nonzero entries of a sparse matrix, row after row; one of value 0 follows the last."""

    starts: Tensor  # where each row begins, and where the last one ends [V + 1], int64
    columns: Tensor  # [n + 1], int32
    values: Tensor  # [n + 1], fp32
    num_anchors: int  # A

    @classmethod
    def pack(cls, values: Tensor, indices: Tensor, num_anchors: int) -> Entries:
        """Leave out what is 0 of values and indices [V, m]."""
        kept, pad = values != 0, torch.nn.functional.pad
        starts = pad(kept.sum(1).cumsum(0), (1, 0))
        return cls(starts, pad(indices[kept], (0, 1)), pad(values[kept], (0, 1)), num_anchors)

    def at(self, ids: Tensor) -> GatheredOperator:
        """Return the operator of the rows ids [B, K] of each distribution."""
        first, counts = look_up(self.starts, ids), look_up(self.starts, ids + 1)
        counts -= first
        ends = counts.cumsum(1)  # [B, K]
        width = max(1, int(ends[:, -1].max()) if len(ids) else 1)  # N
        # as many pieces precede an entry as end before it
        steps = ends.new_zeros(len(ids), width + 1).scatter_add_(1, ends, torch.ones_like(ends))
        pieces = steps.cumsum(1)[:, :width].clamp_(max=ids.shape[1] - 1)
        number = torch.arange(width, device=ids.device)
        place = (first + counts).sub_(ends).gather(1, pieces).add_(number)
        place.masked_fill_(number >= ends[:, -1:], len(self.values) - 1)
        columns, values = look_up(self.columns, place).to(torch.int64), look_up(self.values, place)
        return GatheredOperator(pieces, columns, values, ids.shape[1], self.num_anchors, self.num_anchors)


def share_columns(operators: Sequence[Operator]) -> list[Operator]:
    """Narrow the operators of one batch to the columns that the first one reaches.

    What the others have in any other column arrives in one more, which the first does not reach. Products with dense
    matrices are left as they are.
    """
    gathered = [op for op in operators if isinstance(op, GatheredOperator)]
    if len(gathered) < len(operators):
        return list(operators)
    batch, width = gathered[0].columns.shape
    device = gathered[0].columns.device
    # Each column is called by the place of its first entry; a place without one calls none.
    names = torch.full((batch, gathered[0].num_anchors), width, dtype=torch.int32, device=device)
    places = torch.arange(width, dtype=torch.int32, device=device).expand(batch, -1)
    places = places.masked_fill(gathered[0].values == 0, width)
    names.scatter_reduce_(1, gathered[0].columns, places, "amin")
    return [replace(op, columns=names.gather(1, op.columns).to(torch.int64), num_columns=width + 1) for op in gathered]
