"""Walks over prefix trees: every distinct prefix is forwarded once, in packed chunks, without padding.

A walk visits the nodes depth first. The keys and values that a chunk needs from before are then exactly those
of the way from the root to its first node, so that one row of at most a context's length is kept, whatever the
size of the tree; nothing is ever evicted that is needed again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lm_eval_deepen.member.kv_cache import ColumnCache, LayerKV, Prefilled
from lm_eval_deepen.member.tree import TokenTree, common_prefix


class Walker(ABC):
    """One member's walk over trees of token prefixes."""

    def states(self, paths: Sequence[Sequence[int]]) -> Tensor:
        """Return the state after the last token of every path [n, ...]."""
        return self.read(*TokenTree.of(paths))

    @abstractmethod
    def read(self, tree: TokenTree, nodes: Sequence[int]) -> Tensor:
        """Return the state at every one of some nodes of a tree [n, ...]."""

    @abstractmethod
    def prefill(self, tree: TokenTree, ends: Sequence[int], read: Sequence[int] = ()) -> tuple[list[Prefilled], Tensor]:
        """Return the ways to some `ends` with what is kept of them, and the states [n, ...] at nodes to `read`.

        What is kept of the end visited last may be no copy: use it before this walker goes on.
        """

    def forget(self, path: Sequence[int]) -> None:  # noqa: B027
        """Give back most of the memory of what is kept from walk to walk, where little of it begins the next path."""


