"""Batched decoding from the fused distribution, with a KV cache on every member.

Four verbs: follow (every member takes in the bytes so far), fuse, choose, finish.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm_eval_deepen.errors import RequestError
from lm_eval_deepen.member import Prompt
from lm_eval_deepen.member.sampling import Sampler

if TYPE_CHECKING:
    from lm_eval_deepen.engine.ensemble import Ensemble


@dataclass(frozen=True)
class Job:
    """One text to generate.

    Attributes:
        prompts: one per active member, the main member first.
        max_new: most tokens of the main member to generate.
        stops: strings that end the text.
        sampler: how tokens are chosen.
        generator: the row's own source of randomness, None for greedy decoding.
        dummy: whether a space that begins the text is the main tokenizer's dummy prefix.
    """

    prompts: tuple[Prompt, ...]
    max_new: int
    stops: tuple[str, ...] = ()
    sampler: Sampler = Sampler()
    generator: torch.Generator | None = None
    dummy: bool = False


@dataclass
class Generation:
    """A finished text.

    Attributes:
        ids: the main member's tokens, the end-of-text token not included.
        logp: fused natural-log probability of each of them.
        reason: ``eos``, ``stop`` or ``length``.
    """

    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    reason: str = ""


@dataclass
class _Row:
    index: int
    job: Job
    out: Generation
    data: bytes = b""  # the shared continuation


def generate(ensemble: Ensemble, jobs: Sequence[Job], batch_size: int) -> Iterator[tuple[int, Generation]]:
    """Generate texts in batches, longest prompts first.

    Yields:
        The index of a job and its text, as soon as it is finished.
    """
    order = sorted(range(len(jobs)), key=lambda index: -len(jobs[index].prompts[0].ids))
    for start in range(0, len(order), batch_size):
        rows = [_Row(index, jobs[index], Generation()) for index in order[start : start + batch_size]]
        yield from _generate_batch(ensemble, rows)


def _generate_batch(ensemble: Ensemble, rows: list[_Row]) -> Iterator[tuple[int, Generation]]:
    followers = [_Follower(ensemble, m, len(rows)) for m in range(len(ensemble.active))]
    unfinished = [row for row in rows if row.job.max_new > 0]
    for row in rows:
        if row.job.max_new <= 0:
            row.out.reason = "length"
            yield row.index, row.out
    if len(unfinished) < len(rows):
        followers = [_Follower(ensemble, m, len(unfinished)) for m in range(len(ensemble.active))]
    rows = unfinished
    while rows:
        logp, present = zip(*(follower.follow(rows) for follower in followers), strict=True)
        fused = ensemble.fuse(logp, torch.stack(present, dim=1).to(ensemble.device))
        for row, token, value in zip(rows, *_choose(fused, rows), strict=True):
            _append(ensemble, row, token, value)
        keep = [at for at, row in enumerate(rows) if not row.out.reason]
        if len(keep) < len(rows):
            for row in rows:
                if row.out.reason:
                    yield row.index, row.out
            rows = [rows[at] for at in keep]
            for follower in followers:
                follower.keep(keep)


class _Follower:
    """One member following the rows of a batch."""

    def __init__(self, ensemble: Ensemble, m: int, count: int) -> None:
        self.member = ensemble.active[m]
        self.ensemble, self.m = ensemble, m
        self.cache = self.member.runner.rows(count)
        self.tokens: list[tuple[int, ...]] = [()] * count

    def follow(self, rows: Sequence[_Row]) -> tuple[Tensor, Tensor]:
        """Return log-probabilities [B, V_m] after the bytes so far, and which rows were followed [B]."""
        present = torch.ones(len(rows), dtype=torch.bool)
        for at, row in enumerate(rows):
            prompt = row.job.prompts[self.m]
            text = row.data[1:] if row.job.dummy and row.data[:1] == b" " else row.data
            tokens = self.ensemble.path(self.m, prompt, tuple(row.out.ids), text)
            if tokens is None:
                present[at] = False
                tokens = self.tokens[at] or prompt.ids
            if len(tokens) > self.member.max_length:
                raise RequestError(
                    f"a generated text needs more than the {self.member.max_length} tokens of member "
                    f"{self.member.name!r}. Lower max_gen_toks, or raise the member's max_length."
                )
            self.tokens[at] = tokens
        logp = self.member.logp(self.cache.advance(self.tokens))
        return logp.to(self.ensemble.device), present

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows."""
        if rows:
            self.cache.keep(rows)
        self.tokens = [self.tokens[row] for row in rows]


def _choose(fused: Tensor, rows: Sequence[_Row]) -> tuple[list[int], list[float]]:
    """Return each row's next token and its log-probability, from fused rows [B, K]."""
    if all(row.job.sampler.plain_greedy for row in rows):
        chosen = fused.argmax(dim=-1)
    else:
        chosen = torch.tensor(
            [
                row.job.sampler.choose(logp, (*row.job.prompts[0].ids, *row.out.ids), row.job.generator)
                for row, logp in zip(rows, fused, strict=True)
            ],
            device=fused.device,
        )
    return chosen.tolist(), fused.gather(1, chosen[:, None])[:, 0].tolist()


def _append(ensemble: Ensemble, row: _Row, token: int, logp: float) -> None:
    """Extend a row by a token, or finish it."""
    main = ensemble.main
    if token in main.eos_ids:
        row.out.reason = "eos"
        return
    row.out.ids.append(token)
    row.out.logp.append(logp)
    if len(ensemble.active) > 1:
        row.data += main.codec.vocab.pieces[token]
    text = main.lm.tok_decode(row.out.ids, skip_special_tokens=False)
    if any(stop in text for stop in row.job.stops):
        row.out.reason = "stop"
    elif len(row.out.ids) >= row.job.max_new:
        row.out.reason = "length"
