"""AdaFuse: the members propose whole words, all of them rank the proposals, and the best one is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from lm_eval_deepen.config import Options
from lm_eval_deepen.fusion.base import Fuser, MemberView, fusion
from lm_eval_deepen.fusion.deepen import Deepen
from lm_eval_deepen.relative.store import MatrixStore


@fusion("adafuse", paper="arXiv:2601.06022")
class AdaFuse(Options):
    """Options of ``method: adafuse``, which writes texts, greedily, and scores none that is given.

    Each member proposes what comes next, in its own tokens. It is sure where its likeliest token is ahead of the
    second by ``threshold``. Unsure at the first word, it completes each of its ``candidates`` likeliest tokens to a
    word. Sure, it takes the likeliest word and looks again; unsure there, it stops behind the next word, and at the
    last of ``words`` it completes its likeliest tokens again. Every member then gives each proposal its mean
    log-probability a token, and the one with the highest weighted mean is written. An end of text is a proposal, too.

    So does the released code (CCM0111/AdaFuse). It joins words by single spaces and leaves out those of punctuation
    alone; here a word keeps the white space before it, since a line feed may end an answer. A word has at most 12
    tokens, as there. What may come next (`next_logp`) is the members' geometric mean, as ``method: deepen`` makes it.
    """

    threshold: float = Field(
        0.7,
        ge=0,
        le=1,
        description="A member is sure if its likeliest token is ahead of the second by this probability.",
    )
    candidates: int = Field(
        3, ge=1, description="The number of likeliest tokens that an unsure member completes to words."
    )
    words: int = Field(3, ge=1, description="The largest number of words that a member proposes at once.")
    BY_WORDS: ClassVar[bool] = True

    def build(self, members: Sequence[MemberView], store: MatrixStore) -> Fuser:
        """Return the fuser of single steps, which knows that texts are written by words."""
        fuser = Deepen(average="geometric").build(members, store)
        fuser.by_words = self
        return fuser
