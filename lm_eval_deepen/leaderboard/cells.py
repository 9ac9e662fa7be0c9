"""Cells on disk: the harness's own files of one row on one task, and a mark that says what they are."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker

from lm_eval_deepen.errors import ResultError
from lm_eval_deepen.leaderboard.models import Cost
from lm_eval_deepen.leaderboard.rows import Row
from lm_eval_deepen.leaderboard.tasks import LoadedTask
from lm_eval_deepen.runs.files import TaskRun

SUFFIX = ".cell.json"
_SHOWN = 60


@dataclass(frozen=True)
class Cell:
    """A finished cell.

    Attributes:
        mark: the file that says so.
        identity: what was evaluated.
        results: name of the harness's results file, beside the mark.
        samples: names of its samples files, by task.
        cost: what it took.
        documents: how many were evaluated.
        facts: of the models: parameters, tokens they were trained on as far as that is known.
    """

    mark: Path
    identity: Mapping[str, Any]
    results: str
    samples: Mapping[str, str]
    cost: Cost
    documents: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    def runs(self) -> dict[str, TaskRun]:
        """Return the cell's tasks, read from the harness's files.

        Raises:
            ResultError: a file that is gone or damaged.
        """
        path = self.mark.with_name(self.results)
        try:
            results = json.loads(path.read_text("utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ResultError(f"{path}: cannot be read ({error}); evaluate the cell again with --redo") from error
        found = {}
        for task, name in self.samples.items():
            if not path.with_name(name).is_file():
                raise ResultError(f"{path.with_name(name)} is gone; evaluate the cell again with --redo")
            found[task] = TaskRun(task, path, path.with_name(name), results)
        return found


def identity(
    row: Row, task: LoadedTask, seeds: tuple[int, ...], built: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what decides a cell's results: the ensemble, the task, how it is asked.

    Args:
        row: the row.
        task: the column.
        seeds: of the evaluation.
        built: identities of the row's models that are built, by name.
    """
    found = {"ensemble": row.config.fingerprint(), "seeds": list(seeds), **task.identity}
    return {**found, "built": dict(built)} if built else found


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Return the SHA-256 hex digest of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def mark_of(out: Path, row: Row, task: LoadedTask) -> Path:
    """Return the path of a cell's mark."""
    return out / row.slug / (re.sub(r"[^\w.-]+", "_", task.name) + SUFFIX)


def read_cell(mark: Path, wanted: Mapping[str, Any], redo: bool) -> Cell | None:
    """Return the finished cell; None where it is to be evaluated.

    Args:
        mark: its mark.
        wanted: the identity it should have.
        redo: evaluate a cell again that is of another identity, or damaged.

    Raises:
        ResultError: what is there is of another identity, which is named beside the wanted one.
    """
    if not mark.is_file():
        return None
    try:
        raw = json.loads(mark.read_text("utf-8"))
        cell = Cell(
            mark, raw["identity"], raw["results"], raw["samples"], Cost(**raw["cost"]), int(raw["documents"]),
            raw.get("facts", {}),
        )  # fmt: skip
        if json.loads(json.dumps(wanted)) == cell.identity:
            cell.runs()
            return cell
    except (json.JSONDecodeError, KeyError, TypeError, ResultError) as error:
        if redo:
            return None
        raise ResultError(f"{mark}: the cell is damaged ({error}); --redo evaluates it again") from error
    if redo:
        return None
    raise ResultError(
        f"{mark} is of another evaluation: fingerprint {fingerprint(cell.identity)[:12]} there, "
        f"{fingerprint(wanted)[:12]} wanted ({_differences(cell.identity, wanted)}). "
        "--redo evaluates such cells again; another --out keeps both"
    )


def _differences(there: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    found = []
    for key in dict.fromkeys([*there, *wanted]):
        a, b = there.get(key), wanted.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = _differences(a, b, f"{prefix}{key}.")
            found += [inner] if inner else []
        elif a != b and json.dumps(a) != json.dumps(b):
            found.append(f"{prefix}{key}: {str(a)[:_SHOWN]} -> {str(b)[:_SHOWN]}")
    return "; ".join(found)


def write_cell(
    mark: Path,
    row: Row,
    tracker: EvaluationTracker,
    found: dict[str, Any],
    wanted: Mapping[str, Any],
    cost: Cost,
    facts: Mapping[str, Any],
) -> Cell:
    """Write what ``simple_evaluate`` returned by the harness's own tracker; the mark comes last.

    Raises:
        ResultError: the harness could not write its files.
    """
    mark.parent.mkdir(parents=True, exist_ok=True)
    samples = found.pop("samples")
    count = sum(found["n-samples"][task]["effective"] for task in samples)
    with tempfile.TemporaryDirectory(prefix=".cell-", dir=mark.parent) as folder:
        tracker.output_path = folder
        tracker.general_config_tracker.model_source = "deepen"
        tracker.general_config_tracker.model_name = row.name
        tracker.general_config_tracker.model_name_sanitized = row.slug
        tracker.save_results_aggregated(results=found, samples=samples)
        written = Path(folder) / row.slug
        if not list(written.glob("results_*.json")):  # the tracker logs what goes wrong, and goes on
            raise ResultError(f"{mark.parent}: the harness could not write its results there; is the disk full?")
        for task in samples:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        names = {task: f"samples_{task}_{tracker.date_id}.jsonl" for task in samples}
        results = f"results_{tracker.date_id}.json"
        for name in [*names.values(), results]:
            if not (written / name).is_file():
                raise ResultError(f"{mark.parent / name}: the harness could not write it; is the disk full?")
            shutil.move(written / name, mark.parent / name)
    before = _names(mark)
    cell = Cell(mark, wanted, results, names, cost, count, facts)
    _write(mark, {"row": row.name, "fingerprint": fingerprint(wanted), **_data(cell)})
    for name in before:
        (mark.parent / name).unlink(missing_ok=True)
    return cell


def _names(mark: Path) -> list[str]:
    """Return the names of the files that belong to a mark; none where there is none, or it is damaged."""
    try:
        raw = json.loads(mark.read_text("utf-8"))
        return [Path(name).name for name in (raw["results"], *raw["samples"].values())]
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        return []


def _data(cell: Cell) -> dict[str, Any]:
    data = asdict(cell)
    del data["mark"]
    return data


def _write(path: Path, data: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(partial, path)
