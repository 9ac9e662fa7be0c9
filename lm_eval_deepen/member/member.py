"""A member of the ensemble: loading, prompts, states and next-token log-probabilities."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import product
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import ConfigError, MemberError, RenderError, RequestError, one_line
from lm_eval_deepen.member.chat import ChatPrompt, plain_rendering
from lm_eval_deepen.member.devices import weight_of
from lm_eval_deepen.member.loading_check import (
    LONG,
    check_growing,
    check_reading,
    check_state,
    check_tree,
    decides,
    generates_as_it_reads,
    needs_a_pass_alone,
    sharpest,
)
from lm_eval_deepen.member.reading_cache import find, keep
from lm_eval_deepen.member.runner import PlainRunner, Runner, TreeRunner, cooled, speed_up_few_rows
from lm_eval_deepen.member.state_runner import LongropeRunner, StateRunner
from lm_eval_deepen.member.text import Prompt, TextCodec
from lm_eval_deepen.member.tokenizer_files import files_of

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Runner)


class Member:
    """One model with its tokenizer.

    Attributes:
        config: how it was loaded.
        lm: the harness's ``HFLM`` around the model; gives tokenisation and chat templates.
        runner: the forward passes.
        generates_only: whether it takes part in generation, and can score no given text.
        generates_as_it_reads: whether ``generate``, which `--model hf` calls, agrees with the model's forward passes.
    """

    generates_only = False
    BACKENDS: ClassVar[frozenset[str]] = frozenset({"causal"})  # as ``HFLM`` calls them
    CODEC: ClassVar[type[TextCodec]] = TextCodec

    def __init__(self, config: MemberConfig, lm: Any) -> None:
        if lm.backend not in self.BACKENDS:
            raise MemberError(f"member {config.name!r}: a {lm.backend!r} model is no {type(self).__name__}.")
        if config.source and not self.generates_only:
            raise ConfigError(
                f"member {config.name!r}: {', '.join(config.source)} belong to encoder-decoder members, and "
                f"{config.pretrained!r} is a causal language model. Leave them out."
            )
        self.config, self.lm = config, lm
        self.generates_as_it_reads = True
        prefix = config.loading.get("prefix_token_id")
        if prefix is not None and self.known_ids is not None and prefix >= self.known_ids:
            raise ConfigError(
                f"member {config.name!r}: prefix_token_id={prefix} is no token of {config.pretrained!r}, which knows "
                f"0 to {self.known_ids - 1}. Correct it, or leave it out: then it is the tokenizer's BOS, or else its "
                "EOS."
            )
        self.runner: Runner = self._runner()

    def named(self, config: MemberConfig) -> Member:
        """Return the same loaded model as a member of another name or temperature; what was read of it is shared."""
        if config == self.config:
            return self
        member = copy.copy(self)
        member.config = config
        return member

    def _runner(self) -> Runner:
        """Return the fastest forward passes that are right for the model, and log which these are."""
        model, autocast, longest = self.lm.model, self.lm.mixed_precision_dtype, self.max_length
        plain = sharpest(model, autocast)

        def proven(kind: type[R], check: Callable[[R, int], None], *options: bool) -> R:
            """Return a runner that passes a check on what is checked, and in the model's own precision."""
            check(kind(plain.model, plain.autocast, *options), longest)
            runner = kind(model, autocast, *options)
            if model.dtype != torch.float32 or autocast is not None:  # a cache may fail in one precision alone
                check(runner, longest)
            return runner

        deciding = decides(model, autocast, longest)
        passed = deciding is not None and find("checks/tree", deciding) is not None
        if not passed:
            check_reading(plain, self.name)
        speed_up_few_rows(model.get_output_embeddings())
        try:
            runner = TreeRunner(model, autocast) if passed else proven(TreeRunner, check_tree)
            if not passed and deciding is not None:
                keep("checks/tree", deciding, b"passed")
            log.info("member %r: texts with a common beginning share its cache, as a prefix tree.", self.name)
            return runner
        except Exception as error:  # whatever an unknown architecture raises: the other paths need none of it
            no_tree = error
        check_reading(plain, self.name, min(longest, LONG))
        self.generates_as_it_reads = generates_as_it_reads(plain, longest)
        alone = needs_a_pass_alone(plain, longest)
        no_state: Exception = NotImplementedError("its positions depend on the length of a text")
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        if alone and rope.get("rope_type") == "longrope":
            try:
                switch = rope["original_max_position_embeddings"]
                check_growing(LongropeRunner(plain.model, plain.autocast, switch))
                log.info(
                    "member %r: longrope's positions depend on the length of a text: every text is scored in full and "
                    "alone, and generated with a cache that is made anew at %d tokens.",
                    self.name,
                    switch,
                )
                return LongropeRunner(model, autocast, switch)
            except Exception as error:
                no_state = error
        for by_token, together in () if alone else product((False, True), (True, False)):
            try:
                carrying = proven(StateRunner, check_state, by_token, together)
            except Exception as error:
                no_state = error
                continue
            log.info(
                "member %r: its cache cannot be shared as a prefix tree (%s). It carries its state along a text%s and "
                "copies it where texts branch%s.",
                self.name,
                no_tree,
                " by one token at a time" if by_token else "",
                "" if together else ", one text at a time",
            )
            return carrying
        log.warning(
            "member %r: its cache cannot be shared or rolled back (%s), and its state cannot be carried along a text "
            "(%s); every sequence is forwarded in full, which is slow but exact.",
            self.name,
            no_tree,
            no_state,
        )
        return PlainRunner(model, autocast, alone)

    def check_generation(self) -> None:
        """Raise RequestError where a text made of whole forward passes is not the one that `--model hf` generates."""
        if not self.generates_as_it_reads:
            raise RequestError(
                f"member {self.name!r}: {type(self.lm.model).__name__}.generate, which --model hf calls, says "
                "something else than the model's forward pass of the same text: it counts positions differently, adds "
                "a token, or its cache drops keys. A text made of forward passes would not be that of hf. Evaluate "
                "tasks of loglikelihoods, or generate with --model hf."
            )

    @property
    def name(self) -> str:
        """The member's unique name."""
        return self.config.name

    @property
    def max_length(self) -> int:
        """Longest sequence the model takes, in tokens."""
        return self.lm.max_length

    @cached_property
    def own_context(self) -> int:
        """Longest sequence that the model was made for, in tokens, whatever `max_length` it was given."""
        lm = copy.copy(self.lm)
        lm._max_length = None
        return lm.max_length

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a text; see `ends_of_text`."""
        generation = getattr(self.lm.model, "generation_config", None)
        sources = (generation, self.lm.model.config, self.lm.tokenizer)
        return ends_of_text(*(getattr(source, "eos_token_id", None) for source in sources))

    @cached_property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.lm.model.get_output_embeddings().weight.shape[0]

    @cached_property
    def known_ids(self) -> int | None:
        """Number of token ids that the model has embeddings and logits for; None where it does not tell.

        A tokenizer may have more.
        """
        ends = (self.lm.model.get_input_embeddings(), self.lm.model.get_output_embeddings())
        return min((end.weight.shape[0] for end in ends if hasattr(end, "weight")), default=None)

    def require_known(self, ids: Sequence[int]) -> None:
        """Raise RequestError where a text has tokens that the model does not know."""
        known = self.known_ids
        unknown = None if known is None else next((token for token in ids if token >= known), None)
        if unknown is not None:
            token = self.lm.tokenizer.convert_ids_to_tokens(unknown)
            raise RequestError(
                f"member {self.name!r}: the text has the token {token!r} (id {unknown}), and the model knows {known} "
                "ids alone. Give the tokenizer that belongs to the model (member argument tokenizer=...), or a model "
                "whose embeddings were resized for it."
            )

    @cached_property
    def codec(self) -> TextCodec:
        """The byte view of the tokenizer; built on first use, since one member alone needs none."""
        add_special = True if self.lm.add_bos_token is None else bool(self.lm.add_bos_token)
        return self.CODEC.build(
            self.lm.tokenizer,
            size=self.vocab_size,
            known=self.known_ids,
            eos=self.eos_ids,
            prefix_id=self.lm.prefix_token_id,
            add_special=add_special,
            name=self.name,
            files=files_of(self.config),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer can render a conversation."""
        return getattr(self.lm.tokenizer, "chat_template", None) is not None

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, fallback: str) -> str:
        """Return a conversation rendered by this member's own chat template.

        Args:
            messages: the conversation, ``[{"role": ..., "content": ...}, ...]``.
            add_generation_prompt: whether an assistant turn is opened at the end.
            fallback: what to do without a template: ``plain`` text, or an ``error``.

        Raises:
            MemberError: there is no template, and the fallback is an error.
            RenderError: the template fails.
        """
        if self.has_chat_template:
            try:
                return self.lm.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
            except Exception as error:  # a template is a program
                roles = ", ".join(str(message.get("role")) for message in messages)
                raise RenderError(
                    f"member {self.name!r}: its chat template cannot render a conversation of {roles}: "
                    f"{type(error).__name__}: {one_line(error)}. Change what the task says to it (system "
                    "message, few-shots as turns, gen_prefix), give the member a tokenizer with another template "
                    "(member argument tokenizer=...), or evaluate without chat templates."
                ) from error
        if fallback == "plain":
            return plain_rendering(messages, add_generation_prompt)
        raise MemberError(
            f"member {self.name!r} has no chat template for --apply_chat_template. Give it a tokenizer that has "
            "one (member argument tokenizer=...), give the ensemble chat_fallback=plain for plain text, or "
            "evaluate without chat templates."
        )

    def drops_system(self, messages: list[dict[str, Any]], add_generation_prompt: bool, fallback: str) -> bool:
        """Return whether the system message of a conversation is missing in this member's rendering.

        The harness leaves it out where a template refuses it; other templates leave it out themselves. Arguments and
        errors as `render`.
        """
        said = [m.get("content") for m in messages if m.get("role") == "system"]
        contents = [content for content in said if isinstance(content, str)]
        rest = [m for m in messages if m.get("role") != "system"]
        if not contents or not rest:
            return False
        text = self.render(messages, add_generation_prompt, fallback)
        return not all(c.strip() in text for c in contents) and text == self.render(
            rest, add_generation_prompt, fallback
        )

    def prompt(self, text: str) -> Prompt:
        """Return the prompt for plain text."""
        return self.codec.prompt(text)

    def fits(self, path: Sequence[int]) -> bool:
        """Return whether the model takes in so many tokens."""
        return self.length(path) <= self.max_length

    def length(self, path: Sequence[int]) -> int:
        """Return how many tokens of a path count against `max_length`."""
        return len(path)

    @property
    def idle(self) -> tuple[int, ...]:
        """A shortest path: what stands in the place of a text that this member cannot take in."""
        return self.codec.prefix_ids[:1]

    def rendered_prompt(self, text: str) -> Prompt:
        """Return the prompt for a rendered conversation: a template's control tokens parsed, and one BOS."""
        if not self.has_chat_template:
            return self.prompt(text)
        literals = [str(token) for token in self.lm.tokenizer.all_special_tokens]
        literals += [str(t) for t in getattr(self.lm.tokenizer, "added_tokens_decoder", {}).values() if t.special]
        bos = self.lm.tokenizer.bos_token
        given = False if bos and text.startswith(bos) else None  # `tok_encode` looks for the prefix token only
        ids, end = self.lm.tok_encode(text, add_special_tokens=given), list(self.codec.opening.end)
        if end and ids[-len(end) :] == end and ids != self.lm.tok_encode(text, add_special_tokens=False):
            ids = ids[: -len(end)]  # the continuation goes on with the text
        self.require_known(ids)
        return self.codec.rendered_prompt(text, ids, literals)

    def conversation(self, chat: ChatPrompt, fallback: str) -> Prompt:
        """Return the prompt of a conversation, rendered by this member; arguments and errors as `render`."""
        text = self.render(chat.messages, chat.add_generation_prompt, fallback)
        return self.rendered_prompt(chat.rendered(text))

    def embeddings(self) -> Tensor:
        """Return the input embedding rows [V, d], one per logit."""
        rows = weight_of(self.lm.model.get_input_embeddings())
        if rows.shape[0] < self.vocab_size:
            raise MemberError(
                f"member {self.name!r}: {rows.shape[0]} input embeddings for {self.vocab_size} logits; "
                "relative representations need one row per logit."
            )
        return rows[: self.vocab_size]

    def output_embeddings(self) -> Tensor:
        """Return the rows of the output head [V, d], one per logit; tied models have their input embeddings there."""
        return weight_of(self.lm.model.get_output_embeddings())

    @cached_property
    def embedding_fingerprint(self) -> str:
        """A hex digest of the embedding rows, their shape and dtype."""
        return _digest(self.embeddings())

    @cached_property
    def output_fingerprint(self) -> str:
        """A hex digest of the rows of the output head; that of the embedding rows where they are the same."""
        rows = self.output_embeddings()
        return self.embedding_fingerprint if rows.data_ptr() == self.embeddings().data_ptr() else _digest(rows)

    def states_at(self, paths: Sequence[Sequence[int]]) -> Tensor:
        """Return what `logp` needs for the end of every token path [n, ...]."""
        return self.runner.states_at(paths)

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits [n, V] that `logp` is made of (fp32, this member's temperature)."""
        return cooled(self.runner.logits(states), self.config.temperature)

    def logp(self, states: Tensor) -> Tensor:
        """Return next-token log-probabilities [n, V] (natural log, fp32, this member's temperature)."""
        return self.runner.logp(states, self.config.temperature)


def ends_of_text(generation: Any, config: Any, tokenizer: int | None) -> tuple[int, ...]:
    """Return every id that ends a text, from the ``eos_token_id`` (an id, several, or None) of a model's parts.

    ``hf`` ends a text at the ids of the generation config, and at the tokenizer's end of text as a stop string. The
    model config counts where the generation config names none.
    """
    named = config if generation is None else generation
    ids = [] if named is None else list(named) if isinstance(named, (list, tuple)) else [named]
    return tuple(dict.fromkeys([*ids, *([] if tokenizer is None else [tokenizer])]))


def _digest(rows: Tensor) -> str:
    """Return a hex digest of some rows, their shape and dtype."""
    rows = rows.contiguous().cpu()
    digest = hashlib.blake2b(f"{tuple(rows.shape)} {rows.dtype}".encode(), digest_size=32)
    digest.update(rows.view(torch.uint8).numpy().data)
    return digest.hexdigest()
