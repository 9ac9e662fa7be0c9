"""UniTE: average the members' distributions over the union of their most likely pieces."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lm_eval_deepen.config import Options
from lm_eval_deepen.fusion._linear import one_to_one
from lm_eval_deepen.fusion._maps import first_pieces, stored_map
from lm_eval_deepen.fusion._rows import (
    NEG_INF,
    TINY,
    Kept,
    Roles,
    RowFuser,
    finish,
    gather_groups,
    keep,
    leaders_of,
    roles_of,
    shares_of,
    within_groups,
)
from lm_eval_deepen.fusion._union import Union, unite_vocabularies
from lm_eval_deepen.fusion.base import Fused, Fuser, MemberView, fusion
from lm_eval_deepen.relative.matrix import SparseMatrix
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.relative.support import abstain
from lm_eval_deepen.relative.topk import largest
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab


@fusion("unite", paper="arXiv:2410.03777")
class Unite(Options):
    """Options of ``method: unite``, union top-k ensembling.

    The candidates of a step are the members' ``top_k`` most likely pieces (10 in the released code). In a member that
    lacks a candidate, its probability is that of the first token the member spells it with. Each member's
    probabilities are normalised over the candidates, then averaged. Pieces are compared as bytes, with their
    leading space. The main member's candidates always take part. A score is a lower bound: union-only pieces
    share the normaliser.

    The released code differs in three ways: it compares strings; it goes on from the main member's first token of a
    candidate that the main member lacks, not from all of its bytes; and in members with byte-level BPE it gives a
    candidate whose first token is a candidate already the logit 0.
    """

    top_k: int = Field(10, ge=1, description="The number of most likely pieces that are taken from every member.")
    tail: Literal["main", "none"] = Field(
        "main",
        description="The probability of pieces that are no candidates: the main member's (the candidates share the "
        "rest, so every score is finite), or zero, as published (a score may then be minus infinity).",
    )

    COMPAT: ClassVar[dict[str, dict[str, Any]]] = {"reference": {"tail": "none"}}

    def build(self, members: Sequence[MemberView], store: MatrixStore) -> Fuser:
        """Find how every member begins to spell the pieces it lacks; kept in the store's folder.

        Raises:
            MatrixError: a folder that cannot be written, or a damaged file.
        """
        union = unite_vocabularies([member.vocabulary for member in members])
        lookups, facts = [], []
        for member, columns in zip(members, union.columns, strict=True):
            identity = {"spelling": member.spelling_fingerprint, "union": union.vocabulary.fingerprint}
            build = partial(_lookup, member, columns, union, store.progress)
            matrix, fact = stored_map(store, member, "unite", identity, build)
            ids = matrix.indices[:, 0].long()
            # A map is of the ids that the tokenizer gives; the fuser reads a group's mass at its leader.
            lookups.append(torch.where(matrix.values[:, 0] > 0, leaders_of(member.vocabulary)[ids], -1))
            facts.append(fact)
        return UniteFuser(self, union, [member.vocabulary for member in members], lookups, facts)


def _lookup(member: MemberView, columns: Tensor, union: Union, progress: bool) -> SparseMatrix:
    """Return the map of every column of the union to the member's id: its own piece, else its first token [K, V_m]."""
    leaders = torch.full((len(union.vocabulary),), -1, dtype=torch.int64)
    ids = (columns >= 0).nonzero()[:, 0]
    leaders.scatter_reduce_(0, columns[ids], ids, "amin", include_self=False)  # ids with one column: their leader
    apart = union.vocabulary.control | union.vocabulary.unused
    missing = [n for n in (leaders < 0).nonzero()[:, 0].tolist() if n not in apart]
    if missing:
        leaders[missing] = first_pieces(member, [union.vocabulary.pieces[n] for n in missing], progress)
    return one_to_one(leaders, len(member.vocabulary))


