"""Prefix trees of token sequences, so that every distinct prefix is forwarded once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class TokenTree:
    """Distinct prefixes of the sequences added to it, in depth-first insertion order.

    Node i holds a token, its parent's index (-1 for a first token) and its depth.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self._children: dict[tuple[int, int], int] = {}
        self._last: tuple[tuple[int, ...], list[int]] = ((), [])

    @classmethod
    def of(cls, paths: Iterable[Sequence[int]]) -> tuple[Self, list[int]]:
        """Return the tree of some sequences, and the node of each one's last token."""
        tree = cls()
        return tree, [tree.add(path) for path in paths]

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, path: Sequence[int]) -> int:
        """Add a sequence (at least one token) and return the node of its last token."""
        path = tuple(path)
        before, nodes = self._last
        shared = common_prefix(before, path)
        nodes = nodes[:shared]
        nodes += self._added(nodes[-1] if nodes else -1, path[shared:])
        self._last = (path, nodes)
        return nodes[-1]

    def extend(self, node: int, tokens: Sequence[int]) -> int:
        """Add tokens after a node (-1: none) and return the node of the last one."""
        nodes = self._added(node, tokens)
        return nodes[-1] if nodes else node

    def _added(self, node: int, tokens: Sequence[int]) -> list[int]:
        """Add tokens after a node (-1: none) and return their nodes."""
        nodes = []
        first = self.depths[node] + 1 if node >= 0 else 0
        for depth, token in enumerate(tokens, start=first):
            key = (node, token)
            child = self._children.get(key)
            if child is None:
                child = self._children[key] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(depth)
            node = child
            nodes.append(node)
        return nodes

    def last(self, node: int, count: int) -> tuple[list[int], list[int]]:
        """Return the last `count` tokens of the way to a node, or all of them, and their nodes."""
        nodes = list(islice(self.way_up(node), count))[::-1]
        return [self.tokens[n] for n in nodes], nodes

    def path(self, node: int) -> tuple[int, ...]:
        """Return all tokens of the way to a node."""
        return tuple(self.tokens[n] for n in self.way_up(node))[::-1]

    def way_up(self, node: int) -> Iterator[int]:
        """Yield a node and its ancestors, up to a first token; nothing for -1."""
        while node >= 0:
            yield node
            node = self.parents[node]

    def children(self) -> list[list[int]]:
        """Return every node's children in the order in which they were added; the last list is that of -1."""
        children: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents):
            children[parent].append(node)
        return children

    def preorder(self, first: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """Return the nodes depth first, children in the order in which they were added.

        Args:
            first: tokens of a way from the root that is visited before anything else, as far as it exists.

        Returns:
            The order without the nodes of that way, and these nodes.
        """
        way: list[int] = []
        for token in first:
            node = self._children.get((way[-1] if way else -1, token))
            if node is None:
                break
            way.append(node)
        # one list for each node would be many objects for the search for cycles
        child, sibling = [-1] * (len(self) + 1), [-1] * len(self)
        for node in range(len(self) - 1, -1, -1):
            sibling[node], child[self.parents[node]] = child[self.parents[node]], node
        for parent, node in zip([-1, *way], way, strict=False):
            if (before := child[parent]) != node:
                while sibling[before] != node:
                    before = sibling[before]
                sibling[before], sibling[node], child[parent] = sibling[node], child[parent], node
        order: list[int] = []
        stack, node = list[int](), child[-1]
        while node >= 0 or stack:
            node = node if node >= 0 else stack.pop()
            order.append(node)
            stack += [sibling[node]] if sibling[node] >= 0 else ()
            node = child[node]
        return order[len(way) :], way


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Return the length of the longest common prefix of two token sequences."""
    shortest = min(len(a), len(b))
    if a[:shortest] == b[:shortest]:
        return shortest
    low, high = 0, shortest
    while high - low > 32:  # slices compare at C speed
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    while a[low] == b[low]:
        low += 1
    return low


def pad(rows: Iterable[Sequence[int]], width: int) -> Tensor:
    """Return rows of token ids right-padded with 0 to one tensor [B, width] (int64)."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long)
