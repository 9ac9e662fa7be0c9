"""Which keys a query may see: masks for token trees and for caches with holes, per layer type."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Config fields of windowed attention that the masks below do not express.
UNSUPPORTED_WINDOWS = ("attention_chunk_size", "window_size", "attention_types")


class MaskMaker:
    """Builds the attention masks of one model from positions and an ancestor relation."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        """Read the window and layer types of a text model's `config`.

        Raises:
            NotImplementedError: the model has layers whose attention these masks cannot express.
        """
        self.additive = getattr(config, "_attn_implementation", "sdpa") == "eager"
        self.dtype = dtype
        self.window: int | None = getattr(config, "sliding_window", None)
        self.layer_types: set[str] = set(getattr(config, "layer_types", None) or ())
        unknown = self.layer_types - {"full_attention", "sliding_attention"}
        windows = [name for name in UNSUPPORTED_WINDOWS if getattr(config, name, None)]
        if unknown or windows:
            raise NotImplementedError(f"attention of kinds {sorted(unknown) + windows}")

    def __call__(self, allowed: Tensor, distance: Tensor) -> Tensor | dict[str, Tensor]:
        """Return the mask argument of the model's forward.

        Args:
            allowed: whether a query may see a key at all [B, Q, K] (bool).
            distance: query position minus key position [B, Q, K] (int).
        """
        if self.window is None or self.layer_types == {"full_attention"}:
            return self._format(allowed)
        near = self._format(allowed & (distance < self.window))
        if "full_attention" not in self.layer_types:
            return near
        return {"full_attention": self._format(allowed), "sliding_attention": near}

    def _format(self, allowed: Tensor) -> Tensor:
        mask = allowed[:, None]  # [B, 1, Q, K]
        if not self.additive:
            return mask
        blocked = torch.finfo(self.dtype).min
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, blocked)
