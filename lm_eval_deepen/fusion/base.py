"""The plugin interface of step-level fusion: what a method is given and what it returns.

A method is one file in this folder: a class of options, decorated with ``@fusion(name, paper=...)``, whose ``build``
returns a `Fuser`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from lm_eval_deepen.config.registry import Registry
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

if TYPE_CHECKING:
    from lm_eval_deepen.relative.store import MatrixStore


@dataclass(frozen=True)
class Spelling:
    """How a member's tokenizer spells a continuation that begins anywhere.

    Attributes:
        encode: returns the canonical token ids of some bytes; None, or VocabularyError, where it cannot spell them.
        fingerprint: a digest of the tokenizer; two with the same vocabulary may merge differently.
    """

    encode: Callable[[bytes], Sequence[int] | None]
    fingerprint: str


@dataclass(frozen=True)
class MemberView:
    """What a fusion method may know of a member.

    Attributes:
        name: the member's name in the ensemble, for messages.
        vocabulary: its pieces as bytes, one per logit [V].
        load_embeddings: returns the input embedding rows [V, d] (any float dtype, any device).
        load_fingerprint: returns a hex digest of the embedding rows; computed on demand.
        load_output_embeddings: returns the rows of the output head [V, d'], read-only; None says that the head
            is tied to the input embeddings.
        load_output_fingerprint: returns a hex digest of those rows, the one of `load_fingerprint` where they are the
            same rows; given where `load_output_embeddings` is.
        spelling: the member's tokenizer on bytes; None where there is none, and the longest piece that some
            bytes begin with stands for their first token.
    """

    name: str
    vocabulary: ByteVocab
    load_embeddings: Callable[[], Tensor]
    load_fingerprint: Callable[[], str]
    load_output_embeddings: Callable[[], Tensor] | None = None
    load_output_fingerprint: Callable[[], str] | None = None
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
    def tied(self) -> bool:
        """Whether the output head's rows are the input embeddings."""
        return self.fingerprint("output") == self.fingerprint("input")


@dataclass(frozen=True)
class Fused:
    """A fused distribution per row.

    Attributes:
        logp: natural-log probabilities [B, K], fp32, rows normalised, ``-inf`` = excluded.
        stats: per-row diagnostics, each a float tensor [B]; results have their means, but the sum of one called
            ``rows_...`` and the maximum of one called ``max_...``.
    """

    logp: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Fuser(Protocol):
    """Fuses the members' next-token distributions. No I/O, no model, no state."""

    out_vocab: ByteVocab  # the K pieces the result ranges over; the main member's V_0 come first

    def skip(self, logp: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return rows [B] (bool) that are left to the main member."""
        ...

    def fuse(self, logp: Sequence[Tensor], weights: Tensor) -> Fused:
        """Fuse log-probabilities [B, V_m] per member under weights [B, M] (rows sum to 1)."""
        ...


class FusionMethod(Protocol):
    """The options of a method: a class that derives from `lm_eval_deepen.config.Options`, with a ``build``.

    It may have ``check(vocabularies, names)`` too, which is called before any weight is loaded and raises what
    can be known from the tokenizers alone; the vocabularies then lack rows beyond the tokenizer's length.
    """

    def build(self, members: Sequence[MemberView], store: MatrixStore) -> Fuser:
        """Prepare a fuser for these members, the main member first."""
        ...


METHODS = Registry("method", "lm_eval_deepen.fusion", "fusion")
fusion = METHODS.register


def no_skip(logp: Sequence[Tensor]) -> Tensor:
    """Return an all-false row mask [B]: every row is fused."""
    return torch.zeros(logp[0].shape[0], dtype=torch.bool, device=logp[0].device)
