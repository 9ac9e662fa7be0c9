"""The member's answer that the ensemble finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from lm_eval_deepen.config import Options
from lm_eval_deepen.pooling.base import Candidate, Pooled, ballots, pooling


@pooling("rerank", paper="arXiv:2306.02561")
class Rerank(Options):
    """Options of ``pooling: rerank``: of the members' texts, the one with the highest fused likelihood.

    LLM-Blender (arXiv 2306.02561) ranks the members' texts by a trained model. Here no model is trained: the
    step-fused ensemble (`method`) scores every text after its prompt, under the weights of the ensemble. A member
    without weight gives no text. Of equals the earliest member's text wins. A text that is empty, or that the ensemble
    cannot score, wins only where all are.
    """

    score_per: Literal["byte", "text"] = Field(
        "byte",
        description="Whether a text's log-probability is divided by its length in bytes, or not divided, which "
        "favours short texts.",
    )
    REQUESTS: ClassVar[frozenset[str]] = frozenset({"generate_until"})
    SCORES_TEXTS: ClassVar[bool] = True

    def combine(self, answers: Sequence[Candidate], weights: Sequence[float]) -> Pooled:
        """Combine texts; see `pooling.base`.

        Stats: ``winner``, the member's place among the answers; ``unscored``, texts that the ensemble gives no score.
        """
        shares = ballots(len(answers), weights)
        scores = [
            one.logp / (len(one.text.encode()) if self.score_per == "byte" else 1) if one.text else -float("inf")
            for one in answers
        ]
        here = [n for n, share in enumerate(shares) if share > 0]
        winner = max(here, key=lambda n: scores[n])  # the first of equals
        unscored = sum(score == -float("inf") for score in scores)
        return Pooled(answers[winner].text, {"winner": float(winner), "unscored": float(unscored)})
