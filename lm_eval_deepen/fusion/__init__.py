"""Step-level fusion methods: every module of this folder is one, found on first use."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from typing import Any

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.fusion.seam import REGISTRY, MethodEntry

__all__ = ["methods", "option_classes"]

_NOT_METHODS = frozenset({"seam"})


@lru_cache(maxsize=1)
def methods() -> dict[str, MethodEntry]:
    """Return the fusion methods by name, sorted; modules whose names begin with ``_`` are helpers.

    Raises:
        ConfigError: a file of this folder that cannot be imported, or that registers no method.
    """
    for found in pkgutil.iter_modules(__path__):
        if found.name.startswith("_") or found.name in _NOT_METHODS:
            continue
        module = f"{__name__}.{found.name}"
        where = f"Fusion method file {found.name}.py in {__path__[0]}"
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken file raises, its name is what the user needs
            raise ConfigError(
                f"{where} cannot be imported ({type(error).__name__}: {error}). Fix the file or remove it."
            ) from error
        if not any(entry.options.__module__ == module for entry in REGISTRY.values()):
            raise ConfigError(
                f"{where} registers no method. Decorate its dataclass of options with "
                "@fusion(name, paper=...), or begin the file's name with an underscore if it is a helper."
            )
    return dict(sorted(REGISTRY.items()))


def option_classes() -> dict[str, type[Any]]:
    """Return the dataclass of options of every method, by the method's name."""
    return {name: entry.options for name, entry in methods().items()}
