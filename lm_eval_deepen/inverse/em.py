"""Expectation maximisation: the mixture-proportion form of the inverse, ``inverse: em``."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_eval_deepen.inverse.residual import Inverted, inverted
from lm_eval_deepen.relative.matrix import Operator

# Anchors that p R reaches with less than this are left alone: the ratio of two such numbers is rounding.
UNREACHED = 1e-30


@torch.no_grad()
def em(logp0: Tensor, r: Tensor, op: Operator, *, steps: int) -> Inverted:
    """Decrease KL(r || p R) over the simplex by p <- p * (R (r / (p R))), starting from p0.

    Every step is one of expectation maximisation for the proportions of a mixture whose components are the
    rows of R: it is monotone, needs no learning rate, and r = p0 R is a fixed point. A piece with p0 = 0
    keeps 0.

    Args:
        logp0: log p0 [B, K], natural log; ``-inf`` = excluded.
        r: target [B, A], sum 1.
        op: R restricted to the K pieces.
        steps: number of iterations.
    """
    gain = torch.zeros_like(logp0)  # log(p / p0): pieces whose p underflows keep a finite logp
    for _ in range(steps):
        reached = op.project((logp0 + gain).exp())  # [B, A]
        known = reached > UNREACHED
        ratio = torch.where(known, r / torch.where(known, reached, 1.0), 1.0)
        gain += op.back(ratio).clamp_(min=torch.finfo(torch.float32).tiny).log_()
    return inverted(logp0 + gain, r, op)
