"""Scores of continuations under the fused distribution.

The requests of a call form a tree of token prefixes per member; every node is forwarded once. Logits are
computed only where they are read, in chunks, and fused at once, so that no distribution is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lm_eval_deepen.engine.prompting import Span
from lm_eval_deepen.member import Member
from lm_eval_deepen.member.tree import common_prefix

if TYPE_CHECKING:
    from lm_eval_deepen.engine.ensemble import Ensemble
    from lm_eval_deepen.member.walk import PlainWalker, TreeWalker

    Walker = TreeWalker | PlainWalker

LOGITS_PER_CHUNK = 24_000_000  # over all members; fusion needs a few times this in fp32
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

    paths: tuple[tuple[int, ...] | None, ...]
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
    walkers = [member.runner.walker(nodes) for member in ensemble.active]
    for indices in _rounds(spans, FORWARDS_PER_ROUND * nodes):
        rows = _rows(ensemble, spans, indices)
        results = {index: SpanScore([0.0] * len(spans[index].target)) for index in indices}
        states, places = zip(*(_states(walker, m, rows) for m, walker in enumerate(walkers)), strict=True)
        step = max(1, LOGITS_PER_CHUNK // sum(member.vocab_size for member in ensemble.active))
        for start in range(0, len(rows), step):
            chunk = range(start, min(start + step, len(rows)))
            logp = [
                _chunk_logp(member, state, place, chunk).to(ensemble.device)
                for member, state, place in zip(ensemble.active, states, places, strict=True)
            ]
            present = torch.tensor(
                [[place[i] is not None for place in places] for i in chunk], device=ensemble.device
            )
            _read(ensemble, ensemble.fuse(logp, present), rows[start : chunk.stop], results)
        yield from results.items()


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


def _rows(ensemble: Ensemble, spans: Sequence[Span], indices: Sequence[int]) -> list[_Row]:
    """Return the distinct positions that spans read."""
    rows: dict[tuple, _Row] = {}
    for index in indices:
        for at, target in enumerate(spans[index].target):
            paths = spans[index].paths(ensemble, at)
            row = rows.setdefault(paths, _Row(paths, []))
            row.readers.append((index, at, target))
    return list(rows.values())


def _states(walker: Walker, m: int, rows: Sequence[_Row]) -> tuple[Tensor, list[int | None]]:
    """Return a member's states [n, ...] for the rows it takes part in, and each row's place among them."""
    paths: dict[tuple[int, ...], int] = {}
    place = [None if (path := row.paths[m]) is None else paths.setdefault(path, len(paths)) for row in rows]
    return (walker.states(list(paths)) if paths else torch.empty(0)), place


def _chunk_logp(member: Member, states: Tensor, place: list[int | None], chunk: range) -> Tensor:
    """Return log-probabilities [B, V_m] for a chunk of rows; uniform where the member sits out."""
    wanted = [place[i] for i in chunk]
    here = [i for i in wanted if i is not None]
    if len(here) == len(wanted):
        return member.logp(states[here])
    size = member.vocab_size
    logp = torch.full((len(wanted), size), -float(torch.tensor(size).log()), device=member.runner.device)
    if here:
        logp[[at for at, i in enumerate(wanted) if i is not None]] = member.logp(states[here])
    return logp


def _read(ensemble: Ensemble, logp: Tensor, rows: Sequence[_Row], results: dict[int, SpanScore]) -> None:
    """Read the targets off fused rows [B, K]."""
    best = logp.argmax(dim=-1).tolist()
    readers = [(at, reader) for at, row in enumerate(rows) for reader in row.readers]
    index = torch.tensor([[at, target] for at, (_, _, target) in readers], device=logp.device)
    values = logp[index[:, 0], index[:, 1]].tolist()
    for value, (at, (span, position, target)) in zip(values, readers, strict=True):
        results[span].logp[position] = value
        results[span].greedy &= ensemble.same_piece(best[at], target)
