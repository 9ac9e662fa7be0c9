"""Forward passes of one model: states at the ends of token paths, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from lm_eval_deepen.member.attention import Alibi, MaskMaker, OwnMasks
from lm_eval_deepen.member.cache import RecomputedRows, RowCache
from lm_eval_deepen.member.devices import working_device
from lm_eval_deepen.member.tree import TokenTree, pad
from lm_eval_deepen.member.walk import PlainWalker, TreeWalker

TokenSequences = Sequence[Sequence[int]]  # token sequences, at least one token each
NODES_PER_FORWARD = 512
FEW_ROWS = 48
PLAIN_LOGITS = 64_000_000  # logits that a plain forward pass may compute at once


@dataclass(frozen=True)
class Held:
    """What a model keeps of a text for the forward passes after it.

    Attributes:
        whole: bytes for a text of any length, as of recurrent states.
        layers: per layer, the bytes of a token, and how many of the last tokens it keeps; 0 for all.
    """

    whole: int
    layers: tuple[tuple[int, int], ...]

    @property
    def per_token(self) -> int:
        """Bytes of one more token of a short text."""
        return sum(size for size, _ in self.layers)

    def num_bytes(self, tokens: int) -> int:
        """Return the bytes of a text of so many tokens."""
        return self.whole + sum(size * min(tokens, span or tokens) for size, span in self.layers)


class BodyRunner:
    """Runs a model's body, and its head only where logits are read."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        self.whole = model  # with the wrapper of an adapter, which may do more than what is in the layers
        self.model = unwrap(model)
        self.network = body_of(self.model)
        self.device = working_device(self.model.get_input_embeddings())  # type: ignore[operator]
        self.autocast = autocast
        self.forwarded = 0  # tokens, padding excluded; the head alone is not counted

    def walker(self, nodes: int = NODES_PER_FORWARD) -> Any:
        """Return a walker over trees of token prefixes."""
        raise NotImplementedError

    def rows(self, count: int = 0, width: int = 0) -> Any:
        """Return what follows growing texts, without any yet: `count` will come, the longest of `width` tokens."""
        raise NotImplementedError

    def states_at(self, paths: TokenSequences) -> Tensor:
        """Return the hidden state after the last token of every path [n, d].

        Every distinct prefix is forwarded once.
        """
        return self.walker().states(paths)

    def logits(self, states: Tensor) -> Tensor:
        """Return the model's logits [n, V] (its dtype) from hidden states [n, d]."""
        one_token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with torch.inference_mode(), self._autocast(), self._body_returns(states[None]):
            return self.model(input_ids=one_token, use_cache=False).logits[0]

    def logp(self, states: Tensor, temperature: float = 1.0) -> Tensor:
        """Return natural-log probabilities [n, V] (fp32) from hidden states [n, d]."""
        return log_softmax(self.logits(states), temperature)

    @contextmanager
    def _body_returns(self, hidden: Tensor) -> Iterator[None]:
        """Let the model apply its own head, scaling and capping to states computed before."""
        saved = self.network.__dict__.get("forward")
        self.network.forward = lambda *_, **__: _States(last_hidden_state=hidden)
        try:
            yield
        finally:
            del self.network.forward
            if saved is not None:
                self.network.forward = saved

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device_type=self.device.type, dtype=self.autocast)


class TreeRunner(BodyRunner):
    """Runs the model's body over packed token trees."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        """Wrap a loaded causal language model.

        Raises:
            NotImplementedError: its attention cannot be masked explicitly.
        """
        super().__init__(model, autocast)
        self.masks = MaskMaker(self.model.config.get_text_config(), self.model.dtype)
        self.alibi = Alibi(self.network)
        self.own_masks = OwnMasks(self.network)

    def body(
        self,
        ids: Tensor,
        position: Tensor,
        allowed: Tensor,
        place: Tensor,
        keys: Tensor,
        kv: Cache | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states [B, N, d].

        Args:
            ids: the tokens [B, N].
            position: their positions, for the model [B, N].
            allowed: which keys they see [B, N, K] (bool).
            place: their positions [B, N], for windows.
            keys: the positions of the keys [B, K].
            kv: those before.
            last: the positions of the keys that layers with a window hold [B, L], where these are not all.
        """
        last = None if last is None else last.to(self.device)
        mask = self.masks(allowed.to(self.device), place.to(self.device), keys.to(self.device), last)
        placed = self.alibi.by_position(keys), self.own_masks.by_position(place, keys)
        with torch.inference_mode(), self._autocast(), placed[0], placed[1]:
            return self.network(
                input_ids=ids.to(self.device),
                attention_mask=mask,
                position_ids=position.to(self.device),
                past_key_values=kv,
                use_cache=kv is not None,
            ).last_hidden_state

    @cached_property
    def held(self) -> Held:
        """What is kept of a text: of one that is forwarded."""
        forwarded = self.forwarded
        (text,), _ = self.walker().prefill(*TokenTree.of([[0]]))
        self.forwarded = forwarded
        sizes = [keys.nbytes + values.nbytes for keys, values in text.kv]
        return Held(0, tuple(zip(sizes, self.masks.spans or [0] * len(sizes), strict=True)))

    def walker(self, nodes: int = NODES_PER_FORWARD) -> TreeWalker:
        """Return a walker that forwards at most `nodes` tokens at once."""
        return TreeWalker(self, nodes, self.masks.spans)

    def rows(self, count: int = 0, width: int = 0) -> RowCache:
        """Return a KV cache without rows."""
        return RowCache(self, self.masks.spans, self.masks.slack, (count, width))


