"""Normalizations: how cosines between embedding rows become the logits of a relative row.

A relative row is ``softmax_a(temperature * n(cos(E[w], E[a])))`` over the anchors ``a`` (DeePEn,
arXiv 2404.12715, section 3.2). A normalization chooses what is done to the embedding rows before the
cosine (`Normalization.shift`) and to the cosines after it (`Normalization.unit`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 8192  # rows converted to fp32 at once where a whole vocabulary is walked


@dataclass(frozen=True)
class Shift:
    """What is taken from every embedding row before the cosines."""

    mean: Tensor  # subtracted [d], fp32
    directions: Tensor  # orthonormal rows [D, d] that are projected out after that; D may be 0

    def __call__(self, block: Tensor) -> Tensor:
        """Return rows [b, d] without the mean and the directions."""
        block = block - self.mean
        return block - (block @ self.directions.T) @ self.directions if len(self.directions) else block


@dataclass(frozen=True)
class Normalization:
    """A way from embedding rows to the logits of relative rows."""

    center: bool = True  # whether the mean of the member's text rows is subtracted from every row first
    unit: bool = False  # whether n(.) above scales the cosines of a row to L2 norm 1
    remove: float = 0.0  # principal directions that are projected out after centring, as a share of d

    def shift(self, embeddings: Tensor, rows: Tensor) -> Shift | None:
        """Return what is taken from every row, from the rows [V] (bool) in use; None for nothing."""
        if not self.center:
            return None
        width = embeddings.shape[1]
        total = torch.zeros(width, dtype=torch.float64, device=embeddings.device)
        second = torch.zeros(width, width, dtype=torch.float64, device=embeddings.device)
        for start in range(0, len(embeddings), BLOCK_ROWS):
            block = embeddings[start : start + BLOCK_ROWS][rows[start : start + BLOCK_ROWS]].to(torch.float32)
            total += block.to(torch.float64).sum(0)
            if self.remove:
                second += (block.T @ block).to(torch.float64)
        count = rows.sum().clamp(min=1)
        mean = total / count
        directions = second[:0]
        if self.remove:
            spread = torch.linalg.eigh(second / count - mean[:, None] * mean)  # eigenvalues ascending
            directions = spread.eigenvectors.T[width - max(1, round(self.remove * width)) :]
        return Shift(mean.to(torch.float32), directions.to(torch.float32))

    def logits(self, block: Tensor, anchors: Tensor, temperature: float) -> Tensor:
        """Return logits of relative rows [b, A] from `unit_rows` of a block [b, d] and of anchors [A, d]."""
        cosines = block @ anchors.T
        if self.unit:
            cosines.div_(cosines.norm(dim=-1, keepdim=True).clamp(min=1e-12))
        return cosines.mul_(temperature)


def unit_rows(block: Tensor, shift: Shift | None = None) -> Tensor:
    """Return embedding rows [b, d] after `shift`, scaled to L2 norm 1, fp32; a zero row stays zero."""
    block = block.to(torch.float32)
    if shift is not None:
        block = shift(block)
    return torch.nn.functional.normalize(block, dim=-1, eps=1e-12)


NORMALIZATIONS = {  # by the value of the option ``normalization``
    # T * cos(E[w], E[a]) / ||cos(E[w], E[.])||_2, as published. On modern models the row norm is about 50 to 100, so
    # rows are nearly flat.
    "reference": Normalization(center=False, unit=True),
    "cosine": Normalization(center=False),  # T * cos(E[w], E[a])
    "centered": Normalization(),  # T * cos(E[w] - mean(E), E[a] - mean(E))
    # T * cos(Q E[w], Q E[a]), Q: less mean and top directions. All-but-the-top (Mu and Viswanath, arXiv 1702.01417,
    # section 3): the first d/100 directions carry frequency.
    "decorrelated": Normalization(remove=0.01),
}
