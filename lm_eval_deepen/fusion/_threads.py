"""Fuses the rows of a step on several cores, since torch runs operations that scatter or gather on one thread."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def in_parts(rows: int, largest: int, device: torch.device, work: Callable[[slice], Result]) -> list[Result]:
    """Return what `work` gives for consecutive parts of some rows, of at most `largest`, in their order.

    On a CPU as many parts run at once as torch has threads, each in a thread of its own. Rows do not depend on each
    other, so the parts make no difference beyond the last bit. No rows are one empty part.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    size = max(1, min(largest, -(-rows // threads)))
    parts = [slice(start, start + size) for start in range(0, max(1, rows), size)]
    if threads == 1 or len(parts) == 1:
        return [work(part) for part in parts]
    inference = torch.is_inference_mode_enabled()

    def in_worker(part: slice) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return work(part)

    results = list(_pool(os.getpid(), threads).map(in_worker, parts))
    torch.set_num_threads(threads)  # what a worker set for itself also is what threads made later begin with
    return results


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return the workers of a process; a fork has none of its parent's."""
    return ThreadPoolExecutor(threads, "fuse", initializer=torch.set_num_threads, initargs=(1,))
