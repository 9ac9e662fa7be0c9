"""The steps of `deepen`: project, average, invert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lm_eval_deepen.fusion.seam import Fused
from lm_eval_deepen.inverse import Solver, get_solver
from lm_eval_deepen.inverse.trust import within
from lm_eval_deepen.relative.average import geometric, linear
from lm_eval_deepen.relative.gathered import share_columns
from lm_eval_deepen.relative.support import Side, Split, Support, sit_out, split, supports
from lm_eval_deepen.relative.topk import NEG_INF, argmax
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

if TYPE_CHECKING:
    from lm_eval_deepen.fusion.deepen import Deepen

CHUNK_BYTES = 64 << 20  # working memory of the rows that are fused at once; twice as much is slower on a CPU
ACCELERATOR = 8  # times as much elsewhere
DEFAULT_SUPPORT = 512  # pieces per member, where rows come from embeddings


class Alone:
    """The fuser of an ensemble of one: every row is left to it."""

    def __init__(self, vocabulary: ByteVocab) -> None:
        """Keep the vocabulary."""
        self.out_vocab = vocabulary

    def skip(self, logp: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return all rows [B]."""
        return torch.ones(len(weights), dtype=torch.bool, device=logp[0].device)

    def fuse(self, logp: Sequence[Tensor], weights: Tensor) -> Fused:
        """Return the member's own distribution."""
        return Fused(logp[0].to(torch.float32))


