"""Step-level fusion methods: every module of this folder is one, found on first use."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from lm_eval_deepen.discovery import import_folder
from lm_eval_deepen.fusion.seam import REGISTRY, MethodEntry

__all__ = ["methods", "option_classes"]


@lru_cache(maxsize=1)
def methods() -> dict[str, MethodEntry]:
    """Return the fusion methods by name, sorted; modules whose names begin with ``_`` are helpers.

    Raises:
        ConfigError: a file of this folder that cannot be imported, or that registers no method.
    """
    import_folder(
        __name__,
        __path__,
        REGISTRY,
        kind="Fusion method",
        decorator="@fusion(name, paper=...)",
        helpers={"seam"},
    )
    return dict(sorted(REGISTRY.items()))


def option_classes() -> dict[str, type[Any]]:
    """Return the dataclass of options of every method, by the method's name."""
    return {name: entry.options for name, entry in methods().items()}
