"""What a solver returns, and how well its result explains r."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_deepen.relative.matrix import Operator


@dataclass(frozen=True)
class Inverted:
    """A solution per row.

    Attributes:
        logp: log p' [B, K], natural log, rows normalised.
        stats: ``residual_kl`` [B]: KL(r || p' R) in nats over the anchors that p' R reaches;
            ``lost_mass`` [B]: the mass of r on anchors that no piece with probability reaches.
    """

    logp: Tensor
    stats: dict[str, Tensor]


def inverted(logp: Tensor, r: Tensor, op: Operator) -> Inverted:
    """Normalise log p' [B, K] and measure it against r [B, A]."""
    logp = torch.log_softmax(logp, dim=-1)
    reached = op.project(logp.exp())  # [B, A]
    seen = (reached > 0) & (r > 0)
    total = r.sum(-1)
    target = torch.where(seen, r, 0.0)
    mass = target.sum(-1)
    target = target / mass.clamp(min=1e-30)[:, None]
    ratio = torch.where(seen, target / torch.where(seen, reached, 1.0), 1.0)
    residual = (target * torch.where(ratio > 0, ratio, 1.0).log()).sum(-1)
    lost = ((total - mass) / total.clamp(min=1e-30)).clamp(min=0)
    return Inverted(logp, {"residual_kl": residual.clamp(min=0), "lost_mass": lost})
