"""From a member's configuration to the member: a causal language model, or an encoder-decoder.

Loading arguments of ``HFLM`` that mean something else in an ensemble, or nothing, are refused, never dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import patch_environment
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import ConfigError, DeepenError, MemberError, one_line
from lm_eval_deepen.member.devices import place, slices
from lm_eval_deepen.member.encoder_decoder import EncoderDecoderMember
from lm_eval_deepen.member.member import Member
from lm_eval_deepen.member.text import Backend
from lm_eval_deepen.member.tokenizer_files import files_of, garbage_kept, load_tokenizer
from lm_eval_deepen.member.weights import check_weights, weights_reports
from lm_eval_deepen.vocabulary import ByteVocab

# Arguments of `from_pretrained` that are true or false; those of ``HFLM`` say so themselves.
SWITCHES = ("load_in_4bit", "load_in_8bit", "local_files_only", "low_cpu_mem_usage", "use_safetensors")

RENDERING = {"tokenize", "add_generation_prompt", "continue_final_message"}  # what `hf` renders a conversation with


def loading_keys() -> frozenset[str]:
    """Return the loading arguments of a member: those of the harness's ``HFLM``, and ``tp_size``."""
    from lm_eval.models.huggingface import HFLM

    named = inspect.signature(HFLM.__init__).parameters.values()
    return frozenset(p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD) - {"self", "pretrained"} | {"tp_size"}


def switches() -> tuple[str, ...]:
    """Return the loading arguments that are true or false and nothing else."""
    from lm_eval.models.huggingface import HFLM

    annotations = {name: str(p.annotation) for name, p in inspect.signature(HFLM.__init__).parameters.items()}
    return (*(name for name, kind in annotations.items() if "bool" in kind and "str" not in kind), *SWITCHES)


def check_loading(members: Sequence[MemberConfig], device: Any = None) -> None:
    """Raise ConfigError where members, the main member first, cannot be loaded as asked; by default on `device`."""
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


@garbage_kept()
def preview_vocabularies(configs: Sequence[MemberConfig], tokenizers: Sequence[Any | None]) -> list[ByteVocab]:
    """Return the pieces of every member as bytes, before its number of logits is known; errors as `Backend`."""
    vocabularies = []
    for config, tokenizer in zip(configs, tokenizers, strict=True):
        if tokenizer is not None:
            eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            read = Backend(tokenizer, files_of(config), size=len(tokenizer), eos=eos, name=config.name)
            vocabularies.append(read.vocab.events)
    return vocabularies


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
    if isinstance(tokenizer, (PreTrainedTokenizer, PreTrainedTokenizerFast)):  # ``HFLM`` takes no others
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
