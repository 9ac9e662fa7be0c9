"""Reads traces of steps, as ``trace: true`` leaves them: what every member said, document by document.

`docs/trace.md` describes the files. A run that was killed and went on from its response cache left several; together
they have every document.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lm_eval_deepen.errors import ResultError
from lm_eval_deepen.storage import reason

SCHEMA = "lm_eval_deepen trace 1"
NAME = re.compile(r"trace_(?P<task>.+)_(?P<date>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?)(_rank\d+)?\.jsonl\.gz$")


Key = tuple[Any, ...]  # doc_id, doc_hash, request, repeat, type


class Documents:
    """Documents of traces, packed, each parsed where it is asked for: those of a long run take as much as its file.

    Attributes:
        keys: what tells documents apart, one each.
        packed: their lines, compressed.
    """

    def __init__(self, keys: Iterable[Key] = (), packed: Iterable[bytes] = ()) -> None:
        self.keys, self.packed = list(keys), list(packed)

    def append(self, document: Mapping[str, Any], line: str) -> None:
        """Add a document, whose line this is."""
        names = ("doc_id", "doc_hash", "request", "repeat", "type")
        self.keys.append(tuple(document.get(name) for name in names))
        self.packed.append(zlib.compress(line.encode(), 1))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, at: int) -> Mapping[str, Any]:
        document: Mapping[str, Any] = json.loads(zlib.decompress(self.packed[at]))
        return document


@dataclass(frozen=True)
class TraceFile:
    """One file."""

    path: Path  # where it is
    head: Mapping[str, Any]  # its first line: task, fingerprint, method and members
    documents: Documents  # its other lines, a request each
    cut: bool = False  # whether its end is missing, as where the process was killed while it wrote

    @property
    def date(self) -> str:
        """When its run began, as its name says; empty where that is not its name."""
        match = NAME.match(self.path.name)
        return "" if match is None else match["date"]


def read_trace(path: Path) -> TraceFile:
    """Read one file. What was written last may be cut off: the whole lines before it are read."""
    head: dict[str, Any] | None = None
    documents, cut = Documents(), False
    for number, (line, cut) in enumerate(_lines(path), 1):
        if cut:
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ResultError(
                f"{path}:{number}: not a line of JSON ({error}); the file is damaged, run again"
            ) from error
        if not isinstance(record, dict):
            raise ResultError(f"{path}:{number}: not a line of a trace; the file is damaged, run again")
        if head is None:
            head = record
            if head.get("schema") != SCHEMA:
                raise ResultError(
                    f"{path}: its schema is {head.get('schema')!r:.60}; this version reads {SCHEMA!r}. Read it with "
                    "the version that wrote it, or run again"
                )
            members = head.get("members")
            if not isinstance(members, list) or any(not isinstance(member, dict) for member in members):
                raise ResultError(f"{path}:1: names no members; the file is damaged, run again")
        elif (odd := _odd(record, len(head["members"]))) is not None:
            raise ResultError(f"{path}:{number}: {odd}; the file is damaged, run again")
        else:
            documents.append(record, line)
    if head is None:
        raise ResultError(f"{path}: holds no trace; run again with trace=true")
    return TraceFile(path, head, documents, cut)


def _lines(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the lines, and at a cut-off end an empty one with True."""
    try:
        bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, disable=None, delay=2)
        with path.open("rb") as raw, gzip.open(raw) as file, bar:
            while True:
                bar.update(raw.tell() - bar.n)
                try:
                    line = file.readline()
                except (EOFError, gzip.BadGzipFile, zlib.error):
                    yield "", True
                    return
                if not line:
                    return
                yield (line.decode(), False) if line.endswith(b"\n") else ("", True)
    except OSError as error:
        raise ResultError(f"{path}: cannot be read ({reason(error)}); run again with trace=true") from error
    except UnicodeDecodeError as error:
        raise ResultError(f"{path}: holds what is no UTF-8 ({error}); the file is damaged, run again") from error


def _odd(document: Mapping[str, Any], members: int) -> str | None:
    """Return what of a document is of another type than a trace has it."""
    steps = document.get("steps")
    if not isinstance(steps, list) or type(document.get("doc_id")) not in (int, type(None)):
        return "doc_id or steps are missing"
    places = [document.get(name) for name in ("request", "repeat")]
    texts = [document.get(name) for name in ("doc_hash", "type")]
    if any(type(one) not in (int, type(None)) for one in places) or any(
        not isinstance(one, (str, type(None))) for one in texts
    ):
        return "doc_hash, request, repeat or type is of another type"
    for at, step in enumerate(steps):
        said = step.get("members") if isinstance(step, dict) else None
        if not isinstance(said, list) or len(said) != members or "piece" not in step:
            return f"step {at} has no piece, or not {members} members"
        tops = [one.get("top", []) if isinstance(one, dict) else None for one in said]
        if any(not isinstance(top, list) or any(not isinstance(p, list) or len(p) != 2 for p in top) for top in tops):
            return f"step {at} has a member that is none"
    return None


def find_traces(folder: Path, notes: list[str] | None = None) -> dict[str, list[TraceFile]]:
    """Return the traces under a folder by task, the latest run of each: files of one fingerprint, the newest first.

    Traces of other fingerprints are left out, which is added to `notes`.
    """
    if not folder.exists():
        raise ResultError(f"{folder}: no such folder; give what --output_path was given to lm_eval")
    paths = [folder] if folder.is_file() else sorted(folder.rglob("trace_*.jsonl.gz"))
    dated = sorted(((match["date"], path) for path in paths if (match := NAME.match(path.name))), reverse=True)
    if not dated:
        raise ResultError(
            f"{folder}: holds no trace_<task>_<date>.jsonl.gz; evaluate with trace=true in --model_args and "
            "--output_path. Answers that come from a response cache (--use_cache) have no steps"
        )
    by_task: dict[str, list[TraceFile]] = {}
    for _, path in dated:
        file = read_trace(path)
        others = by_task.setdefault(str(file.head.get("task")), [])
        if not others or file.head.get("fingerprint") == others[0].head.get("fingerprint"):
            others.append(file)
        elif notes is not None:
            notes.append(left_out(file))
    return by_task


def left_out(file: TraceFile) -> str:
    """Return what is said of a trace by another ensemble than that which was traced last."""
    return f"{file.path}: left out, it was traced with other options or members; give this file itself"


def documents_of(files: Sequence[TraceFile]) -> Documents:
    """Return the documents of the files of a task, by number; of one that several have, the newest file's."""
    first: dict[Key, bytes] = {}
    for file in files:
        for key, packed in zip(file.documents.keys, file.documents.packed, strict=True):
            first.setdefault(key, packed)
    keys = sorted(first, key=lambda key: (key[0] or 0, key[2] or 0, key[3] or 0))
    return Documents(keys, [first[key] for key in keys])


def text_of(piece: Any) -> str:
    """Return a piece as text: bytes that are no text by their values, a control piece by its name."""
    if isinstance(piece, str):
        return piece
    if isinstance(piece, Mapping) and isinstance(piece.get("bytes"), str):
        return "".join(f"\\x{piece['bytes'][i : i + 2]}" for i in range(0, len(piece["bytes"]), 2))
    return f"⟨{piece.get('control')}⟩" if isinstance(piece, Mapping) else str(piece)


def bytes_of(piece: Any) -> bytes:
    """Return a piece's bytes; none of a control piece."""
    if isinstance(piece, str):
        return piece.encode("utf-8", "replace")
    try:
        return bytes.fromhex(piece["bytes"])
    except (TypeError, ValueError, LookupError):
        return b""
