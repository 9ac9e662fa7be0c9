"""KV caches: preallocated columns, and batched rows of them that append, roll back, leave and are replaced one by one.

Columns are written where asked, and read as views; they are never copied to grow by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lm_eval_deepen.member.tree import common_prefix, pad

SPARE = 64  # columns to grow by at least

LayerKV = tuple[Tensor, Tensor]
Reads = Sequence[Sequence[int]]  # per row, lengths of its sequence after which a state is read, ascending


@dataclass(frozen=True)
class Prefilled:
    """A forwarded token sequence."""

    tokens: tuple[int, ...]
    state: Tensor  # what ``logp`` needs for its end [d]
    kv: Any  # keys and values [H, len(tokens), D] per layer, or the state that a model carries; empty for none


class ColumnCache:
    """A KV cache of B rows whose caller says into which columns the next forward pass writes.

    Which columns a query may see is the attention mask's business alone; a column that is not masked out must
    have been written. A layer may keep the last columns alone: column c of its rows then lies in place c % span.
    """

    def __init__(self, spans: Sequence[int] = (), room: tuple[int, int] = (0, 0)) -> None:
        """Start empty; the first forward pass tells every layer's shape.

        Args:
            spans: how many columns each layer keeps, 0 for all; empty where all layers keep all.
            room: rows and columns to make room for at once: growing one by one leaves holes in memory.
        """
        self.cache: Any = Cache(layer_class_to_replicate=partial(_ColumnLayer, self))
        self.spans, self.room = spans, room
        self.columns: Tensor = torch.zeros(0, 0, dtype=torch.long)  # where the next pass writes [B, N]
        self.rows: Tensor | None = None  # the rows of the next pass [b], None for all
        self.width = 0  # columns that the next pass sees

    @property
    def layers(self) -> list[_ColumnLayer]:
        """The layers that have seen a forward pass."""
        return [layer for layer in self.cache.layers if layer.is_initialized]

    def aim(self, columns: Tensor, width: int, rows: Tensor | None = None) -> Cache:
        """Make the next forward pass, of some rows or all, write into `columns` [b, N] and see `width` columns."""
        self.columns, self.width, self.rows = columns, width, rows
        return self.cache

    @torch.inference_mode()
    def pack(self, columns: Tensor, start: int = 0) -> None:
        """Move `columns` [n] of every row to n places from `start` on, in this order."""
        for layer in self.layers:
            at, places = columns.to(layer.keys.device), slice(start, start + len(columns))
            layer.keys[:, :, places] = layer.keys.index_select(2, at)
            layer.values[:, :, places] = layer.values.index_select(2, at)

    @torch.inference_mode()
    def take(self, columns: Tensor, spans: Sequence[int] = ()) -> list[LayerKV]:
        """Return copies of `columns` [n] of row 0, or of the last ones that a layer keeps: [H, n, D] per layer."""
        layers = []
        for index, layer in enumerate(self.layers):
            at = columns[-spans[index] if spans else 0 :].to(layer.keys.device)
            layers.append((layer.keys[0].index_select(1, at), layer.values[0].index_select(1, at)))
        return layers

    @torch.inference_mode()
    def view(self, length: int, spans: Sequence[int] = ()) -> list[LayerKV]:
        """Return the first `length` columns of row 0, or the last of these that a layer keeps, uncopied."""
        parts = [slice(max(0, length - (span or length)), length) for span in spans or [0] * len(self.layers)]
        return [(own.keys[0][:, part], own.values[0][:, part]) for own, part in zip(self.layers, parts, strict=True)]

    @torch.inference_mode()
    def put(self, row: int, rows: int, length: int, held: Sequence[LayerKV]) -> None:
        """Write the last keys and values [H, n, D] per layer of a text with `length` tokens into a row among `rows`."""
        while len(self.cache.layers) < len(held):
            self.cache.layers.append(_ColumnLayer(self))
        for layer, (keys, values) in zip(self.cache.layers, held, strict=True):
            layer.grow(keys[None], values[None], rows, length)
            places = layer.places(torch.arange(length - keys.shape[1], length, device=keys.device))
            layer.keys[row][:, places] = keys
            layer.values[row][:, places] = values

    @torch.inference_mode()
    def shrink(self, width: int) -> None:
        """Give back the columns from `width` on."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:, :, :width].clone(), layer.values[:, :, :width].clone()

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.room = (0, 0)
        index = torch.tensor(rows, dtype=torch.long)
        for layer in self.layers:
            at = index.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[at], layer.values[at]


