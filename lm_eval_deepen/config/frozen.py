"""Plain data that cannot change: hashable, with one JSON form."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import CoreSchema, core_schema

from lm_eval_deepen.errors import ConfigError


class FrozenDict(Mapping[str, Any]):
    """A hashable mapping, sorted by key, whose values are frozen as well."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        """Freeze a copy of `items`; raises ConfigError as `freeze` does."""
        items = items or {}
        for key in items:
            if not isinstance(key, str):
                raise ConfigError(f"key {key!r} of {dict(items)!r} is not text; quote it")
        self._items = {key: freeze(value) for key, value in sorted(items.items())}

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return f"FrozenDict({self._items!r})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls._of)

    @classmethod
    def _of(cls, value: Any) -> FrozenDict:
        if not isinstance(value, Mapping):
            raise ValueError("no mapping")
        return value if isinstance(value, cls) else cls(value)


def freeze(value: Any) -> Any:
    """Return a hashable copy of plain data: mappings, sequences, text, numbers, booleans, None.

    Paths become text, and a torch dtype its name, which is how the harness spells them.

    Raises:
        ConfigError: for any other object, which has no stable fingerprint.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return FrozenDict(value)
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if str(value).startswith("torch."):
        return str(value).removeprefix("torch.")
    raise ConfigError(
        f"a value of type {type(value).__name__} ({str(value)[:60]!r}) cannot be part of a configuration; "
        "give text, numbers, true/false, lists or mappings of these"
    )


def thaw(value: Any) -> Any:
    """Return frozen data as plain dicts and lists."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    return value