class DeepenFuser:
    """Fuses rows as DESIGN.md's "The method, exactly" says; `sides` has the main member first.

    Attributes:
        out_vocab: the main member's pieces.
        facts: anchors and matrices, for the diagnostics of a run.
    """

    def __init__(self, out_vocab: ByteVocab, sides: Sequence[Side], options: Deepen, facts: dict[str, Any]) -> None:
        """Take the members' sides and the options; nothing is computed."""
        self.out_vocab, self.options, self.facts = out_vocab, options, facts
        self.solver: Solver = get_solver(options.solver)
        self.steps = options.steps or self.solver.steps
        self.full, self.support = options.full, 0 if options.full else int(options.support or DEFAULT_SUPPORT)
        rate = self.solver.learning_rate if options.learning_rate is None else options.learning_rate
        self.learning_rate = 0.0 if rate is None else float(rate)
        self._eos_ids = sorted(set(out_vocab.eos))
        self._placed: dict[torch.device, tuple[Side, ...]] = {torch.device("cpu"): tuple(sides)}

    def skip(self, logp: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return rows [B] without another member; with ``eos: reference`` also those the paper leaves."""
        left = ~(weights[:, 1:] > 0).any(1).to(logp[0].device)
        if self.options.eos == "reference":
            eos = torch.tensor(self._eos_ids, dtype=torch.int64, device=left.device)
            left |= torch.isin(argmax(logp[0]), eos)
            if self.solver.learning_rate is not None and self.learning_rate == 0:
                left[:] = True
        return left

    @torch.no_grad()
    def fuse(self, logp: Sequence[Tensor], weights: Tensor) -> Fused:
        """Fuse rows; see the seam for shapes.

        Stats: ``end_mass`` of the result; ``residual_kl`` and ``lost_mass`` of the inverse; ``held_back``, the share
        of the change that the trust region took back;
        ``truncated_mass``, the members' weighted text mass outside the support; ``dropped_control_mass``, the
        weighted mass of the other members' control pieces, which have no counterpart, and of unused ids.
        """
        device, sides = logp[0].device, self._sides(logp[0].device)
        size = CHUNK_BYTES * (1 if device.type == "cpu" else ACCELERATOR)
        rows = max(1, size // self._row_bytes(sides, sum(x.shape[1] for x in logp)))
        out = torch.empty(logp[0].shape, dtype=torch.float32, device=device)
        parts = []
        for start in range(0, max(1, len(weights)), rows):
            chunk = slice(start, start + rows)
            parts.append(_fuse(self, [x[chunk] for x in logp], weights[chunk], sides, out[chunk]))
        return Fused(out, {name: torch.cat([stats[name] for stats in parts]) for name in parts[0]})

    def _sides(self, device: torch.device) -> tuple[Side, ...]:
        if device not in self._placed:
            self._placed[device] = tuple(side.to(device) for side in self._placed[torch.device("cpu")])
        return self._placed[device]

    def _row_bytes(self, sides: Sequence[Side], width: int) -> int:
        anchors = sides[0].matrix.shape[1]
        if self.full:
            return 16 * (width + 2 * anchors)
        taken = self.support * len(sides)
        return 8 * (width + anchors) + sum(side.matrix.at_bytes(taken) for side in sides)


def _fuse(
    fuser: DeepenFuser, logp: Sequence[Tensor], weights: Tensor, sides: Sequence[Side], out: Tensor
) -> dict[str, Tensor]:
    """Fuse a chunk of rows into `out` [B, V_0] and return statistics."""
    device, main, side = out.device, logp[0], sides[0]
    weights = weights.to(device)
    active = weights > 0
    with_end = len(side.eos) > 0 or fuser.options.eos == "reference"
    rows = [main, *(sit_out(logp[i].to(device), active[:, i]) for i in range(1, len(logp)))]
    parts = split(rows, sides, with_end=with_end, out=out)

    share = weights * parts.valid  # [B, M]
    share = share / share.sum(1, keepdim=True).clamp(min=1e-30)
    kept, total = parts.log_kept[:, 0], parts.log_total[:, 0]
    text_mass, end, usable, stats = _invert(fuser, parts, sides, share, active, with_end=with_end)
    if len(side.eos):
        out.index_copy_(1, side.eos, _end_logp(main, side.eos) + (kept + end)[:, None])
    out.index_copy_(1, side.control, main.index_select(1, side.control).float() - total[:, None])
    if not bool(usable.all()):
        own = main.to(torch.float32, copy=True).index_fill_(1, side.unused, NEG_INF)
        out.copy_(torch.where(usable[:, None], out, own - total[:, None]))
    stats = {name: value.masked_fill(~usable, 0.0) for name, value in stats.items()}
    stats["end_mass"] = (torch.where(usable, end, parts.log_end[:, 0]) + kept).exp()
    stats["dropped_control_mass"] = (weights[:, 1:] * parts.dropped[:, 1:]).sum(1)
    return stats


def _end_logp(main: Tensor, eos: Tensor) -> Tensor:
    """Return log-probabilities [B, n] of EOS ids given end: the main member's, uniform if it has none."""
    own = torch.log_softmax(main.index_select(1, eos).float(), dim=1)
    return own.masked_fill(own.isnan(), -math.log(len(eos)))


def _invert(
    fuser: DeepenFuser, parts: Split, sides: Sequence[Side], share: Tensor, active: Tensor, *, with_end: bool
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Turn the main member's text pieces [B, V_0] into the fused ones, in place.

    Returns:
        The log mass of text and of end given text or end [B], the rows that could be fused [B], and statistics.
    """
    full, text = fuser.full, parts.texts[0]
    found: list[Support] = []
    held = torch.zeros_like(share)
    if full:
        logps = [text - parts.log_sum[:, i, None] for i, text in enumerate(parts.texts)]
        operators = [side.matrix.full() for side in sides]
    else:
        taking_part = torch.cat([torch.ones_like(active[:, :1]), active[:, 1:]], dim=1)
        found = supports(parts.texts, sides, taking_part, fuser.support)
        logps = [support.logp for support in found]
        operators = share_columns([side.matrix.at(at.ids) for side, at in zip(sides, found, strict=True)])
        held = torch.stack([support.log_mass for support in found], dim=1) - parts.log_sum
    reached = operators[0].project(logps[0].exp())
    others = (op.project(logp.exp()) for op, logp in zip(operators[1:], logps[1:], strict=True))
    average = geometric if fuser.options.average == "geometric" else linear
    agreed = average(reached, others, share, parts, with_end=with_end)
    solved = fuser.solver.run(logps[0], agreed.r, operators[0], fuser.steps, fuser.learning_rate, reached)
    stats = {**solved.stats, "truncated_mass": (agreed.blend * (1 - held.exp()).clamp(min=0)).sum(1)}
    logp = solved.logp
    if fuser.options.trust_region is not None:
        logp, stats["held_back"] = within(logps[0], logp, fuser.options.trust_region)
    mass = parts.log_kept[:, 0] + agreed.log_text
    if full:
        torch.add(logp, mass[:, None], out=text)
    else:
        scale = (mass - parts.log_sum[:, 0])[:, None]
        found[0].scatter(text.add_(scale), logp + (scale + found[0].log_mass[:, None]))
    return agreed.log_text, agreed.log_end, agreed.usable, stats
