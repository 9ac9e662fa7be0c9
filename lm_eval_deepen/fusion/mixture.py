"""Mixture by stretches: it scores texts without a main member, and maps no distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lm_eval_deepen.config import Options
from lm_eval_deepen.fusion.base import Fuser, MemberView, fusion
from lm_eval_deepen.fusion.deepen import Deepen
from lm_eval_deepen.relative.store import MatrixStore


@fusion("mixture", paper="arXiv:2605.00419")
class Mixture(Options):
    """``method: mixture``; it has no options.

    Between two places of a text at which the tokens of all members end lies a stretch. Its probability is
    sum_m w_m P_m, with P_m the product of member m's probabilities of its own tokens in the stretch. That is the same
    in every order of the members. Generation fuses steps as ``method: deepen`` does, where the first member's
    vocabulary is written in, under the experts of the stretches; with ``sampling: member``, texts are sampled without a
    main member. ``skip_when`` and ``covers`` are about steps: they change no score.
    """

    BY_STRETCHES: ClassVar[bool] = True

    @classmethod
    def covers(cls, given: Mapping[str, Any]) -> bool:
        """Return True: generation fuses steps as `deepen` does."""
        return True

    @classmethod
    def learns(cls, given: Mapping[str, Any]) -> bool:
        """Return True."""
        return True

    def build(self, members: Sequence[MemberView], store: MatrixStore) -> Fuser:
        """Return the fuser of generation; scoring needs none."""
        fuser = Deepen().build(members, store)
        fuser.by_stretches, fuser.vocabularies = True, tuple(member.vocabulary for member in members)
        return fuser
