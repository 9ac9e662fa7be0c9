"""Keys and values in preallocated columns: written where asked, read as views, never copied to grow by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

SPARE = 64  # columns to grow by at least

LayerKV = tuple[Tensor, Tensor]


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
        starts = [max(0, length - span) if span else 0 for span in spans or [0] * len(self.layers)]
        parts = [slice(start, length) for start in starts]
        return [
            (layer.keys[0][:, part], layer.values[0][:, part]) for layer, part in zip(self.layers, parts, strict=True)
        ]

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
            layer.batch_select_indices(index.to(layer.keys.device))


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

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows, with every column allocated."""
        self.keys, self.values = self.keys[indices], self.values[indices]
