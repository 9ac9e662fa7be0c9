"""Rows of a matrix, block by block: what all of them cost is said before they are paid for."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from tqdm import tqdm

log = logging.getLogger(__name__)

SAID_FROM = 20.0  # seconds


def blocks(what: str, total: int, size: int, progress: bool) -> Iterator[slice]:
    """Yield slices of `size` rows, with a bar; after the first one, say how long all take where that is long.

    Args:
        what: what is built, for messages.
        total: how many rows there are.
        size: rows of a block.
        progress: whether to show and say anything.
    """
    start = time.perf_counter()
    with tqdm(total=total, unit="row", desc=what, disable=None if progress else True) as bar:
        for at in range(0, total, size):
            rows = slice(at, min(at + size, total))
            yield rows
            bar.update(rows.stop - at)
            if at == 0 and progress:
                seconds = (time.perf_counter() - start) * total / rows.stop
                if seconds >= SAID_FROM:
                    told = f"{total:,} rows take about {seconds / 60:.1f} minutes here"
                    log.warning("%s: %s; it is built once.", what, told)
