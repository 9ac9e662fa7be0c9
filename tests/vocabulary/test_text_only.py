"""A tokenizer rewritten to encode text alone gives tokens of exactly the text's bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from vocabulary_helpers import (
    CAFE,
    SPACE,
    byte_level,
    families,
    sentencepiece_bpe,
    spec_of,
    unigram,
)

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.vocabulary import ByteVocab
from lm_eval_deepen.vocabulary.cuts import safe_cut_allowed, safe_segments
from lm_eval_deepen.vocabulary.round_trip import SAMPLE_TEXTS, check_round_trip
from lm_eval_deepen.vocabulary.text_only import exact_encoder, text_only_spec
from lm_eval_deepen.vocabulary.tokenizer_json import byte_vocab_from_json

FAMILIES = families()
Encode = Callable[[str], list[int]]
LITERALS = ["</s>", "<s>", "<unk>", "<|im_end|>", "<bos>", "\u00e9", "\U0001f642", "\n\n", "ing", "walk"]
LITERALS += ["  a", "<table> a"]


def prepare(tokenizer: Tokenizer, *, eos: tuple[int, ...] = (2,)) -> tuple[ByteVocab, Encode]:
    """The byte vocabulary and the raw text-only encoder of a tokenizer."""
    spec = spec_of(tokenizer)
    pure = Tokenizer.from_str(json.dumps(text_only_spec(spec, control=eos)))
    pure.encode_special_tokens = True
    vocab = byte_vocab_from_json(spec, size=tokenizer.get_vocab_size(), eos=eos, name="m")
    return vocab, lambda text: pure.encode(text, add_special_tokens=False).ids


PREPARED = {family: prepare(tokenizer) for family, tokenizer in FAMILIES.items()}
EXACT = {family: exact_encoder(spec_of(FAMILIES[family]), *PREPARED[family], name="m") for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", LITERALS)
def test_tokens_spell_the_text_and_nothing_else(family: str, text: str) -> None:
    vocab, encode = PREPARED[family]
    assert vocab.decode(encode(text)) == text.encode()
    assert not set(encode(text)) & vocab.control


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shipped_tokenizer_does_add_what_the_rewrite_removes(family: str) -> None:
    vocab, _ = PREPARED[family]
    shipped = FAMILIES[family].encode("</s>ing").ids
    assert 2 in shipped
    assert vocab.decode(shipped) != b"</s>ing"


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_stay_what_they_are_and_the_input_is_not_changed(family: str) -> None:
    tokenizer = FAMILIES[family]
    spec = spec_of(tokenizer)
    before = copy.deepcopy(spec)
    pure = Tokenizer.from_str(json.dumps(text_only_spec(spec, control=[2])))
    assert spec == before
    assert pure.get_vocab_size() == tokenizer.get_vocab_size()
    kept = {p: i for p, i in tokenizer.get_vocab().items() if i > 2}
    assert {p: i for p, i in pure.get_vocab().items() if i > 2} == kept


@given(st.text(max_size=30), st.sampled_from(sorted(FAMILIES)))
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips(text: str, family: str) -> None:
    vocab, _ = PREPARED[family]
    assert vocab.decode(EXACT[family](text)) == text.encode()


TRAPS = st.lists(st.sampled_from([SPACE, " ", "<0x41>", "<0x0a>", "</s>", "caf\u00e9", "<0", "x0A>", "\n"]), max_size=8)


@given(TRAPS.map("".join), st.sampled_from(sorted(FAMILIES)))
@settings(max_examples=200, deadline=None)
def test_space_marks_and_byte_literals_are_text(text: str, family: str) -> None:
    vocab, encode = PREPARED[family]
    ids = EXACT[family](text)
    assert vocab.decode(ids) == text.encode()
    assert not set(ids) & vocab.control
    if vocab.decode(encode(text)) == text.encode():
        assert ids == encode(text)


def test_the_raw_encoder_reads_a_space_mark_as_a_space() -> None:
    vocab, encode = PREPARED["llama"]
    assert vocab.decode(encode(SPACE)) == b" "
    vocab, encode = PREPARED["unigram"]
    assert vocab.decode(encode("<0x41>")) == b"A"


def test_a_space_mark_without_byte_pieces_is_an_error() -> None:
    tokenizer = unigram(byte_fallback=False)
    run = exact_encoder(spec_of(tokenizer), *prepare(tokenizer), name="plain")
    with pytest.raises(VocabularyError, match=r"member 'plain'.*'\u2581' \(U\+2581\).*reads as a space.*Leave"):
        run(f"a{SPACE}b")


def test_merges_and_whole_words_never_make_control_or_bytes() -> None:
    merges = [
        ("<", "/"),
        ("s", ">"),
        ("</", "s>"),
        ("<", "0"),
        ("x", "4"),
        ("1", ">"),
        ("<0", "x4"),
        ("<0x4", "1>"),
    ]
    tokenizer = sentencepiece_bpe(merges, prefix_space=False, ignore_merges=True)
    vocab, encode = prepare(tokenizer)
    assert [vocab.pieces[i] for i in encode("</s>")] == [b"</", b"s>"]
    assert vocab.decode(encode("a<0x41>")) == b"a<0x41>"
    legacy = spec_of(tokenizer)
    legacy["model"]["merges"] = [" ".join(merge) for merge in legacy["model"]["merges"]]
    kept = text_only_spec(legacy)["model"]["merges"]
    assert set(legacy["model"]["merges"]) - set(kept) == {"</ s>", "<0x4 1>"}


def test_an_end_token_that_the_file_does_not_mark_is_text_too() -> None:
    tokenizer = sentencepiece_bpe([*CAFE, ("<", "e"), ("<e", ">")], prefix_space=False)
    end = tokenizer.token_to_id("<e>")
    assert tokenizer.encode("<e>", add_special_tokens=False).ids == [end]
    vocab, encode = prepare(tokenizer, eos=(end,))
    assert vocab.decode(encode("<e>")) == b"<e>"


def test_older_metaspace_and_nested_sequences_lose_the_dummy_prefix() -> None:
    spec = spec_of(unigram(byte_fallback=True))
    old = {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": True, "prepend_scheme": "first"}
    nested = {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": [old]}]}
    vocab, _ = PREPARED["unigram"]
    for pre in (old, nested):
        pure = Tokenizer.from_str(json.dumps(text_only_spec({**spec, "pre_tokenizer": pre})))
        assert vocab.decode(pure.encode("ing", add_special_tokens=False).ids) == b"ing"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_accepts_exact_tokenizers(family: str) -> None:
    vocab, encode = PREPARED[family]
    check_round_trip(vocab, encode, name=family)
    check_round_trip(vocab, EXACT[family], name=family)


def test_nfc_is_left_out_but_lossy_normalisers_are_refused() -> None:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    check_round_trip(*prepare(tokenizer), name="m")
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(
        VocabularyError, match=r"member 'low'.*Hello, world.*character 'H' \(U\+0048\) at 0.*b'he'.*lossy"
    ):
        check_round_trip(*prepare(tokenizer), name="low")
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(VocabularyError, match=r"member 'split'.*character ' ' .*pieces there: \d+: b"):
        check_round_trip(*prepare(tokenizer), name="split")


def test_a_character_without_a_piece_is_named() -> None:
    tokenizer = unigram(byte_fallback=False)
    vocab, encode = prepare(tokenizer)
    assert vocab.decode(encode(" caf\u00e9 ing")) == " caf\u00e9 ing".encode()
    with pytest.raises(
        VocabularyError,
        match=r"member 'plain'.*no piece for the character .*U\+000A.*piece 0\b.*byte fallback",
    ):
        check_round_trip(vocab, encode, name="plain")


def test_silently_dropped_characters_are_named() -> None:
    vocab = ByteVocab(tuple(bytes([b]) for b in range(128)))
    with pytest.raises(VocabularyError, match=r"from the character '\u00e9' \(U\+00E9\) at 3 on it gives"):
        check_round_trip(vocab, lambda text: list(text.encode("ascii", errors="ignore")), name="m")


def test_an_id_without_a_logit_is_named() -> None:
    vocab = ByteVocab(tuple(bytes([b]) for b in range(100)))
    with pytest.raises(VocabularyError, match=r"member 'm'.*gives id 101, but the model has only 100 logits"):
        check_round_trip(vocab, lambda text: list(text.encode()), name="m")


def test_tokens_that_depend_on_a_cut_are_an_error() -> None:
    vocab = ByteVocab(tuple(bytes([b]) for b in range(256)) * 2)

    def by_position(text: str) -> list[int]:
        return [byte + 256 * (n > 5) for n, byte in enumerate(text.encode())]

    with pytest.raises(VocabularyError, match=r"member 'm'.*when the text is cut before the space at 17"):
        check_round_trip(vocab, by_position, name="m")


@given(st.lists(st.sampled_from(["the", " caf\u00e9", " ", ",", "\n", "  ", "ing", " a", "7", "</s>"]), max_size=12))
@settings(max_examples=150, deadline=None)
def test_cutting_does_not_change_tokens(words: list[str]) -> None:
    text = "".join(words)
    for family, (vocab, encode) in PREPARED.items():
        assert safe_cut_allowed(vocab), family
        assert [i for part in safe_segments(text) for i in encode(part)] == encode(text)


def test_the_sample_covers_what_goes_wrong() -> None:
    joined = "".join(SAMPLE_TEXTS)
    for needed in (
        "</s>",
        "<|im_end|>",
        "e\u0301",
        "\u00e9",
        "\u4e2d",
        "\u0645",
        "\u200d",
        "\t",
        "\r\n",
        "   ",
    ):
        assert needed in joined
    assert any(text.endswith(" ") for text in SAMPLE_TEXTS)
    assert any(text.startswith(" ") for text in SAMPLE_TEXTS)
