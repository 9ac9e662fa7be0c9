"""A model's configuration before anything is loaded, with what transformers adds to it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)

from lm_eval_deepen.member.runner import Held, TreeRunner
from lm_eval_deepen.member.state_runner import StateRunner

FURTHER_TOKENS = ("num_nextn_predict_layers", "num_mtp_layers")
_aten = torch.ops.aten
_VALUES = (_aten._local_scalar_dense.default, _aten.item.default, _aten.is_nonzero.default)
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
    """Return the shapes of the parameters of a text model by name, of tied ones once; none of an unknown type."""
    model = _empty(written)
    return {} if model is None else {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def is_left_out(written: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return what tells by its name that a stored weight is not loaded into a model of this configuration.

    Such are the layers that predict further tokens, which are stored after the others, and what the class names. A
    class names such layers of its first models by their numbers, which in a deeper model are numbers of layers.
    """
    config = completed(written)
    kind = None if config is None else MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    named = [re.compile(pattern) for pattern in getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ()]
    layers = written.get("num_hidden_layers")
    further = next((written[key] for key in FURTHER_TOKENS if isinstance(written.get(key), int)), 0)

    def left_out(name: str) -> bool:
        layer = re.search(r"(^|\.)layers\.(\d+)\.", name)
        after = int(layer[2]) - layers if layer and isinstance(layers, int) else -1
        ours = [one for one in named if after >= 0 or not layer or layer[2] not in one.pattern]
        return 0 <= after < further or any(one.search(name) for one in ours)

    return left_out


def held_when_loaded(written: Mapping[str, Any], dtype: torch.dtype) -> Held | None:
    """Return what a causal language model of this configuration keeps of a text; None where nobody can say.

    The model is built without values, and forwards a short text: once a process for models of one configuration.
    """
    return _held(json.dumps(written, sort_keys=True, default=str), dtype)


@lru_cache(64)
def _held(text: str, dtype: torch.dtype) -> Held | None:
    written = json.loads(text)
    model = None if written.get("is_encoder_decoder") else _empty(written, dtype)
    for runner in (TreeRunner, StateRunner) if model is not None else ():
        try:
            with _Unvalued():
                held = runner(model.eval()).held  # type: ignore[union-attr]
            if held.num_bytes(1):
                return held
        except Exception:  # whatever an architecture raises that takes another path, or needs values
            continue
    return None


def _empty(written: Mapping[str, Any], dtype: torch.dtype | None = None) -> nn.Module | None:
    """Return a model's text part without values; None of an unknown type."""
    if (config := completed(written)) is None:
        return None
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            # one product of all experts: it needs no values to say which tokens go to which
            model: nn.Module = kind.from_config(
                config, attn_implementation="eager", experts_implementation="batched_mm", dtype=dtype
            )
    except Exception:  # values that do not fit each other, or a package that is not here
        return None
    return model


class _Unvalued(TorchDispatchMode):
    """Lets a model without values forward a text: a value that decides what comes next is 1, an index 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func in _VALUES:
                return torch.ones((), dtype=args[0].dtype, device="cpu").item()
            if func is _aten.nonzero.default:
                return args[0].new_zeros(1, args[0].dim(), dtype=torch.long)
            if func is _aten.where.default:  # the same by dimension
                return [args[0].new_zeros(1, dtype=torch.long) for _ in range(args[0].dim())]
        return func(*args, **(kwargs or {}))


def class_defaults(model_type: str | None) -> Mapping[str, Any]:
    """Return what a configuration of this type has where its file says nothing; empty for a type of the model's own."""
    return vars(CONFIG_MAPPING[model_type]()) if model_type in CONFIG_MAPPING else {}


def is_encoder_decoder(loading: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """Tell whether a member with these loading arguments and this configuration is an encoder-decoder model."""
    return loading.get("backend", "default") == ENCODER_DECODER or bool(written.get("is_encoder_decoder"))
