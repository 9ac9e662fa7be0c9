"""Traces on the disk: one file a task and run, beside the harness's samples, appended to as answers come.

`docs/trace.md` says what is in it. Of a run that is killed, the documents that were answered are there; the run that
goes on from its response cache writes a file of its own with the others, and whoever reads takes both.
"""

from __future__ import annotations

import functools
import gzip
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval_deepen
from lm_eval_deepen.config import EnsembleConfig
from lm_eval_deepen.engine.following import Generation, Job
from lm_eval_deepen.engine.prompts import Span
from lm_eval_deepen.engine.scoring import SpanScore
from lm_eval_deepen.engine.steps import TOP, Piece, Step
from lm_eval_deepen.errors import ConfigError, StorageError
from lm_eval_deepen.harness.command import locals_of
from lm_eval_deepen.harness.tasks import doc_hashes
from lm_eval_deepen.harness.unanswered import requests_of_the_run
from lm_eval_deepen.results.traces import SCHEMA
from lm_eval_deepen.storage import append_bytes, check_folder

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)

LONGEST = 64  # characters of a piece that are kept
AT_ONCE = 1 << 20  # characters that are compressed together
# Of a step, in bytes: what JSON takes beside the members, and what a member takes beside its pieces; rounded up.
STEP_BYTES, MEMBER_BYTES, PIECE_BYTES = 220, 90, 28
COMPRESSED = 5  # how many times smaller a trace is on the disk
MOST = 6 * LONGEST + 16  # bytes of a piece: JSON spells a control character with 6


def folder_of(config: EnsembleConfig) -> Path | None:
    """Return the folder of an ensemble's traces, as far as it is known before the harness has said how it calls it."""
    if config.trace is None:
        return None
    if config.trace_dir is not None:
        where = Path(config.trace_dir)
        try:
            check_folder(where)
        except StorageError as error:
            raise ConfigError(f"trace_dir: {error}", key="trace_dir") from error
        return where
    folder = samples_folder()
    if folder is None:
        raise ConfigError(
            f"trace={str(config.trace).lower()} has no place to write to: give --output_path DIR (and --log_samples, "
            "whose samples the trace belongs to), or trace_dir=DIR",
            key="trace",
        )
    return folder


def samples_folder() -> Path | None:
    """Return where the harness is going to write samples, as far as it has said; None where it will not."""
    tracker = (locals_of("simple_evaluate") or {}).get("evaluation_tracker")
    if tracker is None or not tracker.output_path:
        return None
    path = Path(tracker.output_path)
    if path.suffix == ".json":
        return path.parent
    named = getattr(tracker.general_config_tracker, "model_name_sanitized", None)
    return path / str(named) if named else path


