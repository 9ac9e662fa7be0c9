"""The answer with the most weight."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from lm_eval_deepen.config import Options, Shown
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.pooling.base import Pooled, ballots, best, pooling


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigError(
            f"answer_pattern {value!r} is no regular expression ({error}); correct it", key="answer_pattern"
        ) from error
    return value


@pooling("vote", paper="arXiv:2203.11171")
class Vote(Options):
    """Options of ``pooling: vote``: a weighted majority over generated texts.

    The majority over sampled reasoning paths of self-consistency (arXiv 2203.11171), here over members.

    Texts agree when their answers are the same up to case and white space. The text given is that of the first
    member that holds the winning answer, or the fused ensemble's where that holds it. A tie goes to the fused
    ensemble's answer, else to the earliest member's. A member without weight has no vote and gives no text.
    """

    with_fused: bool = Field(
        False,
        description="Whether the fused ensemble also gives an answer, with the weight of an average member (DeePEn, "
        "arXiv 2404.12715, combined with voting). It has equal weights and no covers unless you give them.",
    )
    answer_pattern: Annotated[Annotated[str, AfterValidator(_pattern)] | None, Shown(default="the whole text")] = Field(
        None,
        description="A regular expression that finds the answer in a text. The last match counts, or its first "
        "group if it has one. A text without a match abstains.",
    )
    REQUESTS: ClassVar[frozenset[str]] = frozenset({"generate_until"})

    def answer(self, text: str) -> str | None:
        """Return the answer within a text, normalised; None where it has none."""
        if self.answer_pattern is not None:
            matches = list(re.finditer(self.answer_pattern, text))
            if not matches:
                return None
            text = matches[-1].group(1 if matches[-1].re.groups else 0) or ""
        return " ".join(text.casefold().split())

    def combine(self, answers: Sequence[str], weights: Sequence[float]) -> Pooled:
        """Combine texts; see `pooling.base`.

        Stats: ``share``, the winner's share of all weight, 1 where no text has an answer; ``abstained``, texts without
        an answer.
        """
        shares = ballots(len(answers), weights)
        keys = [self.answer(text) for text in answers]
        abstained = float(sum(key is None for key in keys))
        keys = [key if share > 0 else None for key, share in zip(keys, shares, strict=True)]
        if all(key is None for key in keys):  # nobody has an answer: the tie decides between the texts
            keys = ["" if share > 0 else None for share in shares]
        scores = [
            sum(share for share, other in zip(shares, keys, strict=True) if other == key) if key is not None else -1.0
            for key in keys
        ]
        winner = best(scores, shares, len(weights))
        first = next(n for n, key in enumerate(keys) if key == keys[winner]) if winner < len(weights) else winner
        return Pooled(answers[first], {"share": scores[winner] / sum(shares), "abstained": abstained})
