"""Weights that learn from the text: the experts' posterior along every text that is scored or generated.

What an expert gives to a token does not depend on the posterior, so that tokens are looked up in any order and in any
batch. The posterior at a place is the prior times what the experts gave to everything before it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from lm_eval_deepen.fusion._expert_rows import ExpertRows
from lm_eval_deepen.weighting.experts import posteriors

Reader = tuple[Hashable, int, int]  # text, position in it, token


class Ledger:
    """What every expert of one ensemble gave to the tokens of some texts."""

    def __init__(self, priors: Mapping[Hashable, Tensor], lengths: Mapping[Hashable, int]) -> None:
        """Start with the log prior [K] and the number of tokens of every text."""
        self.priors = priors
        self.logp = {
            key: torch.zeros(count, len(priors[key]), dtype=torch.float64) for key, count in lengths.items()
        }  # [T, K] each
        self.latest = {key: (0, prior) for key, prior in priors.items()}  # a place, and the log posterior there

    def note(self, rows: ExpertRows, readers: Sequence[Sequence[Reader]]) -> None:
        """Look up the tokens that texts read off B rows.

        Args:
            rows: the rows under all experts.
            readers: of every row, the texts that read it.
        """
        wanted = [(at, reader) for at, own in enumerate(readers) for reader in own]
        index = torch.tensor([[at, token] for at, (_, _, token) in wanted])
        logp = rows.at(index[:, 0], index[:, 1]).cpu()  # [n, K]
        for values, (_, (key, position, _)) in zip(logp, wanted, strict=True):
            self.logp[key][position] = values

    def before(self, key: Hashable, at: int) -> Tensor:
        """Return the log posterior [K] before token number `at` of a text, whose earlier tokens are noted."""
        done, log_posterior = self.latest[key]
        if at < done:
            done, log_posterior = 0, self.priors[key]
        if at > done:
            log_posterior = posteriors(log_posterior, self.logp[key][done:at].T)[0][-1]
        self.latest[key] = (at, log_posterior)
        return log_posterior

    def values(self, key: Hashable) -> list[float]:
        """Return the mixture's natural-log probability of every token of a text."""
        return posteriors(self.priors[key], self.logp[key].T)[1].tolist()
