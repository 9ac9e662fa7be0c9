"""Inverse solvers: find p' over the main vocabulary whose relative representation p' R is close to r.

Each is a pure function batched over rows that sees R only as an operator, and keeps no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lm_eval_deepen.errors import ConfigError, did_you_mean
from lm_eval_deepen.inverse.adamw import adamw
from lm_eval_deepen.inverse.em import em
from lm_eval_deepen.inverse.exact import exact
from lm_eval_deepen.inverse.mirror import mirror
from lm_eval_deepen.inverse.residual import Inverted
from lm_eval_deepen.relative.matrix import Operator

__all__ = ["SOLVERS", "Inverted", "Solver", "adamw", "em", "exact", "get_solver", "mirror"]


@dataclass(frozen=True)
class Solver:
    """A named solver and its defaults.

    Attributes:
        name: the value of the option ``inverse``.
        steps: iterations where the option ``steps`` is not given.
        learning_rate: its default, or None where the solver takes none.
        run: ``run(logp0 [B, K], r [B, A], op, steps, learning_rate, reached) -> Inverted``, where ``reached`` is
            p0 R [B, A] or None.
    """

    name: str
    steps: int
    learning_rate: float | None
    run: Run


class Run(Protocol):
    """How a solver is called."""

    def __call__(
        self, logp0: Tensor, r: Tensor, op: Operator, steps: int, learning_rate: float, reached: Tensor | None = None
    ) -> Inverted:
        """Return the solution; see `Solver`."""
        ...


def _run_em(
    logp0: Tensor, r: Tensor, op: Operator, steps: int, learning_rate: float, reached: Tensor | None = None
) -> Inverted:
    return em(logp0, r, op, steps=steps, reached=reached)


def _run_adamw(
    logp0: Tensor, r: Tensor, op: Operator, steps: int, learning_rate: float, reached: Tensor | None = None
) -> Inverted:
    return adamw(logp0, r, op, steps=steps, learning_rate=learning_rate)


def _run_exact(
    logp0: Tensor, r: Tensor, op: Operator, steps: int, learning_rate: float, reached: Tensor | None = None
) -> Inverted:
    return exact(logp0, r, op, reached=reached)


def _run_mirror(
    logp0: Tensor, r: Tensor, op: Operator, steps: int, learning_rate: float, reached: Tensor | None = None
) -> Inverted:
    return mirror(logp0, r, op, steps=steps, learning_rate=learning_rate, reached=reached)


SOLVERS: dict[str, Solver] = {
    # 5 steps leave 5e-5 nats of what 200 would gain (SmolLM2-135M and Gemma-3-270M, both orders).
    "em": Solver("em", 5, None, _run_em),
    "exact": Solver("exact", 1, None, _run_exact),
    "mirror": Solver("mirror", 5, 1.7, _run_mirror),
    "adamw": Solver("adamw", 5, 0.15, _run_adamw),
}


def get_solver(name: str) -> Solver:
    """Return the solver called `name`; ConfigError with the nearest name otherwise."""
    if name not in SOLVERS:
        raise ConfigError(
            f"inverse: unknown value {name!r}.{did_you_mean(str(name), SOLVERS)} Known: {', '.join(SOLVERS)}."
        )
    return SOLVERS[name]
