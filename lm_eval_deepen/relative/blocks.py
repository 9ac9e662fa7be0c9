"""What takes long has a bar, and what all of it costs is said before it is paid for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

log = logging.getLogger(__name__)

SAID_FROM = 20.0  # seconds
SAID_AFTER = 2.0  # seconds of work, from which the whole is estimated


@contextmanager
def counted(what: str, total: int, progress: bool, unit: str = "row") -> Iterator[Callable[[int], None]]:
    """Give a function that counts what is done; it moves a bar, and once says how long all takes where that is long."""
    start, done, said = time.perf_counter(), 0, not progress
    with tqdm(total=total, unit=unit, desc=what, disable=None if progress else True) as bar:

        def advance(more: int) -> None:
            nonlocal done, said
            bar.update(more)
            done += more
            if not said and (taken := time.perf_counter() - start) >= SAID_AFTER:
                said = True
                if (seconds := taken * total / done) >= SAID_FROM:
                    told = f"{total:,} {unit}s take about {seconds / 60:.1f} minutes here"
                    log.warning("%s: %s; it is built once.", what, told)

        yield advance


def blocks(what: str, total: int, size: int, progress: bool) -> Iterator[slice]:
    """Yield slices of `size` rows, counted as they are done."""
    with counted(what, total, progress) as advance:
        for at in range(0, total, size):
            rows = slice(at, min(at + size, total))
            yield rows
            advance(rows.stop - at)
