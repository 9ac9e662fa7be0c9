"""What arguments of the command line may be: their ranges, and pairs like NAME=WHERE."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from lm_eval_deepen.errors import ConfigError


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """Parse a whole number of at least 0."""
    return _whole(text, 0)


def _whole(text: str, low: int) -> int:
    value = int(text)
    if value < low:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least {low}")
    return value


def positive(text: str) -> float:
    """Parse a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return value


def pairs(given: Sequence[str], option: str, form: str) -> dict[str, str]:
    """Return values by name of arguments like ``NAME=WHERE``.

    Raises:
        ConfigError: one of another form, or a name that is given twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, _, value = text.partition("=")
        if not (name and value):
            raise ConfigError(f"{option} takes {form}; got {text!r}")
        if name in found:
            raise ConfigError(f"{option} has {name!r} twice ({found[name]!r} and {value!r}); give it once")
        found[name] = value
    return found
