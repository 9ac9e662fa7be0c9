"""Texts to predict: files in, documents out, and the text that ships as the default."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval_deepen.engine.bits_per_byte import Document
from lm_eval_deepen.engine.prompts import require_text
from lm_eval_deepen.errors import RequestError, StorageError
from lm_eval_deepen.storage import read_text, reason


def default_text() -> Path:
    """Return the file of the neutral text that ships with the package."""
    return Path(__file__).resolve().parent / "calibration.txt"


def load_documents(paths: Sequence[str | Path], limit: int | None = None) -> list[Document]:
    """Return the documents of some files, at most `limit` of each.

    A ``.jsonl`` file has one object per line with ``text`` and, if the text follows something, ``context``. In any
    other file documents are separated by blank lines.

    Raises:
        RequestError: a file that cannot be read, or holds no document.
    """
    kept: list[Document] = []
    for path in map(Path, paths):
        try:
            content = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
        except StorageError as error:
            raise RequestError(
                f"text file {path} cannot be read ({reason(error)}). Give UTF-8 text or JSON lines."
            ) from error
        if path.suffix == ".jsonl":
            documents = [_from_json(line, path, n) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
        else:
            documents = [Document(part.strip()) for part in re.split(r"\n\s*\n", content) if part.strip()]
        if not documents:
            raise RequestError(f"text file {path} holds no document. Give it some text.")
        kept += documents[:limit]
    return kept


def _from_json(line: str, path: Path, number: int) -> Document:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is no JSONDecodeError
        raise RequestError(f"{path}, line {number}, is not JSON: {error}.") from error
    text, context = (entry.get("text"), entry.get("context", "")) if isinstance(entry, dict) else (None, "")
    if not isinstance(text, str) or not text.strip() or not isinstance(context, str):
        raise RequestError(
            f'{path}, line {number}: expected {{"text": "...", "context": "..."}} with some text; got {line[:80]!r}.'
        )
    try:
        require_text(context, "the context")
        require_text(text, "the text")
    except RequestError as error:
        raise RequestError(f"{path}, line {number}: {error}") from error
    return Document(text, context)


def digest(documents: Sequence[Document]) -> str:
    """Return the hex SHA-256 of documents, in order."""
    content = json.dumps([[d.context, d.text] for d in documents], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()
