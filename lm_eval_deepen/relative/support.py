"""What a row of probabilities is made of, and the pieces of it that a step works on.

A member's distribution splits into text, end of text, other control pieces and unused ids. The support of a
row is the small set of text pieces that a truncated step redistributes; it depends on the members'
distributions alone, never on the token that is being scored. A member brings some of its likeliest text pieces to it:
a number of them, or those that hold a share of its mass. The mass that is left out is bounded: where a row's own pieces
would leave out more, it gets more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_deepen.relative.matrix import OneHotOperator, RelativeMatrix
from lm_eval_deepen.relative.operators import look_up
from lm_eval_deepen.relative.rows_from_embeddings import described_rows
from lm_eval_deepen.relative.topk import NEG_INF, largest, scan
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

WIDER = 4  # times as many pieces are looked at for a row that needs more
AT_FIRST = 512  # pieces that are looked at where a mass is asked for


@dataclass(frozen=True, eq=False)
class Side:
    """A member as a step sees it; all ids are int64."""

    matrix: RelativeMatrix  # its relative matrix [V, A]
    anchor_ids: Tensor  # its id of every anchor [A]
    anchor_of: Tensor  # the anchor with the bytes of an id, or -1 [V]
    outside: Tensor  # ids that are not text: ``eos``, ``control`` and ``unused`` together
    eos: Tensor  # ids that end a text
    control: Tensor  # ids of the other control pieces (and of pieces without bytes)
    unused: Tensor  # ids without a token
    mask: Tensor  # 0 for text and ``-inf`` for ids outside [V], fp32

    def to(self, device: torch.device) -> Side:
        """Return the same side on `device`."""
        return Side(**{name: value.to(device) for name, value in vars(self).items()})


def make_side(
    vocabulary: ByteVocab, matrix: RelativeMatrix, anchor_ids: Sequence[int], duplicates: dict[int, int], rows: str
) -> Side:
    """Return the side of a member; with rows ``all``, EOS and control pieces are ordinary pieces."""
    size = len(vocabulary)
    anchors = torch.tensor(list(anchor_ids), dtype=torch.int64)
    anchor_of = torch.full((size,), -1, dtype=torch.int64)
    anchor_of[anchors] = torch.arange(len(anchors))
    for other, anchor in duplicates.items():
        anchor_of[other] = anchor
    text = described_rows(vocabulary, rows)
    eos = torch.zeros(size, dtype=torch.bool)
    unused = torch.zeros(size, dtype=torch.bool)
    unused[sorted(vocabulary.unused)] = True
    if rows == "text":
        eos[sorted(set(vocabulary.eos))] = True
    ids = {"outside": ~text, "eos": eos, "control": ~text & ~eos & ~unused, "unused": unused}
    places = {name: mask.nonzero()[:, 0] for name, mask in ids.items()}
    return Side(matrix, anchors, anchor_of, mask=torch.where(text, 0.0, NEG_INF), **places)


@dataclass(frozen=True)
class Split:
    """The parts of every member's rows, in natural logs."""

    rows: tuple[Tensor, ...]  # log-probabilities as given, per member [B, V_m]
    maxima: tuple[Tensor | None, ...]  # ``Scan.maxima`` of their text pieces, per member
    # ``Scan.classes`` of their text pieces, per member: p R where rows of R are one-hot
    classes: tuple[Tensor | None, ...]
    log_sum: Tensor  # log mass of text as given [B, M], 0 where there is none
    log_text: Tensor  # log mass of text given text or end [B, M]
    log_end: Tensor  # log mass of end given text or end [B, M]
    log_kept: Tensor  # log mass of text and end given anything but unused ids [B, M]
    log_total: Tensor  # log mass of everything but unused ids, as given [B, M]
    dropped: Tensor  # mass of control pieces and unused ids [B, M]
    valid: Tensor  # whether there is any mass on text or end [B, M] (bool)

    def masses(self, index: Tensor) -> Split:
        """Return the masses alone of some rows."""
        kept = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return Split(rows=(), maxima=(), classes=(), **kept)


def shares(weights: Tensor, valid: Tensor) -> Tensor:
    """Return weights [..., M] of the members that have something to say, sum 1; all on the main one where none has."""
    own = weights * valid
    total = own.sum(-1, keepdim=True)
    alone = torch.zeros_like(own)
    alone[..., 0] = 1
    return torch.where(total > 0, own / total.clamp_min(1e-30), alone)


