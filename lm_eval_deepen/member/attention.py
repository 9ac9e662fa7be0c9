"""Which keys a query may see, and how near they are: masks for token trees and caches with holes, and alibi."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Config fields of windowed attention that the masks below do not express.
UNSUPPORTED_WINDOWS = ("attention_chunk_size", "window_size", "attention_types")
SLACK = 128  # keys beside a window that are kept: for what a pass writes over, and for a text that goes back
GPT_NEO = "gpt_neo"  # its layers mask by themselves, see `OwnMasks`


class MaskMaker:
    """Builds the attention masks of one model from positions and an ancestor relation."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        """Read a text model's `config`; NotImplementedError: it has layers whose attention no such mask expresses."""
        self.additive = getattr(config, "_attn_implementation", "sdpa") == "eager"
        self.dtype = dtype
        self.window: int | None = getattr(config, "sliding_window", None)
        self.layer_types: set[str] = set(getattr(config, "layer_types", None) or ())
        unknown = self.layer_types - {"full_attention", "sliding_attention"}
        kind = getattr(config, "model_type", "")
        windows = [name for name in UNSUPPORTED_WINDOWS if kind != GPT_NEO and getattr(config, name, None)]
        if unknown or windows:
            raise NotImplementedError(f"attention of kinds {sorted(unknown) + windows}")
        self.slack = SLACK
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * getattr(config, "num_hidden_layers", 0)
        self.by_layer = [kind == "sliding_attention" for kind in types]  # whether it has the window, if there is one

    @property
    def spans(self) -> list[int]:
        """How many of a growing text's last keys each layer keeps, 0 for all; empty where all layers keep all."""
        if self.window is None or not any(self.by_layer):
            return []
        return [self.window + self.slack if windowed else 0 for windowed in self.by_layer]

    def __call__(
        self, allowed: Tensor, place: Tensor, keys: Tensor, last: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Return the mask argument of the model's forward.

        Args:
            allowed: whether a query may see a key at all [B, Q, K] (bool).
            place: the positions of queries [B, Q].
            keys: the positions of keys [B, K].
            last: those of the keys that layers with a window hold, where these are others [B, L]; negative for none.
        """
        if self.window is None or self.layer_types == {"full_attention"}:
            return self._format(allowed)
        if last is None:
            # of a long way most keys are out of every window: they cost no comparison, and numpy's zeros no time
            first = int((keys.amax(0) > place.min() - self.window).byte().argmax())
            on_cpu = allowed.device.type == "cpu"
            near = torch.from_numpy(np.zeros(allowed.shape, bool)) if on_cpu else torch.zeros_like(allowed)
            near[..., first:] = allowed[..., first:] & within(self.window, place, keys[:, first:])
            near = self._format(near)
        else:
            before = (last[:, None] >= 0) & (last[:, None] <= place[:, :, None])  # [B, Q, L]
            near = self._format(before & within(self.window, place, last))
        if "full_attention" not in self.layer_types:
            return near
        return {"full_attention": self._format(allowed), "sliding_attention": near}

    def _format(self, allowed: Tensor) -> Tensor:
        mask = allowed[:, None]  # [B, 1, Q, K]
        if not self.additive:
            return mask
        blocked = torch.finfo(self.dtype).min
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, blocked)


def within(window: int, place: Tensor, keys: Tensor) -> Tensor:
    """Return which keys [B, K] are less than `window` before the queries at a place [B, Q], as [B, Q, K] (bool).

    A long text has many pairs: none but the result is ever held of them.
    """
    return keys.int()[:, None] > (place.int() - window)[:, :, None]


class Alibi:
    """Alibi by the positions of keys, where an architecture counts the columns of its mask.

    A bias is linear in the position of a key, so that one row of them serves all queries of a pass.
    """

    def __init__(self, network: nn.Module) -> None:
        """Find what builds the biases of a body; nothing for a body without alibi."""
        self.owner: Any = None
        self.name = ""
        for name in ("build_alibi_tensor", "build_mpt_alibi_tensor"):
            if hasattr(type(network), name):
                self.owner, self.name = network, name
        if getattr(network, "use_alibi", False) and self.owner is None:  # Falcon's is a function of its module
            self.owner, self.name = sys.modules[type(network).__module__], "build_alibi_tensor"

    def __bool__(self) -> bool:
        """Return whether the body has alibi."""
        return self.owner is not None

    @contextmanager
    def by_position(self, keys: Tensor) -> Iterator[None]:
        """Let the next passes count by the positions of their `keys` [B, K], all rows alike, the first among them."""
        if self.owner is None:
            yield
            return
        place = keys[0] - keys[0].min()  # [K]
        build: Callable[..., Tensor] = getattr(self.owner, self.name)

        def placed(first: Any, *rest: Any, **others: Any) -> Tensor:
            length = int(place.max()) + 1
            if self.name == "build_mpt_alibi_tensor":  # heads, length
                return build(first, length, *rest[1:], **others)[:, :, place.to(others["device"])]  # [H, 1, K]
            mask = torch.ones(len(first), length, dtype=torch.long, device=first.device)
            return build(mask, *rest, **others)[:, :, place.to(first.device)]  # [B * H, 1, K]

        saved = vars(self.owner).get(self.name)
        setattr(self.owner, self.name, placed)
        try:
            yield
        finally:
            if saved is None:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, saved)


class OwnMasks:
    """GPT-Neo's layers mask by columns too, and half of them have a window: they are told positions."""

    def __init__(self, network: nn.Module) -> None:
        """Find the layers; none in another body."""
        self.layers: list[Any] = []
        config: Any = getattr(network, "config", None)
        if getattr(config, "model_type", "") == GPT_NEO:
            self.window: int = config.window_size
            self.layers = [
                part for part in network.modules() if hasattr(part, "attention_type") and hasattr(part, "bias")
            ]

    @contextmanager
    def by_position(self, place: Tensor, keys: Tensor) -> Iterator[None]:
        """Let the next passes at a place [B, Q] see `keys` [B, K] by their positions, where the mask lets them."""
        longest = int(place.max()) + 1
        for layer in self.layers:
            near = within(self.window if layer.attention_type == "local" else longest, place, keys)
            vars(layer)["bias"] = _WholeMask(near[:, None].to(layer.k_proj.weight.device))  # before the module's buffer
        try:
            yield
        finally:
            for layer in self.layers:
                del vars(layer)["bias"]


class _WholeMask:
    """A mask that is whatever part of it is asked for."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask  # [B, 1, Q, K]

    def __getitem__(self, _: Any) -> Tensor:
        return self.mask
