"""Vocabularies as bytes: the one form that members with different tokenizers share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property


@dataclass(frozen=True, eq=False)
class ByteVocab:
    """The pieces of one vocabulary as byte strings, indexed by token id.

    A token's identity is its id: several ids may carry the same bytes.
    """

    # bytes of every id, one per logit of the model. ``b""`` for control pieces, which carry no text, and for unused ids
    pieces: tuple[bytes, ...]
    # ids of control pieces (BOS, EOS, chat markers, padding token, unknown token)
    control: frozenset[int] = frozenset()
    unused: frozenset[int] = frozenset()  # ids without a token: embedding rows beyond the tokenizer's length, holes
    # ids that end a text. Where such a piece is a text piece as well (a newline that ends a text), it has its bytes
    # here, and none in `events`; the others are ``control``
    eos: tuple[int, ...] = field(default=())
    # ids of ``<0xNN>`` pieces. Where a text piece has the same bytes a tokenizer never emits them, so their embedding
    # rows may be untrained
    byte_fallback: frozenset[int] = frozenset()

    def __len__(self) -> int:
        """Return the number of ids V, one per logit."""
        return len(self.pieces)

    @cached_property
    def ids_of(self) -> dict[bytes, tuple[int, ...]]:
        """Ascending ids of every non-empty byte string; several where ids share bytes."""
        ids: dict[bytes, tuple[int, ...]] = {}
        for i, piece in enumerate(self.pieces):
            if piece:
                ids[piece] = (*ids[piece], i) if piece in ids else (i,)
        return ids

    def preferred(self, ids: Sequence[int]) -> int:
        """Return which of the ids of one byte string [n] stands for it: the first that is no ``<0xNN>`` piece.

        A tokenizer spells text with that one, so the byte piece's embedding may never have been trained.
        """
        return next((i for i in ids if i not in self.byte_fallback), ids[0])

    @cached_property
    def events(self) -> ByteVocab:
        """The pieces as what can come next: one that ends a text is an end, and no bytes of it."""
        if self.control.issuperset(self.eos):
            return self
        pieces = list(self.pieces)
        for i in self.eos:
            pieces[i] = b""
        fallback = self.byte_fallback.difference(self.eos)
        return replace(self, pieces=tuple(pieces), control=self.control.union(self.eos), byte_fallback=fallback)

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of a token sequence; control pieces add none."""
        return b"".join(map(self.pieces.__getitem__, ids))

    def spell(self, data: bytes) -> tuple[int, ...] | None:
        """Return a piece of one byte for every byte; None where a byte has none."""
        single = [bytes([byte]) for byte in data]
        return tuple(self.ids_of[byte][0] for byte in single) if self.ids_of.keys() >= {*single} else None

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of pieces, control, unused, EOS and byte-fallback ids; equal for equal vocabularies."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        for ids in (sorted(self.control), sorted(self.unused), self.eos, sorted(self.byte_fallback)):
            digest.update(repr(list(ids)).encode())
        return digest.hexdigest()
