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

    A rollback is free: columns behind a row's end are not seen, and written again.
    """

    def __init__(self, runner: Forward) -> None:
        """Start without rows."""
        self.runner = runner
        self.kv = ColumnCache()
        self.tokens: list[tuple[int, ...]] = []
        self.known: list[dict[int, Tensor]] = []  # per row, states [d] after so many of its tokens

    def admit(self, texts: Sequence[Prefilled], rows: Sequence[int] | None = None) -> None:
        """Put prefilled sequences into `rows`, or into new rows at the end."""
        rows = range(len(self.tokens), len(self.tokens) + len(texts)) if rows is None else rows
        for row in rows:
            if row == len(self.tokens):
                self.tokens.append(())
                self.known.append({})
        for row, text in zip(rows, texts, strict=True):
            self.kv.put(row, len(self.tokens), text.kv)
            self.tokens[row] = text.tokens
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
        rows = [row for row, new in enumerate(fresh) if new]
        if rows:
            hidden = self._forward(rows, wanted, fresh)  # [b, N, d]
            for at, row in enumerate(rows):
                held = len(wanted[row]) - len(fresh[row])
                self.tokens[row] = wanted[row]
                self.known[row].update((n, hidden[at, n - held - 1]) for n in places[row] if n > held)
        return torch.stack([self.known[row][n] for row, lengths in enumerate(places) for n in lengths])

    def _roll_back(self, row: int, tokens: tuple[int, ...], lengths: Sequence[int]) -> tuple[int, ...]:
        """Drop what `tokens` does not share with the row, and return what must be forwarded."""
        shared = common_prefix(self.tokens[row], tokens)
        self.known[row] = {n: state for n, state in self.known[row].items() if n <= shared and n in lengths}
        # a state that was not kept: forward its token again
        shared = min([shared, *(n - 1 for n in lengths if n not in self.known[row])])
        self.tokens[row] = tokens[:shared]
        return tokens[shared:]

    def _forward(
        self, rows: Sequence[int], wanted: Sequence[tuple[int, ...]], fresh: Sequence[tuple[int, ...]]
    ) -> Tensor:
        """Forward the new tokens of some rows; the others wait."""
        begin = torch.tensor([len(wanted[row]) - len(fresh[row]) for row in rows])
        some = None if len(rows) == len(fresh) else torch.tensor(rows)
        fresh = [fresh[row] for row in rows]
        width = max(map(len, fresh))
        columns = begin[:, None] + torch.arange(width)  # [B, N]; a short row's padding lies behind its end
        total = int(begin.max()) + width
        keys = torch.arange(total)[None]
        allowed = keys[:, None] <= columns[:, :, None]  # [B, N, T]
        position = columns * pad([[1] * len(new) for new in fresh], width)  # padding may lie behind the last position
        self.runner.forwarded += sum(map(len, fresh))
        kv = self.kv.aim(columns, total, some)
        return self.runner.body(pad(fresh, width), position, allowed, columns, keys, kv)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.kv.keep(rows)
        self.tokens = [self.tokens[row] for row in rows]
        self.known = [self.known[row] for row in rows]


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
