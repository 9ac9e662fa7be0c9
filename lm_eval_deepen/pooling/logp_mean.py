"""The mean of the members' own log-probabilities: the control of every method that fuses steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from lm_eval_deepen.config import Options
from lm_eval_deepen.pooling.base import Pooled, Scored, ballots, pooling


@pooling("logp-mean", paper="none")
class LogpMean(Options):
    """``pooling: logp-mean``: a weighted mean of the members' scores of a whole continuation; it has no options.

    That is the logarithm of their weighted geometric mean, not normalised. Every member scores its own tokens as
    ``hf`` does (those behind its tokens of the context), so no vocabulary is aligned and no matrix built. A
    continuation is greedy where it is for members of more than half of the weight; at exactly half the first member
    that has weight decides.
    """

    REQUESTS: ClassVar[frozenset[str]] = frozenset({"loglikelihood", "loglikelihood_rolling"})

    def combine(self, answers: Sequence[Scored], weights: Sequence[float]) -> Pooled:
        """Combine scores; see `pooling.base`. Stats: ``spread``, the largest difference between members, in nats."""
        shares = ballots(len(answers), weights)
        used = [(share, answer) for share, answer in zip(shares, answers, strict=True) if share > 0]
        logp = math.fsum(share * answer.logp for share, answer in used)
        for_greedy = math.fsum(share for share, answer in used if answer.greedy)
        total = math.fsum(share for share, _ in used)
        tie = math.isclose(2 * for_greedy, total, abs_tol=1e-9)
        greedy = used[0][1].greedy if tie else 2 * for_greedy > total
        finite = [answer.logp for _, answer in used if math.isfinite(answer.logp)]
        spread = max(finite) - min(finite) if finite else 0.0
        return Pooled(Scored(logp / total, greedy), {"spread": spread})
