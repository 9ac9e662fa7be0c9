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
from lm_eval_deepen.fusion.deepen import DeepenFuser


@dataclass(frozen=True)
class ProjectionLoss:
    """How many more bits a member needs in the main member's pieces than in its own, as a share."""

    main: str  # the main member
    member: str  # the member with all weight on it
    plain: float  # without covers
    covered: float | None  # with them; None for a published method, which has none

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


def projections(ensemble: Ensemble) -> dict[tuple[str, str], Variant]:
    """Return ensembles with all weight on one member that is not the main one, by its name and the state of covers."""
    temperatures = tuple(member.config.temperature for member in ensemble.members)
    fuser = ensemble.fuser.projecting() if isinstance(ensemble.fuser, DeepenFuser) else ensemble.fuser
    variants = {}
    for m, member in enumerate(ensemble.members[1:], start=1):
        weights = torch.zeros(len(ensemble.members))
        weights[m] = 1
        for covers in ("off", "on") if ensemble.config.covers == "on" else ("off",):
            config = ensemble.config.replace(covers=covers)
            one = replace(ensemble, config=config, fuser=fuser, weights=weights, weigher=None, selective=None)
            variants[member.name, covers] = Variant(quiet(one), temperatures)
    return variants


def losses(main: str, bits: Mapping[tuple[str, str], float], own: Mapping[str, float]) -> list[ProjectionLoss]:
    """Return what members lose: `bits` by the keys of `projections`, against their own, by member, on the same text."""
    shares = {key: value / own[key[0]] - 1 for key, value in bits.items()}
    return [
        ProjectionLoss(main, name, plain, shares.get((name, "on")))
        for (name, covers), plain in shares.items()
        if covers == "off"
    ]


def projection_losses(reading: Reading, own: Mapping[str, float]) -> list[ProjectionLoss]:
    """Return what every other member loses through the main one, from a reading made by `read_with_covers`.

    `own` are the bits that every member needs in its own pieces, by its name.
    """
    variants = projections(reading.ensemble)
    bits = reading.bits(reading.logp(list(variants.values()))).sum(1).tolist()
    return losses(reading.ensemble.main.name, dict(zip(variants, bits, strict=True)), own)
