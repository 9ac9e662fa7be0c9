"""Loading arguments of ``HFLM`` that mean something else, or nothing, in an ensemble: refused, never dropped."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.member.devices import place

# Arguments of `from_pretrained` that are true or false; those of ``HFLM`` say so themselves.
SWITCHES = ("load_in_4bit", "load_in_8bit", "local_files_only", "low_cpu_mem_usage", "use_safetensors")

RENDERING = {"tokenize", "add_generation_prompt", "continue_final_message"}  # what `hf` renders a conversation with


def switches() -> tuple[str, ...]:
    """Return the loading arguments that are true or false and nothing else."""
    from lm_eval.models.huggingface import HFLM

    annotations = {name: str(p.annotation) for name, p in inspect.signature(HFLM.__init__).parameters.items()}
    return (*(name for name, kind in annotations.items() if "bool" in kind and "str" not in kind), *SWITCHES)


def check_loading(members: Sequence[MemberConfig], device: Any = None) -> None:
    """Check what members are to be loaded with, and where.

    Args:
        members: all members, the main member first.
        device: where those load that name no device of their own.

    Raises:
        ConfigError: an argument that cannot be honoured, with the reason.
    """
    place(device, "the ensemble:")
    main = members[0].loading_dict()
    for member in members:
        given = member.loading_dict()
        where = f"member {member.name!r}:"
        place(given.get("device"), where)
        if given.get("softmax_dtype") not in (None, "float32"):
            raise ConfigError(
                f"{where} softmax_dtype={given['softmax_dtype']!r} cannot be honoured: distributions are fused in "
                "float32. Leave it out."
            )
        for key in ("dtype", "mixed_precision_dtype"):
            name = given.get(key)
            known = name is None or isinstance(name, Mapping) or (key == "dtype" and name == "auto")
            if not known and not getattr(getattr(torch, str(name), None), "is_floating_point", False):
                raise ConfigError(
                    f"{where} {key}={name!r} must be the name of a type of torch for real numbers, such as float32, "
                    "bfloat16 or float16. Correct it or leave it out."
                )
        for key in sorted(given.get("chat_template_args", {}).keys() & RENDERING):
            raise ConfigError(
                f"{where} chat_template_args has {key!r}, which the harness gives for each conversation. Leave it out."
            )
        for key in switches():
            if given.get(key) is not None and not (isinstance(given[key], int) and given[key] in (0, 1)):
                raise ConfigError(
                    f"{where} {key}={given[key]!r} must be true or false. Give it without quotes: as text it would "
                    "count as true."
                )
        prefix = given.get("prefix_token_id")
        if prefix is not None and (isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0):
            raise ConfigError(
                f"{where} prefix_token_id={prefix!r} must be the id of a token, a whole number of 0 or more. Correct "
                "it, or leave it out: then it is the tokenizer's BOS, or else its EOS."
            )
        if len(members) > 1 and given.get("truncation"):
            raise ConfigError(
                f"{where} truncation=True cuts each member's prompt at its own end, and members must see the same "
                "text. Leave it out: prompts are cut on the left, at the same place for all."
            )
        if given.get("enable_thinking") and given.get("think_end_token") is None:
            raise ConfigError(
                f"{where} think_end_token is required with enable_thinking=True, as under --model hf: else the "
                "thinking is scored as part of the answer. Give the token that ends it, such as '</think>'."
            )
        if given.get("think_end_token") != main.get("think_end_token"):
            raise ConfigError(
                f"{where} think_end_token={given.get('think_end_token')!r}, but the main member has "
                f"{main.get('think_end_token')!r}. There is one generated text, so give it once, beside members."
            )
