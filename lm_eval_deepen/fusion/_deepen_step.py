"""The steps of `deepen`: project, average, invert."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from lm_eval_deepen.config import Options
from lm_eval_deepen.fusion._deepen_experts import OneHotExperts
from lm_eval_deepen.fusion._deepen_rows import Found, Group, Rows
from lm_eval_deepen.fusion._events import Events, of_anchors, of_union
from lm_eval_deepen.fusion._expert_rows import ExpertRows, FusedByEach
from lm_eval_deepen.fusion._threads import in_parts
from lm_eval_deepen.fusion.base import Fused
from lm_eval_deepen.relative.average import Agreed, linear
from lm_eval_deepen.relative.average import geometric as pool_geometrically
from lm_eval_deepen.relative.consistent import consistent
from lm_eval_deepen.relative.gathered import share_columns
from lm_eval_deepen.relative.matrix import OneHotOperator
from lm_eval_deepen.relative.power_mean import power_mean
from lm_eval_deepen.relative.product import product
from lm_eval_deepen.relative.support import Side, Support, abstain, shares, split, supports
from lm_eval_deepen.relative.topk import NEG_INF, argmax
from lm_eval_deepen.relative.tops import WIDER, TopRule, tops
from lm_eval_deepen.solvers.base import Solver
from lm_eval_deepen.solvers.exact import UNDERFLOWS, exact_gain
from lm_eval_deepen.solvers.trust import within
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

if TYPE_CHECKING:
    from lm_eval_deepen.weighting.experts import Experts

CHUNK_BYTES = 64 << 20  # working memory of the rows that are fused at once; twice as much is slower on a CPU
ACCELERATOR = 8  # times as much elsewhere
LARGEST_SHARE = 4  # a row that needs more than a quarter of a vocabulary is fused in full


class StepOptions(Protocol):
    """The options of a step, as `Deepen` has them."""

    @property
    def average(self) -> str | tuple[float, ...]:
        """The name of an average, the power of a power mean, or the exponents of a product."""
        ...

    @property
    def eos(self) -> str:
        """``anchor`` or ``reference``."""
        ...

    @property
    def trust_region(self) -> float | None:
        """The largest divergence from the main member, in nats."""
        ...

    @property
    def from_bytes(self) -> bool:
        """Whether rows are one-hot."""
        ...

    @property
    def solver(self) -> str:
        """The solver's name."""
        ...

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values."""
        ...

    def build_solver(self) -> Solver:
        """Return the way back into the main vocabulary."""
        ...

    def support_rule(self) -> TopRule | None:
        """Return which pieces a member brings to a row's support, None for all of them."""
        ...


