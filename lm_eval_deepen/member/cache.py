"""A batched KV cache whose rows append, roll back, leave and are replaced independently."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_eval_deepen.member.kv import ColumnCache
from lm_eval_deepen.member.tree import Forward, ForwardInFull, common_prefix, pad
from lm_eval_deepen.member.walk import Prefilled

Reads = Sequence[Sequence[int]]  # per row, lengths of its sequence after which a state is read, ascending


class RowCache:
    """Keys and values of B rows; the token at position p of a row lies in column p.

    A rollback is free: columns behind a row's end are not seen, and written again. Layers with a sliding window keep
    the last columns alone: a row that goes back by more than `slack` is forwarded anew, which is longer than a word.
    """

    def __init__(
        self, runner: Forward, spans: Sequence[int] = (), slack: int = 0, room: tuple[int, int] = (0, 0)
    ) -> None:
        """Start without rows.

        Args:
            runner: forwards tokens.
            spans: how many columns each layer keeps, 0 for all; empty where all layers keep all.
            slack: how many of these are not in the window of the last one.
            room: how many rows will come, and the length of the longest in tokens.
        """
        self.runner, self.slack = runner, slack
        self.kv = ColumnCache(spans, room)
        self.span = max(spans, default=0)
        self.written: list[int] = []  # per row, columns up to the last one that was ever written
        self.tokens: list[tuple[int, ...]] = []
        self.known: list[dict[int, Tensor]] = []  # per row, states [d] after so many of its tokens

    def admit(self, texts: Sequence[Prefilled], rows: Sequence[int] | None = None) -> None:
        """Put prefilled sequences into `rows`, or into new rows at the end."""
        rows = range(len(self.tokens), len(self.tokens) + len(texts)) if rows is None else rows
        for row in rows:
            if row == len(self.tokens):
                self.tokens.append(())
                self.known.append({})
                self.written.append(0)
        for row, text in zip(rows, texts, strict=True):
            self.kv.put(row, len(self.tokens), len(text.tokens), text.kv)
            self.tokens[row], self.written[row] = text.tokens, len(text.tokens)
            self.known[row] = {len(text.tokens): text.state}

    def advance(self, sequences: Sequence[Sequence[int]], reads: Reads | None = None) -> Tensor:
        """Make each row hold its sequence, forwarding only what differs from before.

        Args:
            sequences: the full token sequence of every row (at least one token each).
            reads: where states are read; by default after each row's last token.

        Returns:
            The hidden states at the places read [sum of reads, d], row after row.
        """
        wanted = [tuple(tokens) for tokens in sequences]
        places = [[len(tokens)] for tokens in wanted] if reads is None else reads
        fresh = [self._roll_back(row, *pair) for row, pair in enumerate(zip(wanted, places, strict=True))]
        size = max(map(len, fresh), default=0)
        if self.span and max(map(len, self.tokens), default=0) + size > self.span:
            size = self.slack // 2  # what a pass writes over lies before the windows
        while rows := [row for row, new in enumerate(fresh) if new]:
            parts = [new[:size] for new in fresh]
            hidden = self._forward(rows, parts)  # [b, N, d]
            for at, row in enumerate(rows):
                held = len(self.tokens[row])
                self.tokens[row] += parts[row]
                last = len(self.tokens[row])
                self.known[row].update((n, hidden[at, n - held - 1]) for n in places[row] if held < n <= last)
            fresh = [new[size:] for new in fresh]
        return torch.stack([self.known[row][n] for row, lengths in enumerate(places) for n in lengths])

    def _roll_back(self, row: int, tokens: tuple[int, ...], lengths: Sequence[int]) -> tuple[int, ...]:
        """Drop what `tokens` does not share with the row, and return what must be forwarded."""
        shared = common_prefix(self.tokens[row], tokens)
        self.known[row] = {n: state for n, state in self.known[row].items() if n <= shared and n in lengths}
        # a state that was not kept: forward its token again
        shared = min([shared, *(n - 1 for n in lengths if n not in self.known[row])])
        written = self.written[row]
        if self.span and written > self.span and shared < min(len(tokens), written - self.slack):  # its window is gone
            shared = self.written[row] = 0
        self.tokens[row] = tokens[:shared]
        return tokens[shared:]

    def _forward(self, rows: Sequence[int], fresh: Sequence[tuple[int, ...]]) -> Tensor:
        """Forward the new tokens of some rows; the others wait."""
        begin = torch.tensor([len(self.tokens[row]) for row in rows])
        some = None if len(rows) == len(fresh) else torch.tensor(rows)
        fresh = [fresh[row] for row in rows]
        width = max(map(len, fresh))
        columns = begin[:, None] + torch.arange(width)  # [B, N]; a short row's padding lies behind its end
        total = int(begin.max()) + width
        keys = torch.arange(total)[None]
        allowed = keys[:, None] <= columns[:, :, None]  # [B, N, T]
        position = columns * pad([[1] * len(new) for new in fresh], width)  # padding may lie behind the last position
        self.runner.forwarded += sum(map(len, fresh))
        kv, last = self.kv.aim(columns, total, some), None
        if self.span:
            for row, end in zip(rows, (begin + width).tolist(), strict=True):
                self.written[row] = max(self.written[row], end)
            end = torch.tensor([self.written[row] for row in rows])[:, None] - 1
            last = end - (end - torch.arange(min(total, self.span))) % self.span  # [B, L]
        return self.runner.body(pad(fresh, width), position, allowed, columns, keys, kv, last)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.kv.keep(rows)
        self.tokens = [self.tokens[row] for row in rows]
        self.known = [self.known[row] for row in rows]
        self.written = [self.written[row] for row in rows]


class RecomputedRows:
    """The same interface without a cache, for models whose cache cannot be rolled back."""

    def __init__(self, runner: ForwardInFull) -> None:
        """Keep nothing between steps but what prefilling told of whole prompts."""
        self.runner = runner
        self.known: dict[tuple[int, ...], Tensor] = {}

    def admit(self, texts: Sequence[Prefilled], rows: Sequence[int] | None = None) -> None:
        """Keep the states after prompts until they are read."""
        self.known |= {text.tokens: text.state for text in texts}

    def advance(self, sequences: Sequence[Sequence[int]], reads: Reads | None = None) -> Tensor:
        """Forward every sequence in full and return the states at the places read."""
        places = [[len(tokens)] for tokens in sequences] if reads is None else reads
        paths = [tuple(tokens[:n]) for tokens, lengths in zip(sequences, places, strict=True) for n in lengths]
        new = [path for path in dict.fromkeys(paths) if path not in self.known]
        states = self.known | dict(zip(new, self.runner.states_at(new), strict=True) if new else ())
        self.known = {}
        return torch.stack([states[path] for path in paths])

    def keep(self, rows: Sequence[int]) -> None:
        """Nothing is kept."""
