"""Errors a user can act on: each says what, where, what was got, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


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


class WindowError(RequestError):
    """A text that does not fit into a member's context."""


class RenderError(MemberError, RequestError):
    """A conversation that a member's chat template cannot render."""


class SpellingError(VocabularyError, RequestError):
    """A text that a tokenizer cannot spell: at load the tokenizer's fault, later no more than the request's."""


class UnansweredError(RequestError):
    """Requests that have no answer, after all others were answered.

    Attributes:
        requests: all of them, also where the message lists the first ones alone.
    """

    def __init__(self, message: str, requests: tuple[Any, ...] = ()) -> None:
        """Take the message and the requests."""
        super().__init__(message)
        self.requests = requests


class CacheError(DeepenError):
    """A response cache that belongs to another ensemble."""


class ResultError(DeepenError):
    """Result files that are missing, damaged, or cannot be compared."""


class NotPairedError(ResultError):
    """A metric that cannot be compared document by document, though nothing is damaged; others can."""


class StorageError(DeepenError):
    """A file or folder that cannot be read, written, moved or locked."""


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
