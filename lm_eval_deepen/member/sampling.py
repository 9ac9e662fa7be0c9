"""How the next token is chosen from a distribution: greedy, or transformers' own warpers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lm_eval_deepen.errors import RequestError, did_you_mean

# Arguments of `generate` that change nothing here, with the values for which that is true.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "use_cache": (True, False, None),
    "pad_token_id": (None,),
}
# What a model's own generation config may change that decoding here does not do.
UNSUPPORTED_DEFAULTS = frozenset(
    "bad_words_ids begin_suppress_tokens constraints diversity_penalty encoder_no_repeat_ngram_size "
    "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty force_words_ids "
    "forced_bos_token_id forced_eos_token_id guidance_scale min_length min_new_tokens no_repeat_ngram_size "
    "num_beams penalty_alpha remove_invalid_values renormalize_logits sequence_bias stop_strings suppress_tokens "
    "top_h watermarking_config".split()
)
OPTIONS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")


@dataclass(frozen=True)
class Sampler:
    """Chooses a token from log-probabilities.

    Attributes:
        do_sample: draw from the distribution; otherwise take its maximum.
        temperature, top_k, top_p, min_p, typical_p, repetition_penalty: as in transformers' ``generate``.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0

    @classmethod
    def parse(cls, kwargs: Mapping[str, Any], defaults: Mapping[str, Any]) -> Sampler:
        """Read generation arguments.

        Args:
            kwargs: what the request asks for, stops and lengths taken out.
            defaults: what the model's own generation config says where the request is silent.

        Raises:
            RequestError: an argument that has no meaning for fused decoding.
        """
        for key in sorted(UNSUPPORTED_DEFAULTS & defaults.keys() - kwargs.keys()):
            if defaults[key] and defaults[key] != 1:
                raise RequestError(
                    f"the model's generation config sets {key}={defaults[key]!r}, which decoding here does not do. "
                    "Take it out of the model's generation_config.json."
                )
        for key, value in kwargs.items():
            if key in OPTIONS or value in WITHOUT_EFFECT.get(key, ()):
                continue
            raise RequestError(
                f"generation argument {key}={value!r} is not supported by fused decoding.{did_you_mean(key, OPTIONS)} "
                f"Supported: until, max_gen_toks, {', '.join(OPTIONS)}."
            )
        do_sample = bool(kwargs.get("do_sample"))
        chosen = {
            key: value
            for key, value in {**defaults, **kwargs}.items()
            if key in OPTIONS
            and key != "do_sample"
            and value is not None
            and (do_sample or key == "repetition_penalty")
        }
        if do_sample and not chosen.get("temperature", 1.0) > 0:
            raise RequestError(
                f"do_sample=True needs a temperature above 0, got {chosen['temperature']}. "
                "Leave do_sample out for greedy decoding."
            )
        return cls(do_sample=do_sample, **chosen)

    def choose(self, logp: Tensor, before: Sequence[int], generator: torch.Generator | None) -> int:
        """Return the next token.

        Args:
            logp: log-probabilities [K].
            before: the tokens so far, for the repetition penalty.
            generator: the row's own source of randomness; needed where tokens are drawn.
        """
        processors = self._processors()
        if processors:
            logp = processors(torch.tensor([list(before)], device=logp.device), logp[None].clone())[0]
        if not self.do_sample:
            return int(logp.argmax())
        drawn = torch.multinomial(torch.softmax(logp.float(), dim=-1).cpu(), 1, generator=generator)
        return int(drawn)

    def _processors(self) -> LogitsProcessorList:
        found = LogitsProcessorList()
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if not self.do_sample:
            return found
        if self.temperature != 1:
            found.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            found.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            found.append(MinPLogitsWarper(self.min_p))
        if self.typical_p < 1:
            found.append(TypicalLogitsWarper(self.typical_p))
        return found

    @property
    def plain_greedy(self) -> bool:
        """Whether the choice is the maximum of the distribution as it stands."""
        return not self.do_sample and self.repetition_penalty == 1


def row_generator(seed: int, *parts: str) -> torch.Generator:
    """Return a generator that depends on the seed and on `parts` alone, not on batching or order."""
    digest = hashlib.sha256("\0".join([str(seed), *parts]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
