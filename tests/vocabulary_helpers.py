"""Small tokenizers of every family, made by hand or trained here, for the vocabulary tests."""

from __future__ import annotations

import json
import string
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPACE = "\u2581"
ALPHABET = string.ascii_letters + string.digits + string.punctuation + SPACE + "\u00e9\u4e2d"
BYTE_PIECES = [f"<0x{value:02X}>" for value in range(256)]
CORPUS = [
    "the caf\u00e9 was open, the caf\u00e9 was closed; \u4e2d\u56fd and \u65e5\u672c",
    "walking and talking, singing </s> <|im_end|> in the rain\n\nfor x in range(10):\n    print(x)",
]


def spec_of(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())


def codec_of(tokenizer: Any, *, size: int | None = None, **given: Any) -> Any:
    """The byte view of a tokenizer; `given` are further arguments of `TextCodec.build`."""
    from transformers import PreTrainedTokenizerFast

    from lm_eval_deepen.member.text import TextCodec

    if isinstance(tokenizer, Tokenizer):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    given = {"eos": (), "prefix_id": 1, "add_special": True, "name": "m", **given}
    return TextCodec.build(tokenizer, size=size or len(tokenizer), **given)


def byte_level(extra: list[AddedToken] | None = None) -> Tokenizer:
    """GPT-2's arrangement, with a prefix space and a BOS that the rewrite must remove."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_end|>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, " caf\u00e9 \u4e2d " * 20], trainer)
    tokenizer.add_tokens(extra or [])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


def sentencepiece_bpe(merges: list[tuple[str, str]], *, prefix_space: bool = True, **options: Any) -> Tokenizer:
    """Llama's arrangement (``prefix_space``) or Gemma's: space marks, byte fallback, merges by hand."""
    names = ["<unk>", "<s>", "</s>", *BYTE_PIECES, *dict.fromkeys([*ALPHABET, *(a + b for a, b in merges)])]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True, **options))
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix_space else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix_space else steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


CAFE = [("c", "a"), ("f", "\u00e9"), ("ca", "f\u00e9"), (SPACE, "caf\u00e9"), (SPACE, "a")]


def unigram(*, byte_fallback: bool, characters: str = ALPHABET) -> Tokenizer:
    """SentencePiece Unigram with Metaspace; control pieces have score 0, as exported files do."""
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    if byte_fallback:
        vocab += [(piece, 0.0) for piece in BYTE_PIECES]
    vocab += [(character, -9.0) for character in characters] + [(SPACE + "caf\u00e9", -7.0), ("ing", -6.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, 0, byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")
    meta = decoders.Metaspace(SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), meta]) if byte_fallback else meta
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def families() -> dict[str, Tokenizer]:
    return {
        "byte_level": byte_level([AddedToken("\n\n", normalized=False), AddedToken("<table>", rstrip=True)]),
        "llama": sentencepiece_bpe(CAFE),
        "gemma": sentencepiece_bpe(CAFE, prefix_space=False),
        "unigram": unigram(byte_fallback=True),
    }
