"""Which id of the target a source's id stands for: equal bytes, equal role, or the nearest piece by edit distance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lm_eval_deepen.fusion._edit import nearest
from lm_eval_deepen.vocabulary import ByteVocab

NONE, BYTES, ROLE, NEAREST = range(4)
KINDS = {NONE: "nothing", BYTES: "equal bytes", ROLE: "equal role", NEAREST: "edit distance"}
Roles = Mapping[str, int]


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """Where the ids of a source go."""

    target: NDArray[np.int64]  # the target's id, -1 for none [V_s]
    kind: NDArray[np.int8]  # `BYTES`, `ROLE` or `NEAREST`; `NONE` where there is no target [V_s]


def match(
    source: ByteVocab,
    target: ByteVocab,
    occurring: Iterable[int],
    source_roles: Roles | None = None,
    target_roles: Roles | None = None,
) -> VocabularyMap:
    """Match a source's vocabulary to the target's, on bytes (FuseLLM, section 3.2, on surfaces).

    Text never goes to a control piece, nor a control piece to text. A piece that the target lacks goes to the nearest
    one by edit distance over bytes, at equal distances to the lowest id; only for ids that occur, since the search
    compares with the whole vocabulary. Of several target ids with the same bytes it is the lowest that is not a
    ``<0xNN>`` piece, which a tokenizer would not use.

    Args:
        source: the source's pieces.
        target: the target's pieces.
        occurring: the source ids that need a target.
        source_roles: control ids by role (``bos``, ``pad``, ...); end of text is a role of every vocabulary.
        target_roles: the target's.
    """
    to = np.full(len(source), -1, dtype=np.int64)
    kind = np.zeros(len(source), dtype=np.int8)
    if source.fingerprint == target.fingerprint:
        used = [i for i in range(len(source)) if i not in source.unused]
        to[used], kind[used] = used, BYTES
        return VocabularyMap(to, kind)
    places = {piece: target.preferred(ids) for piece, ids in target.ids_of.items()}
    for piece, ids in source.ids_of.items():
        if piece in places:
            to[list(ids)], kind[list(ids)] = places[piece], BYTES
    for role, own in _with_end(source, source_roles):
        for other_role, other in _with_end(target, target_roles):
            if role == other_role and own in source.control and to[own] < 0:
                to[own], kind[own] = other, ROLE
    missing = [i for i in sorted(set(occurring)) if to[i] < 0 and source.pieces[i]]
    candidates = sorted(places, key=lambda piece: places[piece])
    if missing and candidates:
        queries = sorted({source.pieces[i] for i in missing})
        closest = dict(zip(queries, nearest(queries, candidates)[0].tolist(), strict=True))
        for i in missing:
            to[i], kind[i] = places[candidates[closest[source.pieces[i]]]], NEAREST
    return VocabularyMap(to, kind)


def _with_end(vocab: ByteVocab, roles: Roles | None) -> list[tuple[str, int]]:
    """Return roles and their control ids, end of text first: an id that has two roles ends texts."""
    ends = [("eos", i) for i in vocab.eos]
    return ends + [(role, i) for role, i in (roles or {}).items() if i in vocab.control and role != "eos"]
