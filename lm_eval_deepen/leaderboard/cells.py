"""Cells on disk: the harness's own files of one row on one task, and a mark with their identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

from lm_eval.loggers import EvaluationTracker
from pydantic import AfterValidator, Field, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from lm_eval_deepen.errors import ResultError, StorageError, refused
from lm_eval_deepen.harness.tasks import LoadedTask
from lm_eval_deepen.leaderboard.models import EXACT, Cost
from lm_eval_deepen.leaderboard.rows import Row
from lm_eval_deepen.member.model_files import changed
from lm_eval_deepen.results.aggregation import to_number
from lm_eval_deepen.results.files import TaskRun, read_results
from lm_eval_deepen.results.samples import read_samples
from lm_eval_deepen.storage import move_file, read_json, remove_file, sha256, working_folder, write_bytes, write_json

SUFFIX = ".cell.json"
_SHOWN = 60


def _beside(name: str) -> str:
    if Path(name).name != name:
        raise ValueError("not the name of a file beside the mark")
    return name


Name = Annotated[str, AfterValidator(_beside)]


@dataclass(frozen=True, config=EXACT)
class Cell:
    """A finished cell; ValueError where it says what no mark says."""

    mark: Path  # the file that says so
    identity: dict[str, Any]  # what was evaluated
    results: Name  # name of the harness's results file, beside the mark
    samples: Annotated[dict[str, Name], Field(min_length=1)]  # names of its samples files, by task
    cost: Cost  # what it took
    documents: Annotated[int, Field(ge=1)]  # how many were evaluated
    # of the models: parameters, tokens they were trained on as far as that is known
    facts: dict[str, Any] = field(default_factory=dict)
    # digests of the harness's files, by name; empty in cells of older versions
    sha256: dict[str, str] = field(default_factory=dict)

    @field_validator("facts")
    @classmethod
    def _are_numbers(cls, facts: dict[str, Any]) -> dict[str, Any]:
        figures = [to_number(facts.get(key)) for key in ("parameters", "training_tokens", "models")]
        if facts and None in figures or not isinstance(facts.get("warnings", []), list):
            raise ValueError("a figure of the models is no number, or its warnings are no list")
        return facts

    def runs(self) -> dict[str, TaskRun]:
        """Return the cell's tasks, read from the harness's files; ResultError for one that is gone or damaged."""
        path = self.mark.parent / self.results
        results = read_results(path, "evaluate the cell again with --redo.")
        tasks = {}
        for task, name in self.samples.items():
            samples = path.parent / name
            if not samples.is_file():
                raise ResultError(f"{samples} is gone; evaluate the cell again with --redo")
            if task not in results["configs"]:
                raise ResultError(f"{path} is damaged: it has no {task}; evaluate the cell again with --redo")
            tasks[task] = TaskRun(task, path, samples, results)
        return tasks

    def check(self) -> None:
        """Read all that belongs to the cell; ResultError for a file that is gone, or not the one that was written."""
        runs = self.runs()
        for name, digest in self.sha256.items():
            if sha256(path := self.mark.parent / name) != digest:
                raise ResultError(f"{path} is not the file that was written: cut off, or edited")
        if not self.sha256:  # of an older version: whatever can be seen
            samples = [run.samples for run in runs.values()]
            if (count := sum(len(next(iter(one.by_filter.values()))) for one in samples)) != self.documents:
                raise ResultError(f"its samples are of {count} documents, {self.documents} were evaluated")
            for one in samples:
                for sample in (sample for table in one.by_filter.values() for sample in table.values()):
                    for name, value in sample.values.items():
                        if isinstance(value, float) and value != value:
                            raise ResultError(f"{one.source}: {name} of document {sample.doc_id} is NaN")


def identity(
    row: Row, task: LoadedTask, seeds: tuple[int, ...], built: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what decides a cell's results: the ensemble, the task, how it is asked.

    `built`: identities of the row's models that are built, by name.
    """
    facts = {"ensemble": row.config.fingerprint(), "seeds": list(seeds), **task.identity}
    return {**facts, "built": dict(built)} if built else facts


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Return the SHA-256 hex digest of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def mark_of(out: Path, row: Row, task: LoadedTask) -> Path:
    """Return the path of a cell's mark."""
    return out / row.slug / (task.spec.slug + SUFFIX)


