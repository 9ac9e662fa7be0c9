"""The harness's caches as one ensemble's own: of responses (``--use_cache``) and of requests (``--cache_requests``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lm_eval_deepen.distributed import Ranks
from lm_eval_deepen.errors import CacheError

if TYPE_CHECKING:
    from sqlitedict import SqliteDict

    from lm_eval_deepen.member import Member

FINGERPRINT_KEY = "lm_eval_deepen fingerprint"


def claim(stored: SqliteDict, fingerprint: str, ranks: Ranks) -> None:
    """Tie a cache database to an ensemble: the harness's keys hold the request alone.

    Every process of a run has its own database. All of them are brought to hold the same answers, since the
    harness asks for what its process does not have, and the processes answer together.

    Raises:
        CacheError: some process's database belongs to another ensemble; raised in all of them.
    """
    for objection in ranks.gather(_objection(stored, fingerprint)):
        if objection:
            raise CacheError(objection)
    stored[FINGERPRINT_KEY] = fingerprint
    stored.commit()  # on disk, whatever the database's own habit
    if ranks.count > 1:
        _level(stored, ranks)


def _objection(stored: SqliteDict, fingerprint: str) -> str:
    found = stored.get(FINGERPRINT_KEY)
    if found == fingerprint or (found is None and not len(stored)):
        return ""
    whose = f"the ensemble with fingerprint {found}" if found else "a model that left no fingerprint"
    return (
        f"the response cache {stored.filename} holds answers of {whose}; this ensemble has {fingerprint}. "
        "Give --use_cache another path, or delete the file."
    )


def _level(stored: SqliteDict, ranks: Ranks) -> None:
    """Give every process the answers that some process has: a killed run leaves each with its own."""
    held = ranks.gather(set(stored.keys()))
    everywhere = set.intersection(*held)
    before = set().union(*held[: ranks.index])
    for answers in ranks.gather({key: stored[key] for key in held[ranks.index] - everywhere - before}):
        stored.update({key: value for key, value in answers.items() if key not in held[ranks.index]})
    stored.commit()


def rendering_digest(members: Sequence[Member]) -> str:
    """Return a short digest of what decides how members render a conversation, beside their tokenizers' names."""
    facts = [[getattr(member.lm.tokenizer, "chat_template", None), member.lm.chat_template_args] for member in members]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]
