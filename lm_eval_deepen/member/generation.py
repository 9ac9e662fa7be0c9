"""How a text is generated: settings of a request and, with one member, of its checkpoint; and the choice of a token.

Settings are read as ``HFLM`` and ``generate`` read them. Every field of transformers' ``GenerationConfig`` has the
effect here that it has in ``generate``, or is refused by its name. transformers itself puts the logits processors
together; a field that it gains one day, and that nothing here knows, is refused until somebody has said what becomes of
it.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from transformers import (
    EncoderRepetitionPenaltyLogitsProcessor,
    ExponentialDecayLengthPenalty,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from lm_eval_deepen.errors import RequestError, did_you_mean, one_line
from lm_eval_deepen.member.devices import working_device

# These multiply scores, so that what they do depends on where the zero of the logits lies.
MULTIPLYING = (RepetitionPenaltyLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor, ExponentialDecayLengthPenalty)
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one meaning, by precedence

# Fields that act on the next token's scores, or end a text.
HONOURED = frozenset(
    "do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty "
    "encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids sequence_bias "
    "suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id min_length min_new_tokens "
    "exponential_decay_length_penalty remove_invalid_values renormalize_logits guidance_scale watermarking_config "
    "max_length max_new_tokens eos_token_id".split()
)
# Of these, what has a meaning for one model alone: its own end of text, its forward pass, its vocabulary.
OF_ONE_MEMBER = frozenset({"eos_token_id", "guidance_scale", "watermarking_config"})
# Fields that change no text of greedy or sampled decoding: how it is computed, what is returned beside the text, and
# settings of beams and assistants, which need a field that is not among these.
WITHOUT_EFFECT = frozenset(
    "use_cache cache_implementation cache_config max_cache_len return_legacy_cache compile_config disable_compile "
    "prefill_chunk_size low_memory continuous_batching_config "
    "output_attentions output_hidden_states output_scores output_logits "
    "bos_token_id pad_token_id decoder_start_token_id "
    "early_stopping length_penalty num_beam_groups diversity_penalty "
    "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold max_matching_ngram_size "
    "assistant_lookbehind target_lookbehind assistant_ensemble_weight speculation_type "
    "_from_model_config transformers_version generation_kwargs".split()
)
# Fields that choose how tokens are searched for; transformers names the mode that they add up to.
MODES = frozenset(
    "num_beams use_mtp prompt_lookup_num_tokens assistant_early_exit penalty_alpha dola_layers constraints "
    "force_words_ids".split()
)
# Values with which a field asks for nothing, where these are others than whatever counts as false.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stop_strings": (None,), "max_time": (None,), "num_return_sequences": (None, 0, 1), "guidance_scale": (None, 1),
    "eos_token_id": (),
}  # fmt: skip
GREEDY_OR_SAMPLED = ("greedy_search", "sample")
OTHER_CACHES = ("paged", "quantized")  # another way of decoding, and other numbers
SUPPORTED = ", ".join(["until", "max_gen_toks", *sorted(HONOURED - {"max_new_tokens"})])


@dataclass(frozen=True)
class Asked:
    """What a request asks for."""

    until: list[str]  # strings that end the text
    max_gen_toks: int  # most tokens to generate; prompts are cut to leave room for them
    max_length: int | None  # most tokens of prompt and text together, instead; None where it is not given
    settings: dict[str, Any]  # fields of ``GenerationConfig`` by name

    @classmethod
    def read(cls, arguments: Any, default_length: int) -> Asked:
        """Read a request's ``gen_kwargs``, as ``HFLM`` does; `default_length`: tokens where they name no number.

        Raises:
            RequestError: an argument that ``hf`` cannot read, or reads as something else than it says.
        """
        if not isinstance(arguments, Mapping):
            raise RequestError(f"generation arguments must be a mapping; got {type(arguments).__name__}: {arguments!r}")
        given = dict(arguments)
        if nameless := [key for key in given if not isinstance(key, str)]:
            raise RequestError(f"generation argument {nameless[0]!r}={given[nameless[0]]!r} has no name. Quote it.")
        _check_values(given)
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, default_length))
        until, length, total = kwargs.pop("until"), kwargs.pop("max_gen_toks"), kwargs.pop("max_length", None)
        if not kwargs["do_sample"] or "temperature" not in given:
            kwargs.pop("temperature", None)  # greedy; or left to the checkpoint, else 1
        else:
            kwargs["temperature"] = float(kwargs["temperature"])
        return cls(list(until), length, total, kwargs)


def with_end(until: list[str], end: str | None) -> list[str]:
    """Return the strings that end a text with the end of text among them, as ``hf`` has it."""
    stops: list[str] = handle_stop_sequences(until, eos=end)
    return stops


def presented(text: str, until: Sequence[str], think_end: str | None) -> str:
    """Return a text up to its first stop string and behind its thinking, as ``hf`` presents it."""
    shown: str = postprocess_generated_text(text, stop=list(until), think_end_token=think_end)
    return shown


def _check_values(given: Mapping[str, Any]) -> None:
    """Refuse values that ``hf`` cannot read, or reads as something else: the text "false" would sample."""

    def require(holds: bool, key: str, wanted: str) -> None:
        if not holds:
            raise RequestError(f"generation argument {key}={given[key]!r} must be {wanted}")

    until = given.get("until", [])
    stops = until if isinstance(until, list) else [until]
    wanted = "text or a list of texts. Quote what is no text, or give [] for no stop string."
    require(all(isinstance(stop, str) for stop in stops), "until", wanted)
    if halves := [stop for stop in stops if stop.encode(errors="ignore").decode() != stop]:
        raise RequestError(
            f"generation argument until has {halves[0]!r}, with half of a UTF-16 pair, which no text has. Mend it."
        )
    for key in LENGTHS:
        try:
            positive = given.get(key) is None or int(given[key]) >= 1
        except (TypeError, ValueError, OverflowError):
            positive = False
        require(positive, key, "a whole number of tokens, 1 or more.")
    wanted = "a whole number of tokens, those of the prompt included. Correct it, or give max_gen_toks instead."
    require(isinstance(total := given.get("max_length", 1), int) and not isinstance(total, bool), "max_length", wanted)
    sample = given.get("do_sample")
    wanted = "true or false. Give it without quotes: as text it would count as true."
    require(sample is None or isinstance(sample, int) and sample in (0, 1), "do_sample", wanted)
    heat = given.get("temperature", 0.0)
    wanted = "a number. Give it without quotes, or leave it out."
    require(isinstance(heat, (int, float)) and not isinstance(heat, bool), "temperature", wanted)


@dataclass(frozen=True, eq=False)
class Sampler:
    """Chooses the tokens of one text."""

    # what changes the scores before the choice
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    do_sample: bool = False  # draw from the distribution; otherwise take its maximum
    named: str = ""  # the settings, for messages

    def choose(self, scores: Tensor, before: Sequence[int], generator: torch.Generator | None) -> int:
        """Return the next token.

        Args:
            scores: logits of one member alone, or fused log-probabilities [K].
            before: the tokens so far, those of the prompt among them.
            generator: the row's own source of randomness; needed where tokens are drawn.

        Raises:
            RequestError: the settings leave nothing to choose from.
        """
        ids = torch.tensor([list(before)], device=scores.device)
        try:
            with torch.no_grad():
                scores = self.processors(ids, scores[None].float().clone())[0]
        except (IndexError, TypeError, ValueError) as error:
            raise RequestError(
                f"the generation arguments {self.named} cannot be applied to a text of {len(before)} tokens: "
                f"{one_line(error)}. Correct them or leave them out."
            ) from error
        if not self.do_sample:
            return int(scores.argmax())
        probabilities = torch.softmax(scores, dim=-1).cpu()
        if not bool(probabilities.isfinite().all()):
            raise RequestError(
                f"the generation arguments {self.named} leave no distribution to draw a token from: all pieces are "
                "ruled out, or logits divided by the temperature are no finite numbers. Correct them."
            )
        return int(torch.multinomial(probabilities, 1, generator=generator))

    @property
    def plain_greedy(self) -> bool:
        """Whether the choice is the maximum of the distribution as it stands."""
        return not self.do_sample and not self.processors


class FromChance(LogitsProcessor):
    """A processor that multiplies scores, applied to log(K p), whose zero is a piece as likely as by chance.

    K is the number of pieces. A penalty brings a piece that is likelier than 1/K closer to that, and one that is less
    likely further away from it, as it does with a model's logits and their zero. So nothing depends on a number added
    to all scores, which changes no probability. Log-probabilities themselves would leave a piece of probability 1 as
    it is; log-odds, one above 1/2 always in front.
    """

    def __init__(self, processor: LogitsProcessor) -> None:
        self.processor = processor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return log(K p), changed, [B, K] from scores [B, K]."""
        return self.processor(input_ids, torch.log_softmax(scores, dim=-1) + math.log(scores.shape[-1]))


