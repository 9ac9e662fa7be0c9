"""Relative matrices R [V, A] as linear operators: ``project`` is p R, ``back`` is R q.

`DenseMatrix` holds every entry, `SparseMatrix` the m largest of each row. Both are batched over rows of
distributions and never loop over vocabulary rows. ``matrix.at(ids)`` restricts R to the rows of a
per-distribution support; ``matrix.full()`` is all of R.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from typing_extensions import Self

from lm_eval_deepen.relative.operators import Entries, Operator

_ROW_SUM_TOLERANCE = 1e-6
CHUNK_ROWS = 4096  # vocabulary rows per step where no CSR kernel exists; 4096 x 64 floats stay in cache
SAMPLE = 512  # rows whose entropy is looked at


def _unit_sum(rows: Tensor) -> Tensor:
    """Return rows [V, n] scaled to sum 1 in fp32 (zero rows stay zero), uncopied where they already are."""
    rows = rows.to(torch.float32)
    total = rows.sum(-1, keepdim=True)
    total = torch.where(total > 0, total, 1.0)
    return rows if bool(((total - 1).abs() <= _ROW_SUM_TOLERANCE).all()) else rows / total


@dataclass(frozen=True, eq=False)
class _MatmulOperator:
    """All rows of a dense matrix."""

    relative: Tensor  # [V, A]
    num_anchors: int

    def project(self, p: Tensor) -> Tensor:
        return p @ self.relative

    def back(self, q: Tensor) -> Tensor:
        return q @ self.relative.T


@dataclass(frozen=True, eq=False)
class _BatchedOperator:
    """Some rows of a dense matrix, others for each distribution."""

    rows: Tensor  # [B, K, A]
    num_anchors: int

    def project(self, p: Tensor) -> Tensor:
        return torch.bmm(p[:, None, :], self.rows)[:, 0]

    def back(self, q: Tensor) -> Tensor:
        return torch.bmm(self.rows, q[:, :, None])[..., 0]


@dataclass(frozen=True, eq=False)
class _CsrOperator:
    """All rows of a sparse matrix through the CSR kernels of torch."""

    csr: Tensor  # [V, A]
    transposed: Tensor  # [A, V], also CSR: a product with a transposed CSR matrix has no kernel
    num_anchors: int

    def project(self, p: Tensor) -> Tensor:
        return (self.transposed @ p.T.contiguous()).T.contiguous()

    def back(self, q: Tensor) -> Tensor:
        return (self.csr @ q.T.contiguous()).T.contiguous()


@dataclass(frozen=True, eq=False)
class _ChunkedOperator:
    """All rows of a sparse matrix where torch has no CSR kernel (a CPU build without MKL)."""

    values: Tensor  # [V, m]
    indices: Tensor  # [V, m]
    num_anchors: int

    def project(self, p: Tensor) -> Tensor:
        out = torch.zeros(len(p), self.num_anchors, dtype=torch.float32, device=p.device)
        for start in range(0, len(self.values), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            weighted = (p[:, part, None] * self.values[part]).flatten(1)
            out.index_add_(1, self.indices[part].flatten(), weighted)
        return out

    def back(self, q: Tensor) -> Tensor:
        parts = [slice(start, start + CHUNK_ROWS) for start in range(0, len(self.values), CHUNK_ROWS)]
        return torch.cat([(q[:, self.indices[part]] * self.values[part]).sum(-1) for part in parts], dim=1)


@dataclass(frozen=True, eq=False)
class OneHotOperator:
    """All rows of a matrix with a single 1 in every row, or nothing."""

    classes: Tensor  # [V], the column of the 1; A for an empty row
    num_anchors: int

    def project(self, p: Tensor) -> Tensor:
        """Return p R, [B, A]."""
        out = torch.zeros(len(p), self.num_anchors + 1, dtype=torch.float32, device=p.device)
        return out.index_add_(1, self.classes, p)[:, :-1]

    def back(self, q: Tensor) -> Tensor:
        """Return R q, [B, V]."""
        return self.gather(q, torch.zeros_like(q[:, :1]), out=q.new_empty(len(q), len(self.classes)))

    def gather(self, q: Tensor, empty: Tensor, *, out: Tensor) -> Tensor:
        """Write R q to `out` [B, V], with the values `empty` [B, 1] for empty rows, and return it."""
        padded = torch.cat([q, empty], dim=1)
        if out.device.type != "cpu":
            return torch.index_select(padded, 1, self.classes, out=out)
        for row, target in zip(padded, out, strict=True):  # of one row, the entries are gathered faster
            torch.index_select(row, 0, self.classes, out=target)
        return out


class _Placed:
    """A matrix that is copied to another device once: those who ask for it share the copy while one of them has it."""

    @cached_property
    def _copies(self) -> WeakValueDictionary[torch.device, Self]:
        return WeakValueDictionary()

    def to(self, device: torch.device | str) -> Self:
        """Return the same matrix on `device`."""
        device = torch.device(device)
        # not what was made of them, which belongs to their device
        own = {name: value for name, value in vars(self).items() if isinstance(value, (Tensor, int))}
        tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        if all(value.device == device for value in tensors.values()):
            return self
        placed = self._copies.get(device)
        if placed is None:
            placed = self._copies[device] = object.__new__(type(self))  # whose rows have their sums already
            vars(placed).update(own, **{name: value.to(device) for name, value in tensors.items()})
        return placed


class DenseMatrix(_Placed):
    """Every entry of R.

    Args:
        relative: rows [V, A], each of sum 1 or 0 (control and unused ids); rescaled to that in fp32.
    """

    def __init__(self, relative: Tensor) -> None:
        """Keep the rows in fp32."""
        self.relative = _unit_sum(relative)
        self.dropped_mass = torch.zeros(len(relative), device=relative.device)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (V, A)."""
        return self.relative.shape[0], self.relative.shape[1]

    def full(self) -> Operator:
        """Return the operator of all rows."""
        return _MatmulOperator(self.relative, self.shape[1])

    def at(self, ids: Tensor) -> Operator:
        """Return the operator of the rows ids [B, K] of each distribution."""
        return _BatchedOperator(self.relative[ids], self.shape[1])

    def at_bytes(self, width: int) -> int:
        """Return the bytes that ``at`` of one distribution with `width` ids occupies."""
        return width * self.shape[1] * 4


