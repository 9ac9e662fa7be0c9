"""Reductions of rows as long as a vocabulary: the k largest entries, the largest, the log of the sum of exponentials.

Each gives what the operation of torch that it names gives, and is faster on CPU rows of 45k to 262k entries. A row's
result does not depend on the rows beside it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEG_INF = float("-inf")
_GROUP = 4
_BLOCKS = 64
_SHORT = 8192  # below this torch's own operation is as fast


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values [B, k] of rows [B, n] and their positions, in no particular order.

    Exact, and three times as fast as ``torch.topk``: the k largest entries lie in the k groups with the largest
    maxima, which are found in the same way, so that only the entries of those groups are compared.
    """
    num = rows.shape[1] // _GROUP  # entries i, i + num, i + 2 num, ... form group i
    if rows.shape[1] < _SHORT or num < 2 * k:
        return torch.topk(rows, k, dim=1, sorted=False)
    _, groups = largest(rows[:, : num * _GROUP].unflatten(1, (_GROUP, num)).amax(1), k)
    starts = torch.arange(0, num * _GROUP, num, device=rows.device)
    where = (groups[:, None, :] + starts[:, None]).flatten(1)
    if num * _GROUP < rows.shape[1]:
        rest = torch.arange(num * _GROUP, rows.shape[1], device=rows.device)
        where = torch.cat([where, rest.expand(len(rows), -1)], dim=1)
    values, chosen = rows.gather(1, where).topk(k, dim=1, sorted=False)
    return values, where.gather(1, chosen)


def argmax(rows: Tensor) -> Tensor:
    """Return the position [B] of the first largest entry of rows [B, n]; of the first NaN where there is one.

    ``torch.argmax`` compares one entry at a time on a CPU; maxima of blocks are vectorised.
    """
    if rows.shape[1] < _SHORT:
        return rows.argmax(1)
    size = rows.shape[1] // _BLOCKS
    best = rows[:, : size * _BLOCKS].unflatten(1, (_BLOCKS, size)).amax(2)
    if size * _BLOCKS < rows.shape[1]:
        best = torch.cat([best, rows[:, size * _BLOCKS :].amax(1, keepdim=True)], dim=1)
    start = best.argmax(1, keepdim=True) * size
    # past the end of the row its last entry is repeated, and the first largest one wins
    within = (start + torch.arange(size, device=rows.device)).clamp_(max=rows.shape[1] - 1)
    return start[:, 0] + rows.gather(1, within).argmax(1)


def logsumexp(rows: Tensor) -> Tensor:
    """Return the log of the sum of exponentials [B] of rows [B, n] of float32.

    ``torch.logsumexp`` to 2e-6, through powers of 2, which take a third of the time of powers of e.
    ``torch.log_softmax`` is as fast, but off by 5e-5 on rows of 262k entries.
    """
    top = rows.amax(1, keepdim=True)
    top = top.masked_fill_(top == NEG_INF, 0.0)
    scaled = torch.add(top * -math.log2(math.e), rows, alpha=math.log2(math.e))
    return scaled.exp2_().sum(1).log_().add_(top[:, 0])
