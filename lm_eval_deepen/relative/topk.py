"""Reductions of rows as long as a vocabulary: the k largest entries, the largest, sums of exponentials.

Each gives what the operation of torch that it names gives, and is faster on CPU rows of 45k to 262k entries. A row's
result does not depend on the rows beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_deepen.relative.matrix import OneHotOperator

NEG_INF = float("-inf")
_GROUP = 4
_BLOCKS = 64
_SHORT = 8192  # below this torch's own operation is as fast
_CACHED = 1 << 18  # entries that a core's cache holds
_LOG2_E = math.log2(math.e)
_SMALLEST = torch.finfo(torch.float32).tiny


def largest(
    rows: Tensor, k: int, *, mask: Tensor | None = None, maxima: Tensor | None = None, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the k largest values [b, k] of rows [B, n] and their positions, in no particular order.

    Exact, and three times as fast as ``torch.topk``: the k largest entries lie in the k groups with the largest
    maxima, which are found in the same way, so that only the entries of those groups are compared.

    Args:
        rows: where to look.
        k: how many, n at most.
        mask: 0 or ``-inf`` [n], added to the rows.
        maxima: ``Scan.maxima`` of all rows under this mask, where it is known.
        index: in which rows to look [b], None for all of them; others are not copied.
    """
    num = rows.shape[1] // _GROUP  # entries i, i + num, i + 2 num, ... form group i
    if rows.shape[1] < _SHORT or num < 2 * k:
        wanted = rows if index is None else rows[index]
        return torch.topk(wanted if mask is None else wanted + mask, k, dim=1, sorted=False)
    if maxima is None:
        maxima = _group_maxima(rows if mask is None else rows + mask)
    _, groups = largest(maxima if index is None else maxima[index], k)
    starts = torch.arange(0, num * _GROUP, num, device=rows.device)
    where = (groups[:, None, :] + starts[:, None]).flatten(1)
    if num * _GROUP < rows.shape[1]:
        rest = torch.arange(num * _GROUP, rows.shape[1], device=rows.device)
        where = torch.cat([where, rest.expand(len(where), -1)], dim=1)
    if index is None:
        candidates = rows.gather(1, where)
    else:
        candidates = (
            rows.reshape(-1).index_select(0, (where + rows.shape[1] * index[:, None]).flatten()).view(where.shape)
        )
    if mask is not None:
        candidates = candidates + mask.index_select(0, where.flatten()).view(where.shape)
    values, chosen = candidates.topk(k, dim=1, sorted=False)
    return values, where.gather(1, chosen)


def _group_maxima(rows: Tensor) -> Tensor:
    num = rows.shape[1] // _GROUP
    return rows[:, : num * _GROUP].unflatten(1, (_GROUP, num)).amax(1)


@dataclass(frozen=True)
class Scan:
    """What one pass over rows as long as a vocabulary finds."""

    log_mass: Tensor  # log of the sum of exponentials [B], fp32
    maxima: Tensor | None  # of groups of entries, for `largest` [B, n // 4]; None for short rows
    # exponentials added up by class, over the sum of all of them [B, A]; None if there are no classes
    classes: Tensor | None


def scan(rows: Tensor, mask: Tensor, *, grouped: bool = False, one_hot: OneHotOperator | None = None) -> Scan:
    """Pass over rows [B, n] under a mask once, a few at a time, which on a CPU stay in its cache.

    Sums are those of ``torch.logsumexp`` to 2e-6, through powers of 2, which take a third of the time of powers
    of e. ``torch.log_softmax`` is as fast, but off by 5e-5 on rows of 262k entries.

    Args:
        rows: in any float dtype.
        mask: 0 or ``-inf`` [n], fp32, added to the rows.
        grouped: whether `largest` is asked for next.
        one_hot: the classes of the entries.
    """
    size, device = rows.shape[1], rows.device
    step = max(1, _CACHED // size) if device.type == "cpu" else max(1, len(rows))
    log_mass = torch.empty(len(rows), device=device)
    grouped = grouped and size >= _SHORT
    maxima = torch.empty(len(rows), size // _GROUP, device=device) if grouped else None
    sums = None if one_hot is None else torch.zeros(len(rows), one_hot.num_anchors + 1, device=device)
    scratch = torch.empty(min(step, len(rows)), size, device=device)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        here = torch.add(rows[part], mask, out=scratch[: len(rows[part])])
        if maxima is not None:
            maxima[part] = _group_maxima(here)
        top = here.amax(1, keepdim=True)
        top.masked_fill_(top == NEG_INF, 0.0)
        powers = torch.add(top * -_LOG2_E, here, alpha=_LOG2_E, out=here).exp2_()
        total = powers.sum(1)
        log_mass[part] = total.log().add_(top[:, 0])
        if sums is not None and one_hot is not None:
            sums[part].index_add_(1, one_hot.classes, powers).div_(total.clamp_(min=_SMALLEST)[:, None])
    return Scan(log_mass, maxima, None if sums is None else sums[:, :-1])


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
