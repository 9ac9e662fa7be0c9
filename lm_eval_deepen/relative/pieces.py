"""Rows from bytes: which anchor stands for the event "the next bytes are those of this piece".

Such rows are one-hot, need no embeddings and no temperature, and divide every vocabulary into the same classes.
The average of distributions over classes is exact, and so is the way back: a class's mass is shared among the
main member's pieces of that class in proportion to its own probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.relative.matrix import SparseMatrix
from lm_eval_deepen.relative.member_view import MemberView
from lm_eval_deepen.vocabulary.anchors import AnchorSet
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of several members, in an order that does not depend on which of them is the main one."""

    # per tokenizer, the bytes of the first token of some bytes; b"" where it cannot spell them
    first: tuple[Callable[[bytes], bytes], ...] = ()
    fingerprints: tuple[str, ...] = ()  # of what `first` does

    @classmethod
    def of(cls, members: Sequence[MemberView]) -> Tokenizers:
        """Return those of some members; a member without one begins bytes with its longest fitting piece."""
        spellers: dict[str, Callable[[bytes], bytes]] = {}
        for member in members:
            spelling = member.spelling
            own = "longest" if spelling is None else spelling.fingerprint
            spellers[f"{member.vocabulary.fingerprint}:{own}"] = _first_piece(member)
        names = sorted(spellers)
        return cls(tuple(spellers[name] for name in names), tuple(names))


NO_TOKENIZERS = Tokenizers()


def _first_piece(member: MemberView) -> Callable[[bytes], bytes]:
    vocabulary, spelling = member.vocabulary, member.spelling
    longest = max(map(len, vocabulary.ids_of), default=0)

    def by_tokenizer(data: bytes) -> bytes:
        assert spelling is not None
        try:
            ids = spelling.encode(data)
        except VocabularyError:  # a text that this tokenizer would alter; no member is ever given it
            return b""
        return vocabulary.pieces[ids[0]] if ids else b""

    def by_length(data: bytes) -> bytes:
        beginnings = (data[:end] for end in range(min(len(data), longest), 0, -1))
        return next((part for part in beginnings if part in vocabulary.ids_of), b"")

    return by_length if spelling is None else by_tokenizer


def anchor_classes(vocabulary: ByteVocab, anchors: AnchorSet, tokenizers: Tokenizers = NO_TOKENIZERS) -> Tensor:
    """Return the anchor that stands for every id [V], int64; A where none does, and for ids without bytes.

    An anchor stands for itself. Another piece is replaced by the first token of its bytes under the first of
    `tokenizers` that begins them with a shorter piece, and so on until that is an anchor: a member that lacks the
    piece would begin the same bytes so. All members' tokenizers are asked, that of the piece's own member as well,
    which mostly gives the piece itself back. Where that leads nowhere, and without tokenizers, it is the longest
    anchor that the piece begins with.
    """
    index = {piece: i for i, piece in enumerate(anchors.pieces)}
    longest = max(map(len, anchors.pieces), default=0)

    def prefix(piece: bytes) -> int:
        lengths = range(min(longest, len(piece)), 0, -1)
        return next((index[piece[:n]] for n in lengths if piece[:n] in index), len(index))

    def stands_for(piece: bytes) -> int:
        while piece not in index:
            shorter = next((begin for first in tokenizers.first if (begin := first(piece)) and begin != piece), b"")
            if not piece.startswith(shorter) or not shorter:
                return prefix(piece)
            piece = shorter
        return index[piece]

    return torch.tensor([stands_for(piece) if piece else len(index) for piece in vocabulary.pieces])


def class_matrix(classes: Tensor, described: Tensor, num_anchors: int) -> SparseMatrix:
    """Return one-hot rows [V, A + 1]: the last column stands for pieces that no anchor stands for.

    Args:
        classes: what `anchor_classes` returns [V].
        described: ids with a row [V] (bool); the others' rows are zero.
        num_anchors: A.
    """
    values = described.to(torch.float32)[:, None]
    indices = torch.where(described, classes, 0)[:, None]
    return SparseMatrix(values, indices, num_anchors + 1, torch.zeros(len(classes)))
