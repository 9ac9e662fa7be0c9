"""Local tasks of every kind, and one call that evaluates a model on them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from harness import deepen, hf
from lm_eval.tasks import TaskManager
from local_tasks import write_tasks


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tasks in `local_tasks`, for `include_path`."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def matrices(tmp_path_factory) -> str:
    """A folder for the matrices of a file's ensembles."""
    return str(tmp_path_factory.mktemp("matrices"))


@pytest.fixture(scope="module", params=["bytelevel", "metaspace", "padded"])
def both(request, pico):
    """One member, and the harness's own class, on one model."""
    return deepen(pico[request.param], batch_size=4), hf(pico[request.param])


@pytest.fixture(scope="session")
def evaluate(task_folder: Path) -> Callable[..., dict[str, Any]]:
    """`lm_eval.simple_evaluate` on the local tasks; the harness's own thousands are not indexed."""
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)

    def run(model: Any, *tasks: str, **kwargs: Any) -> dict[str, Any]:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        found = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **kwargs
        )
        assert found is not None
        return found

    return run


@pytest.fixture
def read_results() -> Callable[[Path], tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Read what a run wrote under a folder: its results, and its samples."""

    def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        [results] = folder.rglob("results_*.json")
        lines = [line for path in sorted(folder.rglob("samples_*.jsonl")) for line in path.open()]
        return json.loads(results.read_text()), [json.loads(line) for line in lines]

    return read