def split(
    logp: Sequence[Tensor],
    sides: Sequence[Side],
    *,
    with_end: bool,
    grouped: bool = False,
    one_hot: Sequence[OneHotOperator] | None = None,
) -> Split:
    """Split every member's rows of log-probabilities [B, V_m].

    Args:
        logp: the rows.
        sides: the members.
        with_end: whether there is an end of text; otherwise it counts as a dropped control piece.
        grouped: as `scan`.
        one_hot: the members' matrices, where products with them are to be found in passing.
    """
    scans = [
        scan(rows, side.mask, grouped=grouped, one_hot=own)
        for rows, side, own in zip(logp, sides, one_hot or (None,) * len(sides), strict=True)
    ]
    mass = torch.stack([scanned.log_mass for scanned in scans], dim=1)
    end, control, unused = (
        torch.stack([_log_mass(rows, getattr(side, role)) for rows, side in zip(logp, sides, strict=True)], dim=1)
        for role in ("eos", "control", "unused")
    )
    if not with_end:
        end, control = torch.full_like(mass, NEG_INF), torch.logaddexp(control, end)
    kept = torch.logaddexp(mass, end)
    total = torch.logaddexp(kept, control)
    base = _or_zero(kept)
    return Split(
        rows=tuple(logp),
        maxima=tuple(scanned.maxima for scanned in scans),
        classes=tuple(scanned.classes for scanned in scans),
        log_sum=_or_zero(mass),
        log_text=mass - base,
        log_end=end - base,
        log_kept=kept - _or_zero(total),
        log_total=total,
        dropped=1 - (kept - _or_zero(torch.logaddexp(total, unused))).exp(),
        valid=kept > NEG_INF,
    )


def _or_zero(log_mass: Tensor) -> Tensor:
    """Replace the log of no mass by 0, so that it can be subtracted."""
    return log_mass.masked_fill(log_mass == NEG_INF, 0.0)


def _log_mass(logp: Tensor, ids: Tensor) -> Tensor:
    """Return the log of the mass [B] of some ids; ``-inf`` for none."""
    if not len(ids):
        return logp.new_full((len(logp),), NEG_INF, dtype=torch.float32)
    return torch.logsumexp(logp.index_select(1, ids).to(torch.float32), dim=1)


@dataclass(frozen=True)
class Support:
    """A member's pieces that a step works on."""

    places: Tensor  # where its pieces are in all rows [B, V], flattened [b, K]
    ids: Tensor  # [b, K], ascending; a masked place repeats the first id of its row
    logp: Tensor  # log-probabilities given the support [b, K]; ``-inf`` where masked
    log_mass: Tensor  # log of the mass the support holds, as given [b], 0 where there is none
    mask: Tensor  # places in use [b, K]

    def scatter(self, rows: Tensor, logp: Tensor) -> None:
        """Write `logp` [b, K] into contiguous `rows` [B, V] in place; the rest stays."""
        values = torch.where(self.mask, logp, logp[:, :1])
        rows.view(-1).scatter_(0, self.places.flatten(), values.flatten())


def supports(
    rows: Sequence[Tensor], index: Tensor, sides: Sequence[Side], active: Tensor, tops: Sequence[Tensor]
) -> list[Support]:
    """Return each member's support: its own pieces and its anchors among another active member's.

    The union is symmetric, so that identical members have identical supports.

    Args:
        rows: log-probabilities as given, one of every member [B, V_m].
        index: which of these rows [b].
        sides: the members.
        active: members that take part [b, M] (bool).
        tops: every member's own pieces [b, n]; V_m in a place that is not used.
    """
    anchors = []
    for member, (own, side) in enumerate(zip(tops, sides, strict=True)):
        size = len(side.anchor_of)
        known = (own < size) & active[:, member, None]
        anchors.append(torch.where(known, look_up(side.anchor_of, own.clamp(max=size - 1)), -1))
    restricted = []
    for member, (row, side) in enumerate(zip(rows, sides, strict=True)):
        candidates = [tops[member]]
        for other, theirs in enumerate(anchors):
            if other != member:
                own = look_up(side.anchor_ids, theirs.clamp(min=0))
                candidates.append(own.masked_fill_(theirs < 0, row.shape[1]))
        ids = _distinct(torch.cat(candidates, dim=1), row.shape[1])
        mask = ids < row.shape[1]
        ids = torch.where(mask, ids, torch.where(mask[:, :1], ids[:, :1], 0))
        places = ids + row.shape[1] * index[:, None]
        logp = look_up(row.reshape(-1), places).to(torch.float32).masked_fill(~mask, NEG_INF)
        mass = _or_zero(torch.logsumexp(logp, dim=1))
        restricted.append(Support(places, ids, logp.sub_(mass[:, None]), mass, mask))
    return restricted


