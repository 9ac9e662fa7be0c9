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

from lm_eval_deepen.relative.average import LOG_LEAST, Agreed, blended
from lm_eval_deepen.relative.support import Split


def power_mean(
    reached: Tensor, others: Iterable[Tensor], share: Tensor, parts: Split, *, with_end: bool, power: float
) -> Agreed:
    """Return the power mean given text, normalised; text and end of text are averaged linearly. See `linear`.

    Where q_m is 0 its logarithm counts as `LOG_LEAST`, so that a row whose members have nothing in common keeps what
    they say. A power of 0.2 or more gives what it gives for 0, one below 0 gives such an anchor next to nothing.
    """
    masses = blended(share, parts)
    logs = torch.stack([reached, *others]).log_().clamp_min_(LOG_LEAST)
    logs.masked_fill_(masses.blend.T[:, :, None] == 0, math.inf if power < 0 else -math.inf)
    extreme = logs.amin(0) if power < 0 else logs.amax(0)
    extreme.masked_fill_(extreme.isinf(), 0.0)  # rows in which nobody has text
    if math.isinf(power):
        return masses.agree(torch.softmax(extreme, dim=1))
    gaps = logs.sub_(extreme).mul_(power)  # from the term that counts most, which is 1
    log_sum = torch.einsum("bm,mba->ba", masses.blend, gaps.exp()).log_()
    if abs(power) < 1:  # where the sum is nearly 1, its logarithm would be rounding
        less = torch.einsum("bm,mba->ba", masses.blend, gaps.expm1_())
        log_sum = torch.where(less > -0.5, less.log1p(), log_sum)
    return masses.agree(torch.softmax(extreme + log_sum / power, dim=1))
