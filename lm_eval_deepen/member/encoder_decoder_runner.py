"""Forward passes of an encoder-decoder model.

A token path of such a member is its source, then its decoder's tokens. So that a path is one sequence of numbers, as
every member's is, the source's tokens stand in it as their complements (``~token``), which no vocabulary has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from lm_eval_deepen.member.runner import PlainRunner, TokenSequences
from lm_eval_deepen.member.tree import pad

SOURCES_KEPT = 128  # whose encoder output is held
TOKENS_PER_FORWARD = 4096  # padded tokens of decoders, or of sources, in one pass

Ids = tuple[int, ...]


def as_source(ids: Sequence[int]) -> Ids:
    """Return tokens as they stand in a path as its source."""
    return tuple(~token for token in ids)


def divide(path: Sequence[int]) -> tuple[Ids, Ids]:
    """Return the source's tokens of a path, and the decoder's."""
    size = next((at for at, token in enumerate(path) if token >= 0), len(path))
    return tuple(~token for token in path[:size]), tuple(path[size:])


class Seq2SeqRunner(PlainRunner):
    """Encodes every source once, and forwards the decoder in full at each step, which needs no cache to roll back."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__(model, autocast)
        self.encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
        self.head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._encoded: OrderedDict[Ids, Tensor] = OrderedDict()  # source -> states [S, d]

    def states_at(self, paths: TokenSequences) -> Tensor:
        """Return the logits after the last token of every path [n, V].

        A path that begins another one is read off that one's forward pass.
        """
        ordered = sorted({divide(path) for path in paths})
        states: dict[tuple[Ids, Ids], Tensor] = {}
        rows: list[tuple[Ids, Ids]] = []
        reads: list[tuple[int, tuple[Ids, Ids]]] = []  # row, path
        for (source, tokens), after in zip(ordered, [*ordered[1:], None], strict=True):
            reads.append((len(rows), (source, tokens)))
            if after is not None and after[0] == source and after[1][: len(tokens)] == tokens:
                continue
            rows.append((source, tokens))
            longest = max(len(part) for pair in [*rows, *([after] if after else [])] for part in pair)
            if after is None or (len(rows) + 1) * longest > TOKENS_PER_FORWARD or len(rows) >= SOURCES_KEPT:
                states.update(self._forward(rows, reads))
                rows, reads = [], []
        return torch.stack([states[divide(path)] for path in paths])

    def _forward(
        self, rows: Sequence[tuple[Ids, Ids]], reads: Sequence[tuple[int, tuple[Ids, Ids]]]
    ) -> Iterator[tuple[tuple[Ids, Ids], Tensor]]:
        """Forward decoders, and yield the logits [V] after every path to be read."""
        states, mask = self._sources([source for source, _ in rows])
        width = max(len(tokens) for _, tokens in rows)
        at = (torch.tensor([row for row, _ in reads]), torch.tensor([len(path[1]) - 1 for _, path in reads]))
        context = nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        with torch.inference_mode(), context, self._read_at(at):
            logits = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=mask,
                decoder_input_ids=pad([tokens for _, tokens in rows], width).to(self.device),
                decoder_attention_mask=pad([[1] * len(tokens) for _, tokens in rows], width).to(self.device),
                use_cache=False,
            ).logits[0]
        self.forwarded += sum(len(tokens) for _, tokens in rows)
        yield from ((path, row.clone()) for (_, path), row in zip(reads, logits, strict=True))

    @contextmanager
    def _read_at(self, at: tuple[Tensor, Tensor]) -> Iterator[None]:
        """Let the model compute logits only at these rows and positions: [1, n, V] instead of [B, T, V]."""

        def narrow(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (inputs[0][at[0].to(inputs[0].device), at[1].to(inputs[0].device)][None], *inputs[1:])

        handle = self.head.register_forward_pre_hook(narrow)
        try:
            yield
        finally:
            handle.remove()

    def _sources(self, sources: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Return the encoder's states of sources [B, S, d], zeros behind their ends, and their mask [B, S]."""
        new = sorted({source for source in sources if source not in self._encoded}, key=len)
        while new:
            count = max(1, min(len(new), TOKENS_PER_FORWARD // len(new[-1])))
            self._encode(new[-count:])
            del new[-count:]
        for source in sources:
            self._encoded.move_to_end(source)
        width = max(map(len, sources))
        first = self._encoded[sources[0]]
        states = first.new_zeros(len(sources), width, first.shape[1])
        for row, source in enumerate(sources):
            states[row, : len(source)] = self._encoded[source]
        while len(self._encoded) > SOURCES_KEPT:
            self._encoded.popitem(last=False)
        return states, pad([[1] * len(source) for source in sources], width).to(self.device)

    def _encode(self, sources: Sequence[Ids]) -> None:
        width = max(map(len, sources))
        mask = pad([[1] * len(source) for source in sources], width).to(self.device)
        context = nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
        with torch.inference_mode(), context:
            states = self.encoder(input_ids=pad(sources, width).to(self.device), attention_mask=mask).last_hidden_state
        self.forwarded += sum(map(len, sources))
        for source, row in zip(sources, states, strict=True):
            self._encoded[source] = row[: len(source)].clone()
