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
    filters = [(handler, _First()) for handler in dict.fromkeys(handlers)]
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


class _First(logging.Filter):
    """Lets through whatever is no repeated line of the harness."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("lm_eval.") and record.name != "lm_eval":
            return True
        text = record.getMessage()
        new = text not in self.seen
        self.seen.add(text)
        return new
