"""Describes a field to people: its values and its default, for error messages, lists and docs."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple[float, ...]: "a list of finite numbers (inline: 0.6+0.4)",
    tuple[str, ...]: "a name or a list of names",
}


@dataclass(frozen=True)
class Shown:
    """Says of a field what its annotation does not say, as in ``Annotated[int | None, Shown(default="5")]``."""

    allowed: str = ""  # the values it takes, as the end of "KEY must be ..."
    default: str = ""  # what holds where the field is not given, and itself holds None
    remedy: str = ""  # what to do where it holds something else, for error messages


def _named(names: tuple[str, ...]) -> tuple[str, ...]:
    if not all(names):
        raise ValueError(names)
    return names


Names = Annotated[tuple[str, ...], AfterValidator(_named)]  # none of them empty; a single one need be no list


@dataclass(frozen=True, eq=False)
class Choice:
    """One of some names that are not known before the program runs, as in ``Annotated[str, Choice(SOLVERS)]``."""

    names: Iterable[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        if name not in set(self.names):
            raise ValueError  # without the name: pydantic cannot hold half of a surrogate pair
        return name


def arms(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of an annotation; what is annotated stands for itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(arm for part in typing.get_args(annotation) for arm in arms(part))
    if typing.get_origin(annotation) is typing.Annotated:
        choices = [extra for extra in annotation.__metadata__ if isinstance(extra, Choice)]
        return tuple(choices) or arms(annotation.__origin__)
    return (annotation,)


def choices(field: FieldInfo) -> list[str]:
    """Return the names that a field takes; none where it takes other values."""
    words: list[str] = []
    for arm in _arms_of(field):
        if isinstance(arm, Choice):
            words += arm.names
        elif typing.get_origin(arm) is typing.Literal:
            words += [word for word in typing.get_args(arm) if isinstance(word, str)]
    return words


def allowed(field: FieldInfo) -> str:
    """Return the values that a field takes, as the end of a sentence: "a whole number of at least 1 or 'full'"."""
    said = [extra.allowed for extra in field.metadata if isinstance(extra, Shown) and extra.allowed]
    if said:
        return said[0]
    words: list[str] = []
    for arm in _arms_of(field):
        if arm is type(None):
            continue
        if isinstance(arm, Choice):
            words += map(repr, arm.names)
        elif typing.get_origin(arm) is typing.Literal:
            words += map(repr, typing.get_args(arm))
        elif arm in (int, float):
            words.append(_WORDS[arm] + _range(field.metadata))
        else:
            kind = typing.get_origin(arm) or arm
            is_mapping = isinstance(kind, type) and (issubclass(kind, Mapping) or hasattr(kind, "model_fields"))
            words.append(_WORDS.get(arm) or ("a mapping" if is_mapping else "a list"))
    return ", ".join(words[:-2] + [" or ".join(words[-2:])])


def remedy(field: FieldInfo) -> str:
    """Return what to do where a field holds a value that it does not take; empty where that is plain."""
    return next((extra.remedy for extra in field.metadata if isinstance(extra, Shown) and extra.remedy), "")


def default(field: FieldInfo) -> str:
    """Return the default that takes effect, as it is written; empty where there is none."""
    if field.is_required():
        return "required"
    shown = [extra.default for extra in field.metadata if isinstance(extra, Shown) and extra.default]
    value = field.get_default(call_default_factory=True)
    if shown or value is None or value == {} or value == () or hasattr(value, "model_fields_set"):
        return shown[0] if shown else ""
    if isinstance(value, tuple):
        return str(list(value))
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def _arms_of(field: FieldInfo) -> tuple[Any, ...]:
    """Return a field's alternatives; pydantic takes the outermost annotation of a field apart."""
    whole = tuple(extra for extra in field.metadata if isinstance(extra, Choice))
    return whole or arms(field.annotation)


def _range(metadata: Iterable[Any]) -> str:
    """Return the range of a number, as what follows "a number"."""
    bounds = {
        name: getattr(extra, name) for extra in metadata for name in ("ge", "gt", "le", "lt") if hasattr(extra, name)
    }
    ge, gt, le, lt = (None if name not in bounds else str(bounds[name]) for name in ("ge", "gt", "le", "lt"))
    if ge and le:
        return f" from {ge} to {le}"
    if gt and lt:
        return f" between {gt} and {lt}"
    low = f" of at least {ge}" if ge else f" above {gt}" if gt else ""
    high = f"up to {le}" if le else f"below {lt}" if lt else ""
    return f"{low}{' and ' if low and high else ' ' if high else ''}{high}"
