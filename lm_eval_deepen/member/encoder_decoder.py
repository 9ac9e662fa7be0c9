"""A member that is an encoder-decoder model: it reads a source text and takes part in generation only.

A token path of such a member is its source, then its decoder's tokens. So that a path is one sequence of numbers, as
every member's is, the source's tokens stand in it as their complements (``~token``), which no vocabulary has.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from typing_extensions import override

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import ConfigError, MemberError, RequestError, VocabularyError, did_you_mean
from lm_eval_deepen.member.chat import plain_rendering
from lm_eval_deepen.member.configuration import ENCODER_DECODER
from lm_eval_deepen.member.member import Member
from lm_eval_deepen.member.runner import PlainRunner, TokenSequences
from lm_eval_deepen.member.text import Prompt, TextCodec
from lm_eval_deepen.member.tree import pad
from lm_eval_deepen.vocabulary.text_only import text_only_spec
from lm_eval_deepen.vocabulary.tokenizer_json import text_pieces

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
        self._encoded: OrderedDict[Ids, Tensor] = OrderedDict()  # source -> states [S, d]

    @override
    def _too_large(self, batch: TokenSequences) -> bool:
        longest = max(len(part) for path in batch for part in divide(path))
        return len(batch) * longest > TOKENS_PER_FORWARD or len(batch) > SOURCES_KEPT

    @override
    def _logits_at(self, batch: TokenSequences, reads: Sequence[tuple[Sequence[int], int]]) -> Tensor:
        sources, texts = zip(*map(divide, batch), strict=True)
        states, mask = self._sources(sources)
        width = max(map(len, texts))
        at = torch.tensor([row for _, row in reads]), torch.tensor([len(divide(path)[1]) - 1 for path, _ in reads])
        self.forwarded += sum(map(len, texts))
        with self.computing(), self._read_at(at):
            return self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=mask,
                decoder_input_ids=pad(texts, width).to(self.device),
                decoder_attention_mask=pad([[1] * len(tokens) for tokens in texts], width).to(self.device),
                use_cache=False,
            ).logits[0]

    @contextmanager
    def _read_at(self, at: tuple[Tensor, Tensor]) -> Iterator[None]:
        """Let the model compute logits only at these rows and positions: [1, n, V] instead of [B, T, V]."""

        def narrow(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (inputs[0][at[0].to(inputs[0].device), at[1].to(inputs[0].device)][None], *inputs[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(narrow)
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
        with self.computing():
            states = self.model.get_encoder()(
                input_ids=pad(sources, width).to(self.device), attention_mask=mask
            ).last_hidden_state
        self.forwarded += sum(map(len, sources))
        for source, row in zip(sources, states, strict=True):
            self._encoded[source] = row[: len(source)].clone()


class DecoderCodec(TextCodec):
    """Maps a decoder's continuations to tokens, as far as its tokenizer can spell them.

    Translators' tokenizers normalise text and have no byte pieces. A continuation that this one does not spell exactly
    has no tokens (`follow` returns None): the member abstains, which is counted, and no text is ever altered.
    """

    CHECKED = False

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the tokens of `text` on its own; raises VocabularyError where they do not spell it."""
        return self._segment(text)

    def follow(self, prompt: Prompt, continuation: bytes) -> tuple[int, ...] | None:
        """Return the tokens of a prompt and the continuation's bytes after it, None where it cannot spell them.

        The space before the first word is the continuation's own where it has one.
        """
        if not continuation:
            return prompt.ids
        tail = "" if continuation.startswith(b" ") else prompt.tail
        try:
            return prompt.head + self.encode(tail + continuation.decode())
        except (UnicodeDecodeError, VocabularyError):
            return None