class UniteFuser(RowFuser):
    """Averages over the union of the members' candidates."""

    ROW_COPIES = 3

    def __init__(
        self,
        options: Unite,
        union: Union,
        vocabularies: Sequence[ByteVocab],
        lookups: Sequence[Tensor],
        maps: Sequence[dict[str, Any]],
    ) -> None:
        """Take the union and, for every member, its id for each column [K]; of ids with the same bytes the leader."""
        facts = {"union_pieces": len(union.vocabulary), "maps": list(maps)}
        roles = [roles_of(own, with_end=bool(vocabularies[0].eos)) for own in vocabularies]
        super().__init__(union.vocabulary, facts, roles, union.columns, lookups)
        self.options = options

    def fuse_chunk(
        self, logp: list[Tensor], weights: Tensor, roles: list[Roles], columns_of: list[Tensor], lookups: list[Tensor]
    ) -> Fused:
        """Fuse a few rows, given the members' roles, the column of each id [V_m], and the id of each column [K].

        Stats: ``candidates``, how many a row had; ``candidate_mass``, the main member's mass on them; ``end_mass``
        of the result; ``dropped_control_mass``, the weighted mass of the other members' control pieces.
        """
        size, columns = logp[0].shape[1], len(self.out_vocab)
        active = weights > 0
        active[:, 0] = True  # its candidates are kept even where it has no weight
        parts = [keep(abstain(rows, active[:, m]), roles[m]) for m, rows in enumerate(logp)]
        p = [gather_groups(part.logp.exp(), own) for part, own in zip(parts, roles, strict=True)]
        candidates, used = self._candidates(p, active, columns_of)
        shares = shares_of(weights, parts)
        average = torch.zeros(candidates.shape, device=candidates.device)
        for m, lookup in enumerate(lookups):
            ids = lookup[candidates]
            own = torch.where(used & (ids >= 0), p[m].gather(1, ids.clamp(min=0)), 0.0)
            average += own * (shares[:, m] / own.sum(1).clamp(min=TINY))[:, None]
        mass = average.sum(1)
        usable = parts[0].valid & (mass > TINY)
        inside = torch.where(used & (candidates < size), p[0].gather(1, candidates.clamp(max=size - 1)), 0.0).sum(1)

        held = inside.clamp(TINY, 1) if self.options.tail == "main" else torch.ones_like(inside)
        values = average.log() + (held.log() - torch.where(usable, mass, 1.0).log())[:, None]
        out = torch.full((len(candidates), columns + 1), NEG_INF, device=candidates.device)
        if self.options.tail == "main":
            out[:, :size] = parts[0].logp
        out.scatter_(1, torch.where(used, candidates, columns), values)
        out = self._share_groups(out[:, :columns], parts[0], roles[0], candidates, used)
        out = finish(out, logp[0], parts[0], roles[0], usable)
        dropped = torch.stack([part.dropped for part in parts[1:]], dim=1)
        return Fused(
            out,
            {
                "candidates": used.sum(1).float(),
                "candidate_mass": inside,
                "end_mass": out[:, sorted(set(self.out_vocab.eos))].exp().sum(1),
                "dropped_control_mass": (weights[:, 1:] * dropped).sum(1),
            },
        )

    def _candidates(self, p: Sequence[Tensor], active: Tensor, columns_of: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the columns of a row's candidates [B, n], ascending, and which places are in use [B, n]."""
        columns, chosen = len(self.out_vocab), []
        for m, own in enumerate(columns_of):
            values, ids = largest(p[m], min(self.options.top_k, p[m].shape[1]))
            taken = (values > 0) & active[:, m, None]
            chosen.append(torch.where(taken, own[ids], columns))
        ids = torch.cat(chosen, dim=1).sort(dim=1).values
        repeated = torch.zeros_like(ids, dtype=torch.bool)
        repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
        used = (ids < columns) & ~repeated
        return torch.where(used, ids, 0), used

    def _share_groups(self, out: Tensor, part: Kept, roles: Roles, candidates: Tensor, used: Tensor) -> Tensor:
        """Share a candidate's mass among the main member's ids that stand for it, in proportion to its own."""
        if not len(roles.groups):
            return out
        chosen = torch.zeros((len(out), out.shape[1] + 1), dtype=torch.bool, device=out.device)
        chosen.scatter_(1, torch.where(used, candidates, out.shape[1]), True)
        chosen = chosen[:, roles.leaders]
        shared = within_groups(part.logp, roles) + out[:, roles.leaders, None]
        shared = torch.where(chosen[..., None], shared, out[:, roles.groups])
        out[:, roles.groups[roles.in_group]] = shared[:, roles.in_group]
        return out
