"""Texts written by words (``method: adafuse``): members propose them, all rank the proposals, the best stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence

import torch
from torch import Tensor

from lm_eval_deepen.engine.base import EnsembleBase
from lm_eval_deepen.engine.drafts import Drafter
from lm_eval_deepen.engine.following import BatchRow, Follower, TokenPrefix
from lm_eval_deepen.engine.generation import Decoder, append
from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.fusion._rows import gather_groups, keep, roles_of, text_ids
from lm_eval_deepen.fusion.adafuse import AdaFuse
from lm_eval_deepen.member.text import incomplete_tail
from lm_eval_deepen.member.tree import common_prefix
from lm_eval_deepen.relative.topk import largest
from lm_eval_deepen.vocabulary import ByteVocab

LONGEST = 12  # tokens of a word

Proposal = tuple[int, ...]  # tokens; none for an end of text


class Events:
    """What may come next in a member's vocabulary: texts, each by the id that spells it, and the end of text."""

    def __init__(self, vocab: ByteVocab, device: torch.device) -> None:
        """Read a vocabulary, whose rows are on a device."""
        self.vocab, self.roles = vocab, roles_of(vocab, with_end=True).to(device)
        # of ids with the same bytes, the one that a tokenizer gives, by the lowest
        self.spelt_by = {ids[0]: vocab.preferred(ids) for ids in text_ids(vocab).values() if len(ids) > 1}

    def likeliest(self, logp: Tensor, count: int) -> list[tuple[int, float]]:
        """Return at most `count` events of a row [V] with their probabilities, the likeliest first."""
        p = gather_groups(keep(logp[None], self.roles).logp.exp(), self.roles)
        values, ids = largest(p, min(count, p.shape[1]))
        pairs = zip(values[0].tolist(), ids[0].tolist(), strict=True)
        ordered = sorted(((-value, token) for value, token in pairs if value > 0))
        return [(self.spelt_by.get(token, token), -value) for value, token in ordered]


def propose(
    options: AdaFuse, events: Events, path: TokenPrefix, fits: Callable[[TokenPrefix], bool]
) -> Generator[TokenPrefix, Tensor, list[Proposal]]:
    """Yield token prefixes, take the row [V] behind each, and return what a member proposes behind `path`."""
    span: Proposal = ()
    for word in range(options.words):
        ranked = events.likeliest((yield (*path, *span)), max(2, options.candidates))
        if not ranked:
            return []
        sure = ranked[0][1] - sum(p for _, p in ranked[1:2]) >= options.threshold
        branches = word == options.words - 1 or (word == 0 and not sure)
        grown = []
        for first, _ in ranked[: options.candidates if branches else 1]:
            grown.append((*span, *(yield from _word(events, (*path, *span), first, fits))))
        if branches or not sure or grown[0] == span:
            return grown
        span = grown[0]
    return [span]


def _word(
    events: Events, path: TokenPrefix, first: int, fits: Callable[[TokenPrefix], bool]
) -> Generator[TokenPrefix, Tensor, Proposal]:
    """Return the tokens of the word that begins with `first`; none where that is an end of text."""
    word: Proposal = ()
    data, token = b"", first
    while piece := events.vocab.pieces[token]:
        if data.strip() and (data[-1:].isspace() or piece[:1].isspace()):
            break
        word, data = (*word, token), data + piece
        if len(word) == LONGEST or not fits((*path, *word)):
            break
        ranked = events.likeliest((yield (*path, *word)), 1)
        if not ranked:
            break
        token = ranked[0][0]
    return word


