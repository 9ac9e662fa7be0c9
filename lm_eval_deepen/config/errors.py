"""Turns pydantic's errors into messages for people: the key, what was got, what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from lm_eval_deepen.config.describe import allowed, choices, remedy
from lm_eval_deepen.errors import ConfigError, Problem, did_you_mean

_SHOWN = 200  # characters of a value


def explain(error: ValidationError, fields: Mapping[str, FieldInfo], given: Mapping[str, Any]) -> list[Problem]:
    """Return everything that a model refused, each key once."""
    by_key: dict[str, list[Problem]] = {}
    for one in error.errors(include_url=False, include_input=False):
        key, cause = str(one["loc"][0]) if one["loc"] else "", one.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            own = [one if one.key or not key else replace(one, key=key, where=(key,)) for one in cause.problems]
            by_key.setdefault(key, []).extend(own)
        elif one["type"] == "extra_forbidden":
            by_key[key] = [unknown_key(key, fields)]
        elif one["type"] == "missing":
            by_key[key] = [Problem(f"{key} is missing; it must be {allowed(fields[key])}", key, "missing")]
        elif key in fields:
            by_key.setdefault(key, [wrong_value(key, fields[key], given.get(key))])
        else:
            by_key.setdefault(key, []).append(Problem(one["msg"], key, "value"))
    return [problem for problems in by_key.values() for problem in problems]


def wrong_value(key: str, field: FieldInfo, got: Any) -> Problem:
    """Return what is said about a value that a field does not take."""
    near, wanted = did_you_mean(str(got), choices(field)), allowed(field)
    if isinstance(got, float) and not math.isfinite(got):
        wanted = wanted.replace("a number", "a finite number")
    hint = f" ({remedy(field)})" if remedy(field) else ""
    return Problem(f"{key} must be {wanted}; got {shown(got)}{hint}.{near}", key, "value")


def unknown_key(key: Any, known: Iterable[str], remedy: str = "") -> Problem:
    """Return what is said about a key that nobody takes, with the nearest one."""
    names = sorted(known)
    near = did_you_mean(str(key), names)
    return Problem(f"unknown key {key!r}.{near} {remedy or 'Keys: ' + ', '.join(names)}", str(key), "unknown_key")


def unknown_name(kind: str, name: Any, known: Iterable[str]) -> Problem:
    """Return what is said about a name that nothing of a kind has, with the nearest one."""
    names = sorted(known)
    near = did_you_mean(str(name), names)
    plural = f"{kind.capitalize()}s: {', '.join(names) or 'none'}"
    return Problem(f"{kind} {name!r} is unknown.{near} {plural}", kind, "unknown_name")


def shown(value: Any) -> str:
    """Return a value as it was written, cut where it is long; what no configuration can hold, by its type alone."""
    if value is not None and not isinstance(value, (str, bool, int, float, list, tuple, Mapping)):
        return f"an object of type {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def conflict(key: str, message: str) -> ConfigError:
    """Return the error of a key that cannot be honoured beside another one."""
    return ConfigError(message, key=key, code="conflict")


def misplaced(key: str, message: str) -> ConfigError:
    """Return the error of a key that belongs somewhere else."""
    return ConfigError(message, key=key, code="misplaced")


def bad_value(key: str, message: str) -> ConfigError:
    """Return the error of a value that a key does not take."""
    return ConfigError(message, key=key, code="value")
