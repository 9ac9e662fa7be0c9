"""Checks an ensemble's tokenizers before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import MemberError, one_line
from lm_eval_deepen.member.text import Backend
from lm_eval_deepen.member.tokenizer_files import TokenizerFiles, garbage_kept, require_same
from lm_eval_deepen.vocabulary import ByteVocab


@garbage_kept()
def load_tokenizer(config: MemberConfig) -> Any | None:
    """Return a member's tokenizer as ``HFLM`` loads it; None where only loading the model gives it (GGUF).

    Raises:
        MemberError: it cannot be loaded (the cause is chained), or is not what its file says.
    """
    from lm_eval.models.huggingface import HFLM

    given = config.loading_dict()
    if given.get("gguf_file") and not given.get("tokenizer"):
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
            f"{type(error).__name__}: {one_line(error)}. Check the path or hub name and the member's loading arguments."
        ) from error
    require_same(
        loader.tokenizer,
        files_of(config),
        name=config.name,
        allowed=config.allow_altered_tokenizer,
        asked=[key for key, value in given.items() if value is not None],
    )
    if type(loader.tokenizer).__module__.startswith("transformers."):
        for copied in ("_vocab", "_merges"):  # Python's copies of what the tokenizer was made of, which nothing reads
            vars(loader.tokenizer).pop(copied, None)
    return loader.tokenizer


def files_of(config: MemberConfig) -> TokenizerFiles | None:
    """Return the files of a member's tokenizer; None where it has no ``tokenizer.json``."""
    given = config.loading_dict()
    if given.get("gguf_file") and not given.get("tokenizer"):
        return None
    return TokenizerFiles.find(
        given.get("tokenizer") or config.pretrained,
        revision=str(given.get("revision") or "main"),
        subfolder=given.get("subfolder") or "",
    )


@garbage_kept()
def preview_vocabularies(configs: Sequence[MemberConfig], tokenizers: Sequence[Any | None]) -> list[ByteVocab]:
    """Return the pieces of every member as bytes, before its number of logits is known.

    Raises:
        VocabularyError: a tokenizer without an exact byte mapping.
    """
    vocabularies = []
    for config, tokenizer in zip(configs, tokenizers, strict=True):
        if tokenizer is not None:
            eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            read = Backend(tokenizer, files_of(config), size=len(tokenizer), eos=eos, name=config.name)
            vocabularies.append(read.vocab.events)
    return vocabularies


def reusable(tokenizer: Any | None) -> bool:
    """Return whether ``HFLM`` takes this tokenizer object, so that it need not be loaded twice."""
    return isinstance(tokenizer, (transformers.PreTrainedTokenizer, transformers.PreTrainedTokenizerFast))
