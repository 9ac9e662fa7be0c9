"""What the members, their ensemble and two controls need to predict some documents, in bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.engine.bits_per_byte import Document, Reading, ensemble_bits
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
    for k, main in enumerate(ensemble.config.members):
        rest = [m for m in range(len(ensemble.members)) if m != k]
        config = ensemble.config.replace(members=(main, *(ensemble.config.members[m] for m in rest)))
        if getattr(config.weighting_options, "prior", None) is not None:
            prior = _reordered(config.weighting_options.prior, ensemble.experts, [k, *rest])
            config = config.replace(weighting_options=config.weighting_options.replace(prior=prior))
        average = getattr(config.options, "average", None)
        if isinstance(average, tuple) and len(average) > 1:  # exponents, one for each member
            config = config.replace(options=config.options.replace(average=tuple(average[m] for m in (k, *rest))))
        members = [ensemble.members[m] for m in (k, *rest)]
        ensembles.append(ensemble if k == 0 else Ensemble.assemble(config, members))
    return ensembles


def _reordered(prior: Sequence[float], experts: Experts, order: Sequence[int]) -> tuple[float, ...]:
    """Return the experts' prior where their members stand in another order: with them, the same experts do."""
    points = [tuple(weights) for weights in experts.weights.tolist()]
    places = {key: at for at, key in enumerate(zip(points, experts.kinds(), strict=True))}
    before = [tuple(point[order.index(m)] for m in range(len(order))) for point in points]
    return tuple(prior[places[key]] for key in zip(before, experts.kinds(), strict=True))


def read_orders(
    ensembles: Sequence[Ensemble], documents: Sequence[Document], members: int | None = None
) -> list[Reading]:
    """Return one reading per order of members; by the first `members` of each where the others are not needed."""
    return [Reading.of(ensemble, documents, members) for ensemble in ensembles]


def fused_bits(reading: Reading) -> Tensor:
    """Return bits per document [D] of the ensemble as it is configured."""
    return ensemble_bits(reading, reading.ensemble)


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
    segments = [_Segments(reading) for reading in readings]
    bits = {"linear": torch.zeros(len(documents)).double(), "geometric": torch.zeros(len(documents)).double()}
    for index in range(len(documents)):
        common = set.intersection(*(set(own.ends(index)) for own in segments))
        scores = torch.stack([own.sums(index, common) for own in segments])  # [M, segments]
        mixed = torch.logsumexp(scores + weights[:, None].log(), dim=0)
        bits["linear"][index] = -mixed.sum() / math.log(2)
        used = weights > 0  # 0 x -inf
        bits["geometric"][index] = -(weights[used] @ scores[used]).sum() / math.log(2)
    return bits


class _Segments:
    """A member's own scores between byte positions of every document."""

    def __init__(self, reading: Reading) -> None:
        logp = reading.own_logp((reading.ensemble.main.config.temperature,))[0].double().tolist()
        self._tokens: list[list[tuple[int, float]]] = [[] for _ in reading.documents]
        for position, value in zip(reading.positions, logp, strict=True):
            self._tokens[position.document].append((position.left, value))

    def ends(self, index: int) -> Iterator[int]:
        """Yield the bytes left after each token of a document."""
        return (left for left, _ in self._tokens[index])

    def sums(self, index: int, common: set[int]) -> Tensor:
        """Return the sums of log-probabilities up to each common position, in the order of the text."""
        sums, total = [], 0.0
        for left, value in self._tokens[index]:
            total += value
            if left in common:
                sums.append(total)
                total = 0.0
        return torch.tensor(sums, dtype=torch.float64)
