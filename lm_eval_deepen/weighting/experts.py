"""Static ensembles as experts, and what Bayes' rule makes of them while a text goes on.

An expert is one choice of constant weights, with one kind of average. The mixture of K experts under a uniform prior
gives every text at least 1/K of the probability that the best of them gives it, whatever the text: it needs at most
log2 K bits more (the regret bound of a Bayesian mixture; Mattern, arXiv 1302.2820, uses it for context mixing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_GRID = 21  # of points on the simplex


@dataclass(frozen=True, eq=False)
class Experts:
    """A fixed set of static ensembles.

    Attributes:
        weights: one row of member weights per expert [K, M], fp64; rows sum to 1.
        geometric: which experts average geometrically [K] (bool); the others average linearly.
        log_prior: natural-log prior of every expert [K], fp64.
    """

    weights: Tensor
    geometric: Tensor
    log_prior: Tensor

    @classmethod
    def static(cls, weights: Tensor) -> Experts:
        """Return the one expert of an ensemble with constant weights [M]."""
        return cls(weights.double()[None], torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.float64))

    @classmethod
    def grid(cls, members: int, *, geometric: bool, prior: Sequence[float] | None = None) -> Experts:
        """Return the experts at the points of `simplex_grid`, and those inside it with the geometric average as well.

        A geometric expert with all weight on one member is that member, as the linear one is, so that there is none.

        Args:
            members: their number M.
            geometric: whether there are geometric experts.
            prior: of every expert, in the order of `weights`; None for a uniform one.
        """
        points = list(simplex_grid(members))
        inside = [point for point in points if max(point) < 1] if geometric else []
        weights = torch.tensor([*points, *inside], dtype=torch.float64)
        kinds = torch.tensor([False] * len(points) + [True] * len(inside))
        share = torch.full((len(weights),), 1 / len(weights)) if prior is None else torch.tensor(list(prior))
        share = share.double()
        return cls(weights, kinds, (share / share.sum()).log())

    def __len__(self) -> int:
        """Return K."""
        return len(self.weights)

    def among(self, present: Tensor) -> Tensor:
        """Return the experts' weights [B, K, M] among the members that take part in each row [B, M] (bool).

        An expert whose members all abstain weighs those present equally.
        """
        here = present[:, None, :].double()
        weights = self.weights.to(here.device) * here
        total = weights.sum(2, keepdim=True)
        return torch.where(total > 0, weights / total.clamp_min(1e-300), here / here.sum(2, keepdim=True).clamp_min(1))


def simplex_grid(members: int) -> Iterator[tuple[float, ...]]:
    """Yield weights of `members` members in equal steps: every member alone first, the equal weights last.

    There are as many steps as give `LARGEST_GRID` points at most (and two at least): steps of 1/4 for two and three
    members, which for two are 0, .25, .5, .75 and 1.
    """
    steps = 4
    while steps > 2 and math.comb(steps + members - 1, members - 1) > LARGEST_GRID:
        steps -= 1
    points = [tuple(n / steps for n in counts) for counts in _compositions(steps, members)]
    centre = (1 / members,) * members
    inner = sorted((p for p in points if max(p) < 1 and p != centre), key=lambda p: (-max(p), p))
    yield from sorted((p for p in points if max(p) == 1), reverse=True)
    yield from inner
    yield centre


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)


def posteriors(log_prior: Tensor, evidence: Tensor) -> tuple[Tensor, Tensor]:
    """Return what Bayes' rule makes of experts along a text.

    Args:
        log_prior: natural logs [K], fp64.
        evidence: each expert's natural-log probability of each event [K, S], fp64, given the events before.

    Returns:
        The natural-log posterior before every event and after the last one [S + 1, K], and the mixture's natural-log
        probability of every event [S]. After an event that all experts exclude, the posterior stays as it was.
    """
    logs = [log_prior - log_prior.logsumexp(0)]
    values = []
    for event in evidence.unbind(1):
        joint = logs[-1] + event
        value = joint.logsumexp(0)
        values.append(value)
        logs.append(joint - value if bool(value > -torch.inf) else logs[-1])
    return torch.stack(logs), torch.stack(values) if values else log_prior.new_empty(0)
