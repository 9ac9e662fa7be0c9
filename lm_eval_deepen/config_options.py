"""Options of a method, weighting or pooling: flat keys checked against the fields of its dataclass."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from lm_eval_deepen.errors import ConfigError, did_you_mean

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}


def option_names(options: type) -> tuple[str, ...]:
    """Return the names of the options: the fields that the constructor takes."""
    return tuple(field.name for field in dataclasses.fields(options) if field.init)


def choose(name: Any, known: Mapping[str, type], kind: str = "method") -> str:
    """Return a method's name, or raise ConfigError with the nearest one and the list."""
    if isinstance(name, str) and name in known:
        return name
    raise ConfigError(
        f"{kind} {name!r} is unknown.{did_you_mean(str(name), known)} "
        f"{kind.capitalize()}s: {', '.join(sorted(known)) or 'none'}"
    )


def build_options(
    method: str, options: type, given: Mapping[str, Any], compat: str | None, kind: str = "method"
) -> dict[str, Any]:
    """Return every option of a method, defaults filled in and types coerced.

    Args:
        method: the method's name, for messages.
        options: its dataclass.
        given: the options given explicitly, all of them fields of `options`.
        compat: name of a profile of ``options.COMPAT`` to expand, or None.
        kind: what it is: a ``method``, ``weighting`` or ``pooling``.

    Raises:
        ConfigError: a wrong type, a missing option, an unknown profile, or an option given
            explicitly that contradicts the profile.
    """
    hints = typing.get_type_hints(options)
    values = {key: coerce(value, hints[key], key) for key, value in given.items()}
    for key, wanted in expand_compat(method, options, compat).items():
        if key in values and values[key] != wanted:
            raise ConfigError(
                f"compat={compat} sets {key}={wanted!r}, but {key}={values[key]!r} is given; "
                f"remove {key}, or remove compat and give the options you want"
            )
        values[key] = wanted
    for field in dataclasses.fields(options):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in values:
            raise ConfigError(f"{kind} {method!r} needs the option {field.name!r}; give {field.name}=...")
    built = options(**values)
    return {key: getattr(built, key) for key in option_names(options)}


def expand_compat(method: str, options: type, compat: str | None) -> Mapping[str, Any]:
    """Return the options that a compatibility profile stands for."""
    if compat is None:
        return {}
    profiles: Mapping[str, Mapping[str, Any]] = getattr(options, "COMPAT", {})
    if compat not in profiles:
        known = f"Profiles: {', '.join(sorted(profiles))}" if profiles else "It has none: remove compat"
        raise ConfigError(
            f"compat {compat!r} is unknown to method {method!r}.{did_you_mean(str(compat), profiles)} {known}"
        )
    return profiles[compat]


def coerce(value: Any, hint: Any, key: str) -> Any:
    """Return `value` as the annotated type of option `key`.

    Numbers arrive in several forms for one meaning: the harness reads ``-1`` as ``-1.0``, and YAML
    reads ``1e-3`` as text. Whatever has one exact reading is taken.

    Raises:
        ConfigError: the value has no exact reading as that type.
        TypeError: the annotation is not one of bool, int, float, str, Literal, None and unions of these, or
            ``tuple[float, ...]``.
    """
    if hint == tuple[float, ...]:
        return _numbers(value, key)
    arms = _arms(hint)
    for arm in arms:
        if arm is type(value) or (_is_literal(arm) and _literal_match(value, arm)):
            return _finite(value, key)
    for arm in arms:
        number = to_number(value) if arm in (int, float) else None
        if number is not None and (arm is float or number.is_integer()):
            return int(number) if arm is int else number
    raise ConfigError(f"{key} must be {_describe(arms)}; got {value!r}.{_nearest(value, arms)}")


MAX_SEED = 2**32 - 1  # numpy takes no larger one


def whole_number(value: Any, key: str, low: int = 0, high: int | None = None) -> int:
    """Return a whole number in a range.

    Raises:
        ConfigError: it is none, or outside.
    """
    found: int = coerce(value, int, key)
    if found < low:
        raise ConfigError(f"{key} must be a whole number of at least {low}; got {value!r}")
    if high is not None and found > high:
        raise ConfigError(f"{key} must be a whole number of at most {high}; got {value!r}")
    return found


def _numbers(value: Any, key: str) -> tuple[float, ...]:
    """Return a list of numbers, ``0.6+0.4`` inline, or one number."""
    parts = re.split(r"(?<![eE])\+", value) if isinstance(value, str) else value  # 1e+0 is one number
    parts = parts if isinstance(parts, (list, tuple)) else [parts]
    found = tuple(number for number in map(to_number, parts) if number is not None)
    if len(found) < len(parts) or not parts:
        raise ConfigError(f"{key} must be a list of finite numbers (inline: 0.6+0.4); got {value!r}.")
    return found


def to_number(value: Any) -> float | None:
    """Return a finite number given as a number or as text, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _arms(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of an annotation."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(arm for part in typing.get_args(hint) for arm in _arms(part))
    if hint not in _WORDS and not _is_literal(hint):
        raise TypeError(
            f"option annotation {hint!r} is not supported; use bool, int, float, str, Literal, None, unions, "
            "tuple[float, ...]"
        )
    return (hint,)


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _literal_match(value: Any, hint: Any) -> bool:
    return any(type(value) is type(word) and value == word for word in typing.get_args(hint))


def _finite(value: Any, key: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number; got {value!r}")
    return value


def _describe(arms: tuple[Any, ...]) -> str:
    words = []
    for arm in arms:
        words += [repr(word) for word in typing.get_args(arm)] if _is_literal(arm) else [_WORDS[arm]]
    return " or ".join(words)


def _nearest(value: Any, arms: tuple[Any, ...]) -> str:
    names = [word for arm in arms if _is_literal(arm) for word in typing.get_args(arm)]
    return did_you_mean(str(value), [name for name in names if isinstance(name, str)])