class StepFiles:
    """Writes the steps of a run's requests."""

    def __init__(self, config: EnsembleConfig, rank: int = 0, ranks: int = 1) -> None:
        """Write what `config.trace` asks for, in process `rank` of `ranks`."""
        self.config, self.rank, self.ranks = config, rank, ranks
        self.started = datetime.now().isoformat().replace(":", "-")
        self.wanted: set[tuple[str, int | None]] | None = None  # documents; None for all
        self.files: dict[str, Path] = {}
        self.folder: Path | None = None  # known where the harness has begun to ask
        self.lines: dict[str, list[str]] = defaultdict(list)
        self.size = 0  # characters that wait
        self.seen: Counter[tuple] = Counter()  # how often each request was asked
        self.asked: list[tuple[Instance, int]] = []  # those of a call, and how often each was asked before

    def choose(self, requests: Sequence[Instance]) -> None:
        """Choose the documents to trace: all, or the first of every task, of which some may have cached answers."""
        self.folder = self.folder or folder_of(self.config)
        if self.config.trace is True:
            return
        by_task: dict[str, set[int]] = defaultdict(set)
        for request in requests:
            by_task[_task(request)].add(_place(request))
        assert self.config.trace is not None
        self.wanted = {(task, at) for task, places in by_task.items() for at in sorted(places)[: self.config.trace]}

    def mark(self, request: Instance, prepared: Any) -> Any:
        """Return what the engine is given for a request, marked where its steps are wanted."""
        if self.wanted is not None and (_task(request), _place(request)) not in self.wanted:
            return prepared
        if isinstance(prepared, tuple):
            job, until = prepared
            return replace(job, traced=True), until
        if isinstance(prepared, list):
            return [replace(span, traced=True) if isinstance(span, Span) else span for span in prepared]
        return replace(prepared, traced=True) if isinstance(prepared, Span) else prepared

    def announce(self, kind: str, requests: Sequence[Instance], prepared: Sequence[Any]) -> None:
        """Take up the requests of a call; say how large their trace becomes at most, and where it goes."""
        self.asked = []
        for request in requests:
            at = (_task(request), kind, request.doc_id, request.idx)
            self.asked.append((request, self.seen[at]))
            self.seen[at] += 1
        steps = sum(_steps(made) for made in prepared)
        if not steps:
            return
        members = len(self.config.members)
        usual = steps * (STEP_BYTES + members * (MEMBER_BYTES + TOP * PIECE_BYTES))
        most = steps * (STEP_BYTES + 2 * MOST + members * (MEMBER_BYTES + TOP * (PIECE_BYTES + MOST)))
        log.warning(
            "trace: %s has %s%d steps: about %s compressed, and never more than %s, in %s.",
            kind,
            "at most " if kind == "generate_until" else "",
            steps,
            _megabytes(usual / COMPRESSED),
            _megabytes(most),
            self.folder or folder_of(self.config),
        )

    def add_text(self, index: int, generation: Generation) -> None:
        """Add a generated text, of a request by its place among those that were taken up."""
        if generation.steps:
            self._add(index, [[_step(step) for step in generation.steps]], reason=generation.reason)

    def add_scores(self, index: int, windows: Sequence[SpanScore], logp: float) -> None:
        """Add a text that was scored, in one window or several; `logp` is its natural-log probability."""
        if any(window.steps for window in windows):
            steps = [[_step(window.steps[at]) for at in sorted(window.steps)] for window in windows]
            self._add(index, steps, greedy=all(window.greedy for window in windows), logp=_logp(logp))

    def _add(self, index: int, windows: Sequence[Sequence[dict]], **facts: Any) -> None:
        request, repeat = self.asked[index]
        task = _task(request)
        record = {
            "doc_id": request.doc_id,
            "doc_hash": _doc_hash(request),
            "request": request.idx,
            "repeat": repeat,
            "type": request.request_type,
            **facts,
            "windows": [len(window) for window in windows],
            "steps": [step for window in windows for step in window],
        }
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        self.lines[task].append(line)
        self.size += len(line)
        if self.size > AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Bring what waits to the disk."""
        for task in list(self.lines):
            lines = self.lines[task]
            if task not in self.files:
                folder = self.folder = self.folder or folder_of(self.config)
                assert folder is not None
                end = f"_rank{self.rank}" if self.ranks > 1 else ""
                name = task.replace("%", "%25").replace("/", "%2F")  # no two tasks share a name
                self.files[task] = folder / f"trace_{name}_{self.started}{end}.jsonl.gz"
                members = [{"name": member.name, "pretrained": member.pretrained} for member in self.config.members]
                head = {
                    "schema": SCHEMA,
                    "task": task,
                    "fingerprint": self.config.fingerprint(),
                    "method": self.config.method,
                    "members": members,
                    "started": self.started,
                    "lm_eval_deepen": lm_eval_deepen.__version__,
                }
                lines.insert(0, json.dumps(head, ensure_ascii=False))
            text = "".join(line + "\n" for line in lines)
            append_bytes(self.files[task], gzip.compress(text.encode("utf-8", "backslashreplace"), 6, mtime=0))
            del self.lines[task]
        self.size = 0


def choosing(method: Callable[..., list]) -> Callable[..., list]:
    """Make a request method of the model trace the documents that are wanted, and bring all of it to the disk."""

    @functools.wraps(method)
    def answer(self: Any, requests: list[Instance], disable_tqdm: bool = False) -> list:
        if self.step_files is None:
            return method(self, requests, disable_tqdm=disable_tqdm)
        self.step_files.choose(requests_of_the_run().get(method.__name__, requests))
        try:
            return method(self, requests, disable_tqdm=disable_tqdm)
        finally:
            self.step_files.flush()

    return answer


def _task(request: Instance) -> str:
    return request.task_name or "requests"


def _place(request: Instance) -> int:
    return request.idx if request.doc_id is None else request.doc_id


def _doc_hash(request: Instance) -> str | None:
    try:
        return doc_hashes([request.doc])[0]
    except (TypeError, ValueError):  # what the harness could not write either
        return None


def _steps(prepared: Any) -> int:
    if isinstance(prepared, tuple):
        return prepared[0].max_new + 1 if isinstance(prepared[0], Job) and prepared[0].traced else 0
    spans = prepared if isinstance(prepared, list) else [prepared]
    return sum(len(span.target) for span in spans if isinstance(span, Span) and span.traced)


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.3g} MB"


def _step(step: Step) -> dict[str, Any]:
    """Return a step as `docs/trace.md` describes it."""
    return {
        "piece": _piece(step.piece),
        "logp": _logp(step.logp),
        "entropy": round(step.entropy, 4),
        **({"best": _piece(step.best)} if step.best.id != step.piece.id else {}),
        **({"changed": True} if step.changed else {}),
        **({"skipped": step.skipped} if step.skipped else {}),
        "members": [
            {"abstained": True}
            if member.abstained
            else {
                "weight": round(member.weight, 6),
                "top": [[_piece(piece), float(f"{share:.4g}")] for piece, share in member.top],
                "chosen": None if member.chosen is None else float(f"{member.chosen:.4g}"),
            }
            for member in step.members
        ],
    }


def _logp(value: float) -> float | None:
    """Return a log-probability; null in JSON, which has no infinity, where the probability is 0."""
    return round(value, 6) if math.isfinite(value) else None


def _piece(piece: Piece) -> str | dict[str, str]:
    """Return a piece: its text, its bytes in hexadecimal where these are no text, or the name of a control piece."""
    if piece.control:
        return {"control": _short(piece.control)}
    try:
        text = piece.data.decode()
    except UnicodeDecodeError:
        return {"bytes": piece.data[:LONGEST].hex()}
    return _short(text)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
