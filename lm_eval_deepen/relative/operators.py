"""What a relative matrix R [V, A] can be asked: ``project`` is p R, ``back`` is R q."""

from __future__ import annotations

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