class _ColumnLayer(DynamicLayer):
    """One layer's keys and values [B, H, C, D], C columns allocated."""

    def __init__(self, owner: ColumnCache) -> None:
        super().__init__()
        self.owner = owner
        self.span = owner.spans[len(owner.cache.layers)] if owner.spans else 0

    def places(self, columns: Tensor) -> Tensor:
        """Return where columns lie."""
        return columns % self.span if self.span else columns

    def grow(self, keys: Tensor, values: Tensor, rows: int, width: int) -> None:
        """Make room for `rows` rows and `width` columns of states shaped like these [*, H, *, D]."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys.new_zeros(0), values.new_zeros(0)
        have = self.keys.shape if self.keys.dim() == 4 else (0, 0, 0, 0)
        width = min(width, self.span or width)
        if have[0] >= rows and have[2] >= width:
            return
        rows = max(rows, self.owner.room[0])
        columns = max(width, self.owner.room[1]) + SPARE
        columns = have[2] if have[2] >= width else max(columns, have[2] + have[2] // 4)
        columns = min(columns, self.span or columns)
        for name, like in (("keys", keys), ("values", values)):
            # zeroed: what is masked out must still be finite
            bigger = like.new_zeros(max(rows, have[0]), like.shape[1], columns, like.shape[3])
            if have[0]:
                bigger[: have[0], :, : have[2]] = getattr(self, name)
            setattr(self, name, bigger)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> LayerKV:
        """Write states [b, H, N, D] into the columns aimed at and return keys and values [b, H, T, D]: views of all."""
        width, device = min(self.owner.width, self.span or self.owner.width), key_states.device
        self.grow(key_states, value_states, len(key_states), width)
        rows = torch.arange(len(key_states)) if self.owner.rows is None else self.owner.rows
        at, columns = rows.to(device)[:, None], self.places(self.owner.columns.to(device))
        self.keys[at, :, columns] = key_states.transpose(1, 2)
        self.values[at, :, columns] = value_states.transpose(1, 2)
        if self.owner.rows is None:
            return self.keys[: len(at), :, :width], self.values[: len(at), :, :width]
        return self.keys[at[:, 0], :, :width], self.values[at[:, 0], :, :width]

    def get_seq_length(self) -> int:
        """Return how many columns the next pass sees before its own; positions are given explicitly."""
        return max(0, self.owner.width - self.owner.columns.shape[-1]) if self.is_initialized else 0


class RowCache:
    """Keys and values of B rows; the token at position p of a row lies in column p.

    A rollback is free: columns behind a row's end are not seen, and written again. Layers with a sliding window keep
    the last columns alone: a row that goes back by more than `slack` is forwarded anew, which is longer than a word.
    """

    def __init__(self, runner: Any, spans: Sequence[int] = (), slack: int = 0, room: tuple[int, int] = (0, 0)) -> None:
        """Start without rows of a `TreeRunner`; spans and room as `ColumnCache`.

        So many columns of a span as `slack` says are in no window of the last one.
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
        count = max([len(self.tokens), *(row + 1 for row in rows)])
        for row, text in zip(rows, texts, strict=True):
            at, length = slice(row, row + 1), len(text.tokens)
            self.kv.put(row, count, length, text.kv)
            self.tokens[at], self.written[at], self.known[at] = [text.tokens], [length], [{length: text.state}]

    def advance(self, sequences: Sequence[Sequence[int]], reads: Reads | None = None) -> Tensor:
        """Make each row hold its sequence, at least one token, and forward only what differs from before.

        Returns:
            The hidden states at the places read [sum of reads, d], row after row; by default, at the rows' ends.
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
        for name in ("tokens", "known", "written"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
