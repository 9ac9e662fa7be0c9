"""Tokens and positions counted apart from the engine: what has to be forwarded, and what `hf` forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from costs.workloads import Document
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.harness.model import DeepenLM


@dataclass(frozen=True)
class TreeCount:
    """What one member has to do for some documents: distinct token prefixes, and distinct positions to read."""

    nodes: int
    positions: int


def tree_counts(model: DeepenLM, documents: Sequence[Document]) -> list[TreeCount]:
    """Return the count of every active member over all documents of a call."""
    prompter = Prompter(model.ensemble)
    children: list[dict[tuple[int, int], int]] = [{} for _ in model.ensemble.active]
    ends: list[set[int]] = [set() for _ in model.ensemble.active]
    for document in documents:
        for continuation in document.continuations:
            span = prompter.span(document.context, continuation)
            for at in range(len(span.target)):
                for m, path in enumerate(span.paths(model.ensemble, at)):
                    if path is not None:
                        ends[m].add(_end(children[m], path))
    return [TreeCount(len(c), len(e)) for c, e in zip(children, ends, strict=True)]


def _end(children: dict[tuple[int, int], int], path: Sequence[int]) -> int:
    """Return the number of a path's last node, adding what is new; 0 is the root."""
    node = 0
    for token in path:
        node = children.setdefault((node, token), len(children) + 1)
    return node


def hf_tokens(lm: Any, documents: Sequence[Document]) -> int:
    """Return the tokens `hf` forwards, padding excluded; it computes logits at each of them.

    It forwards requests once that differ in their last token only.
    """
    forwarded = set()
    for document in documents:
        for continuation in document.continuations:
            context, target = lm._encode_pair(document.context, continuation)
            forwarded.add(tuple(context + target[:-1]))
    return sum(map(len, forwarded))


def floor(share: float, count: TreeCount, tokens: int) -> float:
    """Return (1 - h) nodes / hf tokens + h positions read / hf positions, h the head's share of the parameters."""
    return (1 - share) * count.nodes / tokens + share * count.positions / tokens
