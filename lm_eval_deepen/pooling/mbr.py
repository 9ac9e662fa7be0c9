"""Minimum Bayes risk: the answer that is most like the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from lm_eval_deepen.config import Options
from lm_eval_deepen.pooling.base import Pooled, ballots, best, pooling

ORDERS = range(1, 7)  # chrF: character n-grams of 1 to 6, recall counting twice as much as precision
BETA_SQUARED = 4.0


@pooling("mbr", paper="arXiv:2005.10283")
class Mbr(Options):
    """Options of ``pooling: mbr``: the text of highest expected utility, with all texts as references.

    Minimum Bayes risk over samples of one model (Eikema and Aziz, arXiv 2005.10283), here over members. A text's
    expected utility is the weighted mean of its utility against every answerer's text, its own among them. A tie goes
    to the fused ensemble's answer, else to the earliest member's. A member without weight gives no text.
    """

    with_fused: bool = Field(
        False,
        description="Whether the fused ensemble also gives an answer, with the weight of an average member (DeePEn, "
        "arXiv 2404.12715, combined with MBR). It has equal weights and no covers unless you give them.",
    )
    utility: Literal["chrf", "f1"] = Field(
        "chrf",
        description="How the similarity of two texts is measured: by character n-grams (`chrf`, Popović 2015), or "
        "by words (F1).",
    )
    REQUESTS: ClassVar[frozenset[str]] = frozenset({"generate_until"})

    def combine(self, answers: Sequence[str], weights: Sequence[float]) -> Pooled:
        """Combine texts; see `pooling.base`. Stats: ``expected_utility`` of the winner, in [0, 1]."""
        shares = ballots(len(answers), weights)
        utility = chrf if self.utility == "chrf" else word_f1
        total = sum(shares)
        scores = [
            sum(share * utility(text, other) for share, other in zip(shares, answers, strict=True)) / total
            for text in answers
        ]
        winner = best(scores, shares, len(weights))
        return Pooled(answers[winner], {"expected_utility": scores[winner]})


def chrf(text: str, reference: str) -> float:
    """Return the character n-gram F-score of a text, in [0, 1]; white space does not count, equal texts have 1.

    It is the mean over n, from 1 to 6, of the F-score of n-grams in which recall counts twice; an n for which neither
    text has n-grams is left out. (The paper takes the F-score of the mean precision and the mean recall.)
    """
    text, reference = "".join(text.split()), "".join(reference.split())
    if text == reference:
        return 1.0
    scores = []
    for n in ORDERS:
        mine, theirs = _ngrams(text, n), _ngrams(reference, n)
        if not mine and not theirs:
            continue
        common = (mine & theirs).total()
        if not common:
            scores.append(0.0)
            continue
        precision, recall = common / mine.total(), common / theirs.total()
        scores.append((1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall))
    return sum(scores) / len(scores)


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def word_f1(text: str, reference: str) -> float:
    """Return the F1 of a text's words, in [0, 1], without regard to case; equal texts have 1."""
    mine, theirs = Counter(text.casefold().split()), Counter(reference.casefold().split())
    if mine == theirs:
        return 1.0
    common = (mine & theirs).total()
    return 2 * common / (mine.total() + theirs.total())
