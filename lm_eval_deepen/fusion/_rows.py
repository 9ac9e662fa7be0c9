"""Shared by the methods that work on probabilities: the events of a row, and equal events that share one mass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lm_eval_deepen.fusion.base import Fused
from lm_eval_deepen.relative.rows_from_embeddings import described_rows
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

NEG_INF = float("-inf")
TINY = torch.finfo(torch.float32).tiny
CHUNK_BYTES = 128 << 20  # working memory of the rows that are fused at once


@dataclass(frozen=True, eq=False)
class Roles:
    """The ids of a vocabulary by what they stand for; all tensors are int64 but the mask."""

    outside: Tensor  # ids that are neither text nor end of text
    control: Tensor  # those of them that are control pieces
    unused: Tensor  # those of them without a token
    # ids that stand for one event, a row each: pieces with the same bytes, and all EOS ids [n, w]. The first is the
    # event's leader; a row that is shorter repeats it
    groups: Tensor
    in_group: Tensor  # places of `groups` in use [n, w] (bool)

    def to(self, device: torch.device) -> Roles:
        """Return the same roles on `device`."""
        return Roles(**{name: value.to(device) for name, value in vars(self).items()})

    @property
    def leaders(self) -> Tensor:
        """The first id of every group [n]."""
        return self.groups[:, 0]


def text_ids(vocabulary: ByteVocab) -> dict[bytes, tuple[int, ...]]:
    """Return the ids of every piece of text, ascending: no control piece, no unused id."""
    apart = vocabulary.control | vocabulary.unused
    if not any(vocabulary.pieces[i] for i in apart):
        return vocabulary.ids_of
    kept = ((piece, tuple(i for i in ids if i not in apart)) for piece, ids in vocabulary.ids_of.items())
    return {piece: ids for piece, ids in kept if ids}


def roles_of(vocabulary: ByteVocab, *, with_end: bool) -> Roles:
    """Return the roles of a vocabulary; without an end, its EOS ids are control pieces like others."""
    size = len(vocabulary)
    kept = described_rows(vocabulary)
    eos = sorted(set(vocabulary.eos)) if with_end else []
    kept[eos] = True
    unused = torch.zeros(size, dtype=torch.bool)
    unused[sorted(vocabulary.unused)] = True
    groups = [list(ids) for ids in text_ids(vocabulary).values() if len(ids) > 1]
    groups += [eos] if len(eos) > 1 else []
    width = max((len(group) for group in groups), default=1)
    padded = [group + [group[0]] * (width - len(group)) for group in groups]
    used = [[True] * len(group) + [False] * (width - len(group)) for group in groups]
    return Roles(
        outside=(~kept).nonzero()[:, 0],
        control=(~kept & ~unused).nonzero()[:, 0],
        unused=unused.nonzero()[:, 0],
        groups=torch.tensor(padded, dtype=torch.int64).reshape(-1, width),
        in_group=torch.tensor(used, dtype=torch.bool).reshape(-1, width),
    )


def leaders_of(vocabulary: ByteVocab) -> Tensor:
    """Return the leader of every id [V], int64: the lowest id of text with the same bytes, and else the id itself.

    A tokenizer may spell a text with another id of a group than its leader: Gemma spells "'" with its text piece, and
    ``<0x27>`` leads. Where the mass of a group is at its leader (`gather_groups`), that is where it has to be read.
    """
    leaders = torch.arange(len(vocabulary))
    for ids in text_ids(vocabulary).values():
        if len(ids) > 1:
            leaders[list(ids)] = ids[0]
    return leaders


@dataclass(frozen=True)
class Kept:
    """Rows of a member without what is neither text nor end of text, in natural logs."""

    logp: Tensor  # log-probabilities given text or end [B, V], a copy; ``-inf`` elsewhere
    log_kept: Tensor  # log mass of text and end given anything but unused ids [B]
    log_total: Tensor  # log mass of everything but unused ids, as given [B]
    dropped: Tensor  # mass of control pieces and unused ids [B]
    valid: Tensor  # rows [B] (bool) with any mass on text or end


def keep(logp: Tensor, roles: Roles) -> Kept:
    """Return rows [B, V] given text or end of text."""
    kept = logp.to(torch.float32, copy=True).index_fill_(1, roles.outside, NEG_INF)
    mass = torch.logsumexp(kept, dim=1)
    valid = mass > NEG_INF
    control, unused = _log_mass(logp, roles.control), _log_mass(logp, roles.unused)
    total = torch.logaddexp(mass, control)
    everything = torch.logaddexp(total, unused)
    kept -= torch.where(valid, mass, 0.0)[:, None]
    return Kept(
        logp=kept,
        log_kept=mass - torch.where(total > NEG_INF, total, 0.0),
        log_total=total,
        dropped=1 - (mass - torch.where(everything > NEG_INF, everything, 0.0)).exp(),
        valid=valid,
    )


def _log_mass(logp: Tensor, ids: Tensor) -> Tensor:
    return torch.logsumexp(logp.index_select(1, ids).to(torch.float32), dim=1)


def within_groups(logp: Tensor, roles: Roles) -> Tensor:
    """Return log-probabilities [B, n, w] of a group's ids given the group: the member's own, uniform if it has none."""
    own = logp[:, roles.groups].masked_fill(~roles.in_group, NEG_INF)
    uniform = -roles.in_group.sum(1, keepdim=True).log()
    shares = torch.log_softmax(own, dim=-1)
    shares = torch.where(shares.isnan(), uniform, shares)
    return torch.where(roles.in_group, shares, NEG_INF)


def gather_groups(p: Tensor, roles: Roles) -> Tensor:
    """Move the mass of every group to its leader, in place, and return the probabilities [B, V]."""
    mass = (p[:, roles.groups] * roles.in_group).sum(-1)
    p[:, roles.groups[roles.in_group]] = 0.0
    p[:, roles.leaders] = mass
    return p


def finish(logp: Tensor, main: Tensor, part: Kept, roles: Roles, usable: Tensor) -> Tensor:
    """Complete fused rows: the main member's control pieces keep their probability, unused ids have none.

    The fused log-probabilities [B, K], given text or end, are changed in place. Of the main member's rows as given
    [B, V_0], `part` was kept; a row that is not `usable` [B] (bool) gets them as they are.
    """
    size = main.shape[1]
    logp += part.log_kept[:, None]
    logp[:, roles.control] = main[:, roles.control].float() - part.log_total[:, None]
    logp[:, roles.unused] = NEG_INF
    if not bool(usable.all()):
        own = torch.full_like(logp, NEG_INF)
        own[:, :size] = main.to(torch.float32, copy=True).index_fill_(1, roles.unused, NEG_INF)
        logp = torch.where(usable[:, None], logp, own - part.log_total[:, None])
    return logp


def shares_of(weights: Tensor, parts: list[Kept]) -> Tensor:
    """Return weights [B, M] among the members that have any text or end; rows of zeros where none has."""
    shares = weights * torch.stack([part.valid for part in parts], dim=1)
    return shares / shares.sum(1, keepdim=True).clamp(min=TINY)


def left_alone(logp: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return rows [B] (bool) in which no other member takes part."""
    return ~(weights[:, 1:] > 0).any(1).to(logp[0].device)


