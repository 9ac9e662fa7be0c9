"""What a member would say next where the main member's token ends inside one of its own tokens.

The main member has written " cl". Another member, whose vocabulary has " clique", would have gone on inside that piece;
asked for what follows its own token " cl", it has nothing left to say about it. A *cover* of the bytes so far is a
prefix of the member's tokens, and the pending bytes after it that its next piece begins with. Exactly, but for other
than canonical tokenizations,

    p(next | bytes)  ~  sum over covers c_1..c_j of  P(c_1..c_j) * sum over pieces t that begin with the pending bytes
                        p(t | c_1..c_j)  [what t goes on with comes next]

where a piece counts only if the main tokenizer, given the word with the rest of the piece, still cuts where it has cut:
that the main member's token is " the" says that the word did not go on as " then". Without this condition the member
predicts worse than without covers (docs/relative-space.md).

Exact bytes from tokens: Phan et al., arXiv 2410.09303; Vieira et al., arXiv 2412.03719.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.member import Prompt

if TYPE_CHECKING:
    from lm_eval_deepen.member import TextCodec

TokenPrefix = tuple[int, ...]

LONGEST_WORD = 32  # bytes that are looked back on, where no word begins in them
TOKENS_READ = LONGEST_WORD + 2  # last tokens of a text on which its covers depend: each has a byte at least
PRECISION = 1e-4  # largest share of a row's mass that pieces too unlikely to be looked at may have
RESTS_KEPT = 4_096  # words whose rests are remembered
NOTHING = Prompt((), "", ())


@dataclass(frozen=True)
class Cover:
    """A prefix of the member's tokens, and the pieces that begin with the bytes after it.

    Attributes:
        source: the place, among the member's tokens, at which its distribution is read: whatever names it.
        token: the member's own next token, by which the following cover goes on.
        first: where the pieces that begin with the pending bytes start in the vocabulary sorted by bytes.
        last: where they end.
        before: bytes of the word before the pending ones.
        pending: the pending bytes.
    """

    source: Any
    token: int
    first: int
    last: int
    before: bytes
    pending: bytes


@dataclass(frozen=True)
class Plan:
    """The covers of one row of one member, the longest prefix of tokens last; there is at least one.

    Attributes:
        covers: the covers that end before the member's last token.
        word: the main member's bytes since the word began.
        tokens: its tokens of them.
    """

    covers: tuple[Cover, ...]
    word: bytes
    tokens: tuple[int, ...]


class CoverReader:
    """Finds and applies the covers of one other member under the main member's boundaries."""

    def __init__(self, main: TextCodec, other: TextCodec, stand_in: Callable[[bytes], bytes]) -> None:
        """Sort the other member's pieces by their bytes.

        Args:
            main: the main member's codec.
            other: the other member's codec.
            stand_in: gives the bytes of the other member's piece that stands for some bytes that come next.
        """
        self.main, self.other, self.stand_in = main, other, stand_in
        vocab = other.vocab.events
        ids = sorted((min(ids) for ids in vocab.ids_of.values()), key=lambda i: vocab.pieces[i])
        duplicates = {i: ids for ids in vocab.ids_of.values() for i in ids}
        # ids with the same bytes follow each other
        self.sorted = [
            i for first in ids for i in duplicates[first] if i not in vocab.control and i not in vocab.unused
        ]
        self.keys = [vocab.pieces[i] for i in self.sorted]
        self.ids = torch.tensor(self.sorted, dtype=torch.long)
        self._rests: OrderedDict[tuple[bytes, bytes, tuple[int, ...]], dict[int, int]] = OrderedDict()
        self._targets: dict[int, int] = {}

    def plan(self, main_path: Sequence[int], path: Sequence[int], place: Callable[[int], Any]) -> Plan | None:
        """Return the covers at a place, None where no piece goes on beyond it.

        Args:
            main_path: the main member's tokens; of more than `TOKENS_READ` the last ones serve.
            path: the other member's tokens of the same bytes; as many.
            place: gives the place after the first n tokens of `path`, by which a distribution is looked up.
        """
        word, tokens = self._word(main_path)
        pieces = self.other.vocab.pieces
        covers: list[Cover] = []
        pending = b""
        for at in range(len(path) - 1, 0, -1):
            piece = pieces[path[at]]
            pending = piece + pending
            if not piece or len(pending) > len(word) or not word.endswith(pending):
                break
            first = bisect_left(self.keys, pending)
            last = bisect_left(self.keys, pending + b"\xff" * 8, lo=first)
            before = word[: len(word) - len(pending)]
            covers.append(Cover(place(at), path[at], first, last, before, pending))
        while covers and covers[-1].last - covers[-1].first <= 1 and self._alone(covers[-1]):
            covers.pop()  # nothing is longer than the pending bytes, and no cover before it needs the token
        if not any(self._goes_on(cover) for cover in covers):
            return None
        return Plan(tuple(reversed(covers)), word, tokens)

    def _goes_on(self, cover: Cover) -> bool:
        """Return whether some piece is longer than the pending bytes."""
        return cover.last > cover.first and len(self.keys[cover.last - 1]) > len(cover.pending)

    def _alone(self, cover: Cover) -> bool:
        return not self._goes_on(cover)

    def _word(self, path: Sequence[int]) -> tuple[bytes, tuple[int, ...]]:
        """Return the bytes and tokens of the main member since the last space or line break."""
        pieces, at, data = self.main.vocab.pieces, len(path), b""
        while at > 0 and path[at - 1] >= 0:
            piece = pieces[path[at - 1]]
            if not piece or len(piece) + len(data) > LONGEST_WORD:
                break
            at, data = at - 1, piece + data
            if data[:1] in (b" ", b"\n"):
                break
        return data, tuple(path[at:])

    def rows(self, logp: Tensor, plans: Sequence[Plan | None], look_up: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """Return the member's distributions of what comes next, in its own pieces.

        Args:
            logp: its log-probabilities [B, V_m] after its own last token.
            plans: of every row, its covers.
            look_up: gives the log-probabilities [n] of some ids [n] at the source of a cover.
        """
        out = logp
        for row, plan in enumerate(plans):
            found = None if plan is None else self._extra(plan, look_up)
            if found is None:
                continue
            if out is logp:
                out = logp.clone()
            targets, values, own = found  # log masses, all given the first cover
            total = torch.logaddexp(torch.logsumexp(values, 0), torch.tensor(own, dtype=values.dtype))
            out[row] += float(own - total)
            unique, place = targets.unique(return_inverse=True)
            masses = torch.zeros(len(unique), dtype=values.dtype).index_add_(0, place, (values - total).exp())
            unique, masses = unique.to(out.device), masses.to(out)
            out[row, unique] = torch.logaddexp(out[row, unique], masses.log())
        return out

    def _extra(self, plan: Plan, look_up: Callable[[Any, Tensor], Tensor]) -> tuple[Tensor, Tensor, float] | None:
        """Return what the covers add: ids and their log masses [n], and the log mass of the member's own last token.

        Pieces that together could add less than `PRECISION` of the latter are left out.
        """
        steps: list[float] = []
        ranges: list[Tensor] = []
        for cover in plan.covers:
            ids = torch.cat([self.ids[cover.first : cover.last], torch.tensor([cover.token])])
            values = look_up(cover.source, ids).double().cpu()
            ranges.append(values[:-1])
            steps.append(float(values[-1]))
        own = math.fsum(steps)
        if own == -math.inf:
            return None  # the member excludes its own tokens; it has no say about what follows them
        start, targets, found = 0.0, [], []
        size = sum(len(values) for values in ranges)
        for cover, values, step in zip(plan.covers, ranges, steps, strict=True):
            near = (values + start > own + math.log(PRECISION / size)).nonzero()[:, 0].tolist()
            rests = self._rests_of(cover, plan)
            for at in near:
                target = self._rest(cover, plan, rests, cover.first + at)
                if target >= 0:
                    targets.append(target)
                    found.append(float(values[at]) + start)
            start += step
        if not found:
            return None
        return torch.tensor(targets), torch.tensor(found, dtype=torch.float64), own

    def _rests_of(self, cover: Cover, plan: Plan) -> dict[int, int]:
        """Return what is known of the rests of a cover: by place in the sorted vocabulary."""
        key = (cover.before, cover.pending, plan.tokens)
        known = self._rests.get(key)
        if known is None:
            known = self._rests[key] = {}
            if len(self._rests) > RESTS_KEPT:
                self._rests.popitem(last=False)
        else:
            self._rests.move_to_end(key)
        return known

    def _rest(self, cover: Cover, plan: Plan, known: dict[int, int], at: int) -> int:
        """Return the member's id that stands for what a piece goes on with, -1 for a piece that does not count."""
        if at not in known:
            known[at] = -1
            rest = self.keys[at][len(cover.pending) :]
            tokens = _follow(self.main, plan.word + rest) if rest else None
            count = len(plan.tokens)
            if tokens is not None and len(tokens) > count and tokens[:count] == plan.tokens:
                known[at] = self._target(tokens[count])
        return known[at]

    def _target(self, token: int) -> int:
        """Return the other member's id that stands for a main token, -1 where none does."""
        if token not in self._targets:
            piece = self.stand_in(self.main.vocab.pieces[token])
            ids = self.other.vocab.events.ids_of.get(piece)
            self._targets[token] = ids[0] if ids else -1
        return self._targets[token]


def plans_of(readers: Mapping[int, CoverReader], paths: Sequence[TokenPrefix | None]) -> tuple[Plan | None, ...]:
    """Return the covers of every active member [M] at a place, given all members' tokens; None where there are none.

    Their sources are tokens.
    """
    plans: list[Plan | None] = [None] * len(paths)
    for m, reader in readers.items():
        main, own = paths[0], paths[m]
        if main is not None and own is not None:
            plans[m] = reader.plan(main, own, partial(_first, own))
    return tuple(plans)


def _first(tokens: TokenPrefix, count: int) -> TokenPrefix:
    return tokens[:count]


def _follow(codec: TextCodec, data: bytes) -> tuple[int, ...] | None:
    """Return the canonical tokens of some bytes, None where the tokenizer cannot spell them."""
    try:
        return codec.follow(NOTHING, data)
    except VocabularyError:
        return None


def stand_in(codecs: Sequence[TextCodec], own: TextCodec) -> Callable[[bytes], bytes]:
    """Return what finds the piece of `own` that stands for some bytes: as canonical rows find anchors.

    Bytes that are no piece of `own` are replaced by their first token under each tokenizer in turn, until they are one.

    Args:
        codecs: of all members; the result does not depend on their order.
        own: the codec whose pieces are wanted.
    """
    pieces = own.vocab.events.ids_of
    ordered = sorted(codecs, key=lambda codec: [str(part) for part in (codec.vocab.fingerprint, codec.identity[0])])

    def find(data: bytes) -> bytes:
        while data and data not in pieces:
            shorter = b""
            for codec in ordered:
                tokens = _follow(codec, data)
                first = codec.vocab.pieces[tokens[0]] if tokens else b""
                if first and first != data and data.startswith(first):
                    shorter = first
                    break
            if not shorter:
                ends = range(len(data) - 1, 0, -1)
                return next((data[:end] for end in ends if data[:end] in pieces), b"")
            data = shorter
        return data

    return find
