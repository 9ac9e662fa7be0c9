"""Which distribution of a source belongs to which token of the target.

Position i of a block is where token i is predicted: a model has read the tokens before it. A source's distribution
belongs to a position of the target if both have read the same text, which is so exactly where as many bytes have been
read. Dynamic time warping compares tokens instead, as FuseLLM does (arXiv 2401.10491, section 3.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lm_eval_deepen.fusion._edit import FAR, distances

Positions = NDArray[np.int64]


def by_bytes(target: Positions, source: Positions) -> Positions:
    """Return the source's position for every position of the target, -1 where it has none [T].

    Args:
        target: bytes read at each position of the target, ascending [T].
        source: bytes read at each position of the source, ascending [S].
    """
    if not len(source):
        return np.full(len(target), -1, dtype=np.int64)
    at = np.searchsorted(source, target).clip(max=len(source) - 1)
    return np.where(source[at] == target, at, -1).astype(np.int64)


def by_dtw(target: Sequence[bytes], source: Sequence[bytes], meant: Sequence[bytes | None] | None = None) -> Positions:
    """Return the source's position for every position of the target, -1 where it has none [T].

    Tokens are warped onto each other at the least sum of edit distances (over bytes). The position after a token of
    the target gets the distribution after the only token it is warped onto, provided that no other token of the target
    is, too, and that the two are equal; the first position, where nothing has been read, gets the first.

    The published code gives every other position the one-hot "distribution" of the token that it has just read: it
    trains the model to repeat it. Here these positions have none.

    Args:
        target: the target's tokens as bytes [T].
        source: the source's tokens [S].
        meant: the target's token that each of the source stands for, None for none [S]; by default itself.
    """
    positions = np.full(len(target), -1, dtype=np.int64)
    if not target or not source:
        return positions
    positions[0] = 0
    warped = warp(target, source)
    takers = Counter(j for partners in warped for j in partners)
    for i, partners in enumerate(warped[:-1]):
        if len(partners) == 1 and takers[partners[0]] == 1 and partners[0] + 1 < len(source):
            j = partners[0]
            if target[i] == (source if meant is None else meant)[j] and target[i]:
                positions[i + 1] = j + 1
    return positions


def warp(target: Sequence[bytes], source: Sequence[bytes]) -> list[list[int]]:
    """Return, for every token of the target, the tokens of the source that it is warped onto, ascending.

    Of equal ways, the last step goes along both if it can, else along the source, else along the target.
    """
    if not target or not source:
        return [[] for _ in target]
    row, column = ({token: n for n, token in enumerate(dict.fromkeys(tokens))} for tokens in (target, source))
    costs = distances(list(row), list(column))
    at = [column[token] for token in source]
    table = np.full((len(target) + 1, len(source) + 1), FAR, dtype=np.int64)  # least costs of the way so far
    table[0, 0] = 0
    for i, token in enumerate(target):
        cost = costs[row[token], at]
        so_far = cost.cumsum()
        # a way enters the row at some place, and goes on along the source
        entered = np.minimum(table[i, :-1], table[i, 1:]) - (so_far - cost)
        table[i + 1, 1:] = np.minimum.accumulate(entered) + so_far
    partners: list[list[int]] = [[] for _ in target]
    i, j = len(target), len(source)
    while i and j:
        partners[i - 1].append(j - 1)
        ways = (table[i - 1, j - 1], table[i, j - 1], table[i - 1, j])
        step = ways.index(min(ways))
        i, j = i - (step != 1), j - (step != 2)
    return [own[::-1] for own in partners]