def from_chance(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Return processors for a fused distribution, whose logits have no zero that would mean anything."""
    return LogitsProcessorList(
        FromChance(processor) if isinstance(processor, MULTIPLYING) else processor for processor in processors
    )


def row_generator(seed: int, *parts: str) -> torch.Generator:
    """Return a generator that depends on the seed and on `parts` alone, not on batching or order."""
    digest = hashlib.sha256("\0".join([str(seed), *parts]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class Plan:
    """How one text is generated."""

    sampler: Sampler  # how its tokens are chosen
    max_new: int  # most tokens of it
    ends: frozenset[int]  # token ids that end it


class Settings:
    """How texts are generated: what requests ask for, over what the model's own generation config says."""

    def __init__(self, model: Any, name: str, eos: Sequence[int] | None = None) -> None:
        """Take in a model.

        Args:
            model: the main member's; its generation config counts where it is alone, as in ``hf``.
            name: the main member's name, for messages.
            eos: with several members, the main member's ends of text; None where it is alone.
        """
        self.model, self.name, self.solo = model, name, eos is None
        own = getattr(model, "generation_config", None) if self.solo else GenerationConfig(eos_token_id=list(eos or ()))
        self.own: GenerationConfig = own if own is not None else GenerationConfig()
        self._checked: set[str] = set()  # settings that were tried

    def plan(self, asked: Asked, prompt: Sequence[int], source: Sequence[int] = ()) -> Plan:
        """Return how a request's text is generated.

        Of an encoder-decoder model, `prompt` are the decoder's tokens, and `source` the encoder's.

        Raises:
            RequestError: a setting that cannot be honoured, by its name.
        """
        named = _named(asked.settings)
        if named not in self._checked:
            self._check(asked, prompt, source)
            self._checked.add(named)
        config = self._config(self.own, asked, prompt)
        if len(prompt) >= config.max_length:
            raise RequestError(
                f"max_length={config.max_length} leaves no token to generate after a prompt of {len(prompt)} tokens of "
                f"member {self.name!r}. Raise it, or give max_gen_toks instead."
            )
        sampler = Sampler(self._processors(config, prompt, source), bool(config.do_sample), named)
        eos = config._eos_token_tensor
        ends = frozenset() if eos is None else frozenset(eos.tolist())
        return Plan(sampler, math.ceil(config.max_length) - len(prompt), ends)

    @property
    def device(self) -> torch.device:
        """Where scores are computed; the weights of a model that was offloaded are nowhere until then."""
        return working_device(self.model.get_input_embeddings())

    def _config(self, own: GenerationConfig, asked: Asked, prompt: Sequence[int]) -> GenerationConfig:
        """Return what ``generate`` would make of its arguments, the model's config and transformers' defaults."""
        config = copy.deepcopy(own)
        config.update(**config._get_default_generation_params(), defaults_only=True)
        config.update(**asked.settings)
        # `HFLM` gives `max_length`; the model's `max_new_tokens` goes before it.
        config.max_length = len(prompt) + asked.max_gen_toks if asked.max_length is None else asked.max_length
        if config.max_new_tokens is not None:
            config.max_length = config.max_new_tokens + len(prompt)
        if config.min_new_tokens is not None:
            config.min_length = config.min_new_tokens + len(prompt)
        eos = config.eos_token_id
        ids = None if eos is None else torch.tensor([eos] if isinstance(eos, int) else list(eos), dtype=torch.long)
        config._eos_token_tensor = None if ids is None else ids.to(self.device)
        return config

    def _processors(
        self, config: GenerationConfig, prompt: Sequence[int], source: Sequence[int]
    ) -> LogitsProcessorList:
        """Return what ``generate`` would apply to the next token's scores, in its order."""
        seen = torch.tensor([list(source or prompt)], device=self.device)
        processors = self.model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(prompt),
            encoder_input_ids=seen,
            logits_processor=LogitsProcessorList(),
            device=self.device,
            model_kwargs={},
        )
        return processors if self.solo else from_chance(processors)

    def _check(self, asked: Asked, prompt: Sequence[int], source: Sequence[int]) -> None:
        """Raise RequestError, with the name of the setting to blame, where these settings cannot be honoured."""
        known = GenerationConfig().to_dict()
        for key, value in asked.settings.items():
            if key not in known:
                hint = " Stop strings are given as until." if key.startswith("stop") else did_you_mean(key, known)
                raise RequestError(
                    f"generation argument {key}={value!r} is not supported.{hint} Supported: {SUPPORTED}."
                )
            if not self.solo and key in OF_ONE_MEMBER and not _is_neutral(key, value):
                raise RequestError(
                    f"generation argument {key}={value!r} is not supported with several members: it belongs to one "
                    "model's own vocabulary. Leave it out."
                )

        def attempt(own: GenerationConfig, settings: dict[str, Any]) -> Exception | None:
            """Return what speaks against settings: whatever a validator or processor of transformers raises."""
            try:
                self._try(own, replace(asked, settings=settings), prompt, source)
            except Exception as error:
                return error
            return None

        if (problem := attempt(self.own, asked.settings)) is None:
            return
        for key, value in asked.settings.items():
            rest = {k: v for k, v in asked.settings.items() if k != key}
            if key != "do_sample" and attempt(self.own, rest) is None:
                raise RequestError(
                    f"generation argument {key}={value!r} {_why(problem)} Correct it or leave it out."
                ) from problem
        own = {key: value for key, value in self.own.to_dict().items() if value is not None and key in known}
        for key, value in own.items():
            without = copy.deepcopy(self.own)
            setattr(without, key, None)
            if attempt(without, asked.settings) is None:
                raise RequestError(
                    f"member {self.name!r}: its generation config sets {key}={value!r}, which {_why(problem)} "
                    "Take it out of the model's generation_config.json."
                ) from problem
        raise RequestError(
            f"what the request asks for ({_named(asked.settings)}), over what the generation config of member "
            f"{self.name!r} says ({_named(own)}), {_why(problem)} Correct the one or the other."
        ) from problem

    def _try(self, own: GenerationConfig, asked: Asked, prompt: Sequence[int], source: Sequence[int]) -> None:
        """Resolve settings and apply them once; raises whatever speaks against it."""
        for key, default in GenerationConfig().to_dict().items():
            value = asked.settings.get(key, getattr(own, key, None))
            if key not in HONOURED | WITHOUT_EFFECT | MODES and value != default and not _is_neutral(key, value):
                raise Unsupported
        config = self._config(own, asked, prompt)
        if config.cache_implementation in OTHER_CACHES or config.get_generation_mode() not in GREEDY_OR_SAMPLED:
            raise Unsupported
        heat = config.temperature if config.do_sample else None
        least = torch.finfo(torch.float32).tiny  # divided by less, `generate` itself would draw from NaN
        if heat is not None and not (isinstance(heat, (int, float)) and least <= heat < math.inf):
            raise ValueError(f"logits divided by a temperature of {heat!r} are no finite numbers")
        ids = torch.tensor([list(prompt)], device=self.device)
        head = self.model.get_output_embeddings()
        size = head.weight.shape[0] if hasattr(head, "weight") else self.model.config.get_text_config().vocab_size
        scores = torch.zeros(1, size, device=self.device)
        for forced in (config.forced_bos_token_id, config.forced_eos_token_id):
            if forced is not None:
                scores[:, forced]  # applied to the first or the last token only
        if config.guidance_scale is None or config.guidance_scale == 1:
            self._processors(config, prompt, source)(ids, scores)


class Unsupported(Exception):
    """Settings that decoding here has no place for."""


def _why(problem: Exception) -> str:
    if isinstance(problem, Unsupported):
        return f"is not supported: texts are decoded token by token, greedily or sampled. Supported: {SUPPORTED}."
    return f"cannot be honoured: {' '.join(str(problem).split()).rstrip('.')}."


def _is_neutral(key: str, value: Any) -> bool:
    return value in NEUTRAL[key] if key in NEUTRAL else not value


def _named(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())
