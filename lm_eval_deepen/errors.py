"""Errors a user can act on: each says what, where, what was got, and how to fix it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class DeepenError(ValueError):
    """Base of every error this package raises on purpose."""

    def within(self, where: str) -> DeepenError:
        """Return the same error with the place in front where it was found: a file, a row."""
        return type(self)(f"{where}: {self}")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what a person wrote."""

    message: str  # what is wrong, what was got, and the remedy, in one line
    key: str = ""  # the key it is about, as ``weights`` or ``members[1].temperature``; empty where it is about none
    code: str = ""  # ``unknown_key``, ``missing``, ``value``, ``unknown_name`` or ``conflict``; empty for anything else
    where: tuple[str, ...] = ()  # the places it was found in, the outermost first: a file, a row

    def __str__(self) -> str:
        """Say where and what, in one line."""
        return ": ".join((*self.where, self.message))


class ConfigError(DeepenError):
    """A configuration that cannot be honoured, with everything that is wrong with it.

    Attributes:
        problems: one or more.
    """

    def __init__(self, *problems: str | Problem, key: str = "", code: str = "") -> None:
        """Take problems, or messages about the key `key`."""
        self.problems = tuple(Problem(one, key, code) if isinstance(one, str) else one for one in problems)
        super().__init__(*self.problems)

    def __str__(self) -> str:
        """Say what is wrong: one line for each problem, and where they all are, once."""
        if len(self.problems) == 1:
            return str(self.problems[0])
        shared = tuple(os.path.commonprefix([list(problem.where) for problem in self.problems]))
        lines = [str(replace(problem, where=problem.where[len(shared) :])) for problem in self.problems]
        return "\n  ".join([": ".join((*shared, f"{len(lines)} problems:")), *lines])

    def within(self, where: str) -> ConfigError:
        """Return the error with the place in front where its problems were found."""
        return ConfigError(*(replace(problem, where=(where, *problem.where)) for problem in self.problems))

    def beneath(self, key: str) -> ConfigError:
        """Return the error with its keys as they are beneath another key."""
        return ConfigError(*(replace(one, key=f"{key}.{one.key}".rstrip(".")) for one in self.problems))


@contextmanager
def blamed(where: str) -> Iterator[None]:
    """Put where it happened in front of an error of ours that is raised inside."""
    try:
        yield
    except DeepenError as error:
        raise error.within(where) from error


class Problems:
    """Collects all errors of a configuration, so that one message names them all."""

    def __init__(self) -> None:
        self.errors: list[Problem] = []

    @contextmanager
    def collected(self, where: str = "") -> Iterator[None]:
        """Keep a ConfigError that is raised inside, and go on after it."""
        try:
            yield
        except ConfigError as error:
            self.errors += (error.within(where) if where else error).problems

    def add(self, message: str, key: str = "", code: str = "") -> None:
        """Add one."""
        self.errors.append(Problem(message, key, code))

    def refuse(self) -> None:
        """Raise ConfigError where there are any."""
        if self.errors:
            raise ConfigError(*self.errors)


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


def one_line(error: BaseException) -> str:
    """Return the message of a library's error, which may be wrapped over many lines, in one."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def refused(error: ValidationError) -> str:
    """Return what pydantic refused first, in one line: where it stands, what is wrong, and what was got."""
    first = error.errors(include_url=False)[0]
    got = "" if first["type"] == "missing" else f"; got {first['input']!r:.60}"
    return ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ") + got])


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
