"""Edit distances and nearest strings, exactly, between whole vocabularies.

Every pair is compared, by the bit-parallel recurrence of Myers (1999) in the form of Hyyrö (2003): a column of the
dynamic program is one machine word per candidate, so a byte of a query costs some twenty vector operations over all
candidates. Queries are walked in sorted order and share the columns of their common beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

WORDS = (np.uint8, np.uint16, np.uint32, np.uint64)
CHUNK = 32_768  # candidates whose state stays in a core's cache
FAR = 1 << 40  # more than any distance times the number of candidates


def nearest(
    queries: Sequence[bytes], candidates: Sequence[bytes], advance: Callable[[int], None] = lambda compared: None
) -> tuple[NDArray, NDArray]:
    """Return, for every query, the index of the nearest candidate and its edit distance [n] (int64).

    The distance counts insertions, deletions and substitutions of bytes. Among candidates at the same distance
    it is the first. `advance` is told of pairs as they are compared, ``len(queries) * len(candidates)`` in all.
    """
    if not candidates or b"" in candidates:
        raise ValueError("nearest needs candidates, none of them empty")
    order = sorted(range(len(queries)), key=lambda n: queries[n])
    lengths = np.array([len(query) for query in queries], dtype=np.int64)
    best = np.full(len(queries), FAR, dtype=np.int64)  # distance * number of candidates + index
    low = 1
    for word in WORDS:
        width = 8 * np.dtype(word).itemsize
        members = [n for n, candidate in enumerate(candidates) if low <= len(candidate) <= width]
        for start in range(0, len(members), CHUNK):
            chunk = members[start : start + CHUNK]
            sizes = [len(candidates[n]) for n in chunk]
            gap = np.maximum(np.maximum(min(sizes) - lengths, lengths - max(sizes)), 0)
            wanted = gap * len(candidates) <= best  # no distance is below the difference in length
            rows = [n for n in order if wanted[n]]
            advance((len(order) - len(rows)) * len(chunk))
            walk = _Walk([candidates[n] for n in chunk], word, int(lengths.max(initial=0)))
            pairs = np.empty((len(rows), 2), dtype=np.int64)
            for at, n in enumerate(rows):
                pairs[at] = walk.nearest(queries[n])
                advance(len(chunk))
            keys = pairs[:, 0] * len(candidates) + np.array(chunk, dtype=np.int64)[pairs[:, 1]]
            best[rows] = np.minimum(best[rows], keys)
        low = width + 1
    for index in (n for n, candidate in enumerate(candidates) if len(candidate) >= low):
        for row in np.flatnonzero((len(candidates[index]) - lengths) * len(candidates) <= best).tolist():
            key = distance(candidates[index], queries[row]) * len(candidates) + index
            best[row] = min(best[row], key)
        advance(len(queries))
    return best % len(candidates), best // len(candidates)


def distances(queries: Sequence[bytes], candidates: Sequence[bytes]) -> NDArray:
    """Return the edit distance of every query and every candidate [n, m] (int64)."""
    table = np.empty((len(queries), len(candidates)), dtype=np.int64)
    table.T[:] = [len(query) for query in queries]  # the distance of nothing
    order = sorted(range(len(queries)), key=lambda n: queries[n])
    longest, low = max(map(len, queries), default=0), 1
    for word in WORDS:
        width = 8 * np.dtype(word).itemsize
        if members := [n for n, candidate in enumerate(candidates) if low <= len(candidate) <= width]:
            walk = _Walk([candidates[n] for n in members], word, longest)
            for n in order:
                table[n, members] = walk.distances(queries[n])
        low = width + 1
    for n in (n for n, candidate in enumerate(candidates) if len(candidate) >= low):
        table[:, n] = [distance(candidates[n], query) for query in queries]
    return table


def distance(pattern: bytes, text: bytes) -> int:
    """Return the edit distance of two byte strings of any length; `pattern` is not empty."""
    equal = {byte: sum(1 << i for i, other in enumerate(pattern) if other == byte) for byte in set(pattern)}
    full, last = (1 << len(pattern)) - 1, 1 << (len(pattern) - 1)
    up, down, score = full, 0, len(pattern)
    for byte in text:
        eq = equal.get(byte, 0)
        diagonal = ((((eq & up) + up) ^ up) | eq | down) & full
        right, left = (down | ~(diagonal | up)) & full, up & diagonal
        score += bool(right & last) - bool(left & last)
        right, left = ((right << 1) | 1) & full, (left << 1) & full
        up, down = (left | ~(diagonal | right)) & full, right & diagonal
    return score


class _Walk:
    """The columns of all candidates after the bytes of one query, kept for every beginning of it."""

    def __init__(self, candidates: Sequence[bytes], word: type[np.unsignedinteger], longest: int) -> None:
        count = len(candidates)
        self.word = word
        sizes = np.array([len(candidate) for candidate in candidates])
        rows = np.repeat(np.arange(count), sizes)
        places = np.concatenate([np.arange(size) for size in sizes])
        data = np.frombuffer(b"".join(candidates), dtype=np.uint8)
        self.equal = np.zeros((256, count), dtype=word)  # where a candidate has a byte, one bit per place
        np.bitwise_or.at(self.equal, (data, rows), np.left_shift(word(1), places.astype(word)))
        self.last = np.left_shift(word(1), (sizes - 1).astype(word))
        score = np.uint8 if max(longest, int(sizes.max())) < 250 else np.int32
        ones = np.full(count, np.iinfo(word).max, dtype=word)
        self.levels = [(ones, np.zeros(count, dtype=word), sizes.astype(score))]
        self.scratch = [np.empty(count, dtype=word) for _ in range(4)]
        self.flag = np.empty(count, dtype=bool)
        self.query = b""

    def nearest(self, query: bytes) -> tuple[int, int]:
        """Return the distance and the first index of the nearest candidate."""
        scores = self.distances(query)
        index = int(scores.argmin())
        return int(scores[index]), index

    def distances(self, query: bytes) -> NDArray:
        """Return the distance of every candidate [m], until another query is asked."""
        shared = 0
        for a, b in zip(self.query, query, strict=False):
            if a != b:
                break
            shared += 1
        for level in range(shared, len(query)):
            if level + 1 == len(self.levels):
                self.levels.append(tuple(np.empty_like(part) for part in self.levels[0]))  # type: ignore[arg-type]
            self._step(level, query[level])
        self.query = query
        return self.levels[len(query)][2]

    def _step(self, level: int, byte: int) -> None:
        """Compute the columns after one more byte."""
        up, down, score = self.levels[level]
        new_up, new_down, new_score = self.levels[level + 1]
        eq, last, flag = self.equal[byte], self.last, self.flag
        diagonal, right, left, spare = self.scratch
        np.bitwise_and(eq, up, out=diagonal)
        np.add(diagonal, up, out=diagonal)  # wraps: the carry beyond the word belongs to no place
        np.bitwise_xor(diagonal, up, out=diagonal)
        np.bitwise_or(diagonal, eq, out=diagonal)
        np.bitwise_or(diagonal, down, out=diagonal)
        np.bitwise_or(diagonal, up, out=right)
        np.invert(right, out=right)
        np.bitwise_or(right, down, out=right)
        np.bitwise_and(up, diagonal, out=left)
        np.bitwise_and(right, last, out=spare)
        np.not_equal(spare, 0, out=flag)
        np.add(score, flag.view(np.uint8), out=new_score)
        np.bitwise_and(left, last, out=spare)
        np.not_equal(spare, 0, out=flag)
        np.subtract(new_score, flag.view(np.uint8), out=new_score)
        np.left_shift(right, self.word(1), out=right)
        np.bitwise_or(right, self.word(1), out=right)
        np.left_shift(left, self.word(1), out=left)
        np.bitwise_or(diagonal, right, out=spare)
        np.invert(spare, out=spare)
        np.bitwise_or(spare, left, out=new_up)
        np.bitwise_and(right, diagonal, out=new_down)
