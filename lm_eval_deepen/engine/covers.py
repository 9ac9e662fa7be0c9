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

Behind white space, tokenizers look ahead: one that leaves the last space of several to the word after them has a token
of three spaces where another one has four. So there, the member's tokens of more white space and a letter are covers,
too, where the main tokenizer would still have cut where it has cut. For that, places are read beyond the bytes so far.
Where the member's whole row counts, a token of several spaces stands for what the main tokenizer has before a word: one
of four spaces for one of three, if the fourth is left to the word.

What a prompt ends with is given, but for letters, digits and spaces: covers begin behind it. A member with a piece of
":" and a line break would else say after "Answer:" that a line break comes next, and have no say about the words.

Exact bytes from tokens: Phan et al., arXiv 2410.09303; Vieira et al., arXiv 2412.03719.
"""

from __future__ import annotations

import math
import sys
from array import array
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import threshold

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.member import TextCodec
from lm_eval_deepen.member.reading_cache import find, keep
from lm_eval_deepen.member.text import NOTHING
from lm_eval_deepen.storage import sha256

TokenPrefix = tuple[int, ...]
RestsKey = tuple[bytes, bytes, tuple[int, ...], bool]

LONGEST_WORD = 32  # bytes that are looked back on, where no word begins in them
TOKENS_READ = LONGEST_WORD + 2  # last tokens of a text on which its covers depend: each has a byte at least
PRECISION = 1e-3  # largest share of a row's mass that pieces too unlikely to be looked at may have
NEGLIGIBLE = 1e-15  # of the likeliest piece's mass
SORTED_AT_ONCE = 8_192  # pieces
LEVEL = 1e-2  # by which the mass falls down to which pieces are sorted
EXCLUDED = 1e-4  # what a row keeps of what the main member's boundary excludes
RESTS_KEPT = 2**24  # pieces whose rests are remembered: 64 MB
LEAST_COUNTED = 4_096  # pieces that a remembered cover counts as, however few it has
KEPT_FROM = 2**16  # pieces of a cover whose rests are kept in the cache folder, too; fewer are soon found again
NEW_TO_KEEP = 1_024  # rests; and a quarter of those known
UNKNOWN = -2  # a rest that was not looked at yet
WHITE = (b" ", b"\n", b"\r", b"\t")
LETTER = b"a"  # stands for whatever is not white space
LOOKED_AHEAD = (b"", b" ", b"\n")  # white space that may come before it


@dataclass(frozen=True)
class Cover:
    """Some of the member's tokens, and the pieces that begin with the bytes after them."""

    source: Any  # the place, among the member's tokens, at which its distribution is read: whatever names it
    way: tuple[int, ...]  # its tokens since the first cover of the plan
    first: int  # where the pieces that begin with the pending bytes start in the vocabulary sorted by bytes
    last: int  # where they end
    pending: bytes  # the bytes so far that come after these tokens
    ahead: bytes = b""  # the bytes with which the tokens go beyond the bytes so far; one of both is empty


@dataclass(frozen=True)
class Plan:
    """The covers of one row of one member, shorter ways first."""

    covers: tuple[Cover, ...]  # what is summed over; nothing where only the member's own row counts
    # the way of the member's own tokens of the bytes so far, whose whole row counts; None where the main member's
    # boundary excludes a part of it, so that it is among the covers
    own: tuple[int, ...] | None
    word: bytes  # the main member's bytes since the word began
    tokens: tuple[int, ...]  # its tokens of them


