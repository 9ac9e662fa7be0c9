"""What a member's token stands for in a fused distribution that is a mixture of the members' own.

Where rows are one-hot and averaged linearly, p = c + (1 - c_0) sum_m w_m sum_e q_m(e) p_0(. | e). c are the main
member's control pieces, with the mass c_0. q_m(e) is what member m, given text or end of text, says of the event e: an
anchor, the pieces with the same bytes, an end of text. Within an event the main member decides. So a piece can be drawn
by drawing a member, then its token, and last a piece of that token's event.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_deepen.fusion._union import unite_vocabularies
from lm_eval_deepen.relative.matrix import OneHotOperator
from lm_eval_deepen.relative.support import Side
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab


@dataclass(frozen=True, eq=False)
class Events:
    """The events of E kinds, and the pieces that stand for them."""

    pieces: Sequence[bytes]  # the pieces of a text [K], as bytes
    # for every member, the event of each id [V_m], int64; -1 for ids that are neither text nor an end of text
    of: tuple[Tensor, ...]
    # of every event the piece that it most likely is [E], -1 where there is none. Then all is drawn again
    first: Tensor
    # the main member's control pieces [n], which keep their probability; None where only text and ends are drawn, and
    # each event is one piece whatever the main member says
    control: Tensor | None
    # the end of text, where the mass of text without a piece goes to other text alone; None where ends of text have a
    # share in it
    end: int | None = None


def of_anchors(vocabulary: ByteVocab, sides: Sequence[Side]) -> Events | None:
    """Return the events of one-hot rows: anchors and the end of text; None for other rows."""
    of = []
    end = sides[0].matrix.shape[1] + 1  # one more is the class of a row without an anchor
    for side in sides:
        operator = side.matrix.full()
        if not isinstance(operator, OneHotOperator):
            return None
        own = torch.where(side.mask == 0, operator.classes, -1)
        own[side.eos] = end if len(sides[0].eos) else -1
        of.append(own)
    ids, known = torch.arange(len(of[0])), of[0] >= 0
    first = torch.full((end + 1,), len(ids)).scatter_reduce_(0, of[0][known], ids[known], "amin")
    first[of[0][sides[0].anchor_ids]] = sides[0].anchor_ids
    return Events(vocabulary.pieces, tuple(of), first.masked_fill_(first == len(ids), -1), sides[0].control, end)


def of_union(vocabularies: Sequence[ByteVocab]) -> Events:
    """Return the events of a mixture without a main member: the byte strings of all vocabularies, and the end of text.

    Their pieces have ids behind the main member's, which does not keep its own tokens then.
    """
    union, size = unite_vocabularies(vocabularies), len(vocabularies[0])
    pieces = union.vocabulary.pieces
    first = torch.arange(len(pieces)) + size
    for end in union.vocabulary.eos:
        first[end] = end
    return Events((*vocabularies[0].pieces, *pieces), union.columns, first, None)
