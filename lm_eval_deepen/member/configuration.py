"""A model's configuration as transformers completes it, from what is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig


def completed(written: Mapping[str, Any]) -> Any | None:
    """Return the configuration of a model's text part with the defaults of its type; None of an unknown type.

    Files written by older versions lack keys of newer ones, whose values follow from others.
    """
    given = {key: value for key, value in written.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(written["model_type"], **given).get_text_config()
    except Exception:  # a type with code of its own, or values that it refuses: what is written has to do
        return None
