"""What a solver returns, and how well its result explains r."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_deepen.relative.operators import Operator


@dataclass(frozen=True)
class Inverted:
    """A solution per row."""

    logp: Tensor  # log p' [B, K], natural log, rows normalised
    # ``residual_kl`` [B]: KL(r || p' R) in nats over the anchors that p' R reaches; ``lost_mass`` [B]: the mass of r on
    # anchors that no piece with probability reaches
    stats: dict[str, Tensor]


def inverted(logp: Tensor, r: Tensor, op: Operator) -> Inverted:
    """Normalise log p' [B, K] and measure it against r [B, A]."""
    # torch's fp32 log_softmax is off by 5e-5 on rows of 262k pieces; logsumexp is not.
    logp = logp - torch.logsumexp(logp, dim=-1, keepdim=True)
    reached = op.project(logp.exp())  # [B, A]
    smallest = torch.finfo(torch.float32).tiny
    target = r * (reached > 0)  # not normalised: sum_a (t/m) log((t/m) / q) = sum_a t log(t/q) / m - log m
    total, mass = r.sum(-1), target.sum(-1).clamp(min=smallest)
    ratio = target.clamp(min=smallest).div_(reached.clamp_(min=smallest)).log_()  # finite: times t = 0 it is 0
    residual = target.mul_(ratio).sum(-1) / mass - mass.log()
    lost = 1 - mass / total.clamp(min=smallest)
    return Inverted(logp, {"residual_kl": residual.clamp(min=0), "lost_mass": lost.clamp(min=0)})