class WordDecoder(Decoder):
    """Extends every row by one proposal at a time."""

    def __init__(self, ensemble: EnsembleBase, waiting: deque[BatchRow], batch_size: int, drafter: Drafter) -> None:
        super().__init__(ensemble, waiting, batch_size, drafter)
        assert ensemble.by_words is not None
        self.options = ensemble.by_words
        self.events = [Events(member.codec.vocab.events, ensemble.device) for member in ensemble.active]

    def step(self) -> list[BatchRow]:
        """Extend every row by at least one token, or end it, and return those that are finished by it."""
        ensemble, rows = self.ensemble, self.rows
        starts = [self._paths(row, tuple(row.out.ids), row.out.data) for row in rows]
        for row, places in zip(rows, starts, strict=True):
            ensemble.counters.record_outgrown(self._outgrown(row, tuple(row.out.ids), row.out.data, places))
        ensemble.counters.record_present(torch.tensor([[path is not None for path in places] for places in starts]))
        weights = [self._weights(row, places) for row, places in zip(rows, starts, strict=True)]
        proposed: list[dict[bytes, Proposal]] = [{} for _ in rows]  # in tokens of the main member
        for follower in self.followers:
            m = follower.m
            paths = [places[m] if own[m] else None for places, own in zip(starts, weights, strict=True)]
            for at, proposals in self._proposals(follower, paths).items():
                for proposal in proposals:
                    if (known := self._as_main(follower, rows[at], proposal)) is not None:
                        proposed[at].setdefault(*known)
        best: list[tuple[float, Proposal] | None] = [None for _ in rows]
        for n in range(max(map(len, proposed))):
            nth = {at: list(words.items())[n] for at, words in enumerate(proposed) if n < len(words)}
            for at, score in self._scores(nth, starts, weights).items():
                standing = best[at]
                if standing is None or score > standing[0]:  # of equals the first, which the earlier member proposes
                    best[at] = score, nth[at][1]
        for row, chosen, words in zip(rows, best, proposed, strict=True):
            ensemble.counters.record_proposals(len(words))
            if chosen is None:
                row.out.reason, row.out.refusal = "refused", "no member proposes a word that the main member can spell."
                continue
            score, proposal = chosen
            if not proposal:
                row.out.reason = "eos"
            for token in proposal:  # as far as it goes; each token gets the proposal's score
                append(ensemble, row, token, score)
                if not row.out.reason and self._is_full(row):
                    row.out.reason = "length"
                if row.out.reason:
                    break
        return [row for row in rows if row.out.reason]

    def _weights(self, row: BatchRow, places: Sequence[TokenPrefix | None]) -> list[float]:
        """Return the weights of the members that take part; of the main one alone where no other has any."""
        given = self.ensemble.weights if row.weights is None else row.weights
        here = [w if path is not None else 0.0 for w, path in zip(given.tolist(), places, strict=True)]
        return here if any(here) else [1.0] + [0.0] * (len(here) - 1)

    def _proposals(self, follower: Follower, starts: Sequence[TokenPrefix | None]) -> dict[int, list[Proposal]]:
        """Return what a member proposes behind each row's tokens; rows without tokens are left out."""
        events = self.events[follower.m]
        running = {
            at: propose(self.options, events, path, follower.member.fits)
            for at, path in enumerate(starts)
            if path is not None
        }
        asked: dict[int, TokenPrefix] = {at: next(one) for at, one in running.items()}
        done: dict[int, list[Proposal]] = {}
        while asked:
            logp = follower.follow([[asked.get(at)] for at in range(len(starts))])
            for at in list(asked):
                try:
                    asked[at] = running[at].send(logp[at])
                except StopIteration as end:
                    done[at] = end.value
                    del asked[at]
        return done

    def _as_main(self, follower: Follower, row: BatchRow, proposal: Proposal) -> tuple[bytes, Proposal] | None:
        """Return a proposal's bytes and the main member's tokens for them; None where it cannot spell them."""
        data = self.events[follower.m].vocab.decode(proposal)
        if not data or follower.m in self.ensemble.siblings:
            return data, proposal
        data = data[: len(data) - incomplete_tail(data)]
        if row.job.prefix_space and not row.out.data:
            data = b" " + data
        try:
            return (data, self.ensemble.main.codec.encode(data.decode())) if data else None
        except (UnicodeDecodeError, VocabularyError):
            return None

    def _scores(
        self,
        proposed: Mapping[int, tuple[bytes, Proposal]],
        starts: Sequence[Sequence[TokenPrefix | None]],
        weights: Sequence[Sequence[float]],
    ) -> dict[int, float]:
        """Return the members' mean log-probability a token of one proposal for each row; none where nobody has one."""
        ends = {
            at: self._paths(row := self.rows[at], (*row.out.ids, *ids), row.out.data + data) if ids else None
            for at, (data, ids) in proposed.items()
        }
        said: dict[int, list[tuple[float, float]]] = {at: [] for at in proposed}  # weights, and what they weigh
        for follower in self.followers:
            m, eos = follower.m, list(self.events[follower.m].vocab.eos)
            reads: dict[int, list[tuple[TokenPrefix, Sequence[int]]]] = {}  # token prefixes, and what follows each
            for at, places in ends.items():
                start = starts[at][m]
                if start is None or not weights[at][m]:
                    continue
                if places is None:
                    reads[at] = [(start, eos)] if eos else []
                elif (end := places[m]) is not None:
                    shared = max(1, common_prefix(start, end))
                    reads[at] = [(end[:n], end[n : n + 1]) for n in range(shared, len(end))]
            if not any(reads.values()):
                continue
            routes: list[list[TokenPrefix | None]] = [
                [path for path, _ in reads.get(at, ())] or [None] for at in range(len(starts))
            ]
            logp = iter(follower.follow(routes))
            for at in range(len(starts)):
                values = [float(next(logp)[list(ids)].logsumexp(0)) for _, ids in reads.get(at, ())]
                if values:
                    said[at].append((weights[at][m], sum(values) / len(values)))
                else:
                    next(logp)
        return {at: sum(w * value for w, value in own) / sum(w for w, _ in own) for at, own in said.items() if own}
