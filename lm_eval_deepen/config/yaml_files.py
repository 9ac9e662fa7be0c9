"""Reads YAML and JSON configurations. Ambiguous or endless input is refused, with its line."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lm_eval_deepen.errors import ConfigError, StorageError
from lm_eval_deepen.storage import decoded, reason

MAX_BYTES = 1_000_000
MAX_DEPTH = 50  # of lists and mappings in each other
MAX_ALIASED = 10_000  # values that all aliases together stand for

_QUOTE = "put it in quotes where it is a text"
_NOT_JSON = {
    "timestamp": "a date",
    "binary": "binary",
    "set": "a set",
    "omap": "an ordered mapping",
    "pairs": "a list of pairs",
}
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same language, ten times faster


def read_yaml(path: Path, name: str | None = None) -> Any:
    """Return what a file of YAML holds; `name` is what messages call it, by default its path.

    Raises:
        ConfigError: it cannot be read, is too large, is no YAML, has a key twice, or values that cannot be: by line.
    """
    where = name or str(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where} cannot be read ({reason(error)}); give the path of a YAML file") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{where} has more than {MAX_BYTES} bytes, too many for a configuration; give another file")
    try:
        text = decoded(raw, where)
    except StorageError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error
    return parse_json(text, where) if path.suffix.lower() == ".json" and _is_json(text) else parse_yaml(text, where)


def _is_json(text: str) -> bool:
    """Tell whether a text is JSON, which YAML does not read where it has tabs, or escapes of its own."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def parse_yaml(text: str, where: str) -> Any:
    """Return what a text of YAML holds; `where`, the file or option it is from, stands in messages."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where} has more than {MAX_BYTES} bytes, too many for a configuration; give less")
    text = text.removeprefix("\ufeff")
    try:
        _measure(text, where)
        return yaml.load(text, _Loader)  # noqa: S506  # a safe loader
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        told = place + ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where} is not valid YAML: {told}; correct it") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}; correct it") from error
    except (UnicodeEncodeError, RecursionError) as error:  # half of a surrogate pair, to the parser in C
        raise ConfigError(f"{where} is not valid YAML: {error}; correct it") from error


def parse_json(text: str, where: str) -> Any:
    """Return what a configuration in JSON holds.

    Raises:
        ConfigError: it is no JSON, has a key twice, NaN or an infinite number.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where} has more than {MAX_BYTES} bytes, too many for a configuration; give less")

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for key, value in pairs:
            if key in keys:
                raise ConfigError(f"{where} has the key {key!r} twice in one mapping; give it once")
            keys[key] = value
        return keys

    def number(word: str) -> float:
        if not math.isfinite(value := float(word)):
            raise ConfigError(f"{where} holds {word}, which is no finite number; give one")
        return value

    try:
        return json.loads(text, object_pairs_hook=mapping, parse_constant=number, parse_float=number)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}; correct it"
        ) from error
    except ConfigError:
        raise
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise ConfigError(f"{where} is not JSON that can be read ({error}); correct it") from error


def refuse_repeated(text: str, where: str) -> None:
    """Raise ConfigError where ``key=value,...`` gives a key twice: the harness's parser takes the last one."""
    keys = [part.partition("=")[0].strip() for part in text.split(",") if "=" in part]
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise ConfigError(f"{where} has the key {key!r} twice; give it once")


def _measure(text: str, where: str) -> None:
    """Refuse what is nested too deeply, or is large by its aliases alone: without building anything."""
    sizes: dict[str, int] = {}  # anchor -> values that it stands for
    opened: list[tuple[Any, int]] = []  # anchor of every open list or mapping, and the values before it
    total = aliased = 0
    event: Any
    for event in yaml.parse(text, _Base):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                if any(event.anchor == anchor for anchor, _ in opened):
                    raise ConfigError(f"{where}: line {line}: *{event.anchor} contains itself; write its value out")
                continue  # unknown: the loader says so
            total += sizes[event.anchor]
            aliased += sizes[event.anchor]
            if aliased > MAX_ALIASED:
                raise ConfigError(
                    f"{where}: line {line}: the aliases (*{event.anchor}) stand for more than {MAX_ALIASED} values "
                    "together; write out what is needed"
                )
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
            total += 1
            if len(opened) > MAX_DEPTH:
                raise ConfigError(
                    f"{where}: line {line}: lists or mappings nested more than {MAX_DEPTH} deep; write fewer levels"
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = total - before


class _Strict:
    """What a safe loader refuses besides: a key that is given twice, and what JSON cannot say."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Return the value of a node."""
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind in _NOT_JSON:
            raise self._refused(node, f"YAML reads this as {_NOT_JSON[kind]}; {_QUOTE}")
        try:
            return super().construct_object(node, deep)  # type: ignore[misc]
        except (ValueError, TypeError, LookupError, AttributeError) as error:  # what a tag or its looks promised
            raise self._refused(node, f"this is no {kind} ({error}); {_QUOTE}") from error

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Return the mapping of a node."""
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            merged = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if merged else self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise self._refused(key_node, "a key is a list or a mapping; give a text")
            if key in lines:
                raise self._refused(key_node, f"the key {key!r} is given twice, first in line {lines[key]}")
            lines[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)  # type: ignore[misc]

    def _refused(self, node: Any, why: str) -> yaml.YAMLError:
        return yaml.constructor.ConstructorError(None, None, why, node.start_mark)


class _Loader(_Strict, _Base):
    """The loader of this module."""
