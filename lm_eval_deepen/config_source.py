"""What an encoder-decoder member reads: the source text within a prompt, and languages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval_deepen.errors import ConfigError

SOURCE_KEYS = frozenset({"source_pattern", "source_language", "target_language"})


@dataclass(frozen=True)
class SourceConfig:
    """How an encoder-decoder member gets its own prompt out of a request's.

    Attributes:
        source_pattern: regular expression with one group, whose last match in the prompt is the source text for the
            encoder; None takes the whole prompt.
        source_language: the source's language, as the member's tokenizer names it.
        target_language: the language to be written, likewise: it is the decoder's first token.
    """

    source_pattern: str | None = None
    source_language: str | None = None
    target_language: str | None = None

    def to_dict(self) -> dict[str, str]:
        """Return what is given, as the configuration spells it."""
        return {key: value for key in sorted(SOURCE_KEYS) if (value := getattr(self, key)) is not None}

    def __bool__(self) -> bool:
        """Tell whether anything is given."""
        return bool(self.to_dict())


def parse_source(entry: Mapping[str, Any], i: int) -> SourceConfig:
    """Return what a member's keys say of its source.

    Raises:
        ConfigError: a value that is no text, or a pattern that is no regular expression with one group.
    """
    where = f"members[{i}] ({entry.get('pretrained')}):"
    given = {key: entry[key] for key in SOURCE_KEYS if entry.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{where} {key} must be non-empty text; got {value!r}")
    pattern = given.get("source_pattern")
    if pattern is not None:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ConfigError(
                f"{where} source_pattern {pattern!r} is no regular expression ({error}); correct it"
            ) from error
        if groups != 1:
            raise ConfigError(
                f"{where} source_pattern {pattern!r} has {groups} groups; it needs one, which is the source text. "
                "Write other groups as (?:...)"
            )
    return SourceConfig(**given)
