"""Weights in proportion to the members' scores on a development set."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field, field_validator

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.weighting.base import Weighting, weighting


@weighting("adaptive", paper="arXiv:2404.12715")
class Adaptive(Weighting):
    """Options of ``weighting: adaptive``, DeePEn-Adapt: w_m = s_m / sum of s.

    The paper sets these weights by the members' performance on a development set. That they are in proportion to it is
    a reading: its formula could not be checked, and the released code takes weights from its command line.
    """

    dev_scores: tuple[float, ...] = Field(
        min_length=1,
        description="Each member's score on a development set, 0 or more, higher is better, in the order of the "
        "members. The set must not share documents with the one that is evaluated.",
    )

    @field_validator("dev_scores")
    @classmethod
    def _weigh_somebody(cls, scores: tuple[float, ...]) -> tuple[float, ...]:
        if min(scores) < 0 or not math.isfinite(sum(scores)):
            raise ConfigError(
                f"dev_scores must be numbers of 0 or more with a finite sum; got {list(scores)}", key="dev_scores"
            )
        if not any(scores):
            raise ConfigError(
                f"dev_scores are all zero ({list(scores)}), so they weigh nobody; use weighting=uniform",
                key="dev_scores",
            )
        return scores

    def start(self, given: Sequence[float] | None, count: int) -> list[float]:
        """Return the weights.

        Raises:
            ConfigError: another number of scores than of members.
        """
        if len(self.dev_scores) != count:
            raise ConfigError(
                f"dev_scores has {len(self.dev_scores)} values for {count} members; give one per member, in their "
                "order",
                key="dev_scores",
            )
        total = math.fsum(self.dev_scores)
        return [score / total for score in self.dev_scores]