class TreeWalker(Walker):
    """A walk that keeps the way to the node it visited last.

    Paths that begin like the last one of the call before continue from there.
    """

    def __init__(self, runner: Any, nodes: int, spans: Sequence[int] = ()) -> None:
        """Walk with a `TreeRunner`, up to `nodes` tokens at once; a layer gives a text's last `spans` keys, or all."""
        self.runner, self.nodes, self.spans = runner, nodes, spans
        self.kv = ColumnCache()
        self.tokens: list[int] = []  # the way kept, one column each
        self.hidden = torch.empty(0)  # states along it [>= P, d]
        self.seen = torch.ones(0, dtype=torch.bool)  # true everywhere between passes: room for a mask

    @override
    def read(self, tree: TokenTree, nodes: Sequence[int]) -> Tensor:
        states = {node: state for node, state, _, _ in self._visit(tree, frozenset(nodes))}
        return torch.stack([states[node] for node in nodes])

    @override
    def prefill(self, tree: TokenTree, ends: Sequence[int], read: Sequence[int] = ()) -> tuple[list[Prefilled], Tensor]:
        states: dict[int, Tensor] = {}
        held: dict[int, list[LayerKV]] = {}
        whole, order = frozenset(ends), tree.preorder(self.tokens)
        last = [*order[1], *order[0]][-1]
        for node, state, depth, columns in self._visit(tree, whole | frozenset(read), order):
            states[node] = state
            if node in whole and node != last:
                at = torch.arange(depth + 1) if columns is None else _way(tree, node, columns)
                held[node] = self.kv.take(at, self.spans)
        if last in whole:
            held[last] = self.kv.view(len(self.tokens), self.spans)
        texts = [Prefilled(tree.path(node), states[node], held[node]) for node in ends]
        return texts, torch.stack([states[node] for node in read]) if read else torch.empty(0)

    @override
    def forget(self, path: Sequence[int]) -> None:
        shared = common_prefix(tuple(self.tokens), tuple(path))
        if 2 * shared < len(self.tokens):
            del self.tokens[shared:]
            self.hidden = self.hidden[:shared].clone()
            self.kv.shrink(shared)

    def _visit(
        self, tree: TokenTree, wanted: frozenset[int], preorder: tuple[list[int], list[int]] | None = None
    ) -> Iterator[tuple[int, Tensor, int, dict[int, int] | None]]:
        """Forward a tree and yield every wanted node with its state [d] and its depth.

        With it come the columns of a chunk's nodes; None where those of its way are the first ones, in order. A node
        before the chunk lies in the column of its depth.
        """
        order, way = preorder or tree.preorder(self.tokens)
        self.kv.room = (1, max(tree.depths) + 1)
        del self.tokens[len(way) :]
        for depth, node in enumerate(way):
            if node in wanted:
                yield node, self.hidden[depth].clone(), depth, None
        for start, stop in chunks(len(order), self.nodes):
            chunk = order[start:stop]
            held = tree.depths[chunk[0]]
            del self.tokens[held:], way[held:]
            columns = {node: held + at for at, node in enumerate(chunk)}
            hidden = self._forward(tree, chunk, columns)
            for node in chunk:
                if node in wanted:
                    yield node, hidden[columns[node] - held], tree.depths[node], columns
            last = tree.parents[order[stop]] if stop < len(order) else chunk[-1]
            self._move(tree, last, way, columns, hidden)

    def _forward(self, tree: TokenTree, chunk: Sequence[int], columns: dict[int, int]) -> Tensor:
        """Forward nodes after the way kept and return their states [N, d]."""
        held, count = len(self.tokens), len(chunk)
        depths = torch.tensor([tree.depths[node] for node in chunk])
        size = count * (held + count)
        if size > len(self.seen):
            self.seen = torch.ones(size + size // 4, dtype=torch.bool)
        allowed = self.seen[:size].view(count, held + count)
        allowed[:, held:] = False
        before, within = allowed[:, :held].numpy(), allowed[:, held:].numpy()
        reach: list[int] = []  # how much of the way kept comes before each node
        for at, node in enumerate(chunk):
            parent = columns.get(tree.parents[node])
            if parent is None:
                reach.append(tree.depths[node])
            else:
                reach.append(reach[parent - held])
                within[at] = within[parent - held]
            within[at, at] = True
            if reach[at] < held:
                before[at, reach[at] :] = False
        keys = torch.cat([torch.arange(held), depths])
        ids = torch.tensor([[tree.tokens[node] for node in chunk]])
        kv = self.kv.aim(torch.arange(held, held + count)[None], held + count)
        self.runner.forwarded += count
        try:
            return self.runner.body(ids, depths[None], allowed[None], depths[None], keys[None], kv)[0]
        finally:  # what it hid of a long way is little
            allowed[:, min([held, *reach]) :] = True

    def _move(self, tree: TokenTree, node: int, way: list[int], columns: dict[int, int], hidden: Tensor) -> None:
        """Make `way` the one to `node` (-1: none) and keep it alone, out of the way before and a chunk's states."""
        held = len(self.tokens)
        new = list(takewhile(columns.__contains__, tree.way_up(node)))[::-1]
        shared = (tree.depths[node] + 1 if node >= 0 else 0) - len(new)
        at = [columns[n] for n in new]
        self.kv.pack(torch.tensor(at, dtype=torch.long), shared)
        self.tokens[shared:] = [tree.tokens[n] for n in new]
        end = len(self.tokens)
        if end > len(self.hidden):
            room = hidden.new_empty(end + len(self.hidden), hidden.shape[1])
            if shared:
                room[:shared] = self.hidden[:shared]
            self.hidden = room
        if new:
            self.hidden[shared:end] = hidden[[column - held for column in at]]
        way[shared:] = new


def _way(tree: TokenTree, node: int, columns: dict[int, int]) -> Tensor:
    """Return the columns of the way from the root to a node, itself included [depth + 1]."""
    new = [columns[n] for n in takewhile(columns.__contains__, tree.way_up(node))]
    return torch.tensor([*range(tree.depths[node] + 1 - len(new)), *new[::-1]])


def chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield bounds that divide `total` into as few parts of at most `size` as possible, nearly equal."""
    parts = math.ceil(total / size)
    for part in range(parts):
        yield part * total // parts, (part + 1) * total // parts
