"""A byte vocabulary is checked against its tokenizer before it is trusted."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from lm_eval_deepen.errors import SpellingError, VocabularyError
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab
from lm_eval_deepen.vocabulary.cuts import safe_cut_allowed, safe_cuts

SAMPLE_TEXTS = (
    "Hello, world! The quick brown fox (jumps) over 12 lazy dogs; isn't it? 3.14159 + 1,000,000 = ~$5",
    "walk",
    "ing",
    " ",
    "   ",
    " leading and trailing ",
    "  two   three    four     spaces",
    "\n",
    "\n\n",
    "one\ntwo\r\nthree\n\n\nfour \n five\t\tsix \t",
    "def f(x):\n    if x != 0 and x[1:] == {'a': \"b\"}:\n\t\treturn -x ** 2  # \\n\n",
    "0 1 23 456 7890 2024-05-17 1e-9 0x1F",
    "caf\u00e9 na\u00efve \u00dcber \u0153uvre \u00bfSe\u00f1or? stra\u00dfe",
    "cafe\u0301 nai\u0308ve U\u0308ber",
    "\u4e2d\u56fd\u7684\u9996\u90fd\u662f\u5317\u4eac\u3002\u3000\u65e5\u672c\u8a9e\u306e\u6587\u3001\ud55c\uad6d\uc5b4",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c",
    "\u05e9\u05dc\u05d5\u05dd \u041f\u0440\u0438\u0432\u0435\u0442",
    "\U0001f642 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44b\U0001f3fd a\u00a0b\u2009c\u200bd",
    "a literal </s>, <s>, <unk> <pad> <bos><eos> [CLS] [SEP] <|endoftext|> and <|im_end|>\n<|im_start|>user",
    "</s>",
    "<unk>",
    "<bos>",
    "<|im_end|>",
    "control \x00 \x01 \x1b \x7f bytes",
)
REMEDY = (
    "Every member must see the same bytes: use a tokenizer with a byte alphabet or byte fallback and without "
    "lossy normalisation, or leave this member out."
)


def is_exact(vocab: ByteVocab, data: bytes, ids: Sequence[int]) -> bool:
    """Return whether the pieces of some ids, which may be none of the vocabulary's, spell exactly these bytes."""
    return min(ids, default=0) >= 0 and max(ids, default=0) < len(vocab) and vocab.decode(ids) == data


def require_exact(vocab: ByteVocab, text: str, ids: Sequence[int], *, name: str) -> None:
    """Raise SpellingError unless `is_exact`; the message names the member, the text and the pieces that go wrong."""
    data = text.encode()
    if is_exact(vocab, data, ids):
        return
    where = f"member {name!r}: its tokenizer does not spell {_short(text)} exactly"
    outside = [i for i in ids if not 0 <= i < len(vocab)]
    if outside:
        raise VocabularyError(
            f"{where}: it gives id {outside[0]}, but the model has only {len(vocab)} logits. The tokenizer "
            "does not belong to this model: correct the member's `tokenizer` argument."
        )
    index, offset = _first_difference(vocab, data, ids)
    at = len(data[:offset].decode(errors="ignore"))
    character = "the end of the text"
    if at < len(text):
        character = f"the character {text[at]!r} (U+{ord(text[at]):04X}) at {at}"
    if index < len(ids) and ids[index] in vocab.control:
        raise SpellingError(
            f"{where}: it has no piece for {character}, which becomes the unknown or control piece "
            f"{ids[index]}. {REMEDY}"
        )
    nearby = range(max(0, index - 1), min(len(ids), index + 2))
    pieces = ", ".join(f"{ids[n]}: {vocab.pieces[ids[n]]!r}" for n in nearby) or "none"
    raise SpellingError(
        f"{where}: from {character} on it gives {_short(vocab.decode(ids)[offset:])} (pieces there: {pieces}). {REMEDY}"
    )


def check_round_trip(vocab: ByteVocab, encode: Callable[[str], Sequence[int]], *, name: str) -> None:
    """Raise VocabularyError where a byte vocabulary is not that of a tokenizer of text alone (see `text_only_spec`).

    The tokens of all `SAMPLE_TEXTS` must spell their bytes; where `safe_cut_allowed`, cutting a text at a safe place
    must not change its tokens.
    """
    for text in SAMPLE_TEXTS:
        require_exact(vocab, text, encode(text), name=name)
    for text in SAMPLE_TEXTS if safe_cut_allowed(vocab) else ():
        whole = list(encode(text))
        for cut in safe_cuts(text):
            parts = [*encode(text[:cut]), *encode(text[cut:])]
            if parts != whole:
                raise VocabularyError(
                    f"member {name!r}: its tokenizer gives {_short(text)} other tokens when the text is cut "
                    f"before the space at {cut} ({parts} against {whole}), though no piece spans the cut: "
                    "its pre-tokenizer looks further than a word. Leave this member out, or change that."
                )


def _first_difference(vocab: ByteVocab, data: bytes, ids: Sequence[int]) -> tuple[int, int]:
    """Return the index of the first token that goes wrong, and the offset of the first byte that does."""
    offset = 0
    for index, token in enumerate(ids):
        piece = vocab.pieces[token]
        if not piece or data[offset : offset + len(piece)] != piece:
            return index, offset + len(os.path.commonprefix([piece, data[offset:]]))
        offset += len(piece)
    return len(ids), offset


def _short(value: str | bytes) -> str:
    return repr(value if len(value) <= 80 else value[:80]) + ("" if len(value) <= 80 else "...")
