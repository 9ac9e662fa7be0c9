"""A model's configuration before anything is loaded, with what transformers adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

ENCODER_DECODER = "seq2seq"  # as the harness's `HFLM` calls these backends


def completed(written: Mapping[str, Any]) -> Any | None:
    """Return the configuration of a model's text part with the defaults of its type; None of an unknown type.

    Files written by older versions lack keys of newer ones, whose values follow from others.
    """
    given = {key: value for key, value in written.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(written["model_type"], **given).get_text_config()
    except Exception:  # a type with code of its own, or values that it refuses: what is written has to do
        return None


def empty_shapes(written: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of a model's text part by name, of tied ones once; none of an unknown type.

    The model is built without values.
    """
    if (config := completed(written)) is None:
        return {}
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = kind.from_config(config, attn_implementation="eager")
    except Exception:  # values that do not fit each other, or a package that is not here
        return {}
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def class_defaults(model_type: str | None) -> Mapping[str, Any]:
    """Return what a configuration of this type has where its file says nothing; empty for a type of the model's own."""
    return vars(CONFIG_MAPPING[model_type]()) if model_type in CONFIG_MAPPING else {}


def is_encoder_decoder(loading: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """Tell whether a member with these loading arguments and this configuration is an encoder-decoder model."""
    return loading.get("backend", "default") == ENCODER_DECODER or bool(written.get("is_encoder_decoder"))
