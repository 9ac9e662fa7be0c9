"""Refuses what an ensemble with an encoder-decoder member cannot do. It is never answered without that member."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval_deepen.config import EnsembleConfig
from lm_eval_deepen.engine.base import EnsembleBase
from lm_eval_deepen.errors import ConfigError, RequestError
from lm_eval_deepen.member import Member


def require_scoring(ensemble: EnsembleBase) -> None:
    """Raise RequestError where a member, or the method, can score no given text, before anything is computed."""
    if ensemble.by_words:
        raise RequestError(
            f"method={ensemble.config.method} writes texts by words and has no probability of a given one, which "
            "loglikelihood and loglikelihood_rolling requests ask for. Evaluate tasks that generate, or choose "
            "another method; pooling=logp-mean ranks given texts as this method ranks words."
        )
    names = [member.name for member in ensemble.active if member.generates_only]
    if names:
        raise RequestError(
            f"member {names[0]!r} is an encoder-decoder model, which takes part in generation only; loglikelihood and "
            "loglikelihood_rolling requests have no answer from this ensemble. Evaluate tasks that generate, or leave "
            "the member out."
        )


def check_specialists(config: EnsembleConfig, members: Sequence[Member], reads_prompts: bool) -> None:
    """Check options against members that generate only; the main member comes first.

    Raises:
        ConfigError: an option that needs such a member to score a text, or a draft in its tokens.
    """
    for m, member in enumerate(members):
        if not member.generates_only:
            continue
        if reads_prompts:
            raise ConfigError(
                f"weighting={config.weighting} needs every member's loss on the prompt, and member {member.name!r} is "
                "an encoder-decoder model that scores no text. Give constant weights, or weighting=confidence."
            )
        if config.speculate == "draft" or (m == 0 and config.speculate != "off"):
            raise ConfigError(
                f"speculate={config.speculate} drafts tokens by members that continue the prompt, and member "
                f"{member.name!r} is an encoder-decoder model. Leave speculate out."
            )
