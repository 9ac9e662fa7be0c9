"""The union of the members' vocabularies, the main member's pieces first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_deepen.fusion._rows import text_ids
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab


@dataclass(frozen=True)
class Union:
    """The union vocabulary and each member's place in it."""

    # the main member's pieces under its own ids, then the other members' further pieces of text, each once, in the
    # order of the members and their ids [K]
    vocabulary: ByteVocab
    # for every member, the column of an id, or -1: control pieces, unused ids [V_m]. Ids that stand for one event
    # (pieces with the same bytes, all EOS ids) share the column of the main member's first
    columns: tuple[Tensor, ...]


def unite_vocabularies(vocabularies: Sequence[ByteVocab]) -> Union:
    """Return the union of the vocabularies, compared as bytes: "▁café" of one is "ĠcafÃ©" of another."""
    main = vocabularies[0]
    places = {piece: ids[0] for piece, ids in text_ids(main).items()}
    pieces = list(main.pieces)
    columns = []
    for vocabulary in vocabularies:
        column = [-1] * len(vocabulary)
        own = text_ids(vocabulary)
        for piece in sorted(own.keys() - places.keys(), key=lambda piece: own[piece][0]):
            places[piece] = len(pieces)
            pieces.append(piece)
        for piece, ids in own.items():
            for i in ids:
                column[i] = places[piece]
        for i in vocabulary.eos if main.eos else ():
            column[i] = min(main.eos)
        columns.append(torch.tensor(column, dtype=torch.int64))
    union = ByteVocab(tuple(pieces), main.control, main.unused, main.eos, main.byte_fallback)
    return Union(union, tuple(columns))
