"""The inverse for one-hot rows, in closed form, ``inverse: exact``."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_eval_deepen.config import Options
from lm_eval_deepen.relative.operators import Operator
from lm_eval_deepen.solvers.base import Inverted, solver
from lm_eval_deepen.solvers.em import SMALLEST

LITTLE = 1e-3  # where p0 reaches less of r, what underflows in p0 R is not normalised: that would have no bound
UNDERFLOWS = torch.finfo(torch.float32).tiny


def exact_gain(r: Tensor, reached: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(r / p0 R) of every anchor [B, A], normalised over those that p0 reaches, and the mass of r elsewhere.

    Args:
        r: target [B, A], sum 1.
        reached: p0 R [B, A].
    """
    ratio = (r + SMALLEST).div_(reached + SMALLEST)
    mass = (ratio * reached).sum(1).clamp(min=SMALLEST)  # of r on anchors that p0 reaches
    lost = (1 - mass / r.sum(1).clamp(min=SMALLEST)).clamp(min=0)
    if bool((few := mass < LITTLE).any()):
        underflows = reached < UNDERFLOWS
        mass = torch.where(few, (ratio * reached.masked_fill(underflows, 0.0)).sum(1).clamp(min=SMALLEST), mass)
        ratio = torch.where(few[:, None] & underflows, ratio * mass[:, None], ratio)
    return ratio.div_(mass[:, None]).log_(), lost


@solver("exact")
class Exact(Options):
    """``inverse: exact``; it has no options."""

    @torch.no_grad()
    def solve(self, logp0: Tensor, r: Tensor, op: Operator, reached: Tensor | None = None) -> Inverted:
        """Return p'(w) = p0(w) r_a / (p0 R)_a, a being the one anchor of w: p' R = r, and nothing else changes.

        Where p0 does not reach an anchor (p0 R = 0), no p' does: r is first normalised over those that it reaches.
        It is what one step of `em` gives on such rows, without a search and without measuring what it left. Arguments
        as of `Solver`; each row of R has a single 1.
        """
        gain, lost = exact_gain(r, op.project(logp0.exp()) if reached is None else reached)
        return Inverted(logp0 + op.back(gain), {"residual_kl": torch.zeros_like(lost), "lost_mass": lost})
