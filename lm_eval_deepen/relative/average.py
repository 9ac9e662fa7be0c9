"""Averages of the members' relative vectors, and of their masses of text and of end of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lm_eval_deepen.relative.support import Split
from lm_eval_deepen.relative.topk import NEG_INF

FLOOR = 1e-12  # what the geometric average takes for a zero: an anchor that a member cannot reach is not excluded
LOG_LEAST = -149 * math.log(2)  # of the smallest number above 0 in fp32: what underflows is not more
LOG_FLOOR = math.log(FLOOR)
PLAUSIBLE = 0.1  # of the likeliest, beside a negative exponent: the alpha of contrastive decoding
SHARPNESS = 2.0  # b of the filter of `consistent` in the released code


@dataclass(frozen=True)
class Agreed:
    """What the members agree on."""

    r: Tensor  # the average given text [B, A], sum 1 where the members' vectors have that
    log_text: Tensor  # log mass of text given text or end [B]
    log_end: Tensor  # log mass of end given text or end [B]
    blend: Tensor  # the members' weights given that the next piece is text [B, M]
    usable: Tensor  # rows [B] (bool) where the main member and the average have text; the others are not fused


def blended(share: Tensor, parts: Split) -> Agreed:
    """Return linear averages of the masses, before there is an `r`; `blend` is weights times masses of text."""
    logs = share.log()
    end = torch.logsumexp(logs + parts.log_end, dim=1)
    text = logs + parts.log_text
    mass = torch.logsumexp(text, dim=1)
    usable = (parts.log_text[:, 0] > NEG_INF) & (mass > NEG_INF)
    blend = (text - mass.masked_fill(~usable, 0.0)[:, None]).exp()
    return Agreed(mass.new_empty(0), mass, end, blend, usable)


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
    return replace(masses, r=r)


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


def power_mean(
    reached: Tensor, others: Iterable[Tensor], share: Tensor, parts: Split, *, with_end: bool, power: float
) -> Agreed:
    """Return the power mean given text, normalised; text and end of text are averaged linearly. See `linear`.

    It is in proportion to (sum_m w_m q_m ** p) ** (1 / p), from the smallest value (minus infinity) to the largest.
    With p = 1 that is the linear average, near 0 the geometric one; below 1 the members must agree, above 1 one of them
    is enough (Amini et al., ICLR 2025, arXiv 2403.00867, averages language models so).

    Where q_m is 0 its logarithm counts as `LOG_LEAST`, so that a row whose members have nothing in common keeps what
    they say. A power of 0.2 or more gives what it gives for 0, one below 0 gives such an anchor next to nothing.
    """
    masses = blended(share, parts)
    logs = torch.stack([reached, *others]).log_().clamp_min_(LOG_LEAST)
    logs.masked_fill_(masses.blend.T[:, :, None] == 0, math.inf if power < 0 else -math.inf)
    extreme = logs.amin(0) if power < 0 else logs.amax(0)
    extreme.masked_fill_(extreme.isinf(), 0.0)  # rows in which nobody has text
    if math.isinf(power):
        return replace(masses, r=torch.softmax(extreme, dim=1))
    gaps = logs.sub_(extreme).mul_(power)  # from the term that counts most, which is 1
    log_sum = torch.einsum("bm,mba->ba", masses.blend, gaps.exp()).log_()
    if abs(power) < 1:  # where the sum is nearly 1, its logarithm would be rounding
        less = torch.einsum("bm,mba->ba", masses.blend, gaps.expm1_())
        log_sum = torch.where(less > -0.5, less.log1p(), log_sum)
    return replace(masses, r=torch.softmax(extreme + log_sum / power, dim=1))


def consistent(reached: Tensor, others: Iterable[Tensor], share: Tensor, parts: Split, *, with_end: bool) -> Agreed:
    """Return the average by consistency given text, normalised; text and end are averaged linearly. See `linear`.

    It trusts what members agree on: CoRE (Zeng et al., EACL 2026 Findings, arXiv 2510.13855). A member's value of an
    anchor counts less the farther it is from the mean of all (a filter exp(-b d), rescaled to 0 to 1), and a member
    counts, beside its weight, by how much it agrees with the others and by how sure it is. As in the released code, the
    main member's own values are not filtered, and its weight is at least that of all others together.
    """
    masses = blended(share, parts)
    vectors = torch.stack([reached, *others], dim=1)  # [B, M, A]
    vectors = torch.where(masses.blend[:, :, None] > 0, vectors, 0.0)
    mean = (masses.blend[:, :, None] * vectors).sum(1, keepdim=True)
    least = math.exp(-SHARPNESS)
    agree = ((-SHARPNESS * (vectors - mean).abs()).exp() - least) / (1 - least)
    agree = agree * (vectors + vectors[:, :1] > FLOOR)  # what neither this member nor the main one says has no score
    total = agree.sum(2)
    entropy = -torch.special.xlogy(vectors, vectors).sum(2).clamp_max(0)  # 1 may be rounded up
    weights = masses.blend * total / (entropy + FLOOR)
    weights[:, 0] = torch.maximum(weights[:, 0], weights[:, 1:].sum(1))
    weights = weights / weights.sum(1, keepdim=True).clamp_min(FLOOR)
    scale = (agree > 0).sum(2) / total.clamp_min(FLOOR)  # so that the scores of a member are 1 in the mean
    scores = agree * scale[:, :, None]
    scores[:, 0] = 1
    r = (weights[:, :, None] * scores * vectors).sum(1)
    return replace(masses, r=r / r.sum(1, keepdim=True).clamp_min(FLOOR))


def product(
    reached: Tensor,
    others: Iterable[Tensor],
    share: Tensor,
    parts: Split,
    *,
    with_end: bool,
    exponents: Sequence[float],
) -> Agreed:
    """Return prod_m q_m ** e_m over anchors, normalised, and the same of text against end of text. See `geometric`.

    With exponents that sum to more than 1 a product of experts is surer than its members (Hinton, Neural Computation
    14:1771-1800, 2002). With a negative one it is contrastive decoding (Li et al., arXiv 2210.15097; the DExperts of
    Liu et al., arXiv 2105.03023): what an expert says and an amateur does not.

    Where q_m is 0 its logarithm counts as `LOG_LEAST`; a mass that is 0 counts as `FLOOR`.

    Beside a negative exponent, what the other members find less than `PLAUSIBLE` times as likely as their likeliest
    is at most `FLOOR` times as likely as the likeliest of the rest, and at most as they find it: an amateur's blind
    spots are no reason to say something. So its own values and masses count as `FLOOR` where they are less. A row in
    which no member with a positive exponent takes part is not usable: what an amateur finds unlikely is no text.

    Arguments as `geometric`, and an exponent for each member. A member without weight takes no part; the other weights
    do not matter.
    """
    wanted = torch.tensor(list(exponents), dtype=share.dtype, device=share.device) * (share > 0)  # [B, M]
    least = [LOG_FLOOR if exponent < 0 else LOG_LEAST for exponent in exponents]
    vectors = [vector.log().clamp_min_(low) for vector, low in zip((reached, *others), least, strict=True)]
    masses = torch.stack([parts.log_text, parts.log_end], dim=2)  # [B, M, 2]
    low = torch.tensor([LOG_FLOOR if exponent < 0 else NEG_INF for exponent in exponents]).to(masses)
    masses = masses.masked_fill(masses == NEG_INF, LOG_FLOOR).clamp_min(low[:, None])
    log_text, log_end = _product(list(masses.unbind(1)), wanted).unbind(1)
    if not with_end:
        log_text, log_end = torch.zeros_like(log_text), torch.full_like(log_text, NEG_INF)
    usable = (parts.log_text[:, 0] > NEG_INF) & (wanted > 0).any(1)
    return Agreed(_product(vectors, wanted).exp(), log_text, log_end, share, usable)


def _product(logs: Sequence[Tensor], exponents: Tensor) -> Tensor:
    """Return the normalised log product [B, A] of values [B, A] to some powers [B, M]."""
    total = torch.stack([exponents[:, m, None] * own for m, own in enumerate(logs)]).sum(0)
    experts = exponents.clamp_min(0)
    liked = torch.stack([experts[:, m, None] * own for m, own in enumerate(logs)]).sum(0)
    liked = (liked - liked.amax(1, keepdim=True)) / experts.sum(1, keepdim=True).clamp_min(FLOOR)
    implausible = liked < math.log(PLAUSIBLE)
    implausible &= (exponents < 0).any(1, keepdim=True)
    best = total.masked_fill(implausible, NEG_INF).amax(1, keepdim=True)
    return torch.log_softmax(torch.where(implausible, best + liked.clamp_max(LOG_FLOOR), total), dim=1)


def nobodys(zeros: Sequence[Tensor], share: Tensor) -> Tensor:
    """Return the anchors [B, A] (bool) that neither the main member nor one with weight gives anything.

    `zeros`: where each member's vector is 0 [B, A], the main member first.
    """
    unreached = zeros[0].clone()
    for m, own in enumerate(zeros[1:], start=1):
        unreached &= own | (share[:, m, None] == 0)
    return unreached & ~unreached.all(1, keepdim=True)


def _mean(share: Tensor, log_mass: Tensor) -> Tensor:
    """Return the weighted mean [B] of log masses [B, M]."""
    return (share * log_mass.masked_fill(log_mass == NEG_INF, LOG_FLOOR)).sum(1)
