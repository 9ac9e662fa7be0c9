"""A member that is an encoder-decoder model: it reads a source text and takes part in generation only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import tokenizers

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import ConfigError, MemberError, RequestError, VocabularyError, did_you_mean
from lm_eval_deepen.member.chat import ChatPrompt, plain_rendering
from lm_eval_deepen.member.configuration import ENCODER_DECODER
from lm_eval_deepen.member.encoder_decoder_runner import Seq2SeqRunner, as_source, divide
from lm_eval_deepen.member.member import Member
from lm_eval_deepen.member.text import Prompt, TextCodec
from lm_eval_deepen.vocabulary import text_only_spec, text_pieces


@dataclass(eq=False)
class DecoderCodec(TextCodec):
    """Maps a decoder's continuations to tokens, as far as its tokenizer can spell them.

    Translators' tokenizers normalise text and have no byte pieces. A continuation that this one does not spell exactly
    has no tokens (`follow` returns None): the member abstains, which is counted, and no text is ever altered.

    Attributes:
        start: the decoder's first tokens: its start token, and the language to be written.
        encode_source: returns the tokens of a source text as the encoder expects them; see `source_encoder`.
    """

    start: tuple[int, ...] = field(default=(), init=False)
    encode_source: Any = field(default=None, init=False)
    CHECKED = False

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the tokens of `text` on its own; raises VocabularyError where they do not spell it."""
        return self._segment(text)

    def source_prompt(self, text: str) -> Prompt:
        """Return the prompt whose source is a text."""
        head = as_source(self.encode_source(text)) + self.start
        return Prompt(head, " " if self.prefix_space else "", head)

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
    characters of text.

    Args:
        tokenizer: a fast transformers tokenizer, its source language set.
        control: ids of all control pieces.
        name: the member's name, for messages.
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

    Args:
        config: the member.
        tokenizer: its tokenizer.
        setting: returns a value of the model's generation config, else of its config, None where neither has it.

    Raises:
        MemberError: neither says how the decoder starts.
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
    """Check a member's languages against its tokenizer.

    Raises:
        ConfigError: one that the tokenizer has no token for, or a source language that it cannot be told.
    """
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
    runner: Seq2SeqRunner

    def __init__(self, config: MemberConfig, lm: Any) -> None:
        """Wrap a loaded ``HFLM`` and check that it can be given a source and languages.

        Raises:
            ConfigError: a language that the tokenizer does not know.
            MemberError: a model that does not say how its decoder starts.
        """
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
    def codec(self) -> DecoderCodec:
        """The byte view of the tokenizer."""
        codec = self._codec(DecoderCodec)
        codec.start = self.start
        control = [*self.lm.tokenizer.all_special_ids, *self.eos_ids]
        codec.encode_source = source_encoder(self.lm.tokenizer, control, self.name)
        return codec

    @property
    def has_chat_template(self) -> bool:
        """Whether it renders conversations: it reads a source cut out of their plain text."""
        return False

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, fallback: str) -> str:
        """Return a conversation as plain text; a source is cut out of it."""
        return plain_rendering(messages, add_generation_prompt)

    def conversation(self, chat: ChatPrompt, fallback: str) -> Prompt:
        """Return the prompt of a conversation; arguments as `render`."""
        return self.prompt(chat.rendered(self.render(chat.messages, chat.add_generation_prompt, fallback)))

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
        return self.codec.source_prompt(self.source(text))

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
