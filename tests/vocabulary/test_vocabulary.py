"""Token strings become bytes exactly, or the tokenizer is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from vocabulary_helpers import SPACE, byte_level, families, sentencepiece_bpe, spec_of, unigram

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.vocabulary import ByteVocab
from lm_eval_deepen.vocabulary.tokenizer_json import BYTE_ALPHABET, byte_vocab_from_json, unknown_id

FAMILIES = families()


def vocab_of(tokenizer: Tokenizer, *, size: int | None = None, eos: tuple[int, ...] = (2,), extra=()) -> ByteVocab:
    size = size or tokenizer.get_vocab_size()
    return byte_vocab_from_json(spec_of(tokenizer), size=size, eos=eos, extra_control=extra, name="m")


def test_the_byte_alphabet_is_the_librarys() -> None:
    assert sorted(BYTE_ALPHABET) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_ALPHABET.values()) == list(range(256))
    decode = decoders.ByteLevel().decode
    assert all(decode([c]) == bytes([b]).decode(errors="replace") for c, b in BYTE_ALPHABET.items())


def test_a_character_split_over_tokens_is_whole_again_in_bytes() -> None:
    for tokenizer in FAMILIES.values():
        ids = [i for i in tokenizer.encode("\U0001f642").ids if i > 2]
        vocab = vocab_of(tokenizer)
        assert vocab.decode(ids).removeprefix(b" ") == "\U0001f642".encode()
        assert len([i for i in ids if vocab.pieces[i] != b" "]) == 4
        assert not any("\ufffd".encode() in piece for piece in vocab.pieces)


@pytest.mark.parametrize("family", FAMILIES)
def test_control_pieces_carry_no_bytes(family: str) -> None:
    tokenizer = FAMILIES[family]
    vocab = vocab_of(tokenizer)
    assert vocab.control == {0, 1, 2}
    assert all(vocab.pieces[i] == b"" for i in vocab.control)
    assert vocab.unused == frozenset()
    assert vocab.eos == (2,)
    assert b"</s>" not in vocab.ids_of
    assert len(vocab.byte_fallback) == (0 if family == "byte_level" else 256)


@given(data=st.data(), family=st.sampled_from(sorted(FAMILIES)))
@settings(max_examples=150, deadline=None)
def test_pieces_agree_with_the_librarys_decoder(data: st.DataObject, family: str) -> None:
    tokenizer = FAMILIES[family]
    vocab = vocab_of(tokenizer)
    text_ids = [i for i in range(len(vocab)) if i not in vocab.control | vocab.byte_fallback]
    ids = data.draw(st.lists(st.sampled_from(text_ids), max_size=8))
    expected = tokenizer.decode([text_ids[0], *ids])  # the first token alone loses a prefix space
    assert vocab.decode([text_ids[0], *ids]).decode(errors="replace") == expected


@given(
    pieces=st.lists(st.binary(min_size=1, max_size=4), unique=True, min_size=1, max_size=30),
    holes=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_random_byte_vocabularies_come_back(pieces: list[bytes], holes: int) -> None:
    spelt = {byte: character for character, byte in BYTE_ALPHABET.items()}
    named = {"".join(spelt[byte] for byte in piece): i * 2 for i, piece in enumerate(pieces)}
    spec = {
        "model": {"type": "BPE", "vocab": named, "merges": []},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]},
        "added_tokens": [],
    }
    size = 2 * len(pieces) + holes
    vocab = byte_vocab_from_json(spec, size=size, eos=[], name="m")
    assert len(vocab) == size
    assert {vocab.pieces[i * 2] for i in range(len(pieces))} == set(pieces)
    assert vocab.unused == {i for i in range(size) if i % 2 or i >= 2 * len(pieces)}
    assert all(vocab.pieces[i] == b"" for i in vocab.unused)
    assert {piece: ids for piece, ids in vocab.ids_of.items()} == {p: (2 * i,) for i, p in enumerate(pieces)}


def test_added_tokens_are_text_unless_special() -> None:
    added = [
        AddedToken("\n\n", normalized=False),
        AddedToken("<table>"),
        AddedToken("na\u00efve \u4e2d"),
        AddedToken("\u00e9t\u00e9"),  # every character is in the byte alphabet, but it is matched as text
        AddedToken("<|x|>", special=True),
    ]
    tokenizer = byte_level(added)
    vocab = vocab_of(tokenizer)
    for token in added:
        expected = b"" if token.special else token.content.encode()
        assert vocab.pieces[tokenizer.token_to_id(token.content)] == expected
    assert tokenizer.token_to_id("<|x|>") in vocab.control


def test_an_added_space_mark_decodes_to_a_space() -> None:
    tokenizer = sentencepiece_bpe([(SPACE, SPACE)], prefix_space=False)
    tokenizer.add_tokens([AddedToken(SPACE * 2, normalized=False)])
    assert vocab_of(tokenizer).pieces[tokenizer.token_to_id(SPACE * 2)] == b"  "


def test_rows_beyond_the_tokenizer_are_unused_and_ids_beyond_the_logits_left_out() -> None:
    tokenizer = FAMILIES["llama"]
    length = tokenizer.get_vocab_size()
    padded = vocab_of(tokenizer, size=length + 37)
    assert padded.unused == set(range(length, length + 37))
    assert len(padded) == length + 37
    short = vocab_of(tokenizer, size=300)
    assert short.pieces == padded.pieces[:300]
    assert all(i < 300 for i in short.control | short.byte_fallback)


def test_eos_padding_and_unknown_are_control() -> None:
    tokenizer = FAMILIES["unigram"]
    vocab = vocab_of(tokenizer, eos=(270, 2, 270), extra=[271, 10**6])
    assert vocab.eos == (270, 2)
    assert {0, 2, 270, 271} <= vocab.control
    assert vocab.pieces[270] == vocab.pieces[271] == b""
    assert unknown_id(spec_of(tokenizer)) == 0
    assert unknown_id(spec_of(byte_level())) is None
    spec = spec_of(FAMILIES["gemma"])
    spec["added_tokens"] = []
    assert 0 in byte_vocab_from_json(spec, size=300, eos=[], name="m").control


def test_an_eos_id_without_a_logit_is_an_error() -> None:
    with pytest.raises(VocabularyError, match=r"member 'm': end-of-text id 300 has no logit .*300\).*eos_token_id"):
        vocab_of(FAMILIES["llama"], size=300, eos=(2, 300))


@pytest.mark.parametrize(
    ("model", "decoder", "found"),
    [
        (models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"), decoders.WordPiece(), "type 'WordPiece'"),
        (models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"), decoders.Fuse(), "type 'WordLevel'"),
        (models.BPE({"a": 0}, []), None, r"\(BPE, no decoder\)"),
        (models.BPE({"a": 0}, []), decoders.CTC(), r"\(BPE, decoder step 'CTC'\)"),
        (models.BPE({"a": 0}, []), decoders.Strip(" ", 1, 0), "decoder step 'Strip'"),
        (
            models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"),
            decoders.ByteLevel(),
            "end_of_word_suffix '</w>'",
        ),
    ],
)
def test_a_family_without_an_exact_mapping_is_refused(model: Any, decoder: Any, found: str) -> None:
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(VocabularyError, match=rf"member 'm'.*{found}.*Use a checkpoint whose tokenizer"):
        vocab_of(tokenizer, size=4, eos=())


def test_a_byte_piece_is_a_byte_even_where_the_decoder_is_silent() -> None:
    spec = spec_of(unigram(byte_fallback=True))
    spec["decoder"] = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    assert byte_vocab_from_json(spec, size=400, eos=[2], name="m").pieces[3 + 10] == b"\n"


@given(st.lists(st.binary(max_size=3), max_size=8), st.lists(st.binary(max_size=3), max_size=8))
def test_fingerprints_tell_vocabularies_apart(left: list[bytes], right: list[bytes]) -> None:
    assert ByteVocab(tuple(left)).fingerprint == ByteVocab(tuple(left)).fingerprint
    assume(left != right)
    assert ByteVocab(tuple(left)).fingerprint != ByteVocab(tuple(right)).fingerprint


def test_fingerprints_cover_every_set_of_ids() -> None:
    pieces = (b"", b"", b"a")
    variants = [
        ByteVocab(pieces),
        ByteVocab(pieces, control=frozenset({0})),
        ByteVocab(pieces, unused=frozenset({0})),
        ByteVocab(pieces, control=frozenset({0}), eos=(0,)),
        ByteVocab(pieces, byte_fallback=frozenset({2})),
    ]
    assert len({vocab.fingerprint for vocab in variants}) == len(variants)


def test_the_layer_loads_without_tensors_or_tokenizers() -> None:
    code = (
        "import sys; sys.path.insert(0, '.'); import lm_eval_deepen.vocabulary\n"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'lm_eval') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
