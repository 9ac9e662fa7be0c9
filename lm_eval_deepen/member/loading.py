"""From a member's configuration to the member: a causal language model, or an encoder-decoder."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from accelerate.utils import patch_environment

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import DeepenError, MemberError, one_line
from lm_eval_deepen.member.devices import place, slices
from lm_eval_deepen.member.encoder_decoder import EncoderDecoderMember
from lm_eval_deepen.member.member import Member
from lm_eval_deepen.member.preflight import load_tokenizer, reusable
from lm_eval_deepen.member.weights import check_weights, weights_reports


def loading_keys() -> frozenset[str]:
    """Return the loading arguments of a member: those of the harness's ``HFLM``, and ``tp_size``."""
    from lm_eval.models.huggingface import HFLM

    named = inspect.signature(HFLM.__init__).parameters.values()
    return frozenset(p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD) - {"self", "pretrained"} | {"tp_size"}


def load_member(config: MemberConfig, device: str | None = None, tokenizer: Any | None = None) -> Member:
    """Load a member through ``HFLM``, so that it takes every loading argument of ``--model hf``.

    It goes to `device`, if `config` does not say where; `tokenizer` is the member's, if it is loaded already.

    Raises:
        ConfigError: a device that this machine lacks, or a launch that is no multiple of ``tp_size`` processes.
        MemberError: loading failed (the cause is chained), or the weights are not those of the files.
    """
    from lm_eval.models.huggingface import HFLM

    arguments = {"device": device, **config.loading_dict(), **config.hf_kwargs_dict(), "batch_size": 1}
    arguments["device"] = place(arguments["device"], f"member {config.name!r}:")
    arguments.pop("tp_size", None)
    # what divides a member takes the processes that hold its slices for the whole launch
    launch = {"world_size": slices([config])} if arguments.get("tp_plan") else {}
    tokenizer = load_tokenizer(config) if tokenizer is None else tokenizer
    if reusable(tokenizer):
        arguments["tokenizer"] = tokenizer
    try:
        with patch_environment(**launch), weights_reports() as reports:
            try:
                lm = HFLM(pretrained=config.pretrained, **arguments)
            finally:
                check_weights(reports, f"member {config.name!r}:", config.allowed)
        if lm.device.type == "cpu" and torch.device(arguments["device"]).type != "cpu":
            raise MemberError(
                f"member {config.name!r}: it was loaded on the CPU, not on device={arguments['device']!r}: accelerate "
                "does not find that device. Install what it needs for it, or give device=cpu."
            )
        if twice := _shared(lm.model) if arguments.get("delta") else ():
            raise MemberError(
                f"member {config.name!r}: the harness adds delta={arguments['delta']!r} once for every name of a "
                f"weight, and {' and '.join(twice)} are one weight (tie_word_embeddings): it would be added twice. Add "
                "the delta to the model, save that, and give its folder."
            )
        return next(kind for kind in (EncoderDecoderMember, Member) if lm.backend in kind.BACKENDS)(config, lm)
    except DeepenError:
        raise
    except Exception as error:
        raise MemberError(
            f"member {config.name!r}: cannot load {config.pretrained!r}: {type(error).__name__}: "
            f"{one_line(error)}. Check the path or hub name and the member's loading arguments."
        ) from error


def _shared(model: Any) -> list[str]:
    """Return the names of the first weight that has several in a model's state; empty where none has."""
    names: dict[int, list[str]] = {}
    for name, weight in model.state_dict().items():
        if weight.numel() and not weight.is_meta:
            names.setdefault(weight.data_ptr(), []).append(name)
    return next((own for own in names.values() if len(own) > 1), [])
