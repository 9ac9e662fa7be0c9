"""The weights that are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.weighting.base import Weighting, weighting


@weighting("explicit", paper="none")
class Explicit(Weighting):
    """``weighting: explicit``: the weights given, and they must be given; it has no options."""

    TAKES_WEIGHTS: ClassVar[bool] = True

    def start(self, given: Sequence[float] | None, count: int) -> list[float]:
        """Return the weights given.

        Raises:
            ConfigError: there are none.
        """
        if given is None:
            raise ConfigError(
                f"weighting=explicit needs weights for {count} members, and none are given; give weights=..., or "
                "use weighting=uniform",
                key="weights",
                code="missing",
            )
        return super().start(given, count)
