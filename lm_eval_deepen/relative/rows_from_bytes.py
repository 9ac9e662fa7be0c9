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

from lm_eval_deepen.relative.matrix import SparseMatrix
from lm_eval_deepen.relative.member_view import MemberView, longest_beginning
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
        spellers = {member.spelling_fingerprint: _first_piece(member) for member in members}
        names = sorted(spellers)
        return cls(tuple(spellers[name] for name in names), tuple(names))


NO_TOKENIZERS = Tokenizers()


def _first_piece(member: MemberView) -> Callable[[bytes], bytes]:
    def first(data: bytes) -> bytes:
        token = member.first_token(data)
        return b"" if token is None else member.vocabulary.pieces[token]

    return first


def anchor_classes(vocabulary: ByteVocab, anchors: AnchorSet, tokenizers: Tokenizers = NO_TOKENIZERS) -> Tensor:
    """Return the anchor that stands for every id [V], int64; A where none does, and for ids without bytes.

    An anchor stands for itself. Another piece is replaced by the first token of its bytes under the first of
    `tokenizers` that begins them with a shorter piece, and so on until that is an anchor: a member that lacks the
    piece would begin the same bytes so. All members' tokenizers are asked, that of the piece's own member as well,
    which mostly gives the piece itself back. Where that leads nowhere, and without tokenizers, it is the longest
    anchor that the piece begins with.
    """
    index = {piece: i for i, piece in enumerate(anchors.pieces)}

    def stands_for(piece: bytes) -> int:
        while piece not in index:
            shorter = next((begin for first in tokenizers.first if (begin := first(piece)) and begin != piece), b"")
            if not piece.startswith(shorter) or not shorter:
                return index.get(longest_beginning(piece, index), len(index))
            piece = shorter
        return index[piece]

    return torch.tensor([stands_for(piece) if piece else len(index) for piece in vocabulary.pieces])


def class_matrix(classes: Tensor, described: Tensor, num_anchors: int) -> SparseMatrix:
    """Return one-hot rows [V, A + 1] by `anchor_classes` [V]; the last column is of pieces that no anchor stands for.

    Rows of ids that are not `described` [V] (bool) are zero.
    """
    values = described.to(torch.float32)[:, None]
    indices = torch.where(described, classes, 0)[:, None]
    return SparseMatrix(values, indices, num_anchors + 1, torch.zeros(len(classes)))
