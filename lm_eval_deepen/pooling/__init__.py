"""Pooling: request-level ensembles of the members' own answers. Every module here is a method, found on first use."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from lm_eval_deepen.discovery import import_folder
from lm_eval_deepen.pooling.seam import REGISTRY, PoolingEntry

__all__ = ["option_classes", "poolings"]


@lru_cache(maxsize=1)
def poolings() -> dict[str, PoolingEntry]:
    """Return the pooling methods by name, sorted; modules whose names begin with ``_`` are helpers.

    Raises:
        ConfigError: a file of this folder that cannot be imported, or that registers no method.
    """
    import_folder(
        __name__,
        __path__,
        REGISTRY,
        kind="Pooling method",
        decorator="@pooling(name, paper=...)",
        helpers={"seam"},
    )
    return dict(sorted(REGISTRY.items()))


def option_classes() -> dict[str, type[Any]]:
    """Return the dataclass of options of every pooling method, by its name."""
    return {name: entry.options for name, entry in poolings().items()}