class CoverReader:
    """Finds and applies the covers of one other member under the main member's boundaries."""

    def __init__(self, codecs: Sequence[TextCodec], m: int, longest: int) -> None:
        """Sort the pieces of member `m` by their bytes; it takes in `longest` tokens. The main member comes first."""
        self.main, self.other, self.longest = codecs[0], codecs[m], longest
        self.stand_in = stand_in(codecs, self.other)  # gives the bytes of its piece that stands for others
        vocab = self.other.vocab.events
        no_text = vocab.control | vocab.unused
        texts = (i for i, piece in enumerate(vocab.pieces) if piece and i not in no_text)
        self.sorted = sorted(texts, key=vocab.pieces.__getitem__)  # ids with the same bytes follow each other
        self.keys = [vocab.pieces[i] for i in self.sorted]
        self.ids = torch.tensor(self.sorted, dtype=torch.long)
        pairs = zip(self.sorted, self.keys, strict=True)
        spaces = [i for i, piece in pairs if piece.endswith((b" ", b"\t")) and len(piece) > 1 and piece.isspace()]
        self._spaces = torch.tensor(spaces, dtype=torch.long)  # several of them, or one behind a line break
        self.places = array("i", [-1]) * len(vocab)  # of every id; a dict takes ten times the memory
        for place, token in enumerate(self.sorted):
            self.places[token] = place
        self._rests: OrderedDict[RestsKey, Tensor] = OrderedDict()
        self._rests_kept = 0
        self._new: Counter[RestsKey] = Counter()  # rests found since they were kept last
        # all that a rest is a function of, but for its key
        self._decides = [sha256(Path(__file__)), sys.byteorder, m, *(repr(codec.identity) for codec in codecs)]
        self._targets: dict[bytes, int] = {}  # its ids that stand for some bytes, -1 where none does
        self._after: dict[int, bytes] = {}

    def plan(
        self,
        main_path: Sequence[int],
        path: Sequence[int],
        place: Callable[[int, tuple[int, ...]], Any],
        back: int,
    ) -> Plan | None:
        """Return the covers at a place, None where no piece goes on beyond it and its own row does not count whole.

        Args:
            main_path: the main member's tokens; of more than `TOKENS_READ` the last ones serve.
            path: the other member's tokens of the same bytes; as many.
            place: names the place after the first n tokens of `path` and some more tokens, by which a distribution is
                looked up; None where the member cannot take these in.
            back: how many bytes behind the place covers may begin; see `reach`.
        """
        word, tokens = self._word(main_path)
        pieces = self.other.vocab.pieces
        begin, data = len(path), b""  # where the covers begin, and the bytes after that
        while begin > 1 and (piece := pieces[path[begin - 1]]) and word.endswith(piece + data):
            if len(piece) + len(data) > back:
                break
            begin, data = begin - 1, piece + data
        tail = tuple(path[begin:])
        others, whole = self._look_ahead(word, tokens, tail, data)
        covers: dict[tuple[int, ...], Cover] = {}
        for way in (tail, *others):
            size = 0
            for at in range(len(way) + 1):
                size += len(pieces[way[at - 1]]) if at else 0
                if way[:at] in covers or (whole and way[:at] == tail):
                    continue
                source = place(begin + at, ()) if way[:at] == tail[:at] else place(begin, way[:at])
                if source is None:
                    break
                pending, ahead = data[size:], _spelt(pieces, way[:at])[len(data) :]
                first = bisect_left(self.keys, pending)
                last = bisect_left(self.keys, pending + b"\xff" * 8, lo=first) if pending else len(self.keys)
                covers[way[:at]] = Cover(source, way[:at], first, last, pending, ahead)
        near = sorted(covers.values(), key=lambda cover: len(cover.way))
        ends = [*covers, *([tail] if whole else [])]
        while near and not self._goes_on(near[0]) and sum(len(way) == len(near[0].way) + 1 for way in ends) == 1:
            near.pop(0)  # nothing is longer than the pending bytes, and there is one way on
        if not any(self._goes_on(cover) for cover in near):
            near = []
        if not near and not whole:
            return None
        return Plan(tuple(near), tail if whole else None, word, tokens)

    def _look_ahead(
        self, word: bytes, tokens: tuple[int, ...], tail: tuple[int, ...], data: bytes
    ) -> tuple[list[tuple[int, ...]], bool]:
        """Return the other member's ways where tokenizers look ahead, and whether all of its own way counts.

        Many tokenizers leave the last space of several to the word after them: a line that is indented by four spaces
        has a token of three, which says that a space comes next. Another member has a token of four.

        `tokens` are the main member's of a `word`, `tail` the other member's last ones of the same bytes, which spell
        `data`.
        """
        if word[-1:] not in WHITE or (tail and _follow(self.other, data) != tail):
            return [], True
        kept = [more for more in LOOKED_AHEAD if self._cuts(word + more + LETTER, tokens)]
        seen = []
        for more in kept:
            if more and (b"" in kept or self._cuts(word + more, tokens)):
                continue  # nothing else is certain, or it is seen without looking ahead
            way: tuple[int, ...] = ()
            for token in _follow(self.other, data + more + LETTER) or ():
                if len(_spelt(self.other.vocab.pieces, (*way, token))) > len(data + more):
                    break
                way += (token,)
            if way != tail[: len(way)] and way[: len(tail)] != tail:
                seen.append(way)
        return seen, not kept or b"" in kept

    def _cuts(self, data: bytes, tokens: tuple[int, ...]) -> bool:
        """Return whether the main tokenizer begins some bytes with these tokens and goes on."""
        cut = _follow(self.main, data)
        return cut is not None and len(cut) > len(tokens) and cut[: len(tokens)] == tokens

    def _goes_on(self, cover: Cover) -> bool:
        """Return whether some piece is longer than the pending bytes."""
        return cover.last > cover.first and len(self.keys[cover.last - 1]) > len(cover.pending)

    def _word(self, path: Sequence[int]) -> tuple[bytes, tuple[int, ...]]:
        """Return the main member's bytes and tokens since the last space or line break, the first of a run."""
        pieces, at, data = self.main.vocab.pieces, len(path), b""
        while at > 0 and path[at - 1] >= 0:
            piece = pieces[path[at - 1]]
            if not piece or len(piece) + len(data) > LONGEST_WORD:
                break
            if data[:1] in (b" ", b"\n") and piece[-1:] not in WHITE:
                break
            at, data = at - 1, piece + data
        return data, tuple(path[at:])

    def rows(self, logp: Tensor, plans: Sequence[Plan | None], look_up: Callable[[Any], Tensor]) -> Tensor:
        """Turn the member's distributions into those of what comes next, in its own pieces.

        `logp` [B, V_m] are after its own last token; they are changed in place and returned. `look_up` gives the
        log-probabilities [V_m] at the source of a cover, which may be rows of `logp`.
        """
        # all are read before a row is changed
        extras = [self._extra(plan, look_up) if plan is not None and plan.covers else None for plan in plans]
        self._leave_space_to_words(logp, plans)
        for row, extra in enumerate(extras):
            if extra is None:
                continue
            targets, values, own = extra  # log masses, all given the first cover
            if own is None:  # what is excluded keeps a little: a text may be cut in another way than the tokenizer's
                own = float(torch.logsumexp(values, 0)) + math.log(EXCLUDED)
            total = torch.logaddexp(torch.logsumexp(values, 0), torch.tensor(own, dtype=values.dtype))
            logp[row] += float(own - total)
            unique, place = targets.unique(return_inverse=True)
            masses = torch.zeros(len(unique), dtype=values.dtype).index_add_(0, place, (values - total).exp())
            unique, masses = unique.to(logp.device), masses.to(logp)
            logp[row, unique] = torch.logaddexp(logp[row, unique], masses.log())
        return logp

    def _leave_space_to_words(self, logp: Tensor, plans: Sequence[Plan | None]) -> None:
        """Move what a whole row gives to spaces to what the main tokenizer has of them before a word, in place.

        A word follows them, or the member had taken a piece with more of them. Behind a line break spaces may follow,
        and behind one space alone a digit.
        """
        self._spaces = self._spaces.to(logp.device)
        own = logp.index_select(1, self._spaces)
        moved = []
        for row, n in (own > math.log(PRECISION)).nonzero().tolist():
            plan, token = plans[row], int(self._spaces[n])
            if plan is not None and plan.own is not None:
                (target,) = self._targets_after([self.other.vocab.events.pieces[token]], [token], plan)
                if target >= 0 and target != token:
                    moved.append((row, target, float(own[row, n])))
                    logp[row, token] += math.log(EXCLUDED)
        for row, target, value in moved:
            more = torch.tensor(value + math.log1p(-EXCLUDED), dtype=logp.dtype, device=logp.device)
            logp[row, target] = torch.logaddexp(logp[row, target], more)

    def _extra(self, plan: Plan, look_up: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor, float | None] | None:
        """Return what the covers add: ids and their log masses [n], and the log mass of the member's own way.

        Pieces that together could add less than `PRECISION` of what counts are left out.
        """
        ways = {cover.way for cover in plan.covers} | ({plan.own} if plan.own is not None else set())
        reached = {plan.covers[0].way: 0.0}  # log masses of ways
        ranges: list[Tensor] = []  # log-probabilities of every cover's pieces
        for cover in plan.covers:
            row = look_up(cover.source)
            self.ids = self.ids.to(row.device)
            values = row.index_select(0, self.ids[cover.first : cover.last])  # much faster than row[ids]
            for way in ways:
                if way[:-1] == cover.way and len(way) > len(cover.way):
                    reached[way] = reached[cover.way] + float(row[way[-1]])
                    # what a way goes on with is counted where that goes on
                    if cover.first <= (place := self.places[way[-1]]) < cover.last:
                        values[place - cover.first] = -math.inf
            ranges.append(values)
        own = None if plan.own is None else reached[plan.own]
        if own == -math.inf:
            return None  # the member excludes its own tokens; it has no say about what follows them
        before = [reached[cover.way] for cover in plan.covers]
        tops = [float(values.max()) + way for values, way in zip(ranges, before, strict=True) if len(values)]
        _, *further = reached.values()  # the first way is the condition of all others
        top = max([*further, *tops, -math.inf])
        begins = torch.tensor([0, *accumulate(map(len, ranges))])
        least = 1e-9 if own is None else min(1e-9, PRECISION * math.exp(own - top) / max(1, int(begins[-1])))
        mass = torch.cat([values + (way - top) for values, way in zip(ranges, before, strict=True)]).exp_()
        counted = 0.0 if own is None else math.exp(own - top)
        parts: list[tuple[Tensor, Tensor]] = []
        for some, left in _likeliest(threshold(mass, least, 0)):
            # most of the mass may not count: that of what is left is compared with what counts
            if left <= max(PRECISION * counted, NEGLIGIBLE):
                break
            of = torch.bucketize(some, begins, right=True) - 1
            for n in of.unique().tolist():
                at = some[of == n] - begins[n]
                targets = self._targets_of(plan.covers[n], plan, at)
                at, targets = at[targets >= 0], targets[targets >= 0]
                values = ranges[n][at.to(mass.device)].double().cpu() + before[n]
                parts.append((targets, values))
                counted += float((values - top).exp().sum())
        if not any(len(targets) for targets, _ in parts):
            return None
        return torch.cat([targets for targets, _ in parts]), torch.cat([values for _, values in parts]), own

    def _targets_of(self, cover: Cover, plan: Plan, at: Tensor) -> Tensor:
        """Return the member's ids that stand for what pieces of a cover's range, at places [n], go on with [n].

        They are -1 for a piece that does not count.
        """
        key = (cover.pending, cover.ahead, plan.tokens, plan.own is None)
        known = self._rests_of(key, cover.last - cover.first)
        unknown = at[known[at] == UNKNOWN]
        if len(unknown):
            ahead, skip = cover.ahead, len(cover.pending)
            places = [cover.first + number for number in unknown.tolist()]
            rests = [ahead + self.keys[place][skip:] for place in places]
            targets = self._targets_after(rests, [self.sorted[place] for place in places], plan)
            known[unknown] = torch.tensor(targets, dtype=known.dtype)
            if len(known) >= KEPT_FROM:
                self._new[key] += len(unknown)
                if self._new[key] >= max(NEW_TO_KEEP, int((known != UNKNOWN).sum()) // 4):
                    keep("tokenizers/rests", [*self._decides, repr(key)], known.numpy().tobytes())
                    del self._new[key]
        return known[at].long()

    def _rests_of(self, key: RestsKey, size: int) -> Tensor:
        """Return the target of every piece of a cover [n] (int32), as far as it is known."""
        known = self._rests.get(key)
        if known is None:
            body = find("tokenizers/rests", [*self._decides, repr(key)]) if size >= KEPT_FROM else None
            unknown = torch.full((size,), UNKNOWN, dtype=torch.int32)
            known = self._rests[key] = torch.frombuffer(bytearray(body), dtype=torch.int32) if body else unknown
            self._rests_kept += max(size, LEAST_COUNTED)
            while self._rests_kept > RESTS_KEPT and len(self._rests) > 1:
                self._rests_kept -= max(len(self._rests.popitem(last=False)[1]), LEAST_COUNTED)
        else:
            self._rests.move_to_end(key)
        return known

    def _targets_after(self, rests: Sequence[bytes], tokens: Sequence[int], plan: Plan) -> list[int]:
        """Return the member's ids that stand for what its tokens [n] go on with, -1 where that does not count."""
        after = [self._follows(token) for token in tokens]
        spelt = self.main.follow_all([plan.word + rest + more for rest, more in zip(rests, after, strict=True)])
        return [self._target(*each, plan) for each in zip(rests, after, spelt, strict=True)]

    def _target(self, rest: bytes, after: bytes, tokens: tuple[int, ...] | None, plan: Plan) -> int:
        """Return the id that stands for a rest, given the main member's tokens of the word with what follows it."""
        count = len(plan.tokens)
        if not rest or tokens is None or len(tokens) <= count or tokens[:count] != plan.tokens:
            return -1
        # what counts with its whole row was no longer white space to the main member one token ago
        if after and plan.own is not None and not self._cuts(plan.word + rest, plan.tokens):
            return -1
        certain = len(rest) + len(after.removesuffix(LETTER))
        data = self.main.vocab.pieces[tokens[count]][:certain]
        if data not in self._targets:
            ids = self.other.vocab.events.ids_of.get(self.stand_in(data))
            self._targets[data] = ids[0] if ids else -1
        return self._targets[data]

    def _follows(self, token: int) -> bytes:
        """Return what follows white space that is one of the member's tokens, if its tokenizer says so."""
        piece = self.other.vocab.pieces[token]
        if piece[-1:] not in WHITE:
            return b""
        if token not in self._after:
            ways = (b"", b" ")
            following = (
                more + LETTER for more in ways if (_follow(self.other, piece + more + LETTER) or ())[:1] == (token,)
            )
            self._after[token] = next(following, b"")
        return self._after[token]


def _likeliest(mass: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Yield places of masses [n], the largest first, and what these and all later ones sum to.

    First 64, then twice as many each time. Sorting many is slow, so of those only what is above a falling level is
    sorted. The masses are used up.
    """
    size, level, left = 64, 1.0, float(mass.sum())  # left: of what is not in order yet
    order, ordered = mass.new_empty(0, dtype=torch.long), mass[:0]
    while left > 0 or len(order):
        while left > 0 and len(order) < size:
            level *= LEVEL if len(mass) > SORTED_AT_ONCE else 0
            more = (mass > level).nonzero()[:, 0]
            largest, by = mass.index_select(0, more).sort(descending=True)
            order, ordered = torch.cat([order, more.index_select(0, by)]), torch.cat([ordered, largest])
            mass.index_fill_(0, more, 0)
            left = float(mass.sum()) if level else 0.0
        yield order[:size].cpu(), float(ordered.sum()) + left
        order, ordered, size = order[size:], ordered[size:], 2 * size


def reach(pieces: Sequence[bytes], tokens: Sequence[int], prompt: int) -> int:
    """Return how many bytes behind a place covers may begin: those since the prompt, and its last letters and spaces.

    The place is behind the main member's `tokens`, of which the first `prompt` are those of its prompt.
    """
    size = len(_spelt(pieces, tokens[max(prompt, len(tokens) - LONGEST_WORD) :]))
    if size < LONGEST_WORD:
        end = _spelt(pieces, tokens[max(0, prompt - LONGEST_WORD) : prompt]).decode(errors="ignore")
        for char in reversed(end):
            if not (char.isalnum() or char in " \t"):
                break
            size += len(char.encode())
    return min(LONGEST_WORD, size)


def plans_of(
    readers: Mapping[int, CoverReader], paths: Sequence[TokenPrefix | None], prompt: int
) -> tuple[Plan | None, ...]:
    """Return the covers of every active member [M] at a place, given all members' tokens; None where there are none.

    Their sources are tokens. The first `prompt` tokens of the main member are those of its prompt.
    """
    plans: list[Plan | None] = [None] * len(paths)
    for m, reader in readers.items():
        main, own = paths[0], paths[m]
        if main is not None and own is not None:
            back = reach(reader.main.vocab.pieces, main, prompt)
            plans[m] = reader.plan(main, own, partial(_after, reader.longest, own), back)
    return tuple(plans)


def _after(longest: int, tokens: TokenPrefix, count: int, more: TokenPrefix) -> TokenPrefix | None:
    return tokens[:count] + more if count + len(more) <= longest else None


def _spelt(pieces: Sequence[bytes], tokens: Sequence[int]) -> bytes:
    return b"".join(pieces[token] for token in tokens)


def _follow(codec: TextCodec, data: bytes) -> tuple[int, ...] | None:
    """Return the canonical tokens of some bytes, None where the tokenizer cannot spell them."""
    try:
        return codec.follow(NOTHING, data)
    except VocabularyError:
        return None


def stand_in(codecs: Sequence[TextCodec], own: TextCodec) -> Callable[[bytes], bytes]:
    """Return what finds the piece of `own` that stands for some bytes: as canonical rows find anchors.

    Bytes that are no piece of `own` are replaced by their first token under each tokenizer in turn, until they are one.
    The order of the members' `codecs` does not matter.
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
