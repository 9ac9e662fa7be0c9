"""Measures how flat relative rows are. Flat rows hardly distinguish pieces."""

from __future__ import annotations

import math

import torch

from lm_eval_deepen.relative.matrix import DenseMatrix, SparseMatrix
from lm_eval_deepen.relative.operators import RelativeMatrix

SAMPLE = 512  # rows looked at


def row_entropy_share(matrix: RelativeMatrix) -> float:
    """Return the mean entropy of a sample of rows, as a share of that of flat ones: 0 one-hot, 1 flat."""
    if isinstance(matrix, SparseMatrix):
        rows = matrix.values
    elif isinstance(matrix, DenseMatrix):
        rows = matrix.relative
    else:
        raise TypeError(f"no rows of {type(matrix).__name__} are known")
    sample = rows[:: max(1, len(rows) // SAMPLE)].float()
    sample = sample[sample.sum(1) > 0]
    if not len(sample) or matrix.shape[1] < 2:
        return 0.0
    return max(0.0, float(-torch.xlogy(sample, sample).sum(1).mean()) / math.log(matrix.shape[1]))
