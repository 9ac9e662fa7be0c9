"""GaC: average the members' distributions over the union of their vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from lm_eval_deepen.config import Options, Shown
from lm_eval_deepen.fusion._events import Events
from lm_eval_deepen.fusion._linear import LinearFuser, one_to_one
from lm_eval_deepen.fusion._union import unite_vocabularies
from lm_eval_deepen.fusion.base import Fuser, MemberView, fusion
from lm_eval_deepen.relative.store import MatrixStore


@fusion("gac", paper="arXiv:2406.12585")
class Gac(Options):
    """Options of ``method: gac``, "token generation as classification" over the union vocabulary.

    A piece's fused probability is the weighted sum of its members' probabilities, 0 in a member that lacks it
    (section 3.2). Pieces are compared as bytes. The published code compares strings: where one tokenizer is byte-level
    and another SentencePiece, the same newline, space, punctuation or non-ASCII piece is two pieces of its union, and
    what the members say of it is not added up. It gives a string that several ids share to one of them only; here the
    ids of one byte string have one mass. A score is a lower bound: union-only pieces share the normaliser.
    """

    threshold: Annotated[float | None, Shown(default="every step is fused")] = Field(
        None,
        gt=0,
        le=1,
        description="A step is fused only if the highest probability of the main member's ids is below this "
        '(section 3.4, "gate model").',
    )

    def build(self, members: Sequence[MemberView], store: MatrixStore) -> Fuser:
        """Map every vocabulary to the union; nothing is stored."""
        vocabularies = [member.vocabulary for member in members]
        union = unite_vocabularies(vocabularies)
        maps = [one_to_one(columns, len(union.vocabulary)) for columns in union.columns[1:]]
        facts = {"union_pieces": len(union.vocabulary)}
        return GacFuser(self.threshold, union.vocabulary, vocabularies, maps, facts)


class GacFuser(LinearFuser):
    """Averages over the union vocabulary, where the main member is unsure."""

    def __init__(self, threshold: float | None, *linear: Any) -> None:
        super().__init__(*linear)
        self.threshold = threshold

    def events(self) -> Events | None:
        """Return what the members' tokens stand for; None with a threshold, which asks the main member first."""
        return None if self.threshold is not None else super().events()

    def skip(self, logp: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return rows [B] without another member, or in which the main member is sure."""
        left = super().skip(logp, weights)
        if self.threshold is not None:
            left |= logp[0].float().amax(1).exp() >= self.threshold
        return left
