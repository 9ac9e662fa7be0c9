"""The base class of all configuration: typed keys, each with its range, default and meaning beside it.

A value has one exact reading, or it is refused: ``5.0`` and ``"5"`` are whole numbers (the harness reads ``-1`` as
``-1.0``, YAML reads ``1e-3`` as text), ``true`` is no number, ``1`` is no truth value, ``3`` is no text.
"""

from __future__ import annotations

import math
import os
import re
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from typing_extensions import Self

from lm_eval_deepen.config.describe import arms
from lm_eval_deepen.config.errors import explain, shown, unknown_key
from lm_eval_deepen.config.frozen import thaw
from lm_eval_deepen.errors import ConfigError, Problem, Problems, did_you_mean


class Keys(BaseModel):
    """Keys that a person may give; ConfigError names everything that is wrong with those given."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )

    def __init__(self, /, **given: Any) -> None:
        """Check the keys.

        Raises:
            ConfigError: unknown or missing keys, and values out of range, all of them.
        """
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise ConfigError(*explain(error, type(self).model_fields, given)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _exact(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return exact(value, cls.model_fields[info.field_name].annotation, info.field_name)

    @classmethod
    def read(cls, raw: Any, what: str = "this") -> Self:
        """Return the keys of a mapping as it was read from a file; a key with the value None is not given.

        Raises:
            ConfigError: no mapping; else as the class itself.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{what} must be a mapping with {', '.join(cls.names())}; got {shown(raw)}", code="value")
        if odd := [key for key in raw if not isinstance(key, str)]:
            raise ConfigError(*(unknown_key(key, cls.names()) for key in odd))
        return cls(**given(raw))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the keys."""
        return tuple(cls.model_fields)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values, which are not checked."""
        changed = self.model_copy(update=changes)
        for cached in changed.__dict__.keys() - type(self).model_fields.keys():  # of cached properties
            del changed.__dict__[cached]
        return changed

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain data."""
        return {name: _plain(getattr(self, name)) for name in self.names()}


class Options(Keys):
    """The options of a fusion method, weighting, pooling or solver; what it does stands in the same class.

    Attributes:
        KIND: what it is, as ``method``.
        NAME: its name in a configuration. Both are set where it is registered.
        COMPAT: options by the name of a profile, as ``compat: reference`` of a configuration asks for them.
    """

    KIND: ClassVar[str] = ""
    NAME: ClassVar[str] = ""
    COMPAT: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def check_members(self, count: int, method: Any) -> None:
        """Refuse what does not fit so many members, under the options of a method, before any of them is loaded.

        Raises:
            ConfigError: a list with another length.
        """

    @classmethod
    def parse(cls, options: Mapping[str, Any], compat: str | None = None) -> Self:
        """Return the options that are given over those of a profile.

        Raises:
            ConfigError: an unknown profile, or an option given that contradicts it; else as the class itself.
        """
        implied = cls.profile(compat)
        problems = Problems()
        for key in filter(options.__contains__, implied):
            value = exact(options[key], cls.model_fields[key].annotation, key)
            if value != implied[key]:
                problems.add(
                    f"compat={compat} sets {key}={implied[key]!r}, but {key}={value!r} is given; remove {key}, or "
                    "remove compat and give the options you want",
                    key, "conflict",
                )  # fmt: skip
        problems.refuse()
        try:
            return cls(**{**implied, **options})
        except ConfigError as error:
            raise ConfigError(*(cls._needs(problem) for problem in error.problems)) from None

    @classmethod
    def covers(cls, given: Mapping[str, Any]) -> bool:
        """Return whether a method reads covers unless told otherwise, under the options that are given."""
        return False

    def identity(self) -> dict[str, Any]:
        """Return what decides results: the options as plain data; the content of a file stands for its name."""
        return self.to_dict()

    @property
    def uses_fused(self) -> bool:
        """Whether a pooling needs the step-fused ensemble, to answer beside the members or to score their answers."""
        return bool(getattr(self, "with_fused", False) or getattr(self, "SCORES_TEXTS", False))

    @classmethod
    def learns(cls, given: Mapping[str, Any]) -> bool:
        """Return whether a method's weights learn from the text unless told otherwise, under the options given."""
        return False

    @classmethod
    def profile(cls, compat: str | None) -> Mapping[str, Any]:
        """Return the options that a profile stands for."""
        if compat is None or compat in cls.COMPAT:
            return cls.COMPAT[compat] if compat else {}
        known = f"Profiles: {', '.join(cls.COMPAT)}" if cls.COMPAT else "It has none: remove compat"
        near = did_you_mean(compat, cls.COMPAT)
        raise ConfigError(
            f"compat {compat!r} is unknown to {cls.KIND} {cls.NAME!r}.{near} {known}", key="compat", code="unknown_name"
        )

    @classmethod
    def _needs(cls, problem: Problem) -> Problem:
        if problem.code != "missing":
            return problem
        message = f"{cls.KIND} {cls.NAME!r} needs the option {problem.key!r}; give {problem.key}=..."
        return Problem(message, problem.key, problem.code)


def exact(value: Any, annotation: Any, key: str) -> Any:
    """Return a value as the one type of an annotation that it can be read as, else unchanged."""
    types = arms(annotation)
    named = [name for arm in types if typing.get_origin(arm) is typing.Literal for name in typing.get_args(arm)]
    if type(value) in types or (isinstance(value, str) and value in named):
        return value
    if isinstance(value, os.PathLike) and str in types:
        return os.fspath(value)
    for arm in types:
        if isinstance(arm, type) and issubclass(arm, Keys) and not isinstance(value, arm):
            try:
                return arm.read(value, key)
            except ConfigError as error:
                raise (error.within(key) if isinstance(value, Mapping) else error).beneath(key) from None
        if typing.get_origin(arm) is tuple:
            item = typing.get_args(arm)[0]
            if item is float:
                value = split_numbers(value)
            elif isinstance(value, (str, int, float, os.PathLike)) and not isinstance(value, bool):
                value = [value]
            if not isinstance(value, (list, tuple)):
                return value
            problems, items = Problems(), []
            for i, one in enumerate(value):
                with problems.collected():
                    items.append(exact(one, item, f"{key}[{i}]"))
            problems.refuse()
            return tuple(items)
    number = to_number(value)
    if number is not None and int in types and number.is_integer():
        return int(number)
    return number if number is not None and float in types else value


def given(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that have a value; None stands for "not given"."""
    return {key: value for key, value in raw.items() if value is not None}


def to_number(value: Any) -> float | None:
    """Return a finite number given as a number or as text, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def split_numbers(value: Any) -> list[Any]:
    """Return a list of numbers as one: ``0.6+0.4`` inline, a single number, or a list; ``1e+0`` is one number."""
    parts = re.split(r"(?<![eE])\+", value) if isinstance(value, str) else value
    return list(parts) if isinstance(parts, (list, tuple)) else [parts]


def _plain(value: Any) -> Any:
    if isinstance(value, Keys):
        return value.to_dict()
    return [_plain(one) for one in value] if isinstance(value, tuple) else thaw(value)
