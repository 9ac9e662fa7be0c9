"""The plugin interface of solvers: find p' over the main vocabulary whose relative representation p' R is close to r.

A solver is one file in this folder: a class of options, decorated with ``@solver(name, paper=...)``. It is batched over
rows, sees R only as an operator, and keeps no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lm_eval_deepen.config.registry import Registry
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


SOLVERS = Registry("inverse", "lm_eval_deepen.solvers", "solver", helpers=("base", "trust"))
solver = SOLVERS.register
