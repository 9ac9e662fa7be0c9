"""Drafts for greedy decoding: tokens proposed ahead, which all members then verify in one block.

Drafting changes no text: a drafted token stands only where the fused distribution would have chosen it. Blocks
and single steps differ by rounding alone, so that a text can differ only where its two best pieces are nearly
tied; these steps are listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from lm_eval_deepen.engine.base import EnsembleBase
from lm_eval_deepen.engine.following import BatchRow, Follower, TokenPrefix, path_of
from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.relative.topk import argmax, largest

LONGEST = 8  # tokens drafted at once
FIRST = 4
NGRAM = (3, 2)  # lengths of the ends that are looked up, longest first
# A forward pass takes as long as reading the weights, and as many tokens as these take as long again (measured on one
# core with the demo's pair: 161 ms for 1 token, 276 for 8, 440 for 16). On an accelerator it is many more tokens.
FREE_TOKENS, FREE_ON_ACCELERATOR = 8, 64
EXPECTED, SURE_OF = 0.6, 8  # share of drafted tokens that stand before any is seen, and how many tokens it counts for
MARGIN = 1.25  # how much more a draft must promise than it costs
MEMORY = 0.97  # of what was seen, from one step to the next: what stopped paying is tried again
NEAR_TIE = 1e-4  # nats between the two best pieces, below which rounding may decide


Drafts = list[TokenPrefix]  # main tokens proposed to follow each row; none where there is no proposal


class Drafter:
    """Where drafts come from; this one drafts nothing, so that texts grow one token at a time."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # steps, blocks (forward passes of a row), drafted and accepted tokens
        # steps whose two best pieces are so close that rounding may decide, each with the index of its job
        self.near_ties: list[dict[str, Any]] = []

    def draft(self, ensemble: EnsembleBase, rows: Sequence[BatchRow], followers: Sequence[Follower]) -> Drafts:
        """Return what may follow each row."""
        return [() for _ in rows]

    def note(self, row: BatchRow, logp: Tensor) -> None:
        """See a fused row [K] that the next token is chosen from."""

    def learn(self, row: BatchRow, drafted: int, accepted: int) -> None:
        """See how many drafted tokens were what was chosen."""


class _Adaptive(Drafter):
    """Counts what became of drafts, adapts a row's next draft to its last one, and drafts only where that pays.

    What a batch drafts follows from its texts alone, not from a clock: near ties are the same in every run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts.update(steps=0, blocks=0, drafted=0, accepted=0)
        self._lengths: dict[int, int] = {}
        self._drafted = self._accepted = 0.0  # of late

    def pays(self, ensemble: EnsembleBase, rows: int, own: float = 0.0) -> bool:
        """Return whether a drafted token saves more than it costs in a batch of so many rows.

        A token that stands saves a row's share of a step; each drafted one costs its own part of the pass, and `own`, a
        share of a step, for all rows.
        """
        self._drafted, self._accepted = MEMORY * self._drafted, MEMORY * self._accepted
        free = FREE_TOKENS if ensemble.device.type == "cpu" else FREE_ON_ACCELERATOR
        stands = (EXPECTED * SURE_OF + self._accepted) / (SURE_OF + self._drafted)
        return stands > MARGIN * (own + rows / (free + rows))

    def length(self, row: BatchRow) -> int:
        """Return how many tokens to draft for a row: the choice is the next one after them."""
        if not row.job.sampler.plain_greedy or row.out.reason:
            return 0
        return min(self._lengths.get(row.index, FIRST), row.job.max_new - len(row.out.ids) - 1)

    def note(self, row: BatchRow, logp: Tensor) -> None:
        """Count a step, and list it where its two best pieces are nearly tied."""
        self.counts["steps"] += 1
        second, best = sorted(largest(logp[None], 2)[0][0].tolist())
        if best - second < NEAR_TIE:
            self.near_ties.append({"request": row.index, "token": len(row.out.ids), "margin": best - second})

    def learn(self, row: BatchRow, drafted: int, accepted: int) -> None:
        """Count, and draft more for a row whose draft stood, less where it fell."""
        self.counts["blocks"] += 1
        if not drafted:
            return
        self.counts["drafted"] += drafted
        self.counts["accepted"] += accepted
        self._drafted, self._accepted = self._drafted + drafted, self._accepted + accepted
        length = self._lengths.get(row.index, FIRST)
        self._lengths[row.index] = min(LONGEST, length + 2) if accepted == drafted else max(1, accepted + 1)


class Lookup(_Adaptive):
    """Proposes what followed the last tokens where they occurred before, in the prompt or in the text."""

    def draft(self, ensemble: EnsembleBase, rows: Sequence[BatchRow], followers: Sequence[Follower]) -> Drafts:
        """Return the tokens after the latest earlier occurrence of each row's end."""
        if not self.pays(ensemble, len(rows)):
            return [() for _ in rows]
        return [look_up((*row.job.prompts[0].ids, *row.out.ids), self.length(row)) for row in rows]


def look_up(tokens: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return up to `count` tokens that followed the latest earlier occurrence of the last few `tokens`."""
    if count <= 0:
        return ()
    for size in NGRAM:
        end = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == end:
                return tokens[start + size : start + size + count]
    return ()


class Cheapest(_Adaptive):
    """Proposes what the member with the fewest parameters would generate on its own."""

    def draft(self, ensemble: EnsembleBase, rows: Sequence[BatchRow], followers: Sequence[Follower]) -> Drafts:
        """Return each row's greedy continuation by one member, in tokens of the main member."""
        sizes = [sum(p.numel() for p in follower.member.lm.model.parameters()) for follower in followers]
        if not self.pays(ensemble, len(rows), min(sizes) / sum(sizes)):
            return [() for _ in rows]
        follower = followers[sizes.index(min(sizes))]
        member, vocab = follower.member, follower.member.codec.vocab.events
        lengths = [self.length(row) for row in rows]
        routes: list[list[TokenPrefix | None]] = [
            [path_of(ensemble, follower.m, row.job, tuple(row.out.ids), row.out.data)] for row in rows
        ]
        lengths = [0 if route[0] is None else length for route, length in zip(routes, lengths, strict=True)]
        while any(length >= len(route) for route, length in zip(routes, lengths, strict=True)):
            states = follower.states(routes)
            ends = list(accumulate(map(len, routes)))
            best = argmax(member.logp(states[[end - 1 for end in ends]])).tolist()
            for at, token in enumerate(best):
                path = routes[at][-1]
                if path is None or lengths[at] < len(routes[at]):
                    continue
                if token in vocab.control or token in vocab.unused or len(path) >= member.max_length:
                    lengths[at] = 0
                else:
                    routes[at].append((*path, token))
        return [
            _as_main(ensemble, follower, route[-1][len(route[0]) :]) if route[0] and route[-1] else ()
            for route in routes
        ]


def _as_main(ensemble: EnsembleBase, follower: Follower, ids: Sequence[int]) -> tuple[int, ...]:
    """Return a member's tokens as the main member's."""
    if follower.m in ensemble.siblings:
        return tuple(ids)
    data = follower.member.codec.vocab.decode(ids)
    try:
        return ensemble.main.codec.encode(data.decode())
    except (UnicodeDecodeError, VocabularyError):  # no whole characters, or a text that the main member cannot spell
        return ()


def drafter(speculate: str) -> Drafter:
    """Return where drafts come from, for the option ``speculate``."""
    kinds: dict[str, type[Drafter]] = {"off": Drafter, "lookup": Lookup, "draft": Cheapest}
    return kinds[speculate]()
