"""Scores of continuations under the fused distribution.

Every distinct token prefix of a tree of requests is forwarded once per member; logits are computed
only where they are read, in chunks, and fused at once, so that no distribution is kept.
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

LOGITS_PER_CHUNK = 24_000_000  # over all members; fusion needs a few times this in fp32
TOKENS_PER_BATCH = 8_192  # padding included
NODES_PER_TREE = 1_024  # more only where one span alone has more


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


def score(ensemble: Ensemble, spans: Sequence[Span], batch_size: int) -> Iterator[tuple[int, SpanScore]]:
    """Score spans in batches, longest first.

    Args:
        ensemble: the members and their fuser.
        spans: what to score.
        batch_size: how many token trees to forward together; spans with a common beginning share one.

    Yields:
        The index of a span and its score, as soon as its batch is done.
    """
    for batch in _batches(spans, batch_size):
        results = {index: SpanScore([0.0] * len(spans[index].target)) for tree in batch for index in tree}
        _score_batch(ensemble, [_rows(ensemble, spans, tree) for tree in batch], results)
        yield from results.items()


def _batches(spans: Sequence[Span], batch_size: int) -> Iterator[list[list[int]]]:
    """Yield batches of at most `batch_size` trees of span indices.

    Spans whose prompts begin alike (few-shot text) share a tree, as long as it stays small: attention
    within a tree is quadratic.
    """
    trees: list[tuple[int, list[int]]] = []  # nodes of the main member's tree, span indices
    before: tuple[int, ...] = ()
    for index in sorted(range(len(spans)), key=lambda index: spans[index].prompts[0].ids):
        ids, target = spans[index].prompts[0].ids, len(spans[index].target)
        shared = common_prefix(before, ids)
        added = len(ids) - shared + target
        if trees and 2 * shared >= len(ids) and trees[-1][0] + added <= NODES_PER_TREE:
            trees[-1] = (trees[-1][0] + added, [*trees[-1][1], index])
        else:
            trees.append((len(ids) + target, [index]))
        before = ids
    trees.sort(key=lambda tree: -tree[0])
    batch: list[list[int]] = []
    width = 0
    for nodes, tree in trees:
        if batch and (len(batch) == batch_size or (len(batch) + 1) * width > TOKENS_PER_BATCH):
            yield batch
            batch = []
        width = width if batch else nodes
        batch.append(tree)
    if batch:
        yield batch


def _rows(ensemble: Ensemble, spans: Sequence[Span], tree: Sequence[int]) -> list[_Row]:
    """Return the distinct positions that the spans of a tree read."""
    rows: dict[tuple, _Row] = {}
    for index in tree:
        for at, target in enumerate(spans[index].target):
            paths = spans[index].paths(ensemble, at)
            row = rows.setdefault(paths, _Row(paths, []))
            row.readers.append((index, at, target))
    return list(rows.values())


def _score_batch(ensemble: Ensemble, groups: list[list[_Row]], results: dict[int, SpanScore]) -> None:
    rows = [row for group in groups for row in group]
    states, places = zip(
        *(_states(member, m, groups) for m, member in enumerate(ensemble.active)), strict=True
    )
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


def _states(member: Member, m: int, groups: list[list[_Row]]) -> tuple[Tensor, list[int | None]]:
    """Return a member's states [n, ...] for the rows it takes part in, and each row's place among them."""
    paths = [[path for row in group if (path := row.paths[m]) is not None] for group in groups]
    place: list[int | None] = []
    count = 0
    for group in groups:
        for row in group:
            place.append(None if row.paths[m] is None else count)
            count += row.paths[m] is not None
    filled = [group for group in paths if group]
    return (member.states_at(filled) if filled else torch.empty(0)), place


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
