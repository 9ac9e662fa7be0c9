"""Scores of continuations under the fused distribution.

The requests of a call form a tree of token prefixes per member; every node is forwarded once. Logits are
computed only where they are read, in chunks, and fused at once, so that no distribution is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm_eval_deepen.engine.evidence import Read, evidence
from lm_eval_deepen.engine.prompt_loss import LOGITS_PER_CHUNK, prompt_losses
from lm_eval_deepen.engine.prompting import Span
from lm_eval_deepen.member import Member, Prompt
from lm_eval_deepen.member.tree import common_prefix
from lm_eval_deepen.relative.topk import argmax

if TYPE_CHECKING:
    from lm_eval_deepen.engine.ensemble import Ensemble
    from lm_eval_deepen.member.walk import PlainWalker, TreeWalker

    Walker = TreeWalker | PlainWalker

Path = tuple[int, ...]

FORWARDS_PER_ROUND = 8  # a kill loses the scores of at most a round


@dataclass
class SpanScore:
    """The score of one span.

    Attributes:
        logp: fused natural-log probability of every target token.
        greedy: whether every target token's bytes are those of the most likely piece.
    """

    logp: list[float] = field(default_factory=list)
    greedy: bool = True

    @property
    def total(self) -> float:
        """The sum over the tokens, in nats."""
        return float(sum(self.logp))


@dataclass
class _Row:
    """One position to read: the path of every active member (None sits out), and who reads it."""

    paths: tuple[Path | None, ...]
    prompts: tuple[Prompt, ...]
    readers: list[tuple[int, int, int]]  # span, position in its target, target token


def score(ensemble: Ensemble, spans: Sequence[Span], nodes: int) -> Iterator[tuple[int, SpanScore]]:
    """Score spans, those with a common beginning one after the other.

    Args:
        ensemble: the members and their fuser.
        spans: what to score.
        nodes: how many tokens a member forwards at once.

    Yields:
        The index of a span and its score, as soon as its round is done.
    """
    for index, (found,) in score_together([ensemble], spans, nodes):
        yield index, found


def score_together(
    ensembles: Sequence[Ensemble], spans: Sequence[Span], nodes: int
) -> Iterator[tuple[int, list[SpanScore]]]:
    """Score spans by several ensembles of the same members, which share their forward passes and logits.

    Args:
        ensembles: they differ in method, options or weights; all have the same active members.
        spans: what to score.
        nodes: how many tokens a member forwards at once.

    Yields:
        The index of a span and its score by every ensemble, as soon as its round is done.
    """
    walkers = [member.runner.walker(nodes) for member in ensembles[0].active]
    by_prompt = any(ensemble.reads_prompts for ensemble in ensembles)
    for indices in _rounds(spans, FORWARDS_PER_ROUND * nodes):
        rows = _rows(ensembles[0], spans, indices, by_prompt)
        results = [{i: SpanScore([0.0] * len(spans[i].target)) for i in indices} for _ in ensembles]
        _score_round(ensembles, walkers, rows, results)
        yield from ((i, [found[i] for found in results]) for i in indices)


def _score_round(
    ensembles: Sequence[Ensemble], walkers: Sequence[Walker], rows: list[_Row], results: list[dict[int, SpanScore]]
) -> None:
    members, device = ensembles[0].active, ensembles[0].device
    prompts = list(dict.fromkeys(row.prompts for row in rows if row.prompts))
    found = [evidence(ensembles[0], own) for own in prompts]
    wanted = [[reads[m] for reads in found] for m in range(len(members))]
    passes = [_Pass(member, m, walkers[m], rows, wanted[m]) for m, member in enumerate(members)]
    step = max(1, LOGITS_PER_CHUNK // sum(member.vocab_size for member in members))
    bases = _bases(ensembles, prompts, passes, wanted, step)
    for start in range(0, len(rows), step):
        chunk = range(start, min(start + step, len(rows)))
        logp = [found.logp(chunk).to(device) for found in passes]
        present = torch.tensor([[found.place[i] is not None for found in passes] for i in chunk], device=device)
        for ensemble, base, result in zip(ensembles, bases, results, strict=True):
            weights = None if base is None else torch.stack([base[rows[i].prompts] for i in chunk])
            _read(ensemble, ensemble.fuse(logp, present, weights), rows[start : chunk.stop], result)


def _bases(
    ensembles: Sequence[Ensemble],
    prompts: list[tuple[Prompt, ...]],
    passes: Sequence[_Pass],
    wanted: Sequence[Sequence[Sequence[Read]]],
    step: int,
) -> list[dict[tuple[Prompt, ...], Tensor] | None]:
    """Return every ensemble's weights [M] by prompt, None where they do not depend on it."""
    if not prompts:
        return [None] * len(ensembles)
    columns = [prompt_losses(p.member, wanted[p.m], p.states_of, step) for p in passes]
    losses = list(zip(*columns, strict=True))
    return [
        dict(zip(prompts, ensemble.prompt_weights(losses), strict=True)) if ensemble.reads_prompts else None
        for ensemble in ensembles
    ]


