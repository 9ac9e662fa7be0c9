"""What is lost between vocabularies: a member in the main member's pieces, against itself in its own.

No weights win that back: where the better member loses much in this way, an ensemble with the other one as its main
member can hardly reach it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lm_eval_deepen.engine.bits_per_byte import Document, Reading, Variant, quiet
from lm_eval_deepen.engine.ensemble import Ensemble


@dataclass(frozen=True)
class ProjectionLoss:
    """How many more bits a member needs in the main member's pieces than in its own, as a share.

    Attributes:
        main: the main member.
        member: the member with all weight on it.
        plain: without covers.
        covered: with them; None for a published method, which has none.
    """

    main: str
    member: str
    plain: float
    covered: float | None

    def __str__(self) -> str:
        """Return ``B through A: +7.7 % without covers, +2.8 % with them``."""
        with_them = "" if self.covered is None else f", {100 * self.covered:+.1f} % with them"
        return f"{self.member} through {self.main}: {100 * self.plain:+.1f} % without covers{with_them}"

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        covered = {} if self.covered is None else {"covers": self.covered}
        return {"main": self.main, "member": self.member, "no_covers": self.plain, **covered}


def read_with_covers(ensemble: Ensemble, documents: Sequence[Document]) -> Reading:
    """Return a reading that answers for the ensemble with covers and without, where its method may have them."""
    if ensemble.config.compat == "reference":
        return Reading.of(ensemble, documents)
    return Reading.of(replace(ensemble, config=ensemble.config.replace(covers="on")), documents)


def projection_losses(reading: Reading, own: Mapping[str, float]) -> list[ProjectionLoss]:
    """Return what every other member loses through the main one.

    Args:
        reading: made by `read_with_covers`.
        own: the bits that every member needs in its own pieces, by its name.
    """
    ensemble, losses = reading.ensemble, []
    temperatures = tuple(member.config.temperature for member in ensemble.members)
    states = [covers for covers in ("off", "on") if covers == "off" or ensemble.config.covers == "on"]
    for m, member in enumerate(ensemble.members[1:], start=1):
        weights = torch.zeros(len(ensemble.members))
        weights[m] = 1
        variants = [
            Variant(
                quiet(replace(ensemble, config=ensemble.config.replace(covers=covers), weights=weights, weigher=None)),
                temperatures,
            )
            for covers in states
        ]
        bits = reading.bits(reading.logp(variants)).sum(1).tolist()
        shares = [value / own[member.name] - 1 for value in bits]
        losses.append(
            ProjectionLoss(ensemble.main.name, member.name, shares[0], dict(zip(states, shares, strict=True)).get("on"))
        )
    return losses
