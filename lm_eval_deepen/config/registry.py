"""A registry for each kind of thing that is chosen by name, such as fusion methods; the files of a folder fill it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lm_eval_deepen.config.errors import unknown_name
from lm_eval_deepen.config.keys import Options
from lm_eval_deepen.errors import ConfigError, one_line

C = TypeVar("C", bound=type[Options])


@dataclass(frozen=True)
class Entry:
    """What a registry holds under a name."""

    name: str  # the name in a configuration
    options: type[Any]  # the class of its options, which does the work, too
    paper: str  # where it is from, ``none`` for nowhere


class Registry(Mapping[str, Entry]):
    """The entries of one kind by name, sorted; every module of a folder registers one, and is found on first use.

    Modules whose names begin with an underscore, and those in `helpers`, are no entries.
    """

    def __init__(
        self, kind: str, package: str | None = None, decorator: str = "register", helpers: Collection[str] = ("base",)
    ) -> None:
        """Make a registry.

        Args:
            kind: what an entry is called, as in ``method: deepen``.
            package: dotted name of the folder; None for entries that are registered by hand alone.
            decorator: name of the decorator that registers one, for messages.
            helpers: modules of the folder that register nothing.
        """
        self.kind, self.package, self.decorator, self.helpers = kind, package, decorator, frozenset(helpers)
        self._entries: dict[str, Entry] = {}
        self._searched: tuple[str, ...] = ()

    def register(self, name: str, *, paper: str = "none") -> Callable[[C], C]:
        """Return a decorator that registers a class of options under `name`."""

        def decorate(cls: C) -> C:
            if not (isinstance(cls, type) and issubclass(cls, Options)):
                raise TypeError(f"{self.kind} {name!r}: its class must derive from lm_eval_deepen.config.Options")
            if name in self._entries and self._entries[name].options is not cls:
                raise ValueError(f"{self.kind} {name!r} is defined twice: {self._entries[name].options} and {cls}")
            if cls.__dict__.get("NAME", name) != name:
                raise ValueError(f"{cls} is {cls.KIND} {cls.NAME!r} already; derive a class from it for {name!r}")
            cls.KIND, cls.NAME = self.kind, name
            self._entries[name] = Entry(name, cls, paper)
            return cls

        return decorate

    def choose(self, name: Any) -> Entry:
        """Return the entry of a name, or raise ConfigError with the nearest one and the list."""
        if isinstance(name, str) and name in self:
            return self[name]
        raise ConfigError(unknown_name(self.kind, name, self))

    def forget(self, name: str) -> None:
        """Remove an entry: its file is gone."""
        del self._entries[name]

    def __getitem__(self, name: str) -> Entry:
        self._search()
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._search()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._search()
        return len(self._entries)

    def _search(self) -> None:
        """Import every module of the folder, so that it registers its entry."""
        path = importlib.import_module(self.package).__path__ if self.package else ()
        if self._searched == tuple(path):
            return
        for file in pkgutil.iter_modules(path):
            if file.name.startswith("_") or file.name in self.helpers:
                continue
            module = f"{self.package}.{file.name}"
            where = f"{self.kind} file {file.name}.py in {getattr(file.module_finder, 'path', self.package)}"
            try:
                importlib.import_module(module)
            except Exception as error:  # whatever a broken file raises, its name is what the user needs
                raise ConfigError(
                    f"{where} cannot be imported ({type(error).__name__}: {one_line(error)}). Fix the file or "
                    "remove it."
                ) from error
            if not any(entry.options.__module__ == module for entry in self._entries.values()):
                raise ConfigError(
                    f"{where} registers no {self.kind}. Decorate its class of options with @{self.decorator}(name, "
                    "paper=...), or begin the file's name with an underscore if it is a helper."
                )
        self._searched = tuple(path)