def _distinct(ids: Tensor, size: int) -> Tensor:
    """Return the distinct ids below `size` of each row [B, n], ascending, filled up with `size` [B, K]."""
    ids = ids.sort(dim=1).values
    new = ids < size
    new[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    count = new.cumsum(1)
    width = max(1, int(count[:, -1].max()) if len(ids) else 1)
    out = ids.new_full((len(ids), width + 1), size)  # what is not new goes to a column that is cut off
    return out.scatter_(1, torch.where(new, count - 1, width), ids)[:, :width]


def abstain(logp: Tensor, active: Tensor) -> Tensor:
    """Replace rows [B, V] of members that abstain by zeros: whatever is in them must not reach the result."""
    return logp if bool(active.all()) else torch.where(active[:, None], logp, 0.0)


@dataclass(frozen=True)
class TopRule:
    """Which of its text pieces a member brings to a row's support."""

    pieces: int | None  # its most likely ones, so many; with `mass`, at most so many
    mass: float | None  # the fewest that hold this share of its text, None where their number alone counts
    # the largest share of its text that may be left out; a row that leaves out more gets the fewest pieces that do not
    max_truncated: float

    @property
    def first(self) -> int:
        """How many pieces to look at first."""
        if self.mass is None:
            assert self.pieces is not None
            return self.pieces
        return AT_FIRST if self.pieces is None else min(AT_FIRST, self.pieces)


@dataclass(frozen=True)
class Tops:
    """A member's own pieces for a row's support."""

    ids: Tensor  # of its text pieces [B, n]; V in a place that is not used
    enough: Tensor  # rows [B] (bool) for which n was enough
    widened: Tensor  # rows [B] (bool) that have more pieces than the rule's number or mass asks for

    def at(self, index: Tensor) -> Tops:
        """Return the same of some rows."""
        return Tops(self.ids[index], self.enough[index], self.widened[index])


def tops(parts: Split, member: int, side: Side, index: Tensor, active: Tensor, rule: TopRule, width: int) -> Tops:
    """Return a member's pieces for some rows, as far as the `width` most likely ones are enough.

    What is found for a row depends on the row alone. The rows are those of an ascending `index` [b]; nothing is bounded
    in a row in which the member is not `active` [b] (bool).
    """
    rows = parts.rows[member]
    size = rows.shape[1]
    everything = size - len(side.outside)
    width = min(width, everything)
    some = None if len(index) == len(rows) else index
    values, ids = largest(rows, width, mask=side.mask, maxima=parts.maxima[member], index=some)
    shares = (values.to(torch.float32) - parts.log_sum[index, member, None]).exp_()
    bound = 1 - rule.max_truncated
    if rule.mass is None and rule.pieces is not None and width <= rule.pieces:  # all of them, in any order
        enough = ~active | (shares.sum(1) >= bound) | (width == everything)
        return Tops(torch.where(values > NEG_INF, ids, size), enough, torch.zeros_like(enough))
    shares, order = shares.double().sort(dim=1, descending=True)
    held = shares.cumsum(1)
    asked = _fewest(held, rule.mass, rule.pieces)
    needed = torch.where(active, _fewest(held, bound, None), 1)
    chosen = torch.maximum(asked, needed)
    place = torch.arange(width, device=rows.device)
    used = (place < chosen[:, None]) & (shares > 0)
    enough = ~active | (chosen <= width) | (width == everything)
    return Tops(torch.where(used, ids.gather(1, order), size), enough, active & (needed > asked))


def _fewest(held: Tensor, mass: float | None, most: int | None) -> Tensor:
    """Return how many pieces [B] hold a mass, `most` at most; n + 1 if n pieces [B, n] do not."""
    if mass is None:
        assert most is not None
        return torch.full_like(held[:, 0], most, dtype=torch.int64)
    count = (held < mass).sum(1) + 1
    return count if most is None else count.clamp(max=most)