class _States(BaseModelOutputWithPast):
    """Hidden states in the place of a body's output; its other fields, whatever their names, are None.

    Heads pass on what else a body returns: router logits, cross attentions, states of other parts.
    """

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class PlainRunner:
    """Forwards every path on its own, with nothing but the model's public interface."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None, alone: bool = False) -> None:
        """Wrap a loaded causal language model; `alone`: every path has a forward pass of its own, unpadded."""
        self.model = model
        self.alone = alone
        self.device = working_device(model.get_input_embeddings())  # type: ignore[operator]
        self.autocast = autocast
        self.forwarded = 0

    def states_at(self, paths: TokenSequences) -> Tensor:
        """Return the logits after the last token of every path [n, V].

        A path that begins another one is read off that one's forward pass.
        """
        ordered = sorted({tuple(path) for path in paths})
        states: dict[tuple[int, ...], Tensor] = {}
        batch: list[tuple[int, ...]] = []
        pending: list[tuple[tuple[int, ...], int]] = []  # path, row of the batch
        size: int = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        for path, after in zip(ordered, [*ordered[1:], ()], strict=True):
            pending.append((path, len(batch)))
            if after[: len(path)] == path:
                continue
            batch.append(path)
            width = max(map(len, batch))
            if not after or self.alone or (len(batch) + 1) * max(width, len(after)) * size > PLAIN_LOGITS:
                mask = pad([[1] * len(path) for path in batch], width)
                logits = self.forward(pad(batch, width), attention_mask=mask)
                self.forwarded += sum(map(len, batch))
                states |= {path: logits[row, len(path) - 1].clone() for path, row in pending}
                batch, pending = [], []
        return torch.stack([states[tuple(path)] for path in paths])

    def forward(self, ids: Tensor, **inputs: Tensor) -> Tensor:
        """Return the logits [B, N, V] for ids [B, N] and other inputs of the model's forward."""
        context = nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        placed = {name: value.to(self.device) for name, value in inputs.items()}
        with torch.inference_mode(), context:
            logits = self.model(input_ids=ids.to(self.device), use_cache=False, **placed).logits
        return logits[:, -ids.shape[1] :]  # without those of virtual tokens that an adapter puts before a text

    def walker(self, nodes: int = NODES_PER_FORWARD) -> PlainWalker:
        """Return a walker that keeps nothing."""
        return PlainWalker(self)

    def logits(self, states: Tensor) -> Tensor:
        """Return the model's logits [n, V] (its dtype), which are what is kept of a path."""
        return states

    def logp(self, states: Tensor, temperature: float = 1.0) -> Tensor:
        """Return natural-log probabilities [n, V] (fp32) from logits [n, V]."""
        return log_softmax(self.logits(states), temperature)

    def rows(self, count: int = 0, width: int = 0) -> RecomputedRows:
        """Return rows that are recomputed at each step."""
        return RecomputedRows(self)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return natural-log probabilities [n, V] (fp32) from logits [n, V]."""
    return torch.log_softmax(cooled(logits, temperature), dim=-1)


def cooled(logits: Tensor, temperature: float) -> Tensor:
    """Return logits [n, V] (fp32) at a temperature."""
    logits = logits.float()
    return logits if temperature == 1 else logits / temperature


def speed_up_few_rows(head: nn.Module | None) -> None:
    """Let an output head multiply few rows from the other side, where MKL is faster.

    For the tall W of a vocabulary, (W x^T)^T takes half of the time of x W^T with 2 to 8 rows, three quarters with up
    to 48, and as long with more. The layers of a body gain nothing.
    """
    plain = type(head) is nn.Linear and "forward" not in head.__dict__  # neither quantized nor spread by a hook
    if not plain or not torch.backends.mkl.is_available():
        return
    assert isinstance(head, nn.Linear)
    linear = head

    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        few = 1 < rows <= FEW_ROWS and x.device.type == "cpu" and x.dtype == linear.weight.dtype == torch.float32
        if not few:
            return nn.functional.linear(x, linear.weight, linear.bias)
        y = torch.stack((linear.weight @ x.reshape(rows, -1).T).unbind(1))  # [rows, V]; faster than contiguous()
        return (y if linear.bias is None else y + linear.bias).reshape(*x.shape[:-1], -1)

    linear.forward = forward  # type: ignore[assignment, method-assign]


def body_of(model: Any) -> nn.Module:
    """Return the part of a model that its head reads; some heads call the decoder in the body, and not the body."""
    body = getattr(model, model.base_model_prefix, None) or model.model  # Llama 4 lacks what its prefix names
    decoder = getattr(body, "decoder", None)
    if not isinstance(decoder, nn.Module):
        return body
    called: list[nn.Module] = []
    hooks = [part.register_forward_pre_hook(lambda part, *_: called.append(part)) for part in (body, decoder)]
    device = working_device(model.get_input_embeddings())
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return called[0] if called else body


def unwrap(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper whose adapters sit in the layers."""
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise NotImplementedError("a PEFT adapter that learns prompt tokens")
        if hasattr(model, "get_base_model") and getattr(config, "alora_invocation_tokens", None):
            raise NotImplementedError("a PEFT adapter that the wrapper turns on where a text has certain tokens")
    return base_model(model)


def base_model(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
