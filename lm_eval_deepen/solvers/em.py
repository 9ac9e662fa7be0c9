"""Expectation maximisation: the mixture-proportion form of the inverse, ``inverse: em``."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from lm_eval_deepen.config import Options
from lm_eval_deepen.relative.operators import Operator
from lm_eval_deepen.solvers.base import Inverted, inverted, solver

# Added to both sides of r / (p R): a ratio of two smaller numbers is rounding, and becomes 1.
SMALLEST = 1e-30


@solver("em")
class ExpectationMaximisation(Options):
    """Options of ``inverse: em``."""

    # 5 steps leave 5e-5 nats of what 200 would gain (SmolLM2-135M and Gemma-3-270M, both orders).
    steps: int = Field(5, ge=1, description="The number of iterations.")

    @torch.no_grad()
    def solve(self, logp0: Tensor, r: Tensor, op: Operator, reached: Tensor | None = None) -> Inverted:
        """Decrease KL(r || p R) over the simplex by p <- p * (R (r / (p R))), starting from p0; see `Solver`.

        Every step is one of expectation maximisation for the proportions of a mixture whose components are the
        rows of R: it is monotone, needs no learning rate, and r = p0 R is a fixed point. A piece with p0 = 0
        keeps 0.
        """
        gain = torch.zeros_like(logp0)  # log(p / p0): pieces whose p underflows keep a finite logp
        target = r + SMALLEST
        for _ in range(self.steps):
            reached = op.project((logp0 + gain).exp()) if reached is None else reached
            gain += op.back(target / (reached + SMALLEST)).clamp_(min=torch.finfo(torch.float32).tiny).log_()
            reached = None
        return inverted(logp0 + gain, r, op)
