"""Forward passes of one model: states at the ends of token paths, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from typing_extensions import override

from lm_eval_deepen.member.attention import Alibi, MaskMaker, OwnMasks
from lm_eval_deepen.member.devices import working_device
from lm_eval_deepen.member.kv_cache import Prefilled, Reads, RowCache
from lm_eval_deepen.member.tree import TokenTree, pad
from lm_eval_deepen.member.walk import TreeWalker, Walker

TokenSequences = Sequence[Sequence[int]]  # token sequences, at least one token each
NODES_PER_FORWARD = 512
FEW_ROWS = 48
PLAIN_LOGITS = 64_000_000  # logits that a plain forward pass may compute at once


@dataclass(frozen=True)
class Held:
    """What a model keeps of a text for the forward passes after it."""

    whole: int  # bytes for a text of any length, as of recurrent states
    layers: tuple[tuple[int, int], ...]  # per layer, a token's bytes, and how many last tokens it keeps; 0 for all

    @property
    def per_token(self) -> int:
        """Bytes of one more token of a short text."""
        return sum(size for size, _ in self.layers)

    def num_bytes(self, tokens: int) -> int:
        """Return the bytes of a text of so many tokens."""
        return self.whole + sum(size * min(tokens, span or tokens) for size, span in self.layers)


class Runner:
    """Forward passes of one model, and what walks over its texts and follows them."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        self.model: Any = model
        self.autocast = autocast
        self.device = working_device(model.get_input_embeddings())  # type: ignore[operator]
        self.forwarded = 0  # tokens, padding excluded; the head alone is not counted

    def walker(self, nodes: int = NODES_PER_FORWARD) -> Walker:
        """Return a walker over trees of token prefixes; `nodes`: the most tokens of a forward pass, if it packs."""
        raise NotImplementedError

    def rows(self, count: int = 0, width: int = 0) -> Any:
        """Return what follows growing texts, without any yet: `count` will come, the longest of `width` tokens."""
        raise NotImplementedError

    def states_at(self, paths: TokenSequences) -> Tensor:
        """Return the state after the last token of every path [n, d]; every distinct prefix is forwarded once."""
        return self.walker().states(paths)

    def logits(self, states: Tensor) -> Tensor:
        """Return the model's logits [n, V] (its dtype) from states [n, d]."""
        raise NotImplementedError

    def logp(self, states: Tensor, temperature: float = 1.0) -> Tensor:
        """Return natural-log probabilities [n, V] (fp32) from states [n, d]."""
        return torch.log_softmax(cooled(self.logits(states), temperature), dim=-1)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute without gradients, in the precision that the model is autocast to."""
        cast = nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        with torch.inference_mode(), cast:
            yield


class BodyRunner(Runner):
    """Runs a model's body, and its head only where logits are read; states are the body's last hidden ones."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__(unwrap(model), autocast)
        self.whole = model  # with the wrapper of an adapter, which may do more than what is in the layers
        self.network = body_of(self.model)

    @override
    def logits(self, states: Tensor) -> Tensor:
        one_token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with self.computing(), self._body_returns(states[None]):
            return self.model(input_ids=one_token, use_cache=False).logits[0]

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


