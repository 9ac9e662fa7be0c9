"""A batched KV cache whose rows append and roll back independently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from lm_eval_deepen.member.tree import common_prefix, pad

if TYPE_CHECKING:
    from lm_eval_deepen.member.runner import PlainRunner, TreeRunner

COMPACT_SLACK = 64


class RowCache:
    """Keys and values of B rows, in columns that may hold holes.

    A rollback only marks columns as invalid; the columns are packed again when holes prevail.
    Layers with a sliding window keep all keys and are masked, since a rollback may need them.
    """

    def __init__(self, runner: TreeRunner, rows: int) -> None:
        """Start with `rows` empty rows."""
        self.runner = runner
        self.kv = DynamicCache()
        self.tokens: list[tuple[int, ...]] = [()] * rows
        self.columns: list[list[int]] = [[] for _ in range(rows)]
        self.valid = torch.zeros(rows, 0, dtype=torch.bool)  # [B, T]
        self.position = torch.zeros(rows, 0, dtype=torch.long)  # [B, T]
        self.state: Tensor | None = None  # hidden state of each row's last token [B, d]

    def advance(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Make each row hold its sequence, forwarding only what differs from before.

        Args:
            sequences: the full token sequence of every row (at least one token each).

        Returns:
            The hidden state at each row's last token [B, d].
        """
        wanted = [tuple(tokens) for tokens in sequences]
        fresh = [self._roll_back(row, tokens) for row, tokens in enumerate(wanted)]
        width = max(map(len, fresh))
        if width == 0:
            assert self.state is not None
            return self.state
        self._compact(width)
        start, rows = self.valid.shape[1], len(fresh)
        new = pad([[1] * len(tokens) for tokens in fresh], width).bool()  # [B, N]
        begin = torch.tensor([len(columns) for columns in self.columns])[:, None]
        position = (begin + torch.arange(width)) * new  # [B, N]
        self.valid = torch.cat([self.valid, new], dim=1)
        self.position = torch.cat([self.position, position], dim=1)
        distance = position[:, :, None] - self.position[:, None, :]  # [B, N, T + N]
        allowed = self.valid[:, None, :] & (distance >= 0)
        allowed[:, torch.arange(width), start + torch.arange(width)] = True  # a padding query sees itself
        hidden = self.runner.body(pad(fresh, width), position, allowed, distance, self.kv)  # [B, N, d]
        for row, tokens in enumerate(fresh):
            self.columns[row].extend(range(start, start + len(tokens)))
            self.tokens[row] = wanted[row]
        last = torch.tensor([max(len(tokens), 1) - 1 for tokens in fresh], device=hidden.device)
        state = hidden[torch.arange(rows, device=hidden.device), last]
        if self.state is not None:
            unchanged = torch.tensor([not tokens for tokens in fresh], device=hidden.device)
            state = torch.where(unchanged[:, None], self.state, state)
        self.state = state
        return state

    def _roll_back(self, row: int, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Drop what `tokens` does not share with the row and return what it adds."""
        shared = common_prefix(self.tokens[row], tokens)
        if shared == len(tokens) and shared < len(self.tokens[row]):
            shared -= 1  # the state at the new end was not kept: forward its last token again
        dropped = self.columns[row][shared:]
        if dropped:
            self.valid[row, dropped] = False
            self.columns[row] = self.columns[row][:shared]
        return tokens[shared:]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        index = torch.tensor(rows, dtype=torch.long)
        for layer in self.kv.layers:
            layer.batch_select_indices(index.to(layer.keys.device))
        self.tokens = [self.tokens[row] for row in rows]
        self.columns = [self.columns[row] for row in rows]
        self.valid, self.position = self.valid[index], self.position[index]
        if self.state is not None:
            self.state = self.state[index.to(self.state.device)]

    def _compact(self, width: int) -> None:
        """Pack the columns when holes are more than a third of them."""
        longest = max(map(len, self.columns))
        if self.valid.shape[1] + width <= 1.5 * (longest + width) + COMPACT_SLACK:
            return
        index = pad(self.columns, longest)  # [B, L]
        for layer in self.kv.layers:
            at = index.to(layer.keys.device)[:, None, :, None]
            layer.keys = layer.keys.gather(2, at.expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3]))
            layer.values = layer.values.gather(
                2, at.expand(-1, layer.values.shape[1], -1, layer.values.shape[3])
            )
        held = torch.tensor([len(columns) for columns in self.columns])[:, None]
        self.valid = torch.arange(longest)[None] < held
        self.position = self.position.gather(1, index)
        self.columns = [list(range(len(columns))) for columns in self.columns]


class RecomputedRows:
    """The same interface without a cache, for models whose cache cannot be rolled back."""

    def __init__(self, runner: PlainRunner, rows: int) -> None:
        """Keep nothing between steps."""
        self.runner = runner

    def advance(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Forward every sequence in full and return the state at its end [B, ...]."""
        return self.runner.states_at([[tokens] for tokens in sequences])

    def keep(self, rows: Sequence[int]) -> None:
        """Nothing is kept."""