class Alone:
    """The fuser of an ensemble of one: every row is left to it."""

    def __init__(self, vocabulary: ByteVocab) -> None:
        self.out_vocab = vocabulary

    def skip(self, logp: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return all rows [B]."""
        return torch.ones(len(weights), dtype=torch.bool, device=logp[0].device)

    def fuse(self, logp: Sequence[Tensor], weights: Tensor) -> Fused:
        """Return the member's own distribution."""
        return Fused(logp[0].to(torch.float32))


class DeepenFuser:
    """Fuses rows as "The method" in docs/design.md says; `sides` has the main member first.

    Attributes:
        out_vocab: the main member's pieces.
        facts: anchors and matrices, for the diagnostics of a run.
        by_stretches: whether given texts are scored by stretches instead (`method: mixture`).
        by_words: the options under which texts are written by words instead (`method: adafuse`).
        vocabularies: the members', with `by_stretches`.
    """

    by_stretches = False
    by_words: Options | None = None
    vocabularies: tuple[ByteVocab, ...] = ()

    def __init__(
        self, out_vocab: ByteVocab, sides: Sequence[Side], options: StepOptions, facts: dict[str, Any]
    ) -> None:
        """Take the members' sides and the options; nothing is computed."""
        self.out_vocab, self.options, self.facts = out_vocab, options, facts
        self.solver = options.build_solver()
        self.rule = options.support_rule()  # None: everything
        self.average = averaging(options.average)
        self._eos_ids = sorted(set(out_vocab.eos))
        self._placed: dict[torch.device, tuple[Side, ...]] = {torch.device("cpu"): tuple(sides)}

    def skip(self, logp: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return rows [B] without another member; with ``eos: reference`` also those the paper leaves."""
        left = ~(weights[:, 1:] > 0).any(1).to(logp[0].device)
        if self.options.eos == "reference":
            eos = torch.tensor(self._eos_ids, dtype=torch.int64, device=left.device)
            left |= torch.isin(argmax(logp[0]), eos)
            if getattr(self.solver, "learning_rate", None) == 0:
                left[:] = True
        return left

    @torch.no_grad()
    def fuse(self, logp: Sequence[Tensor], weights: Tensor) -> Fused:
        """Fuse rows; see `fusion.base` for shapes.

        Stats: ``end_mass`` of the result; ``residual_kl`` and ``lost_mass`` of the inverse; ``held_back``, the share
        of the change that the trust region took back;
        ``truncated_mass``, the members' weighted text mass outside the support, and its maximum; ``rows_widened``,
        rows whose support is larger than asked for, since that left out more than ``max_truncated``;
        ``dropped_control_mass``, the weighted mass of the other members' control pieces, which have no counterpart,
        and of unused ids.
        """
        device, sides = logp[0].device, self._sides(logp[0].device)
        width = sum(x.shape[1] for x in logp) + sides[0].matrix.shape[1]
        if self.rule is None:
            row_bytes = 16 * (width + sides[0].matrix.shape[1])
        else:
            row_bytes = 8 * width + support_bytes(sides, self.rule.first)
        rows = max(1, chunk_bytes(device) // row_bytes)
        out = torch.empty(logp[0].shape, dtype=torch.float32, device=device)
        parts = in_parts(
            len(weights), rows, device,
            lambda part: _fuse(self, [x[part] for x in logp], weights[part], sides, out[part]),
        )  # fmt: skip
        return Fused(out, {name: torch.cat([stats[name] for stats in parts]) for name in parts[0]})

    def experts(self, logp: Sequence[Tensor], weights: Tensor, experts: Experts) -> ExpertRows:
        """Fuse rows under several static ensembles; see `by_expert`.

        With one-hot rows and the exact inverse the experts share nearly all work; else each of them fuses.
        """
        one_hot = self.rule is None and self.options.solver == "exact" and self.options.eos == "anchor"
        if one_hot and self.options.trust_region is None:
            return OneHotExperts(logp, weights, experts, self._sides(logp[0].device))
        return FusedByEach([self.pooled_as(*kind) for kind in experts.kinds()], logp, weights)

    def events(self) -> Events | None:
        """Return what the members' tokens stand for; None where a step is no mixture of their distributions."""
        if self.by_stretches:
            return of_union(self.vocabularies)
        linear_and_exact = self.options.average == "linear" and self.options.solver == "exact" and self.rule is None
        if not linear_and_exact or self.options.eos != "anchor" or self.options.trust_region is not None:
            return None
        return of_anchors(self.out_vocab, self._placed[torch.device("cpu")])

    def pooled_as(self, geometric: bool, power: float) -> DeepenFuser:
        """Return this fuser with another average."""
        fuser = copy.copy(self)
        fuser.average = partial(pool_geometrically, power=power) if geometric else averaging("linear")
        return fuser

    def projecting(self) -> DeepenFuser:
        """Return this fuser with plain averages and no trust region: with all weight on a member it projects that."""
        fuser = self.pooled_as(False, 1.0)
        fuser.options = self.options.replace(trust_region=None)
        return fuser

    def _sides(self, device: torch.device) -> tuple[Side, ...]:
        if device not in self._placed:
            self._placed[device] = tuple(side.to(device) for side in self._placed[torch.device("cpu")])
        return self._placed[device]


def averaging(average: str | tuple[float, ...]) -> Callable[..., Agreed]:
    """Return what averages as an option says."""
    if isinstance(average, tuple):
        return partial(power_mean, power=average[0]) if len(average) == 1 else partial(product, exponents=average)
    named: dict[str, Callable[..., Agreed]] = {
        "linear": linear,
        "geometric": pool_geometrically,
        "min": partial(power_mean, power=-math.inf),
        "max": partial(power_mean, power=math.inf),
        "consistent": consistent,
    }
    return named[average]


def chunk_bytes(device: torch.device) -> int:
    """Return the working memory of the rows that are fused at once."""
    return CHUNK_BYTES * (1 if device.type == "cpu" else ACCELERATOR)


def support_bytes(sides: Sequence[Side], width: int) -> int:
    """Return what the rows of all matrices take in a step with `width` pieces per member, for one distribution."""
    return sum(side.matrix.at_bytes(width * len(sides)) for side in sides)


def _fuse(
    fuser: DeepenFuser, logp: Sequence[Tensor], weights: Tensor, sides: Sequence[Side], out: Tensor
) -> dict[str, Tensor]:
    """Fuse a chunk of rows into `out` [B, V_0] and return statistics."""
    device, main, side = out.device, logp[0], sides[0]
    weights = weights.to(device)
    active = weights > 0
    with_end = len(side.eos) > 0 or fuser.options.eos == "reference"
    given = [main, *(abstain(logp[i].to(device), active[:, i]) for i in range(1, len(logp)))]
    full = fuser.rule is None
    parts = split(given, sides, with_end=with_end, grouped=not full, one_hot=_one_hot(sides) if full else None)
    share = shares(weights, parts.valid)  # [B, M]
    kept, total = parts.log_kept[:, 0], parts.log_total[:, 0]
    taking_part = torch.cat([torch.ones_like(active[:, :1]), active[:, 1:]], dim=1)
    rows = Rows(parts, share, taking_part, out, with_end)
    inverted = _invert_full(fuser, rows, sides) if full else _invert_truncated(fuser, rows, sides)
    if len(side.eos):
        end = torch.log_softmax(main.index_select(1, side.eos).float(), dim=1)  # the main member's, given end
        end = end.masked_fill(end.isnan(), -math.log(len(side.eos)))  # uniform if it has none
        out.index_copy_(1, side.eos, end + (kept + inverted.log_end)[:, None])
    out.index_copy_(1, side.control, main.index_select(1, side.control).float() - total[:, None])
    out.index_fill_(1, side.unused, NEG_INF)
    usable, stats = inverted.usable, inverted.stats
    if not bool(usable.all()):
        own = main.to(torch.float32, copy=True).index_fill_(1, side.unused, NEG_INF)
        out.copy_(torch.where(usable[:, None], out, own - total[:, None]))
    stats = {name: value.masked_fill(~usable, 0.0) for name, value in stats.items()}
    if not full:
        stats["max_truncated_mass"] = stats["truncated_mass"]
    stats["end_mass"] = (torch.where(usable, inverted.log_end, parts.log_end[:, 0]) + kept).exp()
    stats["dropped_control_mass"] = (weights[:, 1:] * parts.dropped[:, 1:]).sum(1)
    return stats


def _one_hot(sides: Sequence[Side]) -> list[OneHotOperator] | None:
    """Return the members' matrices where every row is one-hot."""
    operators = [op for op in (side.matrix.full() for side in sides) if isinstance(op, OneHotOperator)]
    return operators if len(operators) == len(sides) else None


def _invert_full(fuser: DeepenFuser, rows: Rows, sides: Sequence[Side]) -> Found:
    """Write the fused text pieces to ``rows.out`` [B, V_0], from all pieces of all members."""
    parts, op = rows.parts, sides[0].matrix.full()
    own = None  # the main member's log-probabilities given text [B, V_0]
    if parts.classes[0] is None:
        texts = [_given_text(rows, side, i) for i, side in enumerate(sides)]
        own = texts[0]
        projected = [side.matrix.full().project(text.exp()) for side, text in zip(sides, texts, strict=True)]
    else:
        projected = [own_mass for own_mass in parts.classes if own_mass is not None]
    agreed = fuser.average(projected[0], projected[1:], rows.share, parts, with_end=rows.with_end)
    mass = parts.log_kept[:, 0] + agreed.log_text
    nothing = torch.zeros_like(mass)
    stats = {"truncated_mass": nothing}
    if fuser.rule is not None:
        stats["rows_widened"] = torch.ones_like(mass)
    if fuser.options.solver == "exact" and fuser.options.trust_region is None and isinstance(op, OneHotOperator):
        gain, lost = exact_gain(agreed.r, projected[0])
        moved = (mass - parts.log_sum[:, 0])[:, None]
        op.gather(gain.add_(moved), moved, out=rows.out).add_(parts.rows[0])
        return Found.of(agreed, {"residual_kl": nothing, "lost_mass": lost, **stats})
    if own is None:
        own = _given_text(rows, sides[0], 0)
    solved = fuser.solver.solve(own, agreed.r, op, projected[0])
    logp, stats = _held_back(fuser, own, solved.logp, {**solved.stats, **stats})
    torch.add(logp, mass[:, None], out=rows.out)
    return Found.of(agreed, stats)


def _given_text(rows: Rows, side: Side, member: int) -> Tensor:
    """Return a member's log-probabilities given text [B, V]; ``-inf`` for what is not text."""
    return (rows.parts.rows[member] + side.mask).sub_(rows.parts.log_sum[:, member, None])


def _invert_truncated(fuser: DeepenFuser, rows: Rows, sides: Sequence[Side]) -> Found:
    """Write the fused text pieces to ``rows.out`` [B, V_0], from supports of every row's own size."""
    groups, rest = _groups(fuser, rows, sides)
    moved = [_invert_group(fuser, rows, sides, group) for group in groups]
    inverted = [(group.index, own) for group, (own, _, _) in zip(groups, moved, strict=True)]
    whole = None
    if len(rest):
        again = split([x[rest] for x in rows.parts.rows], sides, with_end=rows.with_end, one_hot=_one_hot(sides))
        whole = rows.at(rest, again)
        inverted.append((rest, _invert_full(fuser, whole, sides)))
    together = inverted[0][1] if len(inverted) == 1 else Found.together(inverted)
    scale = (rows.parts.log_kept[:, 0] + together.log_text - rows.parts.log_sum[:, 0])[:, None]
    torch.add(rows.parts.rows[0], scale, out=rows.out)
    for group, (_, support, logp) in zip(groups, moved, strict=True):
        support.scatter(rows.out, logp + (scale[group.index] + support.log_mass[:, None]))
    if whole is not None:
        rows.out[rest] = whole.out
    return together


def _groups(fuser: DeepenFuser, rows: Rows, sides: Sequence[Side]) -> tuple[list[Group], Tensor]:
    """Return rows of similar supports together, and the rows that are to be fused in full.

    A wide row would make all others of its group as wide. Where rows are one-hot, everything costs less than many.
    """
    rule, parts, device = fuser.rule, rows.parts, rows.out.device
    assert rule is not None
    groups: list[Group] = []
    rest, width = torch.arange(len(rows.share), device=device), rule.first
    while True:
        room = chunk_bytes(device) // max(1, support_bytes(sides, width))
        too_wide = not room or any(LARGEST_SHARE * width > len(side.anchor_of) for side in sides)
        if width > rule.first and (too_wide or fuser.options.from_bytes):
            return groups, rest
        active = rows.active[rest]
        own = [tops(parts, m, side, rest, active[:, m], rule, width) for m, side in enumerate(sides)]
        enough = torch.stack([top.enough for top in own], dim=1).all(1)
        for at in enough.nonzero()[:, 0].split(max(1, room if width > rule.first else len(enough))):
            groups.append(Group(rest[at], [top.at(at) for top in own]))
        rest, width = rest[~enough], width * WIDER
        if not len(rest):
            return groups or [Group(rest, own)], rest


def _invert_group(fuser: DeepenFuser, rows: Rows, sides: Sequence[Side], group: Group) -> tuple[Found, Support, Tensor]:
    """Find the log-probabilities [b, K] given the main member's support, from own pieces and their counterparts."""
    index = group.index
    parts, share, active = rows.parts.masses(index), rows.share[index], rows.active[index]
    chosen = supports(rows.parts.rows, index, sides, active, [top.ids for top in group.tops])
    operators = share_columns([side.matrix.at(at.ids) for side, at in zip(sides, chosen, strict=True)])
    held = torch.stack([support.log_mass for support in chosen], dim=1) - parts.log_sum
    projected = [op.project(support.logp.exp()) for op, support in zip(operators, chosen, strict=True)]
    nobodys = torch.stack(projected).amax(0) == 0  # as columns that a longer row beside it has: they have no say
    agreed = fuser.average(projected[0], projected[1:], share, parts, with_end=rows.with_end)
    logp0, r = chosen[0].logp, agreed.r.masked_fill(nobodys, 0.0)
    r.div_(r.sum(1, keepdim=True).clamp_min_(UNDERFLOWS))
    solved = fuser.solver.solve(logp0, r, operators[0], projected[0])
    widened = torch.stack([top.widened for top in group.tops], dim=1).any(1).float()
    truncated = (agreed.blend * (1 - held.exp()).clamp(min=0)).sum(1)
    stats = {**solved.stats, "truncated_mass": truncated, "rows_widened": widened}
    logp, stats = _held_back(fuser, logp0, solved.logp, stats)
    return Found.of(agreed, stats), chosen[0], logp


def _held_back(
    fuser: DeepenFuser, logp0: Tensor, logp: Tensor, stats: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Keep a result within the trust region, if there is one."""
    if fuser.options.trust_region is None:
        return logp, stats
    logp, held_back = within(logp0, logp, fuser.options.trust_region)
    return logp, {**stats, "held_back": held_back}