class SparseMatrix(_Placed):
    """The m largest entries of each row of R.

    Args:
        values: kept entries [V, m] in any float dtype, rescaled to row sums 1 (or 0) in fp32.
        indices: their anchors [V, m], int32.
        num_anchors: A.
        dropped_mass: what the kept entries of each row lacked of 1 before rescaling [V].
    """

    def __init__(self, values: Tensor, indices: Tensor, num_anchors: int, dropped_mass: Tensor) -> None:
        """Keep the entries in fp32: 16-bit rows do not sum to 1."""
        self.values, self.indices = _unit_sum(values), indices.to(torch.int32)
        self.num_anchors, self.dropped_mass = num_anchors, dropped_mass

    @property
    def shape(self) -> tuple[int, int]:
        """Return (V, A)."""
        return self.values.shape[0], self.num_anchors

    @cached_property
    def _entries(self) -> Entries:
        return Entries.pack(self.values, self.indices, self.num_anchors)

    @cached_property
    def _csr(self) -> _CsrOperator:
        starts, columns, values = self._entries.starts, self._entries.columns[:-1], self._entries.values[:-1]
        num_rows = len(starts) - 1
        order = torch.argsort(columns, stable=True)
        counts = torch.bincount(columns, minlength=self.num_anchors)
        column_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        rows = torch.repeat_interleave(starts.diff())[order]
        return _CsrOperator(
            _csr_tensor(starts, columns, values, (num_rows, self.num_anchors)),
            _csr_tensor(column_starts, rows, values[order], (self.num_anchors, num_rows)),
            self.num_anchors,
        )

    @cached_property
    def _one_hot(self) -> OneHotOperator | None:
        if self.values.shape[1] != 1:
            return None
        described = self.values[:, 0] > 0
        return OneHotOperator(torch.where(described, self.indices[:, 0].long(), self.num_anchors), self.num_anchors)

    def full(self) -> Operator:
        """Return the operator of all rows; its index is built once."""
        if self._one_hot is not None:
            return self._one_hot
        if self.values.device.type != "cpu" or torch.backends.mkl.is_available():
            return self._csr
        return _ChunkedOperator(self.values, self.indices, self.num_anchors)

    def at(self, ids: Tensor) -> Operator:
        """Return the operator of the rows ids [B, K] of each distribution."""
        return self._entries.at(ids)

    def at_bytes(self, width: int) -> int:
        """Return the bytes that ``at`` of one distribution with `width` ids occupies."""
        entries = -(-len(self._entries.values) // len(self.values))  # on average, in a row
        return width * entries * 48  # three int64 and two fp32 each, and what they are made from


def _csr_tensor(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a CSR matrix; int32 indices are what MKL and cuSPARSE want."""
    with warnings.catch_warnings():  # "CSR support is in beta": the products are tested against the dense ones
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            starts.to(torch.int32), columns.to(torch.int32), values, size=size, check_invariants=False
        )


RelativeMatrix: TypeAlias = DenseMatrix | SparseMatrix


def row_entropy_share(matrix: RelativeMatrix) -> float:
    """Return how flat relative rows are: the mean entropy of a sample, as a share of that of flat ones.

    One-hot rows have 0, flat ones 1; flat rows hardly distinguish pieces.
    """
    rows = matrix.values if isinstance(matrix, SparseMatrix) else matrix.relative
    sample = rows[:: max(1, len(rows) // SAMPLE)].float()
    sample = sample[sample.sum(1) > 0]
    if not len(sample) or matrix.shape[1] < 2:
        return 0.0
    return max(0.0, float(-torch.xlogy(sample, sample).sum(1).mean()) / math.log(matrix.shape[1]))
