"""Weights and temperatures of members."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from lm_eval_deepen.config_options import to_number
from lm_eval_deepen.errors import ConfigError

WEIGHT_TOLERANCE = 1e-4  # of the weights' sum around 1


def parse_temperature(value: Any, name: str) -> float:
    """Return a member's temperature, a finite number above 0."""
    number = to_number(value)
    if number is None or number <= 0:
        raise ConfigError(f"member {name!r}: temperature must be a finite number above 0; got {value!r}")
    return number


def parse_weights(listed: Any, own: Sequence[Any]) -> list[float]:
    """Return the members' weights, summing to 1; uniform where none are given. Arguments as `given_weights`."""
    found = given_weights(listed, own)
    return [1 / len(own)] * len(own) if found is None else found


def given_weights(listed: Any, own: Sequence[Any]) -> list[float] | None:
    """Return the members' weights, summing to 1; None where none are given.

    Args:
        listed: the value of `weights`: a list, ``0.6+0.4`` inline, one number, or None.
        own: the `weight` of each member, None where it has none.
    """
    with_own = [weight is not None for weight in own]
    if listed is not None and any(with_own):
        raise ConfigError("weights and a member's own weight are both given; keep one of the two spellings")
    if listed is None and not any(with_own):
        return None
    if listed is None and not all(with_own):
        missing = ", ".join(f"members[{i}]" for i, has in enumerate(with_own) if not has)
        raise ConfigError(f"weight is missing for {missing}; give every member a weight, or none")
    if isinstance(listed, str):
        listed = re.split(r"(?<![eE])\+", listed)  # 1e+0 is one number
    elif listed is not None and not isinstance(listed, (list, tuple)):
        listed = [listed]
    return check_weights(own if listed is None else listed, len(own))


def check_weights(values: Sequence[Any], count: int) -> list[float]:
    """Return `values` as floats that sum to 1, or raise ConfigError saying which rule they break."""
    if len(values) != count:
        raise ConfigError(f"weights has {len(values)} values for {count} members; give one per member")
    weights = []
    for i, value in enumerate(values):
        number = to_number(value)
        if number is None or number < 0:
            raise ConfigError(f"weights[{i}] must be a finite number, 0 or more; got {value!r}")
        weights.append(number)
    total = math.fsum(weights)
    if total == 0:
        raise ConfigError("weights are all zero; give at least one member a positive weight")
    if abs(total - 1) > WEIGHT_TOLERANCE + 1e-12:
        scaled = "+".join(f"{weight / total:.6g}" for weight in weights)
        raise ConfigError(f"weights sum to {total:.6g}, not to 1 (within {WEIGHT_TOLERANCE}); {scaled} would")
    if abs(total - 1) < 1e-12:
        return weights  # sums to 1 up to rounding: kept as given
    return [weight / total for weight in weights]
