"""Errors a user can act on: each says what, where, what was got, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeepenError(ValueError):
    """Base of every error this package raises on purpose."""


class ConfigError(DeepenError):
    """An ensemble configuration that cannot be honoured."""


class VocabularyError(DeepenError):
    """A tokenizer that cannot be mapped to bytes exactly, or members without common anchors."""


class MatrixError(DeepenError):
    """A relative matrix that is missing, damaged, or built for something else."""


class MemberError(DeepenError):
    """A member that failed to load or to answer; never replaced by the others."""


class RequestError(DeepenError):
    """A request that has no honest answer from this ensemble."""


class CacheError(DeepenError):
    """A response cache that belongs to another ensemble."""


class ResultError(DeepenError):
    """Result files that are missing, damaged, or cannot be compared."""


class StorageError(DeepenError):
    """A file or folder that cannot be read, written, moved or locked."""


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
