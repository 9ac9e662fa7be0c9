"""Rows that a step of `deepen` works on, and what it finds; both can be taken apart and put together by rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lm_eval_deepen.relative.average import Agreed
from lm_eval_deepen.relative.support import Split
from lm_eval_deepen.relative.tops import Tops


@dataclass(frozen=True)
class Rows:
    """Rows to fuse.

    Attributes:
        parts: what they are made of.
        share: the members' weights [B, M].
        active: members that take part [B, M] (bool), the main one always.
        out: where the fused text pieces go [B, V_0].
        with_end: whether there is an end of text.
    """

    parts: Split
    share: Tensor
    active: Tensor
    out: Tensor
    with_end: bool

    def at(self, index: Tensor, parts: Split) -> Rows:
        """Return some of the rows, whose parts are given, with an `out` of their own."""
        out = self.out.new_empty(len(index), self.out.shape[1])
        return replace(self, parts=parts, share=self.share[index], active=self.active[index], out=out)


@dataclass(frozen=True)
class Group:
    """Rows whose supports are of similar size: their indices [b], and every member's own pieces of them."""

    index: Tensor
    tops: Sequence[Tops]


@dataclass(frozen=True)
class Found:
    """What was found beside the text pieces."""

    log_text: Tensor  # log mass of text given text or end [B]
    log_end: Tensor  # log mass of end given text or end [B]
    usable: Tensor  # rows that could be fused [B] (bool)
    stats: dict[str, Tensor]  # per-row statistics [B]

    @classmethod
    def of(cls, agreed: Agreed, stats: dict[str, Tensor]) -> Found:
        """Return what the members agree on, with statistics."""
        return cls(agreed.log_text, agreed.log_end, agreed.usable, stats)

    @classmethod
    def together(cls, parts: Sequence[tuple[Tensor, Found]]) -> Found:
        """Return what was found for all rows, from parts of them and their indices."""
        order = torch.cat([index for index, _ in parts]).argsort()

        def join(values: Sequence[Tensor]) -> Tensor:
            return torch.cat(list(values))[order]

        groups = [part for _, part in parts]
        stats = {name: join([part.stats[name] for part in groups]) for name in groups[0].stats}
        log_text, log_end = join([part.log_text for part in groups]), join([part.log_end for part in groups])
        return cls(log_text, log_end, join([part.usable for part in groups]), stats)
