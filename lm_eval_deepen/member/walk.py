"""Walks over prefix trees: every distinct prefix is forwarded once, in packed chunks, without padding.

A walk visits the nodes depth first. The keys and values that a chunk needs from before are then exactly those
of the way from the root to its first node, so that one row of at most a context's length is kept, whatever the
size of the tree; nothing is ever evicted that is needed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from lm_eval_deepen.member.kv import ColumnCache, LayerKV
from lm_eval_deepen.member.tree import Forward, ForwardInFull, TokenTree, common_prefix


@dataclass(frozen=True)
class Prefilled:
    """A forwarded token sequence.

    Attributes:
        tokens: the sequence.
        state: what ``logp`` needs for its end [d].
        kv: keys and values [H, len(tokens), D] per layer, or the state that a model carries; empty where none is kept.
    """

    tokens: tuple[int, ...]
    state: Tensor
    kv: Any


class TreeWalker:
    """One member's walk over the trees of a call, which keeps the way to the node it visited last.

    Paths that begin like the last one of the call before continue from there.
    """

    def __init__(self, runner: Forward, nodes: int, spans: Sequence[int] = ()) -> None:
        """Walk with `runner` in chunks of at most `nodes` tokens; a layer gives a text's last `spans` keys, or all."""
        self.runner, self.nodes, self.spans = runner, nodes, spans
        self.kv = ColumnCache()
        self.tokens: list[int] = []  # the way kept, one column each
        self.hidden = torch.empty(0)  # states along it [>= P, d]
        self.seen = torch.ones(0, dtype=torch.bool)  # true everywhere between passes: room for a mask

    def states(self, paths: Sequence[Sequence[int]]) -> Tensor:
        """Return the state after the last token of every path [n, d]."""
        return self.read(*TokenTree.of(paths))

    def read(self, tree: TokenTree, nodes: Sequence[int]) -> Tensor:
        """Return the state at every one of some nodes of a tree [n, d]; the whole tree is forwarded."""
        states = {node: state for node, state, _, _ in self._visit(tree, frozenset(nodes))}
        return torch.stack([states[node] for node in nodes])

    def prefill(self, tree: TokenTree, ends: Sequence[int], read: Sequence[int] = ()) -> tuple[list[Prefilled], Tensor]:
        """Return the states, keys and values of the ways to some `ends`, and the states [n, d] at nodes to `read`.

        Keys and values of the way kept, to the end visited last, are no copies: use them before this walker goes on.
        """
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

    def forget(self, path: Sequence[int]) -> None:
        """Give back most of the memory of the way kept, where less than half of it begins the next path."""
        shared = common_prefix(tuple(self.tokens), tuple(path))
        if 2 * shared < len(self.tokens):
            self._cut(shared)
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
        self._cut(len(way))
        for depth, node in enumerate(way):
            if node in wanted:
                yield node, self.hidden[depth].clone(), depth, None
        for start, stop in chunks(len(order), self.nodes):
            chunk = order[start:stop]
            held = tree.depths[chunk[0]]
            self._cut(held)
            del way[held:]
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
        self._cut(shared)
        self.tokens += [tree.tokens[n] for n in new]
        end = len(self.tokens)
        if end > len(self.hidden):
            room = hidden.new_empty(end + len(self.hidden), hidden.shape[1])
            if shared:
                room[:shared] = self.hidden[:shared]
            self.hidden = room
        if new:
            self.hidden[shared:end] = hidden[[column - held for column in at]]
        way[shared:] = new

    def _cut(self, length: int) -> None:
        del self.tokens[length:]


def _way(tree: TokenTree, node: int, columns: dict[int, int]) -> Tensor:
    """Return the columns of the way from the root to a node, itself included [depth + 1]."""
    new = [columns[n] for n in takewhile(columns.__contains__, tree.way_up(node))]
    return torch.tensor([*range(tree.depths[node] + 1 - len(new)), *new[::-1]])


def chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield bounds that divide `total` into as few parts of at most `size` as possible, nearly equal."""
    parts = math.ceil(total / size)
    for part in range(parts):
        yield part * total // parts, (part + 1) * total // parts


class PlainWalker:
    """The same interface for models whose cache cannot be shared: every longest path is forwarded in full."""

    def __init__(self, runner: ForwardInFull) -> None:
        """Walk with `runner`."""
        self.runner = runner

    def states(self, paths: Sequence[Sequence[int]]) -> Tensor:
        """Return the state after the last token of every path [n, ...]."""
        return self.runner.states_at(paths)

    def read(self, tree: TokenTree, nodes: Sequence[int]) -> Tensor:
        """Return the state at every one of some nodes of a tree [n, ...]."""
        return self.states([tree.path(node) for node in nodes])

    def prefill(self, tree: TokenTree, ends: Sequence[int], read: Sequence[int] = ()) -> tuple[list[Prefilled], Tensor]:
        """Return the states at some `ends`, without keys and values, and those at nodes to `read`."""
        states = self.read(tree, [*ends, *read])
        texts = [Prefilled(tree.path(node), state, []) for node, state in zip(ends, states, strict=False)]
        return texts, states[len(ends) :]

    def forget(self, path: Sequence[int]) -> None:
        """Nothing is kept."""
