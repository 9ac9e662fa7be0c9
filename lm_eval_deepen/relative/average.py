"""Averages of the members' relative vectors, and of their masses of text and of end of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_deepen.relative.support import Split
from lm_eval_deepen.relative.topk import NEG_INF

FLOOR = 1e-12  # what the geometric average takes for a zero: an anchor that a member cannot reach is not excluded
LOG_LEAST = -149 * math.log(2)  # of the smallest number above 0 in fp32: what underflows is not more


@dataclass(frozen=True)
class Agreed:
    """What the members agree on."""

    r: Tensor  # the average given text [B, A], sum 1 where the members' vectors have that
    log_text: Tensor  # log mass of text given text or end [B]
    log_end: Tensor  # log mass of end given text or end [B]
    blend: Tensor  # the members' weights given that the next piece is text [B, M]
    usable: Tensor  # rows [B] (bool) where the main member and the average have text; the others are not fused


@dataclass(frozen=True)
class Blended:
    """Linear averages of the members' masses of text and of end of text; attributes as `Agreed`."""

    log_text: Tensor
    log_end: Tensor
    blend: Tensor
    usable: Tensor

    def agree(self, r: Tensor) -> Agreed:
        """Return them with an average given text [B, A]."""
        return Agreed(r, self.log_text, self.log_end, self.blend, self.usable)


def blended(share: Tensor, parts: Split) -> Blended:
    """Return what a linear average makes of the masses; w_m given text is a member's weight times its mass of text."""
    logs = share.log()
    end = torch.logsumexp(logs + parts.log_end, dim=1)
    text = logs + parts.log_text
    mass = torch.logsumexp(text, dim=1)
    usable = (parts.log_text[:, 0] > NEG_INF) & (mass > NEG_INF)
    return Blended(mass, end, (text - mass.masked_fill(~usable, 0.0)[:, None]).exp(), usable)


def linear(reached: Tensor, others: Iterable[Tensor], share: Tensor, parts: Split, *, with_end: bool) -> Agreed:
    """Return sum_m w_m q_m (DeePEn, section 3.2); w_m is a member's weight times its mass of text, normalised.

    Args:
        reached: the main member's relative vector q_0 [B, A].
        others: the other members' [B, A]; overwritten.
        share: the members' weights [B, M], rows sum to 1.
        parts: the members' masses.
        with_end: not needed: a member without an end of text has no mass there.
    """
    masses = blended(share, parts)
    r = masses.blend[:, :1] * reached
    for i, vector in enumerate(others, start=1):
        r.addcmul_(masses.blend[:, i, None], vector)
    return masses.agree(r)


def geometric(
    reached: Tensor, others: Iterable[Tensor], share: Tensor, parts: Split, *, with_end: bool, power: float = 1.0
) -> Agreed:
    """Return prod_m q_m ** w_m over anchors, normalised, and the same of text against end of text.

    Where q_m, or a mass, is 0 it counts as `FLOOR`, but for anchors that no member gives anything: these stay 0.
    Whether to stop is decided apart from how to go on: pooled together, an end would gain from every disagreement
    about the text. Arguments as `linear`; without an end (`with_end`) there is text alone. A `power` below 1 makes the
    average less sure: the exponents w_m are multiplied by it.
    """
    exponents = share * power
    zeros = [reached == 0]
    r = reached.masked_fill(zeros[0], FLOOR).log_().mul_(exponents[:, :1])
    for i, vector in enumerate(others, start=1):
        zeros.append(vector == 0)
        r.addcmul_(exponents[:, i, None], vector.masked_fill_(zeros[i], FLOOR).log_())
    if bool(zeros[0].any()):
        r.masked_fill_(nobodys(zeros, share), NEG_INF)
    r = r.sub_(torch.logsumexp(r, dim=1, keepdim=True)).exp_()
    text = _mean(exponents, parts.log_text)
    end = _mean(exponents, parts.log_end) if with_end else torch.full_like(text, NEG_INF)
    total = torch.logaddexp(text, end)
    usable = parts.log_text[:, 0] > NEG_INF
    return Agreed(r, text - total, end - total, share, usable)


def nobodys(zeros: Sequence[Tensor], share: Tensor) -> Tensor:
    """Return the anchors [B, A] (bool) that neither the main member nor one with weight gives anything.

    Args:
        zeros: where each member's vector is 0 [B, A], the main member first.
        share: the members' weights [B, M].
    """
    unreached = zeros[0].clone()
    for m, own in enumerate(zeros[1:], start=1):
        unreached &= own | (share[:, m, None] == 0)
    return unreached & ~unreached.all(1, keepdim=True)


def _mean(share: Tensor, log_mass: Tensor) -> Tensor:
    """Return the weighted mean [B] of log masses [B, M]."""
    return (share * log_mass.masked_fill(log_mass == NEG_INF, math.log(FLOOR))).sum(1)
