"""What the members, their ensemble and two controls need to predict some documents, in bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.engine.bits_per_byte import Reading
from lm_eval_deepen.weighting.experts import Experts

TEMPERATURES = tuple(round(math.exp(k / 12), 4) for k in range(-5, 8))  # 0.66 to 1.79, steps of 9 %


@dataclass(frozen=True)
class Own:
    """A member's own figures."""

    name: str  # the member
    bits: Tensor  # per document, as it is configured [D]
    by_temperature: Tensor  # per document at every one of `TEMPERATURES` [T, D]

    def fitted(self, dev: Own | None = None) -> tuple[Tensor, list[float]]:
        """Return bits per document [D] at a temperature fitted elsewhere, and the temperatures that were fitted.

        Fitted on another text, or else each half of the documents on the other half.
        """
        if dev is not None:
            best = int(dev.by_temperature.sum(1).argmin())
            return self.by_temperature[best], [TEMPERATURES[best]]
        halves = [torch.arange(len(self.bits)) % 2 == half for half in (0, 1)]
        bits, chosen = torch.zeros_like(self.bits), []
        for here, elsewhere in (halves, halves[::-1]):
            best = int(self.by_temperature[:, elsewhere].sum(1).argmin()) if elsewhere.any() else TEMPERATURES.index(1)
            bits[here] = self.by_temperature[best, here]
            chosen.append(TEMPERATURES[best])
        return bits, chosen


def own(reading: Reading) -> Own:
    """Return the main member's own figures."""
    member = reading.ensemble.main
    grid = reading.bits(reading.own_logp((member.config.temperature, *TEMPERATURES)))
    return Own(member.name, grid[0], grid[1:])


def orders(ensemble: Ensemble) -> list[Ensemble]:
    """Return the ensemble with each of its members as the main one; the others keep their order."""
    ensembles = []
    for k in range(len(ensemble.members)):
        order = [k, *(m for m in range(len(ensemble.members)) if m != k)]
        config = ensemble.config.replace(members=tuple(ensemble.config.members[m] for m in order))
        if getattr(config.weighting_options, "prior", None) is not None:
            prior = _reordered(config.weighting_options.prior, ensemble.experts, order)
            config = config.replace(weighting_options=config.weighting_options.replace(prior=prior))
        average = getattr(config.options, "average", None)
        if isinstance(average, tuple) and len(average) > 1:  # exponents, one for each member
            config = config.replace(options=config.options.replace(average=tuple(average[m] for m in order)))
        members = [ensemble.members[m] for m in order]
        ensembles.append(ensemble if k == 0 else Ensemble.assemble(config, members))
    return ensembles


def _reordered(prior: Sequence[float], experts: Experts, order: Sequence[int]) -> tuple[float, ...]:
    """Return the experts' prior where their members stand in another order: with them, the same experts do."""
    points = [tuple(weights) for weights in experts.weights.tolist()]
    places = {key: at for at, key in enumerate(zip(points, experts.kinds(), strict=True))}
    before = [tuple(point[order.index(m)] for m in range(len(order))) for point in points]
    return tuple(prior[places[key]] for key in zip(before, experts.kinds(), strict=True))


def controls(readings: Sequence[Reading]) -> dict[str, Tensor]:
    """Return bits per document [D] of mixtures taken only where all tokenisations end.

    Between two such places every member's score is the sum of its own tokens'. ``linear`` averages probabilities,
    ``geometric`` log-probabilities; the latter is not normalised, which makes its bits an upper bound.

    Args:
        readings: one per member, each with that member as the main one.
    """
    documents = readings[0].documents
    names = [reading.ensemble.main.name for reading in readings]
    weight = {m.name: m.weight for m in readings[0].ensemble.config.members}
    weights = torch.tensor([weight[name] for name in names], dtype=torch.float64)
    tokens = [_own_tokens(reading) for reading in readings]
    bits = {"linear": torch.zeros(len(documents)).double(), "geometric": torch.zeros(len(documents)).double()}
    for index in range(len(documents)):
        own = [member[index] for member in tokens]
        common = set.intersection(*({left for left, _ in member} for member in own))
        scores = torch.stack([_sums(member, common) for member in own])  # [M, segments]
        mixed = torch.logsumexp(scores + weights[:, None].log(), dim=0)
        bits["linear"][index] = -mixed.sum() / math.log(2)
        used = weights > 0  # 0 x -inf
        bits["geometric"][index] = -(weights[used] @ scores[used]).sum() / math.log(2)
    return bits


def _own_tokens(reading: Reading) -> list[list[tuple[int, float]]]:
    """Return the main member's tokens of every document: the bytes left after each, and its log-probability."""
    logp = reading.own_logp((reading.ensemble.main.config.temperature,))[0].double().tolist()
    tokens: list[list[tuple[int, float]]] = [[] for _ in reading.documents]
    for position, value in zip(reading.positions, logp, strict=True):
        tokens[position.document].append((position.left, value))
    return tokens


def _sums(tokens: Sequence[tuple[int, float]], common: set[int]) -> Tensor:
    """Return the sums of log-probabilities up to each common position, in the order of the text."""
    sums, total = [], 0.0
    for left, value in tokens:
        total += value
        if left in common:
            sums.append(total)
            total = 0.0
    return torch.tensor(sums, dtype=torch.float64)