class RowFuser:
    """Fuses rows a few at a time, with what it knows of the members on the device of the rows; a base.

    Attributes:
        out_vocab: the K pieces of the result, the main member's V_0 first.
        facts: what it knows, for the diagnostics of a run.
    """

    ROW_COPIES: ClassVar[int]  # fp32 copies of all distributions of a row that are held at once

    def __init__(self, out_vocab: ByteVocab, facts: dict[str, Any], *places: Sequence[Any]) -> None:
        """Take what is placed on a device: sequences of things with ``to(device)``, which `fuse_chunk` is given."""
        self.out_vocab, self.facts = out_vocab, facts
        self._placed = {torch.device("cpu"): places}

    def skip(self, logp: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return rows [B] in which no other member takes part."""
        return left_alone(logp, weights)

    @torch.no_grad()
    def fuse(self, logp: Sequence[Tensor], weights: Tensor) -> Fused:
        """Fuse rows; see `fusion.base` for shapes, and `fuse_chunk` for statistics."""
        device = logp[0].device
        if device not in self._placed:
            known = self._placed[torch.device("cpu")]
            self._placed[device] = tuple([part.to(device) for part in parts] for parts in known)
        width = len(self.out_vocab) + sum(rows.shape[1] for rows in logp)
        step = max(1, CHUNK_BYTES // (4 * self.ROW_COPIES * width))
        chunks = []
        for start in range(0, max(1, len(weights)), step):
            rows = [member[start : start + step].to(device) for member in logp]
            chunks.append(self.fuse_chunk(rows, weights[start : start + step].to(device), *self._placed[device]))
        stats = {name: torch.cat([part.stats[name] for part in chunks]) for name in chunks[0].stats}
        return Fused(torch.cat([part.logp for part in chunks]), stats)

    def fuse_chunk(self, logp: list[Tensor], weights: Tensor, *places: Any) -> Fused:
        """Fuse a few rows, given what is placed on their device."""
        raise NotImplementedError
