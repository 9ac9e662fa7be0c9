"""Averages that trust what members agree on: CoRE (Zeng et al., EACL 2026 Findings, arXiv 2510.13855).

A member's value of an anchor counts less the farther it is from the mean of all (a filter exp(-b d), rescaled to 0 to
1), and a member counts by how much it agrees with the others and by how sure it is. As in the released code, the main
member's own values are not filtered, and its weight is at least that of all others together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lm_eval_deepen.relative.average import FLOOR, Agreed, blended
from lm_eval_deepen.relative.support import Split

SHARPNESS = 2.0  # b of the released code's filter


def consistent(reached: Tensor, others: Iterable[Tensor], share: Tensor, parts: Split, *, with_end: bool) -> Agreed:
    """Return the average by consistency given text, normalised; text and end of text are averaged linearly.

    The members' weights are the prior of their weights by consistency. Arguments as `linear`.
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
    return masses.agree(r / r.sum(1, keepdim=True).clamp_min(FLOOR))
