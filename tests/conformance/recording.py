"""Stand-ins for the packages `wandb` and `trackio`: the part of their interface that the harness uses, recorded.

What is handed over is copied at once, as the real packages serialise it, so that later changes show nothing.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any


class Updates(dict):
    """A run's config or summary."""

    def update(self, values: dict[str, Any], allow_val_change: bool = False) -> None:
        super().update(copy.deepcopy(values))


class Table:
    """A table of `wandb`."""

    def __init__(self, columns: list[str]) -> None:
        self.columns, self.rows = list(columns), []

    def add_data(self, *row: Any) -> None:
        assert len(row) == len(self.columns)
        self.rows.append(list(row))


class Artifact:
    """An artifact of `wandb`: files by name."""

    def __init__(self, name: str, type: str) -> None:
        self.name, self.type, self.files = name, type, {}

    @contextmanager
    def new_file(self, name: str, mode: str, encoding: str) -> Iterator[io.StringIO]:
        file = io.StringIO()
        yield file
        self.files[name] = file.getvalue()


class Run:
    """A run of either package."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.finished = arguments, False
        self.config, self.summary = Updates(), Updates()
        self.logged: dict[str, list[Any]] = {}
        self.artifacts: dict[str, Artifact] = {}

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        for key, value in values.items():
            self.logged.setdefault(key, []).append(copy.deepcopy(value))

    def log_artifact(self, artifact: Artifact) -> None:
        self.artifacts[f"{artifact.type}/{artifact.name}"] = artifact

    def finish(self) -> None:
        self.finished = True


def wandb_modules() -> dict[str, ModuleType]:
    """Return `wandb` and its submodules by name; ``wandb.runs`` lists the runs that were begun."""
    names = ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.printer")
    modules = {name: ModuleType(name) for name in names}
    wandb = modules["wandb"]
    vars(wandb).update(__version__="0.19.0", run=None, runs=[], Table=Table, Artifact=Artifact)

    def init(**arguments: Any) -> Run:
        wandb.runs.append(Run(**arguments))
        return wandb.runs[-1]

    wandb.init = init
    modules["wandb.sdk.lib.printer"].new_printer = SimpleNamespace
    return modules


def trackio_module() -> ModuleType:
    """Return `trackio`, whose functions act on its latest run; ``trackio.runs`` lists them all."""
    trackio = ModuleType("trackio")
    trackio.runs = []

    def init(**arguments: Any) -> Run:
        run = Run(**arguments)
        trackio.runs.append(run)
        trackio.config, trackio.log, trackio.finish = run.config, run.log, run.finish
        return run

    vars(trackio).update(init=init, Trace=SimpleNamespace)
    return trackio
