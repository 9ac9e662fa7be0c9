"""One bar over the cells on a terminal, a line for each cell anywhere."""

from __future__ import annotations

import io

import pytest

from lm_eval_deepen.leaderboard.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_bar_is_for_terminals_and_lines_are_for_all(kind: type[io.StringIO]) -> None:
    file, lines = kind(), []
    with Progress(3, lines.append, file) as progress:
        progress.began -= 10  # seconds ago
        progress.finished("A", "arc")
        progress.finished("A+B", "arc", "no answer")
        progress.say("a worker died")
        progress.finished("B", "arc")
    assert lines == [
        "[1/3] A: arc; 10 s, about 20 s left",
        "no results for row 'A+B', task 'arc': no answer",
        "a worker died",
        "[3/3] B: arc; 10 s, about 0 s left",
    ]
    if kind is Terminal:
        assert "3/3 [" in file.getvalue() and "cell" in file.getvalue()
    else:
        assert file.getvalue() == ""
