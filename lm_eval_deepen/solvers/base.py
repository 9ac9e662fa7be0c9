"""The plugin interface of solvers: find p' over the main vocabulary whose relative representation p' R is close to r.

A solver is one file in this folder: a class of options, decorated with ``@solver(name, paper=...)``. It is batched over
rows, sees R only as an operator, and keeps no state.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lm_eval_deepen.config.registry import Registry
from lm_eval_deepen.relative.operators import Operator
from lm_eval_deepen.solvers.residual import Inverted


class Solver(Protocol):
    """The options of a solver: a class that derives from `lm_eval_deepen.config.Options`."""

    def solve(self, logp0: Tensor, r: Tensor, op: Operator, reached: Tensor | None = None) -> Inverted:
        """Return the solution of every row.

        Args:
            logp0: log p0 [B, K] of the main member, natural log; ``-inf`` = excluded.
            r: target [B, A], sum 1.
            op: R restricted to the K pieces.
            reached: p0 R [B, A], where it is known.
        """
        ...


SOLVERS = Registry("inverse", "lm_eval_deepen.solvers", "solver", helpers=("base", "residual", "trust"))
solver = SOLVERS.register
