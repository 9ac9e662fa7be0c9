"""The weights of an ensemble's members: given beside them, or each with its member, or made by a weighting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lm_eval_deepen.config.errors import bad_value, conflict, shown
from lm_eval_deepen.config.keys import split_numbers, to_number

TOLERANCE = 1e-4  # of the weights' sum around 1


def member_weights(listed: Any, own: Sequence[float | None], weighting: Any) -> list[float]:
    """Return the members' weights, summing to 1: as the weighting says, else those given, else equal ones.

    Args:
        listed: the value of `weights`: a list, ``0.6+0.4`` inline, one number, or None.
        own: the `weight` of each member, None where it has none.
        weighting: its options; None where there is none.
    """
    given, count = _given(listed, own), len(own)
    if weighting is None:
        return [1 / count] * count if given is None else given
    if given is not None and not weighting.TAKES_WEIGHTS:
        raise conflict(
            "weights",
            f"weights are given, but weighting={weighting.NAME} computes them; remove the weights, or remove weighting",
        )
    weights = weighting.start(given, count)
    numbers = [to_number(weight) for weight in weights] if isinstance(weights, (list, tuple)) else []
    known = [number for number in numbers if number is not None and number >= 0]
    if len(known) != count or len(numbers) != count or abs(math.fsum(known) - 1) > TOLERANCE:
        raise bad_value(
            "weighting",
            f"weighting={weighting.NAME} starts from the weights {shown(weights)} of {count} members; start must give "
            "one each, 0 or more, that sum to 1",
        )
    return list(weights)


def _given(listed: Any, own: Sequence[float | None]) -> list[float] | None:
    """Return the weights that are given, in one of two spellings; None where there are none."""
    missing = [f"members[{i}]" for i, weight in enumerate(own) if weight is None]
    if listed is None and len(missing) == len(own):
        return None
    if listed is None and missing:
        raise bad_value("weights", f"weight is missing for {', '.join(missing)}; give every member a weight, or none")
    if listed is not None and len(missing) < len(own):
        raise bad_value("weights", "weights and a member's own weight are both given; keep one of the two spellings")
    values = own if listed is None else split_numbers(listed)
    if not isinstance(listed, (list, tuple, str, float, int, type(None))) or (
        isinstance(listed, str) and "," in listed
    ):
        raise bad_value("weights", f"weights must be a list of numbers, or 0.6+0.4 inline; got {shown(listed)}")
    weights = []
    for i, value in enumerate(values):
        number = to_number(value)
        if number is None or number < 0:
            raise bad_value("weights", f"weights[{i}] must be a finite number, 0 or more; got {value!r}")
        weights.append(number)
    if len(values) != len(own):
        raise bad_value("weights", f"weights has {len(values)} values for {len(own)} members; give one per member")
    if not math.isfinite(sum(weights)):
        raise bad_value("weights", "the sum of the weights is infinite; give smaller numbers")
    total = math.fsum(weights)
    if total == 0:
        raise bad_value("weights", "weights are all zero; give at least one member a positive weight")
    if abs(total - 1) > TOLERANCE + 1e-12:
        scaled = "+".join(f"{weight / total:.6g}" for weight in weights)
        said = f"weights sum to {total:.6g}, not to 1 (within {TOLERANCE}); {scaled} would"
        raise bad_value("weights", said)
    if abs(total - 1) < 1e-12:
        return weights  # sums to 1 up to rounding: kept as given
    return [weight / total for weight in weights]
