"""What a row of probabilities is made of, and the pieces of it that a step works on.

A member's distribution splits into text, end of text, other control pieces and unused ids. The support of a
row is the small set of text pieces that a truncated step redistributes; it depends on the members'
distributions alone, never on the token that is being scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_deepen.relative.build import described_rows
from lm_eval_deepen.relative.matrix import RelativeMatrix
from lm_eval_deepen.relative.topk import largest
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

NEG_INF = float("-inf")


@dataclass(frozen=True, eq=False)
class Side:
    """A member as a step sees it; all ids are int64.

    Attributes:
        matrix: its relative matrix [V, A].
        anchor_ids: its id of every anchor [A].
        anchor_of: the anchor with the bytes of an id, or -1 [V].
        outside: ids that are not text: ``eos``, ``control`` and ``unused`` together.
        eos: ids that end a text.
        control: ids of the other control pieces (and of pieces without bytes).
        unused: ids without a token.
    """

    matrix: RelativeMatrix
    anchor_ids: Tensor
    anchor_of: Tensor
    outside: Tensor
    eos: Tensor
    control: Tensor
    unused: Tensor

    def to(self, device: torch.device) -> Side:
        """Return the same side on `device`."""
        return Side(**{name: value.to(device) for name, value in vars(self).items()})


def make_side(
    vocabulary: ByteVocab, matrix: RelativeMatrix, anchor_ids: Sequence[int], twins: dict[int, int], rows: str
) -> Side:
    """Return the side of a member; with rows ``all``, EOS and control pieces are ordinary pieces."""
    size = len(vocabulary)
    anchors = torch.tensor(list(anchor_ids), dtype=torch.int64)
    anchor_of = torch.full((size,), -1, dtype=torch.int64)
    anchor_of[anchors] = torch.arange(len(anchors))
    for other, anchor in twins.items():
        anchor_of[other] = anchor
    text = described_rows(vocabulary, rows)
    eos = torch.zeros(size, dtype=torch.bool)
    unused = torch.zeros(size, dtype=torch.bool)
    unused[sorted(vocabulary.unused)] = True
    if rows == "text":
        eos[sorted(set(vocabulary.eos))] = True
    ids = {"outside": ~text, "eos": eos, "control": ~text & ~eos & ~unused, "unused": unused}
    return Side(matrix, anchors, anchor_of, **{name: mask.nonzero()[:, 0] for name, mask in ids.items()})


@dataclass(frozen=True)
class Split:
    """The parts of a batch of rows, in natural logs.

    Attributes:
        text: text pieces given that the next piece is text [B, V]; ``-inf`` elsewhere.
        log_text: log mass of text given text or end [B].
        log_end: log mass of end given text or end [B].
        log_kept: log mass of text and end given anything but unused ids [B].
        log_total: log mass of everything but unused ids, as given [B].
        dropped: mass of control pieces and unused ids [B].
        valid: rows [B] (bool) with any mass on text or end.
    """

    text: Tensor
    log_text: Tensor
    log_end: Tensor
    log_kept: Tensor
    log_total: Tensor
    dropped: Tensor
    valid: Tensor


def split(logp: Tensor, side: Side, *, with_end: bool) -> Split:
    """Split rows [B, V]; without an end, end of text counts as a dropped control piece."""
    text = logp.to(torch.float32, copy=True).index_fill_(1, side.outside, NEG_INF)
    mass = torch.logsumexp(text, dim=1)
    end, control = _log_mass(logp, side.eos), _log_mass(logp, side.control)
    unused = _log_mass(logp, side.unused)
    if not with_end:
        end, control = torch.full_like(mass, NEG_INF), torch.logaddexp(control, end)
    kept = torch.logaddexp(mass, end)
    valid = kept > NEG_INF
    base = torch.where(valid, kept, 0.0)
    total = torch.logaddexp(kept, control)
    everything = torch.logaddexp(total, unused)
    text -= torch.where(mass > NEG_INF, mass, 0.0)[:, None]
    return Split(
        text=text,
        log_text=mass - base,
        log_end=end - base,
        log_kept=kept - torch.where(total > NEG_INF, total, 0.0),
        log_total=total,
        dropped=1 - (kept - torch.where(everything > NEG_INF, everything, 0.0)).exp(),
        valid=valid,
    )


def _log_mass(logp: Tensor, ids: Tensor) -> Tensor:
    """Return the log of the mass [B] of some ids; ``-inf`` for none."""
    return torch.logsumexp(logp.index_select(1, ids).to(torch.float32), dim=1)


@dataclass(frozen=True)
class Support:
    """A member's pieces that a step works on.

    Attributes:
        ids: [B, K], ascending; a masked place repeats the first id of its row.
        logp: log-probabilities given the support [B, K]; ``-inf`` where masked.
        log_mass: log of the text mass the support holds [B].
        mask: places in use [B, K].
    """

    ids: Tensor
    logp: Tensor
    log_mass: Tensor
    mask: Tensor

    def scatter(self, text: Tensor, logp: Tensor) -> Tensor:
        """Write `logp` [B, K], given the support, into rows `text` [B, V] in place; the rest stays."""
        logp = logp + self.log_mass[:, None]
        return text.scatter_(1, self.ids, torch.where(self.mask, logp, logp[:, :1]))


def supports(texts: Sequence[Tensor], sides: Sequence[Side], active: Tensor, k: int) -> list[Support]:
    """Return each member's support: its top k text pieces and its anchors in another active member's top k.

    The union is symmetric, so that identical members have identical supports.

    Args:
        texts: ``Split.text`` of every member [B, V_m].
        sides: the members.
        active: members that take part [B, M] (bool).
        k: pieces taken from every member.
    """
    tops, anchors = [], []
    for member, (text, side) in enumerate(zip(texts, sides, strict=True)):
        values, ids = largest(text, min(k, text.shape[1] - len(side.outside)))
        used = (values > NEG_INF) & active[:, member, None]
        tops.append((ids, values > NEG_INF))
        anchors.append(torch.where(used, side.anchor_of[ids], -1))
    found = []
    for member, (text, side) in enumerate(zip(texts, sides, strict=True)):
        size = text.shape[1]
        ids, known = tops[member]
        candidates = [torch.where(known, ids, size)]
        for other, theirs in enumerate(anchors):
            if other != member:
                candidates.append(torch.where(theirs >= 0, side.anchor_ids[theirs.clamp(min=0)], size))
        found.append(_restrict(text, _distinct(torch.cat(candidates, dim=1), size)))
    return found


def _distinct(ids: Tensor, size: int) -> Tensor:
    """Sort ids [B, n], replace repetitions by `size` and cut columns that no row needs."""
    ids = ids.sort(dim=1).values
    ids[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1].clone(), size)
    ids = ids.sort(dim=1).values
    used = (ids < size).sum(1)
    return ids[:, : max(1, int(used.max()) if len(used) else 1)]


def _restrict(text: Tensor, ids: Tensor) -> Support:
    mask = ids < text.shape[1]
    ids = torch.where(mask, ids, torch.where(mask[:, :1], ids[:, :1], 0))
    logp = torch.where(mask, text.gather(1, ids), NEG_INF)
    mass = torch.logsumexp(logp, dim=1)
    logp = logp - torch.where(mass > NEG_INF, mass, 0.0)[:, None]
    return Support(ids, logp, mass, mask)


def sit_out(logp: Tensor, active: Tensor) -> Tensor:
    """Replace rows [B, V] of members that sit out by zeros: whatever is in them must not reach the result."""
    return logp if bool(active.all()) else torch.where(active[:, None], logp, 0.0)
