"""Rows fused by several static ensembles at once: the probability that each gives to a token, and their mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lm_eval_deepen.fusion.base import Fused, Fuser

if TYPE_CHECKING:
    from lm_eval_deepen.weighting.experts import Experts


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

    def __init__(self, fusers: Sequence[Fuser], logp: Sequence[Tensor], weights: Tensor) -> None:
        """Fuse.

        Args:
            fusers: one per expert; they differ in their average alone.
            logp: log-probabilities [B, V_m] per member.
            weights: the experts' weights [B, K, M].
        """
        fused = [fuser.fuse(logp, weights[:, k].float()) for k, fuser in enumerate(fusers)]
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
        """Take all rows of the main member [B, V_0], which of them are left [B], and the others, fused.

        Args:
            main: log-probabilities of the main member.
            columns: length C of a fused row.
            left: rows that are left (bool).
            fused: the experts at the other rows, in their order; None where there are none.
            experts: their number K.
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


def by_expert(fuser: Fuser, logp: Sequence[Tensor], weights: Tensor, experts: Experts) -> ExpertRows:
    """Return rows [B, V_m] under experts; methods that know no faster way fuse K times.

    Args:
        fuser: the method's.
        logp: log-probabilities per member.
        weights: the experts' weights in every row [B, K, M], of the members that take part.
        experts: which they are.
    """
    if hasattr(fuser, "experts"):
        return fuser.experts(logp, weights, experts)
    return FusedByEach([fuser] * len(experts), logp, weights)
