"""Mirror descent with long steps, ``inverse: mirror``."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lm_eval_deepen.config import Options
from lm_eval_deepen.relative.operators import Operator
from lm_eval_deepen.solvers.base import Inverted, inverted, solver
from lm_eval_deepen.solvers.em import SMALLEST


@solver("mirror")
class Mirror(Options):
    """Options of ``inverse: mirror``."""

    steps: int = Field(5, ge=1, description="The number of iterations.")
    learning_rate: float = Field(1.7, ge=0, description="The exponent of a step: 1 is `em`, a larger one goes further.")

    @torch.no_grad()
    def solve(self, logp0: Tensor, r: Tensor, op: Operator, reached: Tensor | None = None) -> Inverted:
        """Search min KL(r || p R) over the simplex by p <- p * (R (r / (p R))) ** learning_rate, normalised.

        A step of 1 is `em`, which is safe and short; longer ones reach further where rows overlap. r = p0 R is a fixed
        point, and a piece with p0 = 0 keeps 0. Arguments as of `Solver`.
        """
        gain = torch.zeros_like(logp0)  # log(p / p0) up to a constant: pieces whose p underflows keep a finite logp
        target = r + SMALLEST
        for _ in range(self.steps):
            if reached is None:
                logp = logp0 + gain
                reached = op.project((logp - torch.logsumexp(logp, dim=-1, keepdim=True)).exp())
            back = op.back(target / (reached + SMALLEST)).clamp_(min=torch.finfo(torch.float32).tiny)
            gain.add_(back.log_(), alpha=self.learning_rate)
            reached = None
        return inverted(logp0 + gain, r, op)
