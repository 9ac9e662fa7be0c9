"""Sampling by turns: a member is drawn by its weight, and then its token; the others need no forward pass until then.

The law is that of the fused distribution where this is a mixture of the members' own (`fusion._events`). Two things
need the main member: its control pieces, and which of an event's pieces is written. So another member's token is a
proposal. When the main member is drawn, or the text ends, it reads all proposals since then in one block. It draws what
they should have been: nearly always what they are, else the text goes back to that place. That is exact, because a
piece that stands was drawn from its own distribution, and nothing behind one that falls is kept.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lm_eval_deepen.engine.base import EnsembleBase, check_row
from lm_eval_deepen.engine.covers import plans_of
from lm_eval_deepen.engine.following import BatchRow, Job, TokenPrefix
from lm_eval_deepen.engine.generation import Decoder, append

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Proposal:
    """A piece that another member wrote, and what the text was before it."""

    piece: int
    event: int
    path: TokenPrefix  # of the main member
    pieces: int
    size: int


@dataclass
class _Draw:
    """What is counted of a step when the text is finished: until then it may be taken back."""

    present: list[bool]  # which members took part
    outgrown: list[int]  # the members that abstained because the text had outgrown their contexts
    member: int = 0  # whose turn it was


@dataclass
class _Turn:
    """Where a text stands."""

    expert: int = 0  # the static ensemble that was drawn for it; the mixture of experts is one of whole texts
    member: int | None = None  # whose turn it is, None before it is drawn
    # whether no other member can be drawn, so that the main member's distribution is taken as it is
    alone: bool = False
    text_only: bool = False  # whether text was drawn that the main member has no piece for
    paths: tuple[TokenPrefix | None, ...] = ()  # the members' tokens
    proposals: list[_Proposal] = field(default_factory=list)  # what the main member has not read yet
    reason: str = ""  # why the text ends, if the proposals stand
    draws: dict[int, _Draw] = field(default_factory=dict)  # the last one after so many pieces


def takes_turns(ensemble: EnsembleBase, job: Job) -> bool:
    """Return whether a text is sampled by turns; with ``sampling: member``, tell once why not."""
    if ensemble.config.sampling != "member" or ensemble.fuser is None or not job.sampler.do_sample:
        return False
    why = _why_fused(ensemble)
    if not why and job.sampler.processors:
        why = (
            f"the request's settings ({job.sampler.named}) change the fused distribution; only temperature=1 and "
            "top_k=0, without other filters and penalties, leave it as it is"
        )
    if why and why not in ensemble.counters.told:
        ensemble.counters.told.add(why)
        log.warning("sampling=member: all members are forwarded for each token, as with sampling=fused: %s.", why)
    return not why


def _why_fused(ensemble: EnsembleBase) -> str:
    """Return why no text of an ensemble can be sampled by turns, empty where it can."""
    weighting = ensemble.config.weighting
    if ensemble.turn_events is None:
        return f"method={ensemble.config.method} with these options is no mixture of the members' distributions"
    if ensemble.selective is not None:
        return f"skip_when={ensemble.selective.when} asks all members"
    if ensemble.weigher is not None and ensemble.weigher.reads_steps:
        return f"weighting={weighting} asks all members for their weights"
    if ensemble.learns and not ensemble.by_stretches and bool(ensemble.experts.geometric.any()):
        return f"weighting={weighting} has geometric averages among its experts; averages=linear has none"
    if any(member.generates_only for member in ensemble.active):
        return "there is an encoder-decoder member"
    return ""


class TurnDecoder(Decoder):
    """Decodes by turns; a step is one member's forward pass for the rows that wait for it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        events = self.ensemble.turn_events
        assert events is not None
        self.events = events
        self.turns: dict[int, _Turn] = {}
        ids = [own.to(self.ensemble.device) for own in events.of]
        self.barred = [torch.where(own < 0, -torch.inf, 0.0) for own in ids]  # what is neither text nor an end
        self.unused = self.barred[0].clone()  # of the main member
        if events.control is not None:
            self.unused[events.control.to(self.ensemble.device)] = 0.0

    def step(self) -> list[BatchRow]:
        """Run the member that most rows wait for, and return the rows that are finished by it."""
        wanted = [self._wanted(row) for row in self.rows]
        counts = Counter(m for m, _ in wanted)
        m = max(sorted(counts), key=lambda m: counts[m])
        routes = [route if own == m else [None] for own, route in wanted]
        follower = self.followers[m]
        if m in self.ensemble.covers and self.events.control is not None:  # else all write tokens of their own
            readers = {m: self.ensemble.covers[m]}
            plans = [
                [plans_of(readers, self.turns[row.index].paths, len(row.job.prompts[0].ids))[m] if own == m else None]
                for row, (own, _) in zip(self.rows, wanted, strict=True)
            ]
            logp = follower.follow_covered(routes, plans)
            logp = logp[[at for at, (own, _) in enumerate(wanted) if own == m]]
        else:
            waits = [own == m for own, route in wanted for _ in (route if own == m else [None])]
            states = follower.states(routes)[torch.tensor(waits)]
            logp = follower.member.logp(states).to(self.ensemble.device)
        check_row(follower.member, logp)
        start = 0
        for row, (own, route) in zip(self.rows, wanted, strict=True):
            if own == m:
                self._take_turn(row, m, logp[start : start + len(route)])
                start += len(route)
        finished = [row for row in self.rows if row.out.reason]
        counters = self.ensemble.counters
        for row in finished:
            for draw in self.turns.pop(row.index).draws.values():
                counters.turns[self.ensemble.active[draw.member].name] += 1
                counters.record_present(torch.tensor([draw.present]))
                counters.record_outgrown(draw.outgrown)
        return finished

    def _wanted(self, row: BatchRow) -> tuple[int, list[TokenPrefix | None]]:
        """Return which member a row waits for, and the places where it is read."""
        if row.index not in self.turns:
            expert = 0
            if self.ensemble.learns:
                assert row.weights is not None
                expert = int(torch.multinomial(row.weights.exp(), 1, generator=row.job.generator))
            self.turns[row.index] = _Turn(expert)
        turn = self.turns[row.index]
        if turn.member is None and not turn.reason:
            ids, data = tuple(row.out.ids), row.out.data
            turn.paths = self._paths(row, ids, data)
            present = [path is not None for path in turn.paths]
            turn.draws[len(ids)] = _Draw(present, self._outgrown(row, ids, data, turn.paths))
            self._draw_member(row, turn)
        main = turn.paths[0]
        here: list[TokenPrefix | None] = [] if turn.reason or turn.member is None else [turn.paths[turn.member]]
        if not turn.proposals or (here and turn.member != 0 and _begins(main, turn.proposals[-1].path)):
            assert turn.member is not None
            return turn.member, here
        goes_on = turn.member == 0 and _begins(main, turn.proposals[-1].path)
        return 0, [*(proposal.path for proposal in turn.proposals), *(here if goes_on else [])]

    def _draw_member(self, row: BatchRow, turn: _Turn) -> None:
        """Draw whose turn it is, among the members that take part."""
        ensemble = self.ensemble
        present = torch.tensor([path is not None for path in turn.paths])
        if ensemble.learns:
            given = self.experts.weights[turn.expert]
        else:
            given = (ensemble.weights if row.weights is None else row.weights).double()
        weights = given * present
        if not bool(weights.sum() > 0):  # as where a step is fused, or a stretch is scored
            weights = present.double() if ensemble.learns or ensemble.by_stretches else torch.eye(len(present))[0]
        weights = weights / weights.sum()
        drawn = torch.rand(1, dtype=torch.float64, generator=row.job.turns)
        turn.member = min(int((weights.cumsum(0) <= drawn).sum()), int(weights.nonzero().max()))
        turn.alone = not bool(present[1:].any()) if ensemble.learns else bool(weights[0] == 1)
        turn.draws[len(row.out.ids)].member = turn.member

    def _take_turn(self, row: BatchRow, m: int, logp: Tensor) -> None:
        """Go on by what member `m` says at the proposals that it has to read, and at the end of the text."""
        turn = self.turns[row.index]
        for at, proposal in enumerate(turn.proposals if m == 0 else ()):
            piece = self._decided(row, proposal, logp[at])
            if piece != proposal.piece:
                turn.proposals, turn.member, turn.reason, turn.text_only = [], None, "", piece < 0
                row.out.ids, row.out.logp = row.out.ids[: proposal.pieces], row.out.logp[: proposal.pieces]
                row.out.data, row.out.end, row.paths = row.out.data[: proposal.size], None, None
                turn.draws = {place: draw for place, draw in turn.draws.items() if place <= proposal.pieces}
                if piece >= 0:
                    self._write(row, turn, piece)
                return
        if m == 0:
            read, turn.proposals = len(turn.proposals), []
            if turn.reason:
                row.out.reason = turn.reason
            if read == len(logp):
                return
        turn.member = None
        if m == 0 and self.events.control is not None and not turn.text_only:
            self._write(row, turn, self._pick(row, logp[-1] if turn.alone else logp[-1] + self.unused))
            return
        scores = self.experts.power[turn.expert].item() * logp[-1] + self.barred[m]
        others = any(path is not None for at, path in enumerate(turn.paths) if at != m)
        if others and (m > 0 or self.events.control is None) and bool((scores == -torch.inf).all()):
            # It gives control pieces alone, and takes no part in the fused distribution.
            turn.paths = (*turn.paths[:m], None, *turn.paths[m + 1 :])
            self._draw_member(row, turn)
            turn.alone = False  # it is there, and the row is fused
            return
        token = self._pick(row, scores)
        event = int(self.events.of[m][token])
        piece = int(self.events.first[event])
        if piece < 0 or (turn.text_only and event == self.events.end):
            turn.text_only = self.events.end is not None
            return
        turn.text_only = False
        if self.events.control is not None and turn.paths[0] is not None:
            proposal = _Proposal(piece, event, turn.paths[0], len(row.out.ids), len(row.out.data))
            turn.proposals.append(proposal)
        self._write(row, turn, piece)

    def _decided(self, row: BatchRow, proposal: _Proposal, logp: Tensor) -> int:
        """Return what the main member, with log-probabilities [V_0], makes of a proposed event; -1 to draw anew."""
        assert self.events.control is not None
        control = self.events.control.to(logp.device)
        ids = (self.events.of[0] == proposal.event).nonzero()[:, 0].to(logp.device)
        if not len(ids):  # a piece that the main member lacks
            ids = torch.tensor([proposal.piece], device=logp.device)
            inside = torch.zeros(1, device=logp.device)
        elif bool((inside := torch.log_softmax(logp[ids], 0)).isnan().any()):  # it gives them nothing
            if self.events.end not in (None, proposal.event):
                return -1
            inside = torch.zeros(len(ids), device=logp.device) - math.log(len(ids))
        inside = inside + torch.logsumexp(logp + self.barred[0], 0)
        return int(torch.cat([control, ids])[self._pick(row, torch.cat([logp[control], inside]))])

    @staticmethod
    def _pick(row: BatchRow, scores: Tensor) -> int:
        return int(torch.multinomial(torch.softmax(scores, 0).cpu(), 1, generator=row.job.generator))

    def _write(self, row: BatchRow, turn: _Turn, piece: int) -> None:
        # what all members together say of it is not known
        append(self.ensemble, row, piece, torch.nan, self.events.pieces[piece])
        if not row.out.reason and self._is_full(row):
            row.out.reason = "length"
        if turn.proposals:
            turn.reason, row.out.reason = row.out.reason, ""

    def _is_full(self, row: BatchRow) -> bool:
        if self.events.control is not None:
            return super()._is_full(row)
        return not any(self._paths(row, tuple(row.out.ids), row.out.data))


def _begins(path: TokenPrefix | None, start: TokenPrefix) -> bool:
    return path is not None and path[: len(start)] == start
