"""What can be known of an ensemble before any weight is loaded: its tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import transformers

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import MemberError, VocabularyError
from lm_eval_deepen.vocabulary import ByteVocab, byte_vocab_from_json


def load_tokenizer(config: MemberConfig) -> Any | None:
    """Return a member's tokenizer as ``HFLM`` loads it; None where only loading the model gives it (GGUF).

    Raises:
        MemberError: it cannot be loaded; the cause is chained.
    """
    from lm_eval.models.huggingface import HFLM

    given = config.loading_dict()
    if given.get("gguf_file"):
        return None
    loader = object.__new__(HFLM)
    try:
        loader._create_tokenizer(
            config.pretrained,
            given.get("tokenizer"),
            revision=str(given.get("revision", "main")),
            trust_remote_code=given.get("trust_remote_code", False),
            use_fast_tokenizer=given.get("use_fast_tokenizer", True),
            add_bos_token=given.get("add_bos_token"),
            subfolder=given.get("subfolder", ""),
        )
    except Exception as error:
        raise MemberError(
            f"member {config.name!r}: cannot load the tokenizer of {config.pretrained!r}: "
            f"{type(error).__name__}: {error}. Check the path or hub name and the member's loading arguments."
        ) from error
    return loader.tokenizer


def preview_vocabularies(configs: Sequence[MemberConfig], tokenizers: Sequence[Any | None]) -> list[ByteVocab]:
    """Return the pieces of every member as bytes, before its number of logits is known.

    Raises:
        VocabularyError: a tokenizer without an exact byte mapping.
    """
    found = []
    for config, tokenizer in zip(configs, tokenizers, strict=True):
        if tokenizer is None:
            continue
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise VocabularyError(
                f"member {config.name!r}: tokenizer {type(tokenizer).__name__} has no fast (tokenizers) backend, so "
                "its pieces cannot be mapped to bytes exactly. Use a checkpoint with a tokenizer.json, or "
                "use_fast_tokenizer=True."
            )
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        found.append(
            byte_vocab_from_json(
                json.loads(backend.to_str()),
                size=len(tokenizer),
                eos=eos,
                extra_control=tokenizer.all_special_ids,
                name=config.name,
            )
        )
    return found


def reusable(tokenizer: Any | None) -> bool:
    """Return whether ``HFLM`` takes this tokenizer object, so that it need not be loaded twice."""
    return isinstance(tokenizer, (transformers.PreTrainedTokenizer, transformers.PreTrainedTokenizerFast))
