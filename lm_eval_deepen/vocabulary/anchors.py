"""Anchors: the byte strings that every member has a piece for (DeePEn, arXiv 2404.12715, section 3.1).

The published code compares strings instead, "Ġ" as "▁". For SmolLM2 and Gemma 3 that makes 45,589 pairs, 158 of which
are different bytes; 46,145 byte strings are common.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab


@dataclass(frozen=True)
class AnchorSet:
    """Byte strings common to all members, sorted; an anchor's index is its place here."""

    pieces: tuple[bytes, ...]  # the anchors [A], ascending, without repetition
    max_anchors: int | None = None  # size limit of the subset that was taken, None where all common pieces are anchors
    seed: int = 0  # seed of the subset, 0 where all common pieces are anchors

    def __post_init__(self) -> None:
        """Refuse an order or a repetition that would give one set two identities."""
        if any(a >= b for a, b in zip(self.pieces, self.pieces[1:], strict=False)) or b"" in self.pieces:
            raise VocabularyError(
                "anchors must be non-empty, strictly ascending byte strings; sort them and drop repetitions."
            )

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the anchors, each with its length, and of the subset's parameters."""
        digest = hashlib.sha256(repr((len(self.pieces), self.max_anchors, self.seed)).encode())
        for piece in self.pieces:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        return digest.hexdigest()


def find_anchors(
    vocabs: Sequence[ByteVocab],
    *,
    max_anchors: int | None = None,
    seed: int = 0,
    min_anchors: int = 16,
    names: Sequence[str],
) -> AnchorSet:
    """Return the byte strings that all vocabularies share, or a seeded, hashed subset of them.

    Control pieces and unused ids have no bytes and never anchor. The subset is the same on every machine:
    the pieces with the lowest SHA-256 of seed and piece. Where it is all of them, its parameters do not
    count: the anchors are the same, and so is their fingerprint. `names`: the members', for messages.

    Raises:
        VocabularyError: too few common pieces, or `max_anchors` below `min_anchors`.
    """
    if not vocabs or len(names) != len(vocabs):
        raise VocabularyError(
            f"anchors need one name per vocabulary, at least one: got {len(names)} names for {len(vocabs)}."
        )
    if max_anchors is not None and max_anchors < min_anchors:
        raise VocabularyError(
            f"max_anchors is {max_anchors}, but at least {min_anchors} anchors are needed. Raise max_anchors."
        )
    common = _common(tuple(vocabs))
    if len(common) < min_anchors:
        counts = ", ".join(f"{name!r} ({len(vocab.ids_of)} pieces)" for name, vocab in zip(names, vocabs, strict=True))
        raise VocabularyError(
            f"members {counts} have {len(common)} pieces in common as bytes; at least {min_anchors} anchors "
            "are needed. Leave out the member whose vocabulary differs, or use a method without anchors."
        )
    if max_anchors is None or max_anchors >= len(common):
        return AnchorSet(tuple(sorted(common)))
    salt = f"{seed}\0".encode()
    ranked = sorted(common, key=lambda piece: (hashlib.sha256(salt + piece).digest(), piece))
    return AnchorSet(tuple(sorted(ranked[:max_anchors])), max_anchors, seed)


@lru_cache(8)
def _common(vocabs: tuple[ByteVocab, ...]) -> frozenset[bytes]:
    """Return the byte strings that all vocabularies share; methods and orders of the same members ask again."""
    return frozenset(vocabs[0].pieces).intersection(*(vocab.pieces for vocab in vocabs[1:])) - {b""}


def anchor_ids(vocab: ByteVocab, anchors: AnchorSet) -> list[int]:
    """Return the id of every anchor [A] in one vocabulary.

    Where several ids share the bytes it is the `ByteVocab.preferred` one. Raises VocabularyError where an anchor is not
    in the vocabulary.
    """
    chosen = []
    for piece in anchors.pieces:
        ids = vocab.ids_of.get(piece)
        if ids is None:
            raise VocabularyError(
                f"anchor {piece!r} is not in the vocabulary of {len(vocab)} pieces. Find the anchors with "
                "all members' vocabularies."
            )
        chosen.append(ids[0] if len(ids) == 1 else vocab.preferred(ids))
    return chosen


def duplicates(vocab: ByteVocab, anchors: AnchorSet) -> dict[int, int]:
    """Return the other ids that share an anchor's bytes, each with that anchor's index.

    They get the anchor's row of the relative matrix, so that equal bytes have equal rows.
    """
    alike = ((index, vocab.ids_of[piece]) for index, piece in enumerate(anchors.pieces))
    return {i: index for index, ids in alike if len(ids) > 1 for i in ids if i != vocab.preferred(ids)}
