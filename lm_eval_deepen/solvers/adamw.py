"""The published search: AdamW on the logits of the main member, ``inverse: adamw``."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from lm_eval_deepen.config import Options
from lm_eval_deepen.relative.operators import Operator
from lm_eval_deepen.solvers.base import Inverted, inverted, solver

BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.01
T_MAX = 10  # half a period of the cosine schedule, in steps
ETA_MIN = 0.25  # smallest learning rate of the schedule, as a share of the first


def schedule(learning_rate: float, step: int) -> float:
    """Return the learning rate of step 0, 1, ...: torch's CosineAnnealingLR in closed form."""
    low = learning_rate * ETA_MIN
    return low + (learning_rate - low) * (1 + math.cos(math.pi * step / T_MAX)) / 2


def gradient(logits: Tensor, r: Tensor, op: Operator) -> Tensor:
    """Return the gradient [B, K] of sum_a r_a (log r_a - log (p R)_a) / |A| with respect to the logits of p.

    dL/dz = (p / |A|) * (sum(r) - R (r / (p R))), with r / (p R) := 0 where p R underflows: it would be infinite.
    A is the full number of anchors, whatever the rows of R hold: eps makes the result depend on it.
    """
    p = torch.softmax(logits, dim=-1)
    reached = op.project(p)
    known = reached >= torch.finfo(reached.dtype).tiny
    ratio = torch.where(known, r / torch.where(known, reached, 1.0), 0.0)
    return (p / op.num_anchors) * (r.sum(-1, keepdim=True) - op.back(ratio))


@solver("adamw", paper="arXiv:2404.12715")
class AdamW(Options):
    """Options of ``inverse: adamw``."""

    steps: int = Field(5, ge=1, description="The number of iterations.")
    learning_rate: float = Field(0.15, ge=0, description="The first learning rate of the cosine schedule.")

    @torch.no_grad()
    def solve(self, logp0: Tensor, r: Tensor, op: Operator, reached: Tensor | None = None) -> Inverted:
        """Search log p' by AdamW from the logits logp0, as the published code does (DeePEn, section 3.4).

        Starting from log-probabilities instead of logits changes the result by a constant per row, which the
        normalisation removes. Identical members are not a fixed point: Adam divides rounding by its own size,
        and weight decay tempers. Arguments as of `Solver`; `reached` is not used.
        """
        logits = logp0.clone()
        mean, square = torch.zeros_like(logits), torch.zeros_like(logits)
        for step in range(self.steps):
            rate = schedule(self.learning_rate, step)
            grad = gradient(logits, r, op)
            logits *= 1 - rate * WEIGHT_DECAY
            mean.lerp_(grad, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            denominator = square.sqrt().div_(math.sqrt(1 - BETAS[1] ** (step + 1))).add_(EPS)
            logits.addcdiv_(mean, denominator, value=-rate / (1 - BETAS[0] ** (step + 1)))
        return inverted(logits, r, op)
