"""Weights of a step: a surer member gets more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lm_eval_deepen.weighting.base import Weighting, weighting


@weighting("confidence", paper="none")
class Confidence(Weighting):
    """Options of ``weighting: confidence``: w_m(x) is proportional to w_m exp(-H(p_m(. | x)) / temperature).

    H is the entropy of the member's whole next-token distribution, in nats. The configured weights are the prior.
    """

    entropy_temperature: float = Field(
        1.0, gt=0, description="The entropies are divided by it. A large value gives nearly the configured weights."
    )
    TAKES_WEIGHTS: ClassVar[bool] = True
    reads_steps: ClassVar[bool] = True

    @torch.no_grad()
    def weights(self, logp: Sequence[Tensor], base: Tensor) -> Tensor:
        """Return the weights [B, M]; see `weighting.base`."""
        entropies = []
        for m, rows in enumerate(logp):
            rows = torch.where(base[:, m, None] > 0, rows.float(), 0.0)  # whatever is in a row that is not used
            entropies.append(-torch.where(rows == -torch.inf, 0.0, rows.exp() * rows).sum(1))
        entropy = torch.where(base > 0, torch.stack(entropies, dim=1).to(base), torch.inf)
        above = entropy - entropy.amin(1, keepdim=True)  # a tiny temperature makes large ones infinite, but not all
        return torch.softmax(base.log() - above / self.entropy_temperature, dim=1)
