"""Documents that a tuned ensemble was fitted on, and the refusal to evaluate it on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_deepen.config import EnsembleConfig
from lm_eval_deepen.config.yaml_files import read_yaml
from lm_eval_deepen.errors import ConfigError

KEY = "evidence"  # of an ensemble file: what speaks for its options
_PREFIX = 16  # hexadecimal digits kept of a document's hash: 64 bits


@dataclass(frozen=True)
class Tuned:
    """What an ensemble was fitted on."""

    source: str  # the file that records it, or a split, for messages
    documents: frozenset[str]  # the first 16 digits of the harness's ``doc_hash`` of every document


def kept_digits(digest: str) -> str:
    """Return what is kept of a document's ``doc_hash``."""
    return digest[:_PREFIX]


def record(config: EnsembleConfig, hashes: Iterable[str], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of the key `evidence` of an ensemble file that was fitted on documents with these hashes."""
    kept = sorted({kept_digits(digest) for digest in hashes})
    return {**about, "fingerprint": config.fingerprint(), "documents_digest": _digest(kept), "document_hashes": kept}


def read_tuned(path: Path, config: EnsembleConfig) -> Tuned | None:
    """Return what an ensemble file records of its tuning; None where it was not tuned on documents of tasks.

    Raises:
        ConfigError: a damaged record, or one of another ensemble: the file was edited after it was tuned.
    """
    raw = read_yaml(path)
    record = raw.get(KEY) if isinstance(raw, Mapping) else None
    if not isinstance(record, Mapping) or not {"document_hashes", "documents_digest"} & record.keys():
        return None
    documents = record.get("document_hashes")
    if not isinstance(documents, list) or _digest(documents) != record.get("documents_digest"):
        raise ConfigError(
            f"{path}: its record `{KEY}` is damaged: the documents it lists are not those of documents_digest, so that "
            "nobody can say which documents it was fitted on; tune it again"
        )
    if record.get("fingerprint") != config.fingerprint():
        raise ConfigError(
            f"{path}: its record `{KEY}` is of another ensemble (fingerprint {str(record.get('fingerprint'))[:12]}, "
            f"this one has {config.fingerprint()[:12]}): members or options changed since; tune it again, or "
            f"remove `{KEY}`"
        )
    return Tuned(str(path), frozenset(documents))


def _digest(documents: Sequence[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, documents)).encode()).hexdigest()


def refuse_overlap(what: str, tuned: Iterable[str], task: str, evaluated: Sequence[str]) -> None:
    """Raise ConfigError where an ensemble would be evaluated on documents it was fitted on."""
    known = {kept_digits(digest) for digest in tuned}
    if count := sum(kept_digits(digest) in known for digest in evaluated):
        raise ConfigError(
            f"{what} was fitted on {count} of the {len(evaluated)} documents of task {task!r}: a score on them says "
            "nothing about others. Tune on another split, or evaluate other documents"
        )
