"""A text without safe cuts that grows: read from its middle, with the tokens of the whole text."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from vocabulary_helpers import codec_of

from lm_eval_deepen.member.cursor import TextCursor
from lm_eval_deepen.member.text import TextCodec
from lm_eval_deepen.vocabulary.tokenizer_json import BYTE_ALPHABET

SPACE = "\u2581"
OF_GPT_4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OF_GPT_4O = OF_GPT_4.replace(r"?\p{L}+", r"?[\p{Lu}\p{Lo}]*[\p{Ll}\p{Lo}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}]+")
ALPHABET = "aabrestA中中国的首\u0e01'! =01\n\u0e47\u00e9"
ENDS = ["▁", "<0x41>", "'re", "🙂", "ſ", "  ", "\n\n", "== ", "中A"]


def bpe(draw: random.Random, singles: list[str], words: list[str], merges: int) -> models.BPE:
    """BPE with random merges: pieces of words in any order, so that a merge may come before what it is made of."""
    pairs = []
    while len(pairs) < merges:
        word = draw.choice(words)
        begin, middle, end = sorted(draw.sample(range(len(word) + 1), 3)) if len(word) > 1 else (0, 0, 0)
        if begin < middle < end <= begin + 6:
            pairs.append((word[begin:middle], word[middle:end]))
    if draw.random() < 0.5:  # a run that is read anew to its beginning when it grows
        pairs += [("a" * size, "a" * size) for size in (1, 2, 4, 8, 16, 32)]
        draw.shuffle(pairs)
    products = {left + right for left, right in pairs}
    pairs = [pair for pair in dict.fromkeys(pairs) if all(len(part) == 1 or part in products for part in pair)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*singles, *sorted(products)]))}
    return models.BPE(vocab=vocab, merges=pairs, byte_fallback="<0x00>" in vocab)


def text_of(draw: random.Random, size: int, alphabet: str = ALPHABET) -> str:
    return "".join(
        draw.choice(alphabet) * draw.choice((1, 1, 1, 2, 5) if draw.random() < 0.98 else (90,)) for _ in range(size)
    )


def by_bytes(draw: random.Random, *steps) -> Tokenizer:
    """Byte-level BPE with steps before the bytes; none: GPT-2's own."""
    spelt = {byte: character for character, byte in BYTE_ALPHABET.items()}
    words = ["".join(spelt[byte] for byte in text_of(draw, 8).encode()) for _ in range(40)]
    tokenizer = Tokenizer(bpe(draw, sorted(BYTE_ALPHABET), words, 300))
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, own]) if steps else own
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def by_marks(draw: random.Random, pre_tokenizer=None, added: tuple[str, ...] = ()) -> Tokenizer:
    """BPE over characters, with marks for spaces and pieces for bytes."""
    letters = "aabrestA中中国的'!=01"  # the others are spelt by bytes
    words = [text_of(draw, 8, letters + SPACE) for _ in range(40)]
    singles = [f"<0x{value:02X}>" for value in range(256)] + sorted(set(letters + SPACE))
    tokenizer = Tokenizer(bpe(draw, singles, words, 200))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return tokenizer


def split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


KINDS = {
    "GPT-2": by_bytes,
    "GPT-4": lambda draw: by_bytes(draw, split(OF_GPT_4)),
    "Gemma": lambda draw: by_marks(
        draw, pre_tokenizers.Split(" ", "merged_with_previous"), ("\n\n", "\n\n\n", "中国的", "==")
    ),
    "Llama 2": by_marks,
    "words": lambda draw: by_marks(draw, pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_that_of_the_whole_text(kind):
    """Random merges, in orders that no training gives, and texts that end in every way."""
    draw, folded = random.Random(kind), 0
    for trial in range(8):
        codec = codec_of(KINDS[kind](draw), add_special=False)
        assert codec.restarts is not None
        alphabet = "".join(draw.sample(ALPHABET, 2 + trial % 4)) if trial % 2 else ALPHABET
        text = (text_of(draw, 150, alphabet) + draw.choice(ENDS) + text_of(draw, 30, alphabet)).encode()
        if trial % 4 == 3:  # bytes that are no characters
            text = text[:-20] + b"\xe4\xb8\xff" + text[-20:]
        prompt = codec.prompt(text_of(draw, draw.choice((0, 90)), alphabet))
        cursor, at = TextCursor(codec, prompt), 0
        while at < len(text):
            step = draw.choice((1, 2, 3, 7))
            cursor.take(text[at : at + step])
            at = min(at + step, len(text))
            for ahead in (b"", draw.choice(ENDS).encode()[: draw.randrange(1, 6)]):
                end = cursor.end(ahead)
                found = None if end is None else (*cursor.fixed[: end[0]], *end[1])
                assert found == codec.follow(prompt, text[:at] + ahead), (trial, text[:at].decode(errors="replace"))
            folded += len(cursor._blocks)
    assert folded > 100


def test_where_nothing_is_proven_a_text_is_read_whole():
    """Patterns in which later letters change earlier words, normalizers, words that are pieces whatever merges say."""
    draw = random.Random(0)
    unknown = {
        "GPT-4o": by_bytes(draw, split(OF_GPT_4O)),
        "digits by threes from the right": by_bytes(draw, split(r"\d{1,3}(?=(\d{3})*\b)")),
        "another step": by_bytes(draw, split(OF_GPT_4), split(r"\d")),
    }
    lower, whole, single = by_marks(draw), by_marks(draw), by_marks(draw)
    lower.normalizer = normalizers.Sequence([normalizers.Replace("aa", "a"), normalizers.Replace(" ", SPACE)])
    spec = json.loads(whole.to_str())
    spec["model"]["ignore_merges"] = True
    single.add_tokens([AddedToken("word", single_word=True)])
    unknown |= {"a normalizer": lower, "ignore_merges": Tokenizer.from_str(json.dumps(spec)), "single words": single}
    unknown["spaces that stay"] = by_marks(draw, pre_tokenizers.Split(" ", "merged_with_previous"))
    unknown["spaces that stay"].normalizer = None
    for name, tokenizer in unknown.items():
        assert codec_of(tokenizer).restarts is None, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_the_same_in_a_long_text(kind, monkeypatch):
    """Characters that are encoded for a text four times as long."""
    draw, counts = random.Random(1), Counter()
    codec = codec_of(KINDS[kind](draw), add_special=False)
    encode = TextCodec.encode

    def counted(codec, text):
        counts["encoded"] += len(text)
        return encode(codec, text)

    monkeypatch.setattr(TextCodec, "encode", counted)
    found = []
    for size in (500, 2000):
        counts.clear()
        cursor = TextCursor(codec, codec.prompt("中国"))
        for character in text_of(draw, size, "中国的首a")[:size]:
            cursor.take(character.encode())
            cursor.end()
        found.append(counts["encoded"])
    assert found[1] < 5 * found[0], found
