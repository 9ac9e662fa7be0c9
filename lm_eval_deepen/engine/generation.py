"""Continuous batched decoding from the fused distribution, with a KV cache on every member.

Five verbs: admit (waiting jobs take the place of finished ones), draft, follow (every member takes in the bytes
so far and the draft), fuse, choose.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice

import torch
from torch import Tensor

from lm_eval_deepen.engine.base import EnsembleBase, FusionNotes
from lm_eval_deepen.engine.covers import plans_of
from lm_eval_deepen.engine.drafts import Drafter
from lm_eval_deepen.engine.evidence import evidence
from lm_eval_deepen.engine.following import (
    BatchRow,
    Follower,
    Generation,
    GrowingPaths,
    Job,
    TokenPrefix,
    piece_of,
    text_after,
    text_of,
)
from lm_eval_deepen.engine.steps import StepReader
from lm_eval_deepen.errors import RequestError
from lm_eval_deepen.fusion._expert_rows import ExpertRows
from lm_eval_deepen.member.devices import give_back_freed_memory
from lm_eval_deepen.member.runner import NODES_PER_FORWARD
from lm_eval_deepen.relative.topk import argmax
from lm_eval_deepen.weighting.experts import posteriors


def generate(
    ensemble: EnsembleBase,
    jobs: Sequence[Job],
    batch_size: int,
    drafter: Drafter | None = None,
    kind: type[Decoder] | None = None,
) -> Iterator[tuple[int, Generation]]:
    """Generate texts, `batch_size` at a time; a finished one leaves its place to the next.

    No text depends on where drafts come from. A text is extended by a `kind` of decoder, by default `Decoder`.

    Yields:
        The index of a job and its text, as soon as it is finished.
    """
    order = sorted(range(len(jobs)), key=lambda index: jobs[index].prompts[0].ids)
    for index in order:
        if jobs[index].max_new <= 0:
            yield index, Generation(reason="length")
    waiting = deque(BatchRow(index, jobs[index]) for index in order if jobs[index].max_new > 0)
    decoder = (kind or Decoder)(ensemble, waiting, batch_size, drafter or Drafter())
    while decoder.refill():
        for row in decoder.step():
            yield row.index, row.out


class Decoder:
    """The rows being decoded, and every member following them."""

    def __init__(self, ensemble: EnsembleBase, waiting: deque[BatchRow], batch_size: int, drafter: Drafter) -> None:
        self.ensemble, self.waiting, self.size, self.drafter = ensemble, waiting, batch_size, drafter
        self.rows: list[BatchRow] = []
        first = [row.job.prompts for row in islice(waiting, batch_size)]
        self.followers = [Follower(ensemble, m, [own[m] for own in first]) for m in range(len(ensemble.active))]
        self.ready: deque[BatchRow] = deque()
        self.reader = StepReader(ensemble)
        self.experts = ensemble.experts

    def refill(self) -> bool:
        """Put waiting texts into free places, drop finished ones from the others; return whether any is left."""
        free = [at for at, row in enumerate(self.rows) if row.out.reason]
        free += range(len(self.rows), self.size)
        while free and (self.ready or self.waiting):
            if self.ready:
                for follower in self.followers:
                    follower.admit(free[: len(self.ready)])
            else:
                self._prefill(free)
            places, free = free[: len(self.ready)], free[len(self.ready) :]
            for at in places:
                self.rows[at : at + 1] = [self.ready.popleft()]
        keep = [at for at, row in enumerate(self.rows) if not row.out.reason]
        if len(keep) < len(self.rows):
            self.rows = [self.rows[at] for at in keep]
            for follower in self.followers:
                follower.keep(keep)
        return bool(self.rows)

    def _prefill(self, free: Sequence[int]) -> None:
        """Take in the prompts of waiting texts, and find their weights where these depend on prompts.

        Several at once, since a short forward pass costs nearly as much as a long one; not more than fill one, since
        their keys and values wait beside those of the rows. Those that have a `free` place do not wait for the other
        members.
        """
        tokens = 0
        while self.waiting and len(self.ready) < self.size:
            tokens += len(self.waiting[0].job.prompts[0].ids)
            if self.ready and tokens > NODES_PER_FORWARD:
                break
            self.ready.append(self.waiting.popleft())
        by_prompt = self.ensemble.reads_prompts
        last = self.ensemble.prompt_stretches
        wanted = [evidence(self.ensemble, row.job.prompts, last) for row in self.ready] if by_prompt else None
        losses = []
        for follower in self.followers:
            prompts = [row.job.prompts[follower.m] for row in self.ready]
            reads = None if wanted is None else [own[follower.m] for own in wanted]
            then = self.waiting[0].job.prompts[follower.m] if self.waiting else None
            losses.append(follower.prefill(prompts, reads, then))
            follower.admit(free[: len(self.ready)])
            if len(prompts[0].ids) > NODES_PER_FORWARD:  # a long one: what is kept of it is in its place
                give_back_freed_memory()
        if by_prompt:
            weights = self.ensemble.prompt_weights(list(zip(*losses, strict=True)), self.experts)
            for row, own in zip(self.ready, weights, strict=True):
                row.weights = own
        elif self.ensemble.learns:
            for row in self.ready:
                row.weights = self.experts.log_prior

    def step(self) -> list[BatchRow]:
        """Extend every row by at least one token and return those that are finished by it."""
        with self.ensemble.counters.holding():
            return self._step()

    def _step(self) -> list[BatchRow]:
        ensemble = self.ensemble
        drafts = self.drafter.draft(ensemble, self.rows, self.followers)
        routes = [self._routes(row, draft) for row, draft in zip(self.rows, drafts, strict=True)]
        drafts = [draft[: len(route) - 1] for draft, route in zip(drafts, routes, strict=True)]
        paths = [[[places[follower.m] for places in route] for route in routes] for follower in self.followers]
        scores: Tensor | None = None
        if ensemble.fuser is None:  # tokens are chosen from logits, as in `generate`: penalties depend on their zero
            scores = self.followers[0].logits(paths[0])
            logp = [torch.log_softmax(scores, dim=-1)]
        else:
            covers = ensemble.covers
            plans = [
                [plans_of(covers, places, len(row.job.prompts[0].ids)) for places in route] if covers else []
                for row, route in zip(self.rows, routes, strict=True)
            ]
            logp = [
                follower.follow_covered(own, [[plan[follower.m] for plan in route] for route in plans])
                if follower.m in covers
                else follower.follow(own)
                for follower, own in zip(self.followers, paths, strict=True)
            ]
        present = torch.tensor([[path is not None for path in places] for route in routes for places in route])
        present = present.to(ensemble.device)
        inside = ensemble.inside(logp[0], (places for route in routes for places in route))
        by_expert = None
        notes = FusionNotes() if any(row.job.traced for row in self.rows) else None
        if ensemble.learns:
            by_expert = ensemble.fuse_by_expert(logp, present, inside)
            before_each = torch.cat(self._learnt(by_expert, drafts, drafts))
            fused = ensemble.mix(logp, by_expert, before_each, present, notes)
        else:
            base = None
            if ensemble.reads_prompts:
                pairs = zip(self.rows, routes, strict=True)
                base = torch.stack([row.weights for row, route in pairs for _ in route if row.weights is not None])
            fused = ensemble.fuse(logp, present, base, notes, inside)  # [sum of (1 + drafted), K]
        scores = fused if scores is None else scores
        finished, start = [], 0
        counted: list[bool] = []  # which of the distributions were read: not those behind a token that fell
        taken: list[tuple[BatchRow, int, int]] = []  # of traced rows: a row, where its distribution is, what was chosen
        extended: list[list[int]] = []  # what every row was extended by
        best = argmax(scores).tolist()
        for row, draft, route in zip(self.rows, drafts, routes, strict=True):
            own, before, data = slice(start, start + len(draft) + 1), len(row.out.ids), row.out.data
            chosen = self._take(row, draft, scores[own], fused[own], best[own])
            read = max(1, len(chosen))
            counted += [at < read for at in range(len(route))]
            for at, there in enumerate(route[:read]):
                if None in there:
                    text = data + b"".join(piece_of(ensemble, token) for token in draft[:at])
                    out = self._outgrown(row, (*row.out.ids[:before], *draft[:at]), text, there)
                    ensemble.counters.record_outgrown(out)
            if row.job.traced:
                taken += [(row, start + at, token) for at, token in enumerate(chosen)]
            extended.append(row.out.ids[before:])
            start += len(draft) + 1
            if row.out.reason:
                finished.append(row)
        if by_expert is not None:
            for row, learnt in zip(self.rows, self._learnt(by_expert, drafts, extended), strict=True):
                row.weights = learnt[-1]
        ensemble.counters.settle(counted)
        if notes is not None:
            places, tokens = [at for _, at, _ in taken], [token for _, _, token in taken]
            steps = self.reader.read(places, tokens, logp, present, fused, notes)
            for (row, _, _), step in zip(taken, steps, strict=True):
                row.out.steps.append(step)
        return finished

    def _learnt(
        self, by_expert: ExpertRows, drafts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Return of each row the experts' log posterior [T + 1, K] before each of T tokens and after them.

        The distributions are those after 0, 1, ... of a row's drafted tokens, one row after the other; the `tokens` to
        learn from are at most one more than drafted.
        """
        weights = [row.weights for row in self.rows if row.weights is not None]  # of every row: all learn
        if not any(tokens):
            return [own[None] for own in weights]
        starts = accumulate((len(draft) + 1 for draft in drafts), initial=0)
        places = [start + at for start, own in zip(starts, tokens, strict=False) for at in range(len(own))]
        logp = by_expert.at(torch.tensor(places), torch.tensor([token for own in tokens for token in own])).cpu()
        parts = logp.split([len(own) for own in tokens])  # [T, K] each
        return [
            posteriors(own, part.T)[0] if len(part) else own[None] for own, part in zip(weights, parts, strict=True)
        ]

    def _routes(self, row: BatchRow, draft: Sequence[int]) -> list[tuple[TokenPrefix | None, ...]]:
        """Return every member's tokens after none, one, ... of a draft's tokens, as far as one block serves.

        A member takes in a draft in one block where its tokens before and after a drafted token begin alike.
        """
        ids, data = tuple(row.out.ids), row.out.data
        routes = [self._paths(row, ids, data)]
        for token in draft:
            ids, data = (*ids, token), data + piece_of(self.ensemble, token)
            paths = self._paths(row, ids, data)
            pairs = list(zip(routes[-1], paths, strict=True))
            if paths[0] is None or not all(_goes_on(before, after) for before, after in pairs):
                break
            routes.append(paths)
        return routes

    def _paths(self, row: BatchRow, ids: TokenPrefix, data: bytes) -> tuple[TokenPrefix | None, ...]:
        if row.paths is None:
            row.paths = GrowingPaths(self.ensemble, row.job)
        row.paths.grow(row.out.data)
        return row.paths.paths(ids, data)

    def _outgrown(self, row: BatchRow, ids: TokenPrefix, data: bytes, paths: Sequence[TokenPrefix | None]) -> list[int]:
        """Return the members whose context a text has outgrown, among those that abstain."""
        if None not in paths:
            return []
        text = text_after(row.job, data)
        out = [m for m, path in enumerate(paths) if path is None]
        return [m for m in out if self.ensemble.outgrown(m, row.job.prompts[m].before(text), ids, text)]

    def _is_full(self, row: BatchRow) -> bool:
        """Return whether a text has outgrown the main member's context, or none of the members can take it in."""
        ids, main = tuple(row.out.ids), row.job.prompts[0]
        if self.ensemble.is_own(ids):
            return not self.ensemble.main.fits(main.ids + ids)
        text = text_after(row.job, row.out.data)
        full = self.ensemble.outgrown(0, main.before(text), ids, text)
        return full or not any(self._paths(row, ids, row.out.data))

    def _too_long(self, row: BatchRow) -> str:
        """Return why a text of one member cannot go on, where it cannot.

        ``hf`` goes on past ``max_length`` where a checkpoint's `max_new_tokens`, or a request's `max_length`, says so,
        and past the positions that the model was made for.
        """
        main, size = self.ensemble.main, len(row.job.prompts[0].ids) + len(row.out.ids)
        if size <= max(main.max_length, main.own_context):
            return ""
        return (
            f"prompt and text come to {size} tokens, more than the {main.own_context} that member {main.name!r} was "
            "made for, and no stop string or end of text came before. Lower max_length, or max_new_tokens in the "
            "model's generation_config.json."
        )

    def _take(
        self, row: BatchRow, draft: Sequence[int], scores: Tensor, fused: Tensor, best: Sequence[int]
    ) -> list[int]:
        """Extend a row by what follows it, and by as much of its draft as is what would have been chosen; return that.

        After none, one, ... of the draft's tokens, tokens are chosen from `scores` [n, K], whose largest are at `best`
        [n]; `fused` [n, K] are their log-probabilities.
        """
        sampler = row.job.sampler
        chosen: list[int] = []
        for at, logp in enumerate(fused):
            token = best[at]
            if not sampler.plain_greedy:
                before = [token for token in row.job.prompts[0].ids if token >= 0]  # a source's tokens are negative
                try:
                    token = sampler.choose(scores[at], [*before, *row.out.ids], row.job.generator)
                except RequestError as error:  # of this text alone: the others go on
                    row.out.reason, row.out.refusal = "refused", str(error)
                    break
            chosen.append(token)
            self.drafter.note(row, logp)
            append(self.ensemble, row, token, float(logp[token]))
            if not row.out.reason and self.ensemble.is_hf:
                row.out.refusal = self._too_long(row)
                row.out.reason = "refused" if row.out.refusal else ""
            elif not row.out.reason and self._is_full(row):
                row.out.reason = "length"
            if row.out.reason or at == len(draft) or token != draft[at]:
                self.drafter.learn(row, len(draft), at + (at < len(draft) and token == draft[at]))
                break
        return chosen


def _goes_on(before: TokenPrefix | None, after: TokenPrefix | None) -> bool:
    """Return whether tokens begin with those before, or the member abstains both times."""
    if before is None or after is None:
        return before is after
    return after[: len(before)] == before


def append(ensemble: EnsembleBase, row: BatchRow, token: int, logp: float, data: bytes | None = None) -> None:
    """Extend a row by a piece, or finish it; `data` are the piece's bytes where the fuser has no such piece."""
    ends = ensemble.main.eos_ids if row.job.ends is None else row.job.ends
    if token in ends:
        row.out.reason, row.out.end = "eos", token
        return
    row.out.ids.append(token)
    row.out.logp.append(logp)
    row.out.data += piece_of(ensemble, token) if data is None else data
    text = text_of(ensemble, row.out.ids, row.out.data) if row.job.stops else ""
    if any(stop in text for stop in row.job.stops):
        row.out.reason = "stop"
    elif len(row.out.ids) >= row.job.max_new:
        row.out.reason = "length"
