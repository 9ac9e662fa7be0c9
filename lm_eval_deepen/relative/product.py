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

from lm_eval_deepen.relative.average import FLOOR, LOG_LEAST, Agreed
from lm_eval_deepen.relative.support import Split
from lm_eval_deepen.relative.topk import NEG_INF

LOG_FLOOR = math.log(FLOOR)
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

    Where q_m is 0 its logarithm counts as `LOG_LEAST`; a mass that is 0 counts as `FLOOR`.

    Beside a negative exponent, what the other members find less than `PLAUSIBLE` times as likely as their likeliest
    is at most `FLOOR` times as likely as the likeliest of the rest, and at most as they find it: an amateur's blind
    spots are no reason to say something. So its own values and masses count as `FLOOR` where they are less. A row in
    which no member with a positive exponent takes part is not usable: what an amateur finds unlikely is no text.

    Args:
        reached: as `linear`.
        others: as `linear`.
        share: as `linear`; a member without weight takes no part, the other weights do not matter.
        parts: as `linear`.
        with_end: as `geometric`.
        exponents: one for each member.
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
