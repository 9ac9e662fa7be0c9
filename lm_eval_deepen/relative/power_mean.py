"""Power means of the members' relative vectors: from the smallest of their values (minus infinity) to the largest.

r is in proportion to (sum_m w_m q_m ** p) ** (1 / p). With p = 1 that is the linear average, near 0 the geometric one;
below 1 the members must agree, above 1 one of them is enough (Amini et al., ICLR 2025, arXiv 2403.00867, averages
language models so).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lm_eval_deepen.relative.average import FLOOR, Agreed, blended
from lm_eval_deepen.relative.support import Split


def power_mean(
    reached: Tensor, others: Iterable[Tensor], share: Tensor, parts: Split, *, with_end: bool, power: float
) -> Agreed:
    """Return the power mean given text, normalised; text and end of text are averaged linearly. See `linear`.

    Where q_m is less than `FLOOR` it counts as that.
    """
    masses = blended(share, parts)
    logs = [vector.clamp_min(FLOOR).log() for vector in (reached, *others)]
    if math.isinf(power):
        absent = math.inf if power < 0 else -math.inf
        values = [torch.where(masses.blend[:, m, None] > 0, own, absent) for m, own in enumerate(logs)]
        r = torch.stack(values).amin(0) if power < 0 else torch.stack(values).amax(0)
    elif abs(power) < 1:  # near 0 the sum of w_m q_m ** p is near 1, and its logarithm would be rounding
        mean = torch.stack([masses.blend[:, m, None] * own for m, own in enumerate(logs)]).sum(0)
        more = [masses.blend[:, m, None] * torch.expm1(power * (own - mean)) for m, own in enumerate(logs)]
        r = mean + torch.stack(more).sum(0).log1p() / power
    else:
        weights = masses.blend.log()
        r = torch.logsumexp(torch.stack([weights[:, m, None] + power * own for m, own in enumerate(logs)]), 0) / power
    return masses.agree(torch.softmax(r, dim=1))
