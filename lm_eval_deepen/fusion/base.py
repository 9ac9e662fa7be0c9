"""The plugin interface of step-level fusion: what a method is given and what it returns.

A method is one file in this folder: a class of options, decorated with ``@fusion(name, paper=...)``, whose ``build``
returns a `Fuser`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from lm_eval_deepen.config.registry import Registry
from lm_eval_deepen.relative.member_view import MemberView, Spelling
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

__all__ = ["METHODS", "Fused", "Fuser", "FusionMethod", "MemberView", "Spelling", "fusion"]


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
        """Prepare a fuser for two members or more, the main member first."""
        ...


METHODS = Registry("method", "lm_eval_deepen.fusion", "fusion")
fusion = METHODS.register
