"""Finding the methods of a seam: every module of its folder is one."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any, Protocol

from lm_eval_deepen.errors import ConfigError


class Entry(Protocol):
    """What a seam's registry holds under a name."""

    @property
    def options(self) -> type[Any]:
        """The dataclass of the method's options."""
        ...


def import_folder(
    package: str, path: Iterable[str], registry: dict[str, Any], *, kind: str, decorator: str, helpers: Iterable[str]
) -> None:
    """Import every module of a seam's folder, so that it registers its method.

    Args:
        package: dotted name of the folder.
        path: its ``__path__``.
        registry: where the decorator puts a method, an `Entry` by name.
        kind: what a method is called, capitalised, for messages.
        decorator: how a method is registered, for messages.
        helpers: modules that are no methods, beside those whose names begin with an underscore.

    Raises:
        ConfigError: a file that cannot be imported, or that registers no method.
    """
    for found in pkgutil.iter_modules(path):
        if found.name.startswith("_") or found.name in helpers:
            continue
        module = f"{package}.{found.name}"
        where = f"{kind} file {found.name}.py in {getattr(found.module_finder, 'path', package)}"
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a broken file raises, its name is what the user needs
            raise ConfigError(
                f"{where} cannot be imported ({type(error).__name__}: {error}). Fix the file or remove it."
            ) from error
        if not any(entry.options.__module__ == module for entry in registry.values()):
            raise ConfigError(
                f"{where} registers no method. Decorate its dataclass of options with {decorator}, or begin the "
                "file's name with an underscore if it is a helper."
            )
