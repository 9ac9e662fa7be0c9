"""Lines that the harness repeats in every evaluation of one process appear once."""

from __future__ import annotations

import logging
from typing import Any

import lm_eval.evaluator as evaluator

from lm_eval_deepen.harness.once import said_once


def test_a_line_of_the_harness_appears_once(caplog: Any, monkeypatch: Any) -> None:
    asked: list[int] = []
    original = lambda: asked.append(1) or "abc"  # noqa: E731
    monkeypatch.setattr(evaluator, "get_git_commit_hash", original)
    harness, ours = logging.getLogger("lm_eval.evaluator"), logging.getLogger("lm_eval_deepen.x")
    with said_once():
        for number in range(3):
            harness.warning("generation_kwargs: %s", "{}")
            harness.warning("task %d", number)
            ours.warning("said every time")
            assert evaluator.get_git_commit_hash() == "abc"
    assert [record.getMessage() for record in caplog.records if record.name == harness.name] == [
        "generation_kwargs: {}", "task 0", "task 1", "task 2",
    ]  # fmt: skip
    assert sum(record.name == ours.name for record in caplog.records) == 3 and asked == [1]
    harness.warning("generation_kwargs: %s", "{}")
    assert caplog.records[-1].getMessage() == "generation_kwargs: {}" and evaluator.get_git_commit_hash is original