def read_cell(mark: Path, wanted: Mapping[str, Any], redo: bool, files: Mapping[str, str] | None = None) -> Cell | None:
    """Return the finished cell; None where it is to be evaluated.

    Args:
        mark: its mark.
        wanted: the identity it should have.
        redo: evaluate a cell again that is of another identity or other model files, or damaged.
        files: what tells its models (see `digests`) and its tasks' few-shots, which older cells do not know.

    Raises:
        ResultError: what is there is of another identity, which is named beside the wanted one, or of other files.
    """
    if not mark.is_file():
        return None
    others = ""
    try:
        cell = _parsed(mark)
        if json.loads(json.dumps(wanted)) == cell.identity:
            cell.check()
            if not (others := changed(files or {}, cell.facts.get("files"))):
                return cell
    except (ResultError, StorageError) as error:
        if redo:
            return None
        raise ResultError(f"{mark}: the cell is damaged ({error}); --redo evaluates it again") from error
    if redo:
        return None
    why = (
        f"was evaluated before the files in {others} changed"
        if others
        else f"is of another evaluation: fingerprint {fingerprint(cell.identity)[:12]} there, "
        f"{fingerprint(wanted)[:12]} wanted ({_differences(cell.identity, wanted)})"
    )
    raise ResultError(f"{mark} {why}. --redo evaluates such cells again; another --out keeps both")


def _parsed(mark: Path) -> Cell:
    raw = read_json(mark)
    try:
        return Cell(**{**raw, "mark": mark, "cost": Cost(**raw["cost"])})
    except (LookupError, TypeError) as error:
        raise ResultError(f"the mark lacks something: {type(error).__name__} {error}") from error
    except ValidationError as error:
        raise ResultError(f"the mark says what no mark says: {refused(error)}") from error


def _differences(there: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str:
    differences = []
    for key in dict.fromkeys([*there, *wanted]):
        a, b = there.get(key), wanted.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            inner = _differences(a, b, f"{prefix}{key}.")
            differences += [inner] if inner else []
        elif a != b and json.dumps(a) != json.dumps(b):
            differences.append(f"{prefix}{key}: {str(a)[:_SHOWN]} -> {str(b)[:_SHOWN]}")
    return "; ".join(differences)


def write_cell(
    mark: Path,
    row: Row,
    tracker: EvaluationTracker,
    evaluated: dict[str, Any],
    wanted: dict[str, Any],
    cost: Cost,
    facts: dict[str, Any],
) -> Cell:
    """Write what ``simple_evaluate`` returned by the harness's own tracker; the mark comes last."""
    samples = evaluated.pop("samples")
    count = sum(evaluated["n-samples"][task]["effective"] for task in samples)
    with working_folder(mark.parent, ".cell-", sole=True) as folder:
        tracker.output_path = str(folder)
        tracker.general_config_tracker.model_source = "deepen"
        tracker.general_config_tracker.model_name = row.name
        tracker.general_config_tracker.model_name_sanitized = row.slug
        tracker.save_results_aggregated(results=evaluated, samples=samples)
        written = folder / row.slug
        if not list(written.glob("results_*.json")):  # the tracker logs what goes wrong, and goes on
            raise ResultError(f"{mark.parent}: the harness could not write its results there; is the disk full?")
        for task in samples:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        names = {task: f"samples_{task}_{tracker.date_id}.jsonl" for task in samples}
        results = f"results_{tracker.date_id}.json"
        digests = {name: _written(written / name, mark.parent / name) for name in [*names.values(), results]}
        for name in digests:
            move_file(written / name, mark.parent / name)
    before = _names(mark)
    cell = Cell(mark, wanted, results, names, cost, count, facts, digests)
    data = asdict(cell)
    del data["mark"]
    write_json(mark, {"row": row.name, "fingerprint": fingerprint(wanted), **data}, sole=True)
    for name in before:
        remove_file(mark.parent / name)
    return cell


def packed(cell: Cell) -> dict[str, bytes]:
    """Return the files of a cell by name, its mark last."""
    names = [*cell.samples.values(), cell.results, cell.mark.name]
    return {name: (cell.mark.parent / name).read_bytes() for name in names}


def unpack(files: Mapping[str, bytes], mark: Path) -> None:
    """Write the files of a cell that was evaluated elsewhere; what was there before goes."""
    before = _names(mark)
    for name, data in files.items():
        write_bytes(mark.parent / name, data)
    for name in before:
        if name not in files:
            remove_file(mark.parent / name)


def _written(path: Path, place: Path) -> str:
    """Return the digest of a file that the harness wrote: on a full disk it logs an error, and goes on."""
    try:
        if path.suffix == ".jsonl":
            read_samples(path)
        else:
            read_results(path, "evaluate again.")
    except ResultError as error:
        raise ResultError(f"{place}: the harness could not write it ({error}); is the disk full?") from error
    return sha256(path)


def _names(mark: Path) -> list[str]:
    """Return the names of the files that belong to a mark; none where there is none, or it is damaged."""
    try:
        cell = _parsed(mark)
    except (ResultError, StorageError):
        return []
    return [cell.results, *cell.samples.values()]
