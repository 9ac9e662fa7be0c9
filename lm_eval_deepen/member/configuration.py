"""A model's configuration before anything is loaded, with what transformers adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

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


def class_defaults(model_type: str | None) -> Mapping[str, Any]:
    """Return what a configuration of this type has where its file says nothing; empty for a type of the model's own."""
    return vars(CONFIG_MAPPING[model_type]()) if model_type in CONFIG_MAPPING else {}


def is_encoder_decoder(loading: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """Tell whether a member with these loading arguments and this configuration is an encoder-decoder model."""
    return loading.get("backend", "default") == ENCODER_DECODER or bool(written.get("is_encoder_decoder"))
