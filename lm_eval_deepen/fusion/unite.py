"""UniTE: average the members' distributions over the union of their most likely pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lm_eval_deepen.config import Options
from lm_eval_deepen.fusion._linear import one_to_one
from lm_eval_deepen.fusion._maps import first_pieces, spelling_fingerprint, stored_map
from lm_eval_deepen.fusion._rows import (
    NEG_INF,
    TINY,
    Kept,
    Roles,
    finish,
    gather_groups,
    keep,
    leaders_of,
    left_alone,
    roles_of,
    shares_of,
    within_groups,
)
from lm_eval_deepen.fusion._union import Union, unite_vocabularies
from lm_eval_deepen.fusion.base import Fused, Fuser, MemberView, fusion
from lm_eval_deepen.relative.matrix import SparseMatrix
from lm_eval_deepen.relative.support import abstain
from lm_eval_deepen.relative.topk import largest
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

if TYPE_CHECKING:
    from lm_eval_deepen.relative.store import MatrixStore

CHUNK_BYTES = 128 << 20  # working memory of the rows that are fused at once


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
            if len(members) == 1:
                break
            identity = {"spelling": spelling_fingerprint(member), "union": union.vocabulary.fingerprint}

            def build(member: MemberView = member, columns: Tensor = columns) -> SparseMatrix:
                return one_to_one(_lookup(member, columns, union, store.progress), len(member.vocabulary))

            matrix, fact = stored_map(store, member, "unite", identity, build)
            ids = matrix.indices[:, 0].long()
            # A map is of the ids that the tokenizer gives; the fuser reads a group's mass at its leader.
            lookups.append(torch.where(matrix.values[:, 0] > 0, leaders_of(member.vocabulary)[ids], -1))
            facts.append(fact)
        return UniteFuser(self, union, [member.vocabulary for member in members], lookups, facts)


def _lookup(member: MemberView, columns: Tensor, union: Union, progress: bool) -> Tensor:
    """Return the member's id for every column of the union [K]: its own piece, else its first token, else -1."""
    leaders = torch.full((len(union.vocabulary),), -1, dtype=torch.int64)
    ids = (columns >= 0).nonzero()[:, 0]
    leaders.scatter_reduce_(0, columns[ids], ids, "amin", include_self=False)  # ids with one column: their leader
    apart = union.vocabulary.control | union.vocabulary.unused
    missing = [n for n in (leaders < 0).nonzero()[:, 0].tolist() if n not in apart]
    if missing:
        leaders[missing] = first_pieces(member, [union.vocabulary.pieces[n] for n in missing], progress)
    return leaders


@dataclass(frozen=True, eq=False)
class _Place:
    """A member's tensors on one device: roles, the column of an id [V_m], the id of a column [K]."""

    roles: Roles
    columns: Tensor
    lookup: Tensor

    def to(self, device: torch.device) -> _Place:
        return _Place(self.roles.to(device), self.columns.to(device), self.lookup.to(device))


class UniteFuser:
    """Averages over the union of the members' candidates.

    Attributes:
        out_vocab: the union vocabulary, the main member's pieces first.
        facts: its size and the maps' files, for the diagnostics of a run.
    """

    def __init__(
        self,
        options: Unite,
        union: Union,
        vocabularies: Sequence[ByteVocab],
        lookups: Sequence[Tensor],
        facts: Sequence[dict[str, Any]],
    ) -> None:
        """Take the union and, for every member, its id for each column [K]; of ids with the same bytes the leader."""
        self.options, self.out_vocab = options, union.vocabulary
        self.facts = {"union_pieces": len(union.vocabulary), "maps": list(facts)}
        roles = [roles_of(vocabulary, with_end=bool(vocabularies[0].eos)) for vocabulary in vocabularies]
        places = tuple(_Place(*parts) for parts in zip(roles, union.columns, lookups, strict=False))
        self._placed = {torch.device("cpu"): places}

    def skip(self, logp: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return rows [B] in which no other member takes part."""
        return left_alone(tuple(logp), weights)

    @torch.no_grad()
    def fuse(self, logp: Sequence[Tensor], weights: Tensor) -> Fused:
        """Fuse rows; see `fusion.base` for shapes.

        Stats: ``candidates``, how many a row had; ``candidate_mass``, the main member's mass on them; ``end_mass``
        of the result; ``dropped_control_mass``, the weighted mass of the other members' control pieces.
        """
        device = logp[0].device
        if device not in self._placed:
            self._placed[device] = tuple(place.to(device) for place in self._placed[torch.device("cpu")])
        width = len(self.out_vocab) + sum(rows.shape[1] for rows in logp)
        step = max(1, CHUNK_BYTES // (12 * width))
        parts = []
        for start in range(0, max(1, len(weights)), step):
            chunk = slice(start, start + step)
            rows = [member[chunk].to(device) for member in logp]
            parts.append(self._fuse(rows, weights[chunk].to(device), self._placed[device]))
        stats = {name: torch.cat([part.stats[name] for part in parts]) for name in parts[0].stats}
        return Fused(torch.cat([part.logp for part in parts]), stats)

    def _fuse(self, logp: list[Tensor], weights: Tensor, places: Sequence[_Place]) -> Fused:
        size, columns = logp[0].shape[1], len(self.out_vocab)
        active = weights > 0
        active[:, 0] = True  # its candidates are kept even where it has no weight
        parts = [keep(abstain(rows, active[:, m]), places[m].roles) for m, rows in enumerate(logp)]
        p = [gather_groups(part.logp.exp(), place.roles) for part, place in zip(parts, places, strict=True)]
        candidates, used = self._candidates(p, active, places)
        shares = shares_of(weights, parts)
        average = torch.zeros(candidates.shape, device=candidates.device)
        for m, place in enumerate(places):
            ids = place.lookup[candidates]
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
        out = self._share_groups(out[:, :columns], parts[0], places[0].roles, candidates, used)
        out = finish(out, logp[0], parts[0], places[0].roles, usable)
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

    def _candidates(self, p: Sequence[Tensor], active: Tensor, places: Sequence[_Place]) -> tuple[Tensor, Tensor]:
        """Return the columns of a row's candidates [B, n], ascending, and which places are in use [B, n]."""
        columns, columns_of = len(self.out_vocab), []
        for m, place in enumerate(places):
            values, ids = largest(p[m], min(self.options.top_k, p[m].shape[1]))
            taken = (values > 0) & active[:, m, None]
            columns_of.append(torch.where(taken, place.columns[ids], columns))
        ids = torch.cat(columns_of, dim=1).sort(dim=1).values
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
