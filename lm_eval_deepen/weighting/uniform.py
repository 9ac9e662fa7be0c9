"""The same weight for every member."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lm_eval_deepen.config import Options
from lm_eval_deepen.weighting.base import weighting


@weighting("uniform", paper="arXiv:2404.12715")
class Uniform(Options):
    """``weighting: uniform``: 1/M each, DeePEn-Avg of the paper; it has no options."""

    TAKES_WEIGHTS: ClassVar[bool] = False

    def start(self, given: Sequence[float] | None, count: int) -> list[float]:
        """Return equal weights."""
        return [1 / count] * count

    def build(self) -> None:
        """Return None: the weights are constant."""
