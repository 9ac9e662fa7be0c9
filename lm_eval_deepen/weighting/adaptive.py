"""Weights in proportion to the members' scores on a development set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.weighting.seam import weighting


@weighting("adaptive", paper="arXiv:2404.12715")
@dataclass(frozen=True)
class Adaptive:
    """Options of ``weighting: adaptive``, DeePEn-Adapt: w_m = s_m / sum of s.

    The paper sets these weights by the members' performance on a development set. That they are in proportion to it is
    a reading: its formula could not be checked, and the released code takes weights from its command line.

    Attributes:
        dev_scores: each member's score on a development set, 0 or more, higher is better; in the order of the
            members. The set must not share documents with the one that is evaluated.
    """

    dev_scores: tuple[float, ...]
    TAKES_WEIGHTS: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "dev_scores", tuple(self.dev_scores))
        if not all(math.isfinite(score) and score >= 0 for score in self.dev_scores):
            raise ConfigError(f"dev_scores must be finite numbers, 0 or more; got {list(self.dev_scores)}")
        if not any(self.dev_scores):
            raise ConfigError(
                f"dev_scores are all zero ({list(self.dev_scores)}), so they weigh nobody; use weighting=uniform"
            )

    def start(self, given: Sequence[float] | None, count: int) -> list[float]:
        """Return the weights.

        Raises:
            ConfigError: another number of scores than of members.
        """
        if len(self.dev_scores) != count:
            raise ConfigError(
                f"dev_scores has {len(self.dev_scores)} values for {count} members; give one per member, in their order"
            )
        total = math.fsum(self.dev_scores)
        return [score / total for score in self.dev_scores]

    def build(self) -> None:
        """Return None: the weights are constant."""
