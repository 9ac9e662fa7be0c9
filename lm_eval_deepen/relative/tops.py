"""How many of a member's likeliest text pieces a truncated step works on: a number, or a share of the mass.

The mass that is left out is bounded: where a row's own share of pieces would leave out more, it gets more of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_deepen.relative.support import Side, Split
from lm_eval_deepen.relative.topk import NEG_INF, largest

WIDER = 4  # times as many pieces are looked at for a row that needs more
AT_FIRST = 512  # pieces that are looked at where a mass is asked for


@dataclass(frozen=True)
class TopRule:
    """Which of its text pieces a member brings to a row's support."""

    pieces: int | None  # its most likely ones, so many; with `mass`, at most so many
    mass: float | None  # the fewest that hold this share of its text, None where their number alone counts
    # the largest share of its text that may be left out; a row that leaves out more gets the fewest pieces that do not
    max_truncated: float

    @property
    def first(self) -> int:
        """How many pieces to look at first."""
        if self.mass is None:
            assert self.pieces is not None
            return self.pieces
        return AT_FIRST if self.pieces is None else min(AT_FIRST, self.pieces)


@dataclass(frozen=True)
class Tops:
    """A member's own pieces for a row's support."""

    ids: Tensor  # of its text pieces [B, n]; V in a place that is not used
    enough: Tensor  # rows [B] (bool) for which n was enough
    widened: Tensor  # rows [B] (bool) that have more pieces than the rule's number or mass asks for

    def at(self, index: Tensor) -> Tops:
        """Return the same of some rows."""
        return Tops(self.ids[index], self.enough[index], self.widened[index])


def tops(parts: Split, member: int, side: Side, index: Tensor, active: Tensor, rule: TopRule, width: int) -> Tops:
    """Return a member's pieces for some rows, as far as the `width` most likely ones are enough.

    What is found for a row depends on the row alone.

    Args:
        parts: the rows.
        member: which member.
        side: the member.
        index: which of the rows [b], in ascending order.
        active: rows in which the member takes part [b] (bool); in others nothing is bounded.
        rule: which pieces.
        width: how many are looked at.
    """
    rows = parts.rows[member]
    size = rows.shape[1]
    everything = size - len(side.outside)
    width = min(width, everything)
    some = None if len(index) == len(rows) else index
    values, ids = largest(rows, width, mask=side.mask, maxima=parts.maxima[member], index=some)
    shares = (values.to(torch.float32) - parts.log_sum[index, member, None]).exp_()
    bound = 1 - rule.max_truncated
    if rule.mass is None and rule.pieces is not None and width <= rule.pieces:  # all of them, in any order
        enough = ~active | (shares.sum(1) >= bound) | (width == everything)
        return Tops(torch.where(values > NEG_INF, ids, size), enough, torch.zeros_like(enough))
    shares, order = shares.double().sort(dim=1, descending=True)
    held = shares.cumsum(1)
    asked = _fewest(held, rule.mass, rule.pieces)
    needed = torch.where(active, _fewest(held, bound, None), 1)
    chosen = torch.maximum(asked, needed)
    place = torch.arange(width, device=rows.device)
    used = (place < chosen[:, None]) & (shares > 0)
    enough = ~active | (chosen <= width) | (width == everything)
    return Tops(torch.where(used, ids.gather(1, order), size), enough, active & (needed > asked))


def _fewest(held: Tensor, mass: float | None, most: int | None) -> Tensor:
    """Return how many pieces [B] hold a mass, `most` at most; n + 1 if n pieces [B, n] do not."""
    if mass is None:
        assert most is not None
        return torch.full_like(held[:, 0], most, dtype=torch.int64)
    count = (held < mass).sum(1) + 1
    return count if most is None else count.clamp(max=most)
