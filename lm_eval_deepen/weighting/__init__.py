"""Weightings: where the members' weights come from. Every module of this folder is one, found on first use."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from lm_eval_deepen.discovery import import_folder
from lm_eval_deepen.weighting.seam import REGISTRY, WeightingEntry

__all__ = ["option_classes", "weightings"]


@lru_cache(maxsize=1)
def weightings() -> dict[str, WeightingEntry]:
    """Return the weightings by name, sorted; modules whose names begin with ``_`` are helpers.

    Raises:
        ConfigError: a file of this folder that cannot be imported, or that registers no weighting.
    """
    import_folder(
        __name__,
        __path__,
        REGISTRY,
        kind="Weighting",
        decorator="@weighting(name, paper=...)",
        helpers={"seam", "experts"},
    )
    return dict(sorted(REGISTRY.items()))


def option_classes() -> dict[str, type[Any]]:
    """Return the dataclass of options of every weighting, by its name."""
    return {name: entry.options for name, entry in weightings().items()}
