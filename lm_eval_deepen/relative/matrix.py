"""Relative matrices R [V, A] as linear operators: ``project`` is p R, ``back`` is R q.

`DenseMatrix` holds every entry, `SparseMatrix` the m largest of each row. Both are batched over rows of
distributions and never loop over vocabulary rows. ``matrix.at(ids)`` restricts R to the rows of a
per-distribution support; ``matrix.full()`` is all of R.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

_ROW_SUM_TOLERANCE = 1e-6
_CHUNK_ROWS = 4096  # vocabulary rows per step where no CSR kernel exists; 4096 x 64 floats stay in cache


class Operator(Protocol):
    """R restricted to K rows per distribution: project [B, K] -> [B, A], back [B, A] -> [B, K]."""

    def project(self, p: Tensor) -> Tensor:
        """Return p R, [B, A]."""
        ...

    def back(self, q: Tensor) -> Tensor:
        """Return R q, [B, K]."""
        ...


class RelativeMatrix(Protocol):
    """The interface both matrices share; ``dropped_mass`` [V] is zero for a dense one."""

    dropped_mass: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return (V, A)."""
        ...

    def full(self) -> Operator:
        """Return the operator of all V rows, K = V."""
        ...

    def at(self, ids: Tensor) -> Operator:
        """Return the operator of the rows ids [B, K] of each distribution."""
        ...

    def at_bytes(self, width: int) -> int:
        """Return the bytes that ``at`` of one distribution with `width` ids occupies."""
        ...

    def to(self, device: torch.device | str) -> RelativeMatrix:
        """Return the same matrix on `device`."""
        ...


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

    def project(self, p: Tensor) -> Tensor:
        return p @ self.relative

    def back(self, q: Tensor) -> Tensor:
        return q @ self.relative.T


@dataclass(frozen=True, eq=False)
class _BatchedOperator:
    """Some rows of a dense matrix, others for each distribution."""

    rows: Tensor  # [B, K, A]

    def project(self, p: Tensor) -> Tensor:
        return torch.bmm(p[:, None, :], self.rows)[:, 0]

    def back(self, q: Tensor) -> Tensor:
        return torch.bmm(self.rows, q[:, :, None])[..., 0]


class _GatheredOperator:
    """Some rows of a sparse matrix, others for each distribution: one gather, then scatter-adds."""

    def __init__(self, values: Tensor, indices: Tensor, num_anchors: int) -> None:
        self.values = values  # [B, K, m]
        self.num_anchors = num_anchors
        offset = torch.arange(len(values), device=values.device) * num_anchors
        self.flat = (indices + offset[:, None, None]).flatten()  # int64 positions in a flat [B * A]
        self.scratch = torch.empty_like(values)  # reused: a fresh 2 MB block per product costs more than the product

    def project(self, p: Tensor) -> Tensor:
        out = torch.zeros(len(p) * self.num_anchors, dtype=torch.float32, device=p.device)
        torch.mul(p[..., None], self.values, out=self.scratch)
        return out.scatter_add_(0, self.flat, self.scratch.view(-1)).view(len(p), self.num_anchors)

    def back(self, q: Tensor) -> Tensor:
        torch.index_select(q.reshape(-1), 0, self.flat, out=self.scratch.view(-1))
        return self.scratch.mul_(self.values).sum(-1)


@dataclass(frozen=True, eq=False)
class _CsrOperator:
    """All rows of a sparse matrix through the CSR kernels of torch."""

    csr: Tensor  # [V, A]
    transposed: Tensor  # [A, V], also CSR: a product with a transposed CSR matrix has no kernel

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

    def _chunk(self, start: int, batch: int) -> _GatheredOperator:
        part = slice(start, start + _CHUNK_ROWS)
        shape = (batch, *self.values[part].shape)
        return _GatheredOperator(
            self.values[part].expand(shape).contiguous(), self.indices[part].expand(shape), self.num_anchors
        )

    def project(self, p: Tensor) -> Tensor:
        out = torch.zeros(len(p), self.num_anchors, dtype=torch.float32, device=p.device)
        for start in range(0, len(self.values), _CHUNK_ROWS):
            out += self._chunk(start, len(p)).project(p[:, start : start + _CHUNK_ROWS])
        return out

    def back(self, q: Tensor) -> Tensor:
        parts = range(0, len(self.values), _CHUNK_ROWS)
        return torch.cat([self._chunk(start, len(q)).back(q) for start in parts], dim=1)


class DenseMatrix:
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
        return _MatmulOperator(self.relative)

    def at(self, ids: Tensor) -> Operator:
        """Return the operator of the rows ids [B, K] of each distribution."""
        return _BatchedOperator(self.relative[ids])

    def at_bytes(self, width: int) -> int:
        """Return the bytes that ``at`` of one distribution with `width` ids occupies."""
        return width * self.shape[1] * 4

    def to(self, device: torch.device | str) -> DenseMatrix:
        """Return the same matrix on `device`."""
        return self if self.relative.device == torch.device(device) else DenseMatrix(self.relative.to(device))


class SparseMatrix:
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
    def _csr(self) -> _CsrOperator:
        num_rows, width = self.values.shape
        starts = torch.arange(0, num_rows * width + 1, width, dtype=torch.int64, device=self.values.device)
        columns, values = self.indices.flatten(), self.values.flatten()
        order = torch.argsort(columns, stable=True)
        counts = torch.bincount(columns, minlength=self.num_anchors)
        column_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        rows = torch.div(order, width, rounding_mode="floor")
        return _CsrOperator(
            _csr_tensor(starts, columns, values, (num_rows, self.num_anchors)),
            _csr_tensor(column_starts, rows, values[order], (self.num_anchors, num_rows)),
        )

    def full(self) -> Operator:
        """Return the operator of all rows; its index is built once."""
        if self.values.device.type != "cpu" or torch.backends.mkl.is_available():
            return self._csr
        return _ChunkedOperator(self.values, self.indices, self.num_anchors)

    def at(self, ids: Tensor) -> Operator:
        """Return the operator of the rows ids [B, K] of each distribution."""
        flat, shape = ids.flatten(), (*ids.shape, self.values.shape[1])
        values = self.values.index_select(0, flat).view(shape)
        return _GatheredOperator(values, self.indices.index_select(0, flat).view(shape), self.num_anchors)

    def at_bytes(self, width: int) -> int:
        """Return the bytes that ``at`` of one distribution with `width` ids occupies."""
        return width * self.values.shape[1] * 20  # values and scratch fp32, positions int64, indices int32

    def to(self, device: torch.device | str) -> SparseMatrix:
        """Return the same matrix on `device`."""
        if self.values.device == torch.device(device):
            return self
        values, indices = self.values.to(device), self.indices.to(device)
        return SparseMatrix(values, indices, self.num_anchors, self.dropped_mass.to(device))


def _csr_tensor(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a CSR matrix; int32 indices are what MKL and cuSPARSE want."""
    with warnings.catch_warnings():  # "CSR support is in beta": the products are tested against the dense ones
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(
            starts.to(torch.int32), columns.to(torch.int32), values, size=size, check_invariants=False
        )
