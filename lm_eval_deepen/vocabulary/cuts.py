"""Places where a text can be cut without changing its tokens: before a space after a letter or digit.

Cutting there makes the tokens of a long text the concatenation of its segments' tokens, so that only the
last segment is encoded again when the text grows. Letters and digits rather than any visible character:
real vocabularies have pieces such as ``> </``, which would forbid every cut.
"""

from __future__ import annotations

import re

from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

SAFE_CUT = re.compile(r" (?<=[^\W_] )")


def safe_cuts(text: str) -> list[int]:
    """Return every position of a space that follows a letter or digit, ascending."""
    return [cut.start() for cut in SAFE_CUT.finditer(text)]


def last_safe_cut(text: str) -> int:
    """Return the last position of a space that follows a letter or digit, 0 where there is none."""
    at = text.rfind(" ")
    while at > 0:
        if text[at - 1].isalnum():
            return at
        at = text.rfind(" ", 0, at)
    return 0


def safe_segments(text: str) -> list[str]:
    """Split a text at every safe cut; the segments join to the text. An empty text has none."""
    if not text:
        return []
    edges = [0, *safe_cuts(text), len(text)]
    return [text[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def safe_cut_allowed(vocab: ByteVocab) -> bool:
    """Return whether no piece has a space after a letter, a digit or a part of a character.

    Then no token spans a safe cut, and both sides are tokenised independently.
    """
    for piece in vocab.pieces:
        if b" " not in piece[1:]:
            continue
        text = piece.decode("utf-8", errors="surrogateescape")
        for at in range(1, len(text)):
            before = text[at - 1]
            # a lone byte may end a letter that began in the piece before
            if text[at] == " " and (before.isalnum() or "\udc80" <= before <= "\udcff"):
                return False
    return True