def _rounds(spans: Sequence[Span], size: int) -> Iterator[list[int]]:
    """Yield indices of spans whose trees have about `size` nodes in the main member, sorted by their prompts.

    A walker goes on from the way it visited last, so that a beginning shared by two rounds is not forwarded
    again.
    """
    found: list[int] = []
    nodes = 0
    before: tuple[int, ...] = ()
    for index in sorted(range(len(spans)), key=lambda index: spans[index].prompts[0].ids):
        ids = spans[index].prompts[0].ids
        added = len(ids) - common_prefix(before, ids) + len(spans[index].target)
        if found and nodes + added > size:
            yield found
            found, nodes = [], 0
        found.append(index)
        nodes += added
        before = ids
    if found:
        yield found


def _rows(ensemble: Ensemble, spans: Sequence[Span], indices: Sequence[int], by_prompt: bool) -> list[_Row]:
    """Return the distinct positions that spans read, told apart by their prompts where weights depend on these."""
    rows: dict[tuple, _Row] = {}
    for index in indices:
        prompts = spans[index].prompts if by_prompt else ()
        for at, target in enumerate(spans[index].target):
            paths = spans[index].paths(ensemble, at)
            row = rows.setdefault((paths, prompts), _Row(paths, prompts, []))
            row.readers.append((index, at, target))
    return list(rows.values())


class _Pass:
    """One member's pass over the rows of a round: a state for each of its token paths."""

    def __init__(
        self, member: Member, m: int, walker: Walker, rows: Sequence[_Row], wanted: Sequence[Sequence[Read]]
    ) -> None:
        self.member, self.m = member, m
        at: dict[Path, int] = {}
        self.place = [None if (path := row.paths[m]) is None else at.setdefault(path, len(at)) for row in rows]
        for reads in wanted:
            for read in reads:
                at.setdefault(read.before, len(at))
        self.at = at
        self.states = walker.states(list(at)) if at else torch.empty(0)  # [n, ...]

    def states_of(self, paths: Sequence[Path]) -> Tensor:
        """Return the states [n, ...] after token sequences of this pass."""
        return self.states[[self.at[path] for path in paths]]

    def logp(self, chunk: range) -> Tensor:
        """Return log-probabilities [B, V_m] for a chunk of rows; uniform where the member sits out."""
        wanted = [self.place[i] for i in chunk]
        here = [i for i in wanted if i is not None]
        if len(here) == len(wanted):
            return self.member.logp(self.states[here])
        size = self.member.vocab_size
        logp = torch.full((len(wanted), size), -math.log(size), device=self.member.runner.device)
        if here:
            logp[[at for at, i in enumerate(wanted) if i is not None]] = self.member.logp(self.states[here])
        return logp


def _read(ensemble: Ensemble, logp: Tensor, rows: Sequence[_Row], results: dict[int, SpanScore]) -> None:
    """Read the targets off fused rows [B, K]."""
    best = argmax(logp).tolist()
    readers = [(at, reader) for at, row in enumerate(rows) for reader in row.readers]
    index = torch.tensor([[at, target] for at, (_, _, target) in readers], device=logp.device)
    values = logp[index[:, 0], index[:, 1]].tolist()
    for value, (at, (span, position, target)) in zip(values, readers, strict=True):
        results[span].logp[position] = value
        results[span].greedy &= ensemble.same_piece(best[at], target)
