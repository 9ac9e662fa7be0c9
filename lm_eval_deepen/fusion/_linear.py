"""Methods that map each member's distribution to common pieces by a fixed sparse matrix, and average there.

GaC, MinED and EVA are one formula, p = sum_m w_m p_m T_m, each with its own T_m [V_m, K].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lm_eval_deepen.fusion._events import Events
from lm_eval_deepen.fusion._rows import (
    TINY,
    Roles,
    RowFuser,
    finish,
    keep,
    leaders_of,
    roles_of,
    shares_of,
    within_groups,
)
from lm_eval_deepen.fusion.base import Fused
from lm_eval_deepen.relative.matrix import SparseMatrix
from lm_eval_deepen.relative.support import abstain
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab


class LinearFuser(RowFuser):
    """Averages the members' mapped distributions.

    A member's row is taken given text or end of text. End of text is one event, and so are pieces with the same
    bytes: their fused mass goes to the main member's ids in proportion to its own. Where a map loses mass
    (a piece without a counterpart) the result is renormalised.
    """

    ROW_COPIES = 4

    def __init__(
        self,
        out_vocab: ByteVocab,
        vocabularies: Sequence[ByteVocab],
        maps: Sequence[SparseMatrix],
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Take the members' vocabularies and the maps [V_m, K] of all but the main one; nothing is computed."""
        with_end = bool(vocabularies[0].eos)
        super().__init__(out_vocab, facts or {}, [roles_of(own, with_end=with_end) for own in vocabularies], maps)
        self.vocabularies = tuple(vocabularies)

    def shares(self, mapped: Sequence[Tensor], shares: Tensor, roles: Roles) -> Tensor:
        """Return the members' shares [B, M] of the average, from those by weight.

        In their mapped distributions [B, K] a group's mass is spread among its ids, by the main member's `roles`.
        """
        return shares

    def events(self) -> Events | None:
        """Return what the members' tokens stand for; None where the result is no mixture of their distributions."""
        roles, maps = self._placed[torch.device("cpu")]
        if type(self).shares is not LinearFuser.shares or any(matrix.values.shape[1] > 1 for matrix in maps):
            return None
        main = leaders_of(self.vocabularies[0])
        if ends := self.vocabularies[0].eos:
            main[list(ends)] = min(ends)
        main[roles[0].outside] = -1
        others = []
        for role, matrix in zip(roles[1:], maps, strict=True):
            own = torch.where(matrix.values[:, 0] > 0, matrix.indices[:, 0].long(), len(self.out_vocab))
            own[role.outside] = -1
            others.append(own)
        first = torch.cat([torch.arange(len(self.out_vocab)), torch.tensor([-1])])  # -1: text without a column
        return Events(self.out_vocab.pieces, (main, *others), first, roles[0].control)

    def fuse_chunk(
        self, logp: list[Tensor], weights: Tensor, roles: Sequence[Roles], maps: Sequence[SparseMatrix]
    ) -> Fused:
        """Fuse a few rows.

        Stats: ``end_mass`` of the result; ``unmapped_mass``, the weighted mass of pieces without a counterpart;
        ``dropped_control_mass``, the weighted mass of the other members' control pieces and unused ids.
        """
        main, size, active = logp[0], logp[0].shape[1], weights > 0
        parts = [keep(main, roles[0])]
        parts += [keep(abstain(logp[m], active[:, m]), roles[m]) for m in range(1, len(logp))]
        own = parts[0].logp
        mapped = [torch.nn.functional.pad(own.exp(), (0, len(self.out_vocab) - size))]
        for part, matrix in zip(parts[1:], maps, strict=True):
            mapped.append(spread(matrix.full().project(part.logp.exp()), own, roles[0]))
        shares = self.shares(mapped, shares_of(weights, parts), roles[0])
        total = mapped[0] * shares[:, :1]
        for m in range(1, len(mapped)):
            total.add_(mapped[m] * shares[:, m, None])
        mass = total.sum(1)
        usable = parts[0].valid & (mass > TINY)
        scale = torch.where(usable, mass, 1.0).log()
        out = total.log_().sub_(scale[:, None])
        # what underflows as a probability still has a logarithm
        floor = own + (shares[:, 0].log() - scale)[:, None]
        torch.maximum(out[:, :size], floor, out=out[:, :size])
        out = finish(out, main, parts[0], roles[0], usable)
        lost = torch.stack([(1 - rows.sum(1)).clamp(0, 1) for rows in mapped[1:]], dim=1)
        dropped = torch.stack([part.dropped for part in parts[1:]], dim=1)
        stats = {
            "end_mass": out[:, sorted(set(self.out_vocab.eos))].exp().sum(1),
            "unmapped_mass": (shares[:, 1:] * lost).sum(1),
            "dropped_control_mass": (weights[:, 1:] * dropped).sum(1),
        }
        return Fused(out, stats)


def spread(mapped: Tensor, own: Tensor, roles: Roles) -> Tensor:
    """Share the mass [B, K] that arrived at the leader of a group among the group's ids, in place.

    The main member's log-probabilities `own` [B, V_0] give the proportions.
    """
    if len(roles.groups):
        given = within_groups(own, roles).exp() * mapped[:, roles.leaders, None]
        mapped[:, roles.groups[roles.in_group]] = given[:, roles.in_group]
    return mapped


def one_to_one(targets: Tensor, columns: int) -> SparseMatrix:
    """Return the map [V_m, K] that sends every piece to the column `targets` [V_m], and -1 nowhere."""
    mapped = targets >= 0
    lost = (~mapped).to(torch.float32)
    return SparseMatrix(mapped.to(torch.float32)[:, None], targets.clamp(min=0).to(torch.int32)[:, None], columns, lost)