def source_encoder(tokenizer: Any, control: Sequence[int], name: str) -> Callable[[str], tuple[int, ...]]:
    """Return what encodes a source text as a tokenizer does, but never parses the text itself as control.

    The text is normalised and gets the tokenizer's template (a language, an end); its literal ``</s>`` is four
    characters of text. `control`: ids of all control pieces. The tokenizer's source language has been set.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    text = text_pieces(spec, control)
    pure = text_only_spec(spec, control=[i for i in control if i not in text], text=text, name=name)
    kept = {token["id"]: token for token in pure["added_tokens"]}
    added = [
        {**given, "content": kept[given["id"]]["content"], "special": kept[given["id"]]["special"]}
        for given in spec["added_tokens"]
        if given["id"] in kept
    ]
    rewritten = {**spec, "model": pure["model"], "added_tokens": added, "truncation": None, "padding": None}
    encoder = tokenizers.Tokenizer.from_str(json.dumps(rewritten))
    encoder.encode_special_tokens = True
    return lambda text: tuple(encoder.encode(text).ids)


def decoder_start(config: MemberConfig, tokenizer: Any, setting: Callable[[str], int | None]) -> tuple[int, ...]:
    """Return the first tokens of a member's decoder: its start token, and the language to be written.

    `setting` returns a value of the model's generation config, else of its config, None where neither has it. Raises
    MemberError where neither says how the decoder starts.
    """
    start, forced = setting("decoder_start_token_id"), setting("forced_bos_token_id")
    if start is None:
        raise MemberError(
            f"member {config.name!r}: neither its generation config nor its config has decoder_start_token_id, so "
            "its decoder cannot be started. Add it to the model's generation_config.json."
        )
    if config.target_language is not None:
        forced = tokenizer.convert_tokens_to_ids(config.target_language)
    return (start,) if forced is None else (start, forced)


def check_languages(config: MemberConfig, tokenizer: Any) -> None:
    """Raise ConfigError for a language that a member's tokenizer has no token for, or a source that it is not told."""
    if config.source_language is not None and not hasattr(tokenizer, "src_lang"):
        raise ConfigError(
            f"member {config.name!r}: source_language={config.source_language!r}, but its tokenizer "
            f"({type(tokenizer).__name__}) has no source language. Leave it out."
        )
    for key in ("source_language", "target_language"):
        language = getattr(config, key)
        if language is None:
            continue
        token = tokenizer.convert_tokens_to_ids(language)
        if token is None or token == tokenizer.unk_token_id:
            near = did_you_mean(language, map(str, tokenizer.all_special_tokens))
            raise ConfigError(
                f"member {config.name!r}: {key}={language!r} is no token of its tokenizer.{near} Give the code as the "
                "model's card spells it."
            )


class EncoderDecoderMember(Member):
    """An encoder-decoder model, such as a translator, with its tokenizer.

    Its own prompt is a source text, cut out of the request's, for the encoder; the shared continuation goes to the
    decoder.
    """

    generates_only = True
    BACKENDS = frozenset({ENCODER_DECODER})
    CODEC = DecoderCodec
    runner: Seq2SeqRunner

    def __init__(self, config: MemberConfig, lm: Any) -> None:
        """Wrap a loaded ``HFLM``; errors as `check_languages` and `decoder_start`."""
        super().__init__(config, lm)
        check_languages(config, lm.tokenizer)
        self.start = decoder_start(config, lm.tokenizer, self._setting)
        if config.source_language is not None:
            lm.tokenizer.src_lang = config.source_language

    def _runner(self) -> Seq2SeqRunner:
        return Seq2SeqRunner(self.lm.model, self.lm.mixed_precision_dtype)

    def _setting(self, key: str) -> int | None:
        sources = (getattr(self.lm.model, "generation_config", None), self.lm.model.config)
        return next((value for source in sources if (value := getattr(source, key, None)) is not None), None)

    @cached_property
    def encode_source(self) -> Callable[[str], tuple[int, ...]]:
        """What returns the tokens of a source text as the encoder expects them."""
        return source_encoder(self.lm.tokenizer, [*self.lm.tokenizer.all_special_ids, *self.eos_ids], self.name)

    @property
    def has_chat_template(self) -> bool:
        """Whether it renders conversations: it reads a source cut out of their plain text."""
        return False

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, fallback: str) -> str:
        """Return a conversation as plain text; a source is cut out of it."""
        return plain_rendering(messages, add_generation_prompt)

    def source(self, text: str) -> str:
        """Return the source text within a prompt; raises RequestError where the pattern does not match."""
        pattern = self.config.source_pattern
        if pattern is None:
            return text
        matches = list(re.finditer(pattern, text))
        if not matches or matches[-1][1] is None:
            raise RequestError(
                f"member {self.name!r}: source_pattern {pattern!r} finds no source text in the prompt that ends in "
                f"{text[-80:]!r}. Correct the pattern, or evaluate tasks with such prompts."
            )
        return matches[-1][1]

    def prompt(self, text: str) -> Prompt:
        """Return the prompt whose source is cut out of a text; raises RequestError where there is no source."""
        return self.source_prompt(self.source(text))

    def source_prompt(self, source: str) -> Prompt:
        """Return the prompt of a source text."""
        head = as_source(self.encode_source(source)) + self.start
        return Prompt(head, " " if self.codec.prefix_space else "", head)

    def fits(self, path: Sequence[int]) -> bool:
        """Return whether the encoder takes in the path's source, and the decoder the rest."""
        source, tokens = divide(path)
        return max(len(source), len(tokens)) <= self.max_length

    def length(self, path: Sequence[int]) -> int:
        """Return how many tokens of a path count against `max_length` while a text grows: the decoder's."""
        return len(divide(path)[1])

    @property
    def idle(self) -> tuple[int, ...]:
        """A shortest path: a source of one token, and the decoder's start."""
        return as_source(self.eos_ids[:1] or (0,)) + self.start