class TreeRunner(BodyRunner):
    """Runs the model's body over packed token trees."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        """Wrap a loaded causal language model; NotImplementedError: its attention cannot be masked explicitly."""
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
        with self.computing(), placed[0], placed[1]:
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

    @override
    def walker(self, nodes: int = NODES_PER_FORWARD) -> TreeWalker:
        return TreeWalker(self, nodes, self.masks.spans)

    @override
    def rows(self, count: int = 0, width: int = 0) -> RowCache:
        return RowCache(self, self.masks.spans, self.masks.slack, (count, width))


class _States(BaseModelOutputWithPast):
    """Hidden states in the place of a body's output; its other fields, whatever their names, are None.

    Heads pass on what else a body returns: router logits, cross attentions, states of other parts.
    """

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class PlainRunner(Runner, Walker):
    """Forwards every path on its own, with nothing but the model's public interface; states are logits."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None, alone: bool = False) -> None:
        """Wrap a loaded causal language model; `alone`: every path has a forward pass of its own, unpadded."""
        super().__init__(model, autocast)
        self.alone = alone

    @override
    def states_at(self, paths: TokenSequences) -> Tensor:
        """Return the logits after the last token of every path [n, V].

        A path that begins another one is read off that one's forward pass.
        """
        ordered = sorted({tuple(path) for path in paths})
        states: dict[tuple[int, ...], Tensor] = {}
        batch: list[tuple[int, ...]] = []
        reads: list[tuple[tuple[int, ...], int]] = []  # path, row of the batch
        for path, after in zip(ordered, [*ordered[1:], ()], strict=True):
            reads.append((path, len(batch)))
            if after[: len(path)] == path:
                continue
            batch.append(path)
            if not after or self._too_large([*batch, after]):
                logits = self._logits_at(batch, reads)
                states |= {path: row for (path, _), row in zip(reads, logits, strict=True)}
                batch, reads = [], []
        return torch.stack([states[tuple(path)] for path in paths])

    def _too_large(self, batch: TokenSequences) -> bool:
        """Return whether some paths are too many for one forward pass."""
        size = self.model.get_input_embeddings().weight.shape[0]
        return self.alone or len(batch) * max(map(len, batch)) * size > PLAIN_LOGITS

    def _logits_at(self, batch: TokenSequences, reads: Sequence[tuple[Sequence[int], int]]) -> Tensor:
        """Forward some paths, and return the logits [n, V] at the ends of paths that begin them, by their rows."""
        width = max(map(len, batch))
        logits = self.forward(pad(batch, width), attention_mask=pad([[1] * len(path) for path in batch], width))
        self.forwarded += sum(map(len, batch))
        return logits[[row for _, row in reads], [len(path) - 1 for path, _ in reads]]

    def forward(self, ids: Tensor, **inputs: Tensor) -> Tensor:
        """Return the logits [B, N, V] for ids [B, N] and other inputs of the model's forward."""
        placed = {name: value.to(self.device) for name, value in inputs.items()}
        with self.computing():
            logits = self.model(input_ids=ids.to(self.device), use_cache=False, **placed).logits
        return logits[:, -ids.shape[1] :]  # without those of virtual tokens that an adapter puts before a text

    @override
    def logits(self, states: Tensor) -> Tensor:
        return states

    @override
    def walker(self, nodes: int = NODES_PER_FORWARD) -> Walker:
        return self

    @override
    def read(self, tree: TokenTree, nodes: Sequence[int]) -> Tensor:
        return self.states_at([tree.path(node) for node in nodes])

    @override
    def prefill(self, tree: TokenTree, ends: Sequence[int], read: Sequence[int] = ()) -> tuple[list[Prefilled], Tensor]:
        states = self.read(tree, [*ends, *read])
        texts = [Prefilled(tree.path(node), state, []) for node, state in zip(ends, states, strict=False)]
        return texts, states[len(ends) :]

    @override
    def rows(self, count: int = 0, width: int = 0) -> Any:
        return RecomputedRows(self)


class RecomputedRows:
    """The interface of `RowCache` without a cache, for models whose cache cannot be rolled back."""

    def __init__(self, runner: PlainRunner) -> None:
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


def cooled(logits: Tensor, temperature: float) -> Tensor:
    """Return logits [n, V] (fp32) at a temperature."""
    logits = logits.float()
    return logits if temperature == 1 else logits / temperature


def speed_up_few_rows(head: nn.Module | None) -> None:
    """Let an output head multiply few rows from the other side, where MKL is faster.

    For the tall W of a vocabulary, (W x^T)^T takes half of the time of x W^T with 2 to 8 rows, three quarters with up
    to 48, and as long with more. The layers of a body gain nothing.
    """
    if type(head) is not nn.Linear or "forward" in vars(head) or not torch.backends.mkl.is_available():
        return  # as where it is quantized, or spread by a hook
    linear: nn.Linear = head

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
