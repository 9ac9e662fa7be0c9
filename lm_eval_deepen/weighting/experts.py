"""Static ensembles as experts, and what Bayes' rule makes of them while a text goes on.

An expert is one choice of constant weights, with one kind of average. The mixture of K experts under a uniform prior
gives every text at least 1/K of the probability that the best of them gives it, whatever the text: it needs at most
log2 K bits more (the regret bound of a Bayesian mixture; Mattern, arXiv 1302.2820, uses it for context mixing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lm_eval_deepen.errors import ConfigError

LARGEST_GRID = 21  # of points on the simplex
POWERS = (1.0, 0.85)  # of the members' probabilities: language models are surer than they are right, as a rule


@dataclass(frozen=True, eq=False)
class Experts:
    """A fixed set of static ensembles."""

    weights: Tensor  # one row of member weights per expert [K, M], fp64; rows sum to 1
    geometric: Tensor  # which experts average geometrically [K] (bool); the others average linearly
    # what the probabilities are raised to, and then normalised again [K], fp64: below 1, an expert is less sure than
    # its members. Of a geometric expert that is the sum of its exponents
    power: Tensor
    log_prior: Tensor  # natural-log prior of every expert [K], fp64
    prompt_stretches: int = 0  # how many of a prompt's last stretches they learn from
    prior_share: float = 1.0  # how much of the prior stays in the weights that a continuation begins with

    @classmethod
    def static(cls, weights: Tensor) -> Experts:
        """Return the one expert of an ensemble with constant weights [M]."""
        zero = torch.zeros(1, dtype=torch.float64)
        return cls(weights.double()[None], torch.zeros(1, dtype=torch.bool), zero + 1, zero)

    @classmethod
    def of(
        cls, experts: Sequence[tuple[tuple[float, ...], bool, float]], prior: Sequence[float] | None = None
    ) -> Experts:
        """Return experts, each given by its weights, whether it averages geometrically, and its power.

        Raises:
            ConfigError: another number of priors than of experts; without a prior, it is uniform.
        """
        if prior is not None and len(prior) != len(experts):
            raise ConfigError(
                f"prior has {len(prior)} values for {len(experts)} experts; give one for each", key="prior"
            )
        weights, kinds, powers = zip(*experts, strict=True)
        share = torch.tensor([1.0] * len(experts) if prior is None else list(prior), dtype=torch.float64)
        return cls(
            torch.tensor(weights, dtype=torch.float64),
            torch.tensor(kinds),
            torch.tensor(powers, dtype=torch.float64),
            (share / share.sum()).log(),
        )

    @classmethod
    def of_steps(cls, members: int, *, geometric: bool, prior: Sequence[float] | None = None) -> Experts:
        """Return the experts of a method that fuses steps: linear averages, and geometric ones where it has them."""
        points = list(simplex_grid(members))
        experts = [(point, False, 1.0) for point in points]
        for power in POWERS if geometric else ():
            # with all weight on one member and power 1, the geometric average is the linear one
            experts += [(point, True, power) for point in points if power != 1 or max(point) < 1]
        return cls.of(experts, prior)

    @classmethod
    def of_stretches(cls, members: int, prior: Sequence[float] | None = None) -> Experts:
        """Return the experts of a mixture by stretches: linear averages of the members at every power."""
        return cls.of([(point, False, power) for power in POWERS for point in simplex_grid(members)], prior)

    def kinds(self) -> list[tuple[bool, float]]:
        """Return of every expert whether it averages geometrically, and its power."""
        return list(zip(self.geometric.tolist(), self.power.tolist(), strict=True))

    @property
    def of_members(self) -> list[float]:
        """What each expert raises its members' distributions to [K]; geometric averages have their power themselves."""
        return torch.where(self.geometric, 1.0, self.power).tolist()

    @property
    def powers(self) -> tuple[float, ...]:
        """The powers of members that there are: one, for experts that are as sure as their members, else `POWERS`."""
        return (1.0,) if set(self.of_members) == {1.0} else POWERS

    def places_of_powers(self) -> Tensor:
        """Return the place in `powers` of what each expert raises its members' distributions to [K]."""
        return torch.tensor([self.powers.index(power) for power in self.of_members])

    def some(self, index: Tensor) -> Experts:
        """Return some of the experts, under their share of the prior."""
        own = (self.weights[index], self.geometric[index], self.power[index], self.log_prior[index])
        return replace(self, weights=own[0], geometric=own[1], power=own[2], log_prior=own[3])

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

    def begun(self, prompt: Tensor) -> Tensor:
        """Return the log weights [K] that a continuation begins with, after a prompt's stretches.

        They are the posterior after the last `prompt_stretches`, and a share of the prior (the fixed share of Herbster
        and Warmuth, 1998, at this one place). So what a prompt teaches costs a continuation at most log2(1/share) bits
        if it is wrong there. `prompt` has each expert's natural-log probability of every stretch [K, S], fp64.
        """
        last = prompt[:, prompt.shape[1] - min(self.prompt_stretches, prompt.shape[1]) :]
        learnt = posteriors(self.log_prior, last)[0][-1]
        return torch.stack([_log(1 - self.prior_share) + learnt, _log(self.prior_share) + self.log_prior]).logsumexp(0)


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf


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
