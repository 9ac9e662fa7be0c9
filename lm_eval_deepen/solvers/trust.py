"""A trust region around the main member's distribution."""

from __future__ import annotations

import torch
from torch import Tensor

HALVINGS = 12  # the step is found to 1 part in 4,096


def within(logp0: Tensor, logp: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Go from p0 towards p only as far as KL(p' || p0) <= radius, along p' ~ p0^(1 - t) p^t.

    What a small learning rate does to the published search, made explicit: the result stays near the main member
    however far the inverse would go.

    Args:
        logp0: the main member's log-probabilities [B, K]; ``-inf`` = excluded.
        logp: the solver's [B, K].
        radius: in nats.

    Returns:
        Log-probabilities [B, K] and 1 - t [B]: 0 where the region was not left.
    """
    gain = torch.where(logp0 == float("-inf"), 0.0, logp - logp0)

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        moved = logp0 + t[:, None] * gain
        norm = torch.logsumexp(moved, dim=1, keepdim=True)
        moved = moved - norm
        return moved, t * (moved.exp() * gain).sum(1) - norm[:, 0]

    low, high = torch.zeros_like(logp[:, 0]), torch.ones_like(logp[:, 0])
    inside = at(high)[1] <= radius
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        near = at(middle)[1] <= radius
        low, high = torch.where(near, middle, low), torch.where(near, high, middle)
    t = torch.where(inside, 1.0, low)
    return torch.where(inside[:, None], logp, at(t)[0]), 1 - t
