"""Rows fused by several static ensembles at once: the probability that each gives to a token, and their mixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lm_eval_deepen.fusion.base import Fused, Fuser
from lm_eval_deepen.weighting.experts import Experts

Check = Callable[[Tensor, int], None]  # raises where a method gives other than so many rows [B, C]


class ExpertRows(Protocol):
    """B rows under K experts."""

    def at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return every expert's log-probability [n, K] (fp64) of a token in a row, for n pairs of them."""
        ...

    def mixed(self, log_posterior: Tensor) -> Fused:
        """Return the experts' mixture under each row's log posterior [B, K]."""
        ...


class FusedByEach:
    """Every expert's fused distribution in full: right for any method, at the cost of K fusions."""

    def __init__(
        self, fusers: Sequence[Fuser], logp: Sequence[Tensor], weights: Tensor, check: Check | None = None
    ) -> None:
        """Fuse rows [B, V_m] by a fuser per expert, which differ in their average alone, under `weights` [B, K, M]."""
        fused = [fuser.fuse(logp, weights[:, k].float()) for k, fuser in enumerate(fusers)]
        if check is not None:
            for part in fused:
                check(part.logp, len(weights))
        self.logp = torch.stack([part.logp for part in fused])  # [K, B, C]
        self.stats = [part.stats for part in fused]

    def at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return every expert's log-probability [n, K] (fp64) of a token in a row, for n pairs of them."""
        return self.logp[:, rows, tokens].T.double()

    def mixed(self, log_posterior: Tensor) -> Fused:
        """Return the experts' mixture under each row's log posterior [B, K], with the mean of their statistics."""
        share = log_posterior.to(self.logp)
        out = torch.logsumexp(self.logp + share.T[..., None], dim=0)
        names = [name for name in self.stats[0] if all(name in stats for stats in self.stats)]
        values = {name: torch.stack([stats[name].float() for stats in self.stats], dim=1) for name in names}
        return Fused(out, {name: (value * share.exp()).sum(1) for name, value in values.items()})


class SomeLeft:
    """Rows of which some are left to the main member: there every expert says what that member says."""

    def __init__(self, main: Tensor, columns: int, left: Tensor, fused: ExpertRows | None, experts: int) -> None:
        """Take all rows of the main member [B, V_0], which are left [B] (bool), and the others under K experts, fused.

        Without others, `fused` is None. A fused row has `columns` entries, C.
        """
        self.main, self.columns, self.left, self.fused, self.experts = main, columns, left, fused, experts
        self.place = torch.cumsum(~left, 0) - 1  # [B]

    def at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return every expert's log-probability [n, K]; a token that the main member lacks has none in a row left."""
        rows, tokens = rows.to(self.main.device), tokens.to(self.main.device)
        own = tokens < self.main.shape[1]
        values = torch.where(own, self.main[rows, tokens.clamp(max=self.main.shape[1] - 1)].double(), -torch.inf)
        logp = values[:, None].repeat(1, self.experts)
        fused = ~self.left[rows]
        if self.fused is not None and bool(fused.any()):
            logp[fused] = self.fused.at(self.place[rows[fused]], tokens[fused])
        return logp

    def mixed(self, log_posterior: Tensor) -> Fused:
        """Return the mixture [B, C]."""
        out = self.main.new_full((len(self.main), self.columns), -torch.inf)
        out[:, : self.main.shape[1]] = self.main
        stats: dict[str, Tensor] = {}
        if self.fused is not None:
            mixed = self.fused.mixed(log_posterior[~self.left])
            out[~self.left] = mixed.logp
            stats = mixed.stats
        return Fused(out, stats)


class ByPower:
    """Rows under experts that raise the members' distributions to several powers, which are fused apart."""

    def __init__(self, parts: Sequence[tuple[Tensor, ExpertRows]]) -> None:
        """Take the indices of the experts of each power, and the rows under them."""
        self.parts = parts
        self.left = getattr(parts[0][1], "left", None)  # the same with every power

    def at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return every expert's log-probability [n, K]."""
        order = torch.cat([index for index, _ in self.parts]).argsort()
        logp = torch.cat([part.at(rows, tokens) for _, part in self.parts], dim=1)
        return logp[:, order.to(logp.device)]

    def mixed(self, log_posterior: Tensor) -> Fused:
        """Return the experts' mixture [B, C], with the mean of their statistics."""
        out, stats = [], []
        for index, part in self.parts:
            own = log_posterior[:, index.to(log_posterior.device)]
            mass = torch.logsumexp(own, dim=1, keepdim=True)
            given = own - torch.where(mass > -torch.inf, mass, 0.0)
            mixed = part.mixed(torch.where(mass > -torch.inf, given, -math.log(len(index))))
            mass = mass.to(mixed.logp)
            out.append(mixed.logp + mass)
            here = mass.exp()[:, 0] if self.left is None else mass.exp()[~self.left, 0]
            stats.append({name: value * here for name, value in mixed.stats.items()})
        means = {name: torch.stack([own[name] for own in stats]).sum(0) for name in stats[0]}
        return Fused(torch.logsumexp(torch.stack(out), dim=0), means)


def by_expert(
    fuser: Fuser,
    logp: Sequence[Tensor],
    weights: Tensor,
    experts: Experts,
    left: Tensor | None = None,
    check: Check | None = None,
) -> ExpertRows:
    """Return rows [B, V_m] under experts; methods that know no faster way fuse K times, and are checked.

    `weights` [B, K, M] are the experts' of the members that take part; rows of `left` [B] (bool) are left to the main
    member.
    """
    powers, places = experts.powers, experts.places_of_powers()
    parts = []
    for place in places.unique().tolist():
        index = (places == place).nonzero()[:, 0]
        raised = logp if powers[place] == 1 else [torch.log_softmax(powers[place] * rows, dim=1) for rows in logp]
        own = weights[:, index.to(weights.device)]
        parts.append((index, _at_one_power(fuser, raised, own, experts.some(index), left, check)))
    return parts[0][1] if len(parts) == 1 else ByPower(parts)


def _at_one_power(
    fuser: Fuser,
    logp: Sequence[Tensor],
    weights: Tensor,
    experts: Experts,
    left: Tensor | None,
    check: Check | None,
) -> ExpertRows:
    if left is not None:
        fused = None
        if not bool(left.all()):
            fused = _at_one_power(fuser, [rows[~left] for rows in logp], weights[~left], experts, None, check)
        return SomeLeft(logp[0], len(fuser.out_vocab), left, fused, len(experts))
    if hasattr(fuser, "experts"):
        return fuser.experts(logp, weights, experts)
    return FusedByEach([fuser] * len(experts), logp, weights, check)
