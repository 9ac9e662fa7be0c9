"""A folder whose files are methods, weightings, ... for one test, as if they lay beside ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lm_eval_deepen.config import Registry


@contextmanager
def dropped_in(registry: Registry, folder: Path) -> Iterator[None]:
    """Find the entries of another folder, too, while the block runs."""
    assert registry.package is not None
    package, before = importlib.import_module(registry.package), set(registry)
    package.__path__.append(str(folder))
    try:
        yield
    finally:
        package.__path__.remove(str(folder))
        for name in set(registry) - before:
            registry.forget(name)
        for path in folder.glob("*.py"):
            sys.modules.pop(f"{registry.package}.{path.stem}", None)
            vars(package).pop(path.stem, None)
