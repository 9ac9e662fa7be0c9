"""What matrices and fusion methods may know of a member: its pieces, its embeddings and its tokenizer on bytes."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from torch import Tensor

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab


def longest_beginning(data: bytes, pieces: Container[bytes]) -> bytes:
    """Return the longest of some pieces that the data begins with, b"" where there is none."""
    return next((data[:end] for end in range(len(data), 0, -1) if data[:end] in pieces), b"")


@dataclass(frozen=True)
class Spelling:
    """How a member's tokenizer spells a continuation that begins anywhere."""

    # returns the canonical token ids of some bytes; None, or VocabularyError, where it cannot spell them
    encode: Callable[[bytes], Sequence[int] | None]
    fingerprint: str  # a digest of the tokenizer; two with the same vocabulary may merge differently


@dataclass(frozen=True)
class MemberView:
    """What a matrix or a fusion method may know of a member."""

    name: str  # in the ensemble, for messages
    vocabulary: ByteVocab  # its pieces as bytes, one per logit [V]
    load_embeddings: Callable[[], Tensor]  # returns the input embedding rows [V, d] (any float dtype, any device)
    load_fingerprint: Callable[[], str]  # returns a hex digest of the embedding rows; computed on demand
    # returns the rows of the output head [V, d'], read-only; None says that the head is tied to the input embeddings
    load_output_embeddings: Callable[[], Tensor] | None = None
    # returns a hex digest of those, the one of `load_fingerprint` where they are the same rows; given where they are
    load_output_fingerprint: Callable[[], str] | None = None
    # the tokenizer on bytes; without one, the longest piece that some bytes begin with stands for their first token
    spelling: Spelling | None = None

    def __post_init__(self) -> None:
        """Check that rows of a head come with their digest."""
        if (self.load_output_embeddings is None) != (self.load_output_fingerprint is None):
            raise ValueError("load_output_embeddings and load_output_fingerprint belong together")

    def load_rows(self, which: str) -> Tensor:
        """Return the ``input`` or ``output`` embedding rows [V, d]; those of a tied head are the same."""
        output = self.load_output_embeddings if which == "output" else None
        return (output or self.load_embeddings)()

    def fingerprint(self, which: str) -> str:
        """Return a hex digest of the ``input`` or ``output`` embedding rows."""
        output = self.load_output_fingerprint if which == "output" else None
        return (output or self.load_fingerprint)()

    @property
    def spelling_fingerprint(self) -> str:
        """A digest of what decides `first_token`."""
        return f"{self.vocabulary.fingerprint}:{self.spelling.fingerprint if self.spelling else 'longest'}"

    def first_token(self, data: bytes) -> int | None:
        """Return the id of the token that some bytes begin with; None where the tokenizer cannot spell them."""
        if self.spelling is None:
            ids = self.vocabulary.ids_of.get(longest_beginning(data, self.vocabulary.ids_of))
            return ids[0] if ids else None
        try:
            return next(iter(self.spelling.encode(data) or ()), None)
        except VocabularyError:  # a text that this tokenizer would alter; no member is ever given it
            return None

    @property
    def tied(self) -> bool:
        """Whether the output head's rows are the input embeddings."""
        return self.fingerprint("output") == self.fingerprint("input")
