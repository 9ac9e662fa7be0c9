"""How far a leaderboard is: one bar over its cells on a terminal, and a line for each finished cell anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """Tells of finished cells; the bar is closed at the end of a ``with`` block.

    Rows that share a pass finish together, so that what is left is an estimate.
    """

    def __init__(self, total: int, say: Callable[[str], None], file: TextIO | None = None) -> None:
        """Begin with `total` cells to do; `file` shows the bar if it is a terminal (default: standard error)."""
        self.total, self.done, self.began = total, 0, time.monotonic()
        self._say = say
        self._bar = tqdm(total=total, unit="cell", disable=None, file=file, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with self._bar.external_write_mode():
            self._say(text)

    def finished(self, row: str, task: str, problem: str | None = None) -> None:
        """Tell that a cell is finished, or why it has no results."""
        self.done += 1
        seconds = time.monotonic() - self.began
        left = seconds / self.done * (self.total - self.done)
        if problem is None:
            self.say(f"[{self.done}/{self.total}] {row}: {task}; {seconds:.0f} s, about {left:.0f} s left")
        else:
            self.say(f"no results for row {row!r}, task {task!r}: {problem}")
        self._bar.update()
