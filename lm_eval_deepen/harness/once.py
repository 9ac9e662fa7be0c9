"""Many evaluations in one process: what the harness says in each of them, it says once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def said_once() -> Iterator[None]:
    """Let through a line of the harness's log once, and let git say once that there is no repository."""
    import lm_eval.evaluator as evaluator

    handlers = [handler for name in (None, "lm_eval") for handler in logging.getLogger(name).handlers]
    filters = [(handler, functools.partial(_is_new, set())) for handler in dict.fromkeys(handlers)]
    for handler, first in filters:
        handler.addFilter(first)
    commit = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = functools.cache(commit)
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = commit
        for handler, first in filters:
            handler.removeFilter(first)


def _is_new(seen: set[str], record: logging.LogRecord) -> bool:
    """Tell whether a record is no repeated line of the harness, whose lines are `seen`."""
    if record.name.partition(".")[0] != "lm_eval":
        return True
    before = len(seen)
    seen.add(record.getMessage())
    return len(seen) > before
