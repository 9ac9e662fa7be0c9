"""The plugin interface of pooling: every member answers a request by itself, and the answers are combined.

A method is one file in this folder: a class of options, decorated with ``@pooling(name, paper=...)``. An ensemble
uses one so::

    check_request(name, method, "generate_until")      # an error where the method cannot combine such answers
    answers = [answer of each member, as an ensemble of that member alone gives it]
    if fused_takes_part(method):                       # deepen + vote, deepen + mbr
        answers.append(answer of the step-fused ensemble)
    if scores_texts(method):                           # the step-fused ensemble scores them
        answers = [Candidate(text, logp) of each]
    pooled = method.combine(answers, weights)          # weights: the members' [M], also where M + 1 answer

With a method that leaves the fused ensemble out of both, no fuser is built and no relative matrix is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from lm_eval_deepen.config.registry import Registry
from lm_eval_deepen.errors import RequestError


@dataclass(frozen=True)
class Scored:
    """An answer to a loglikelihood or loglikelihood_rolling request.

    Attributes:
        logp: natural log-probability of the continuation, or of the whole text, by the answerer's own tokens.
        greedy: whether the continuation is what the answerer would have generated; False for rolling requests.
    """

    logp: float
    greedy: bool = False


@dataclass(frozen=True)
class Candidate:
    """An answer to a generate_until request, for a method with ``SCORES_TEXTS``.

    Attributes:
        text: as the answerer gives it.
        logp: natural log-probability that the step-fused ensemble gives it after the request's prompt; minus infinity
            where it gives none.
    """

    text: str
    logp: float


@dataclass(frozen=True)
class Pooled:
    """What the ensemble answers.

    Attributes:
        answer: a `Scored`, or a text that ends as the request asked.
        stats: diagnostics of the request, each a number; their means over requests go to the results file.
    """

    answer: Any
    stats: dict[str, float] = field(default_factory=dict)


class PoolingMethod(Protocol):
    """The options of a method: a class that derives from `lm_eval_deepen.config.Options`, with a ``combine``.

    A field ``with_fused: bool`` says whether the step-fused ensemble answers as well, and a class variable
    ``SCORES_TEXTS: bool`` whether it scores the answers.
    """

    REQUESTS: ClassVar[frozenset[str]]  # the request types whose answers it combines

    def combine(self, answers: Sequence[Any], weights: Sequence[float]) -> Pooled:
        """Combine the answers to one request.

        Args:
            answers: a `Scored` each, or a text each (a `Candidate`, where the method wants its score): one per
                member, the main member's first; the fused ensemble's last, where it takes part.
            weights: the members' weights, which sum to 1.
        """
        ...


POOLINGS = Registry("pooling", "lm_eval_deepen.pooling", "pooling")
pooling = POOLINGS.register


def fused_takes_part(method: PoolingMethod) -> bool:
    """Return whether the step-fused ensemble answers beside the members."""
    return bool(getattr(method, "with_fused", False))


def scores_texts(method: PoolingMethod) -> bool:
    """Return whether the step-fused ensemble scores the answers."""
    return bool(getattr(method, "SCORES_TEXTS", False))


def check_request(name: str, method: PoolingMethod, request: str) -> None:
    """Raise RequestError where a method cannot combine the answers to a type of request."""
    if request not in method.REQUESTS:
        raise RequestError(
            f"pooling={name} combines answers to {' and '.join(sorted(method.REQUESTS))} requests, and the task has "
            f"{request} requests. Choose tasks of the former type, or another pooling method."
        )


def ballots(count: int, weights: Sequence[float]) -> list[float]:
    """Return the weight of each of `count` answers; the fused ensemble's counts like an average member's.

    Raises:
        ValueError: neither one answer per member nor one more.
    """
    if count == len(weights):
        return list(weights)
    if count == len(weights) + 1:
        return [*weights, sum(weights) / len(weights)]
    raise ValueError(f"{count} answers for {len(weights)} members: one per member, and at most the fused one beside")


def best(scores: Sequence[float], shares: Sequence[float], members: int) -> int:
    """Return the index of the highest score; among equals (within 1e-9) the fused answer, else the first.

    An answer without weight is chosen by nobody.
    """
    top = max(score for score, share in zip(scores, shares, strict=True) if share > 0)
    tied = [n for n, share in enumerate(shares) if share > 0 and scores[n] >= top - 1e-9]
    return tied[-1] if tied[-1] >= members else tied[0]
