"""Products of experts: the members' relative vectors to any powers, negative ones for members that are to be avoided.

With exponents that sum to more than 1 the product is surer than its members (Hinton, Neural Computation 14:1771-1800,
2002). With a negative one it is contrastive decoding (Li et al., arXiv 2210.15097; the DExperts of Liu et al., arXiv
2105.03023): what an expert says and an amateur does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lm_eval_deepen.relative.average import FLOOR, Agreed
from lm_eval_deepen.relative.support import Split
from lm_eval_deepen.relative.topk import NEG_INF

PLAUSIBLE = 0.1  # of the likeliest: the alpha of contrastive decoding


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

    Beside a negative exponent, what the other members find less than `PLAUSIBLE` times as likely as their likeliest
    counts as `FLOOR`: an amateur's blind spots are no reason to say something. A row in which no member with a positive
    exponent takes part is not usable: what an amateur finds unlikely is no text.

    Args:
        reached: as `linear`.
        others: as `linear`.
        share: as `linear`; a member without weight takes no part, the other weights do not matter.
        parts: as `linear`.
        with_end: as `geometric`.
        exponents: one for each member.
    """
    wanted = torch.tensor(list(exponents), dtype=share.dtype, device=share.device) * (share > 0)  # [B, M]
    r = _product([vector.clamp_min(FLOOR).log() for vector in (reached, *others)], wanted)
    both = torch.stack([parts.log_text, parts.log_end], dim=2).clamp_min(math.log(FLOOR))  # [B, M, 2]
    log_text, log_end = _product(list(both.unbind(1)), wanted).unbind(1)
    if not with_end:
        log_text, log_end = torch.zeros_like(log_text), torch.full_like(log_text, NEG_INF)
    usable = (parts.log_text[:, 0] > NEG_INF) & (wanted > 0).any(1)
    return Agreed(r.exp(), log_text, log_end, share, usable)


def _product(logs: Sequence[Tensor], exponents: Tensor) -> Tensor:
    """Return the normalised log product [B, A] of values [B, A] to some powers [B, M]."""
    total = torch.stack([exponents[:, m, None] * own for m, own in enumerate(logs)]).sum(0)
    experts = exponents.clamp_min(0)
    liked = torch.stack([experts[:, m, None] * own for m, own in enumerate(logs)]).sum(0)
    implausible = liked < liked.amax(1, keepdim=True) + experts.sum(1, keepdim=True) * math.log(PLAUSIBLE)
    implausible &= (exponents < 0).any(1, keepdim=True)
    best = total.masked_fill(implausible, NEG_INF).amax(1, keepdim=True)
    return torch.log_softmax(torch.where(implausible, best + math.log(FLOOR), total), dim=1)
