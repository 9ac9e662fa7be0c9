"""Tokenizers as they are found in the field: spelt otherwise, lossy, larger than their model, with odd roles."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from vocabulary_helpers import SPACE, byte_level, codec_of, sentencepiece_bpe, spec_of, unigram

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.member.text import TextCodec
from lm_eval_deepen.vocabulary.tokenizer_json import byte_vocab_from_json, text_pieces

QUICK = settings(max_examples=60, deadline=None)


# What a decoder, a normalizer or a pre-tokenizer is, not how it is written.

REPLACE, FALLBACK, FUSE, STRIP = (
    decoders.Replace(SPACE, " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
)
SAME_DECODERS = {
    "as shipped": [REPLACE, FALLBACK, FUSE, STRIP],
    "fused first": [FUSE, REPLACE],
    "bytes first": [FALLBACK, FUSE, REPLACE, STRIP],
    "fused twice": [FALLBACK, FUSE, STRIP, REPLACE, FUSE],
    "nested": [decoders.Sequence([FALLBACK, decoders.Sequence([FUSE])]), decoders.Sequence([REPLACE])],
    "metaspace": [FALLBACK, decoders.Metaspace(SPACE, prepend_scheme="always")],
    "fused metaspace": [FALLBACK, FUSE, decoders.Metaspace(SPACE, prepend_scheme="never")],
    "a pattern of one character": [decoders.Replace(Regex(SPACE), " "), FALLBACK, FUSE],
    "a strip of nothing": [decoders.Strip(" ", 0, 0), REPLACE, FALLBACK, FUSE],
}
DUMMY = [("t", "h"), ("th", "e"), (SPACE, "the"), (SPACE, "t"), ("\u00e9", "\u4e2d"), (SPACE, "\u00e9\u4e2d")]


@pytest.mark.parametrize("spelling", SAME_DECODERS)
def test_decoders_that_do_the_same_read_the_same(spelling: str) -> None:
    tokenizer = sentencepiece_bpe(DUMMY)
    tokenizer.decoder = decoders.Sequence(SAME_DECODERS[spelling])
    codec, expected = codec_of(tokenizer), codec_of(sentencepiece_bpe(DUMMY))
    assert codec.vocab.fingerprint == expected.vocab.fingerprint
    text = "the \u00e9\u4e2d, \U0001f642 the\n"
    assert codec.encode(text) == expected.encode(text)
    text = text if spelling != "fused first" else "the \u00e9\u4e2d, the"  # it leaves byte pieces as they are
    assert tokenizer.decode(list(codec.encode(text))).lstrip() == text  # what the library makes of the same pieces


@pytest.mark.parametrize(
    "steps",
    [
        [decoders.Replace(Regex(SPACE + "+"), " "), FUSE],  # several marks become one space
        [FUSE, decoders.Replace("th", "TH")],  # may span two pieces
        [STRIP, REPLACE, FUSE],  # takes the space of every piece
        [decoders.ByteLevel(), decoders.Replace("a", "b")],
        [FUSE, decoders.Metaspace(SPACE, prepend_scheme="first")],  # takes all spaces
    ],
)
def test_decoders_that_do_more_are_refused(steps: list[Any]) -> None:
    tokenizer = sentencepiece_bpe(DUMMY)
    tokenizer.decoder = decoders.Sequence(steps)
    with pytest.raises(VocabularyError, match="decoder step"):
        codec_of(tokenizer)


def dummies() -> dict[str, Tokenizer]:
    """The same vocabulary with a prefix space, which is spelt in several ways."""
    found = {name: sentencepiece_bpe(DUMMY) for name in ("prepend", "always", "first", "nested")}
    for name in ("always", "first"):
        found[name].normalizer = None
        found[name].pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=name, split=False)
    replace = normalizers.Sequence([normalizers.Replace(Regex(" "), SPACE)])
    found["nested"].normalizer = normalizers.Sequence([normalizers.Sequence([normalizers.Prepend(SPACE)]), replace])
    found["unigram"] = unigram(byte_fallback=True)
    return found


DUMMIES = {name: (tokenizer, codec_of(tokenizer)) for name, tokenizer in dummies().items()}
WORDS = ["", " ", "\n", SPACE, "t", "th", "the", "he", "\u00e9", "\u4e2d", "\u043b", "\U0001f642", "  the", "a the"]


@pytest.mark.parametrize("family", DUMMIES)
def test_a_prompt_of_one_word_grows_as_the_whole_is_spelt(family: str) -> None:
    """The prefix space and the word after it may be one piece, which the continuation makes longer."""
    _, codec = DUMMIES[family]
    assert codec.prefix_space
    for prompt in WORDS:
        for continuation in WORDS:
            start = codec.prompt(prompt).before(continuation.encode())
            whole = codec.encode_prompt(prompt + continuation)
            found = codec.follow(start, continuation.encode())
            if not prompt:  # it is conditioned on the prefix token, and then on the prefix space alone
                whole = codec.prefix_ids + (whole[len(codec.automatic_prefix) :] or codec.encode(" "))
            assert found == whole, (prompt, continuation)


@pytest.mark.parametrize("family", DUMMIES)
def test_prompts_are_the_tokenizers_own(family: str) -> None:
    tokenizer, codec = DUMMIES[family]
    for prompt in WORDS:
        for continuation in WORDS[1:]:
            text = prompt + continuation
            if SPACE not in text:  # as text of its own it is a space to the tokenizer
                assert codec.encode_prompt(text) == tuple(tokenizer.encode(text).ids)


def test_the_text_after_a_control_token_keeps_its_dummy_space() -> None:
    """A template's last word is a prompt of one word, too."""
    tokenizer, codec = DUMMIES["always"]
    for text in ("</s>\u00e9", "</s> \u00e9", "a</s>\u00e9"):
        start = codec.rendered_prompt(text, tokenizer.encode(text).ids, ["</s>"])
        assert start.ids == tuple(tokenizer.encode(text).ids)
        assert codec.follow(start, "\u4e2d".encode()) == tuple(tokenizer.encode(text + "\u4e2d").ids)


# What a tokenizer cannot spell, it does not follow.

LOSSY = {
    "quotes": normalizers.Replace("\u2019", "'"),
    "byte order mark": normalizers.Replace("\ufeff", ""),
    "spaces": normalizers.Replace(Regex("[\u2028-\u202f]"), " "),
    "one letter": normalizers.Replace("\u0130", "i"),
    "letter by letter": normalizers.Sequence([normalizers.NFC(), normalizers.Replace("\u0132", "IJ")]),
}
ALTERED = "\u2019\ufeff\u2028\u0130\u0132"


def lossy(kind: str, family: str) -> Tokenizer:
    tokenizer = byte_level() if family == "byte_level" else sentencepiece_bpe(DUMMY)
    before = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([LOSSY[kind], *before])
    return tokenizer


LOSSY_CODECS = {(k, f): codec_of(lossy(k, f)) for k in LOSSY for f in ("byte_level", "llama")}
HOSTILE = st.text(st.sampled_from(list(ALTERED + " the'\u00e9\U0001f642\n")), max_size=8)


@QUICK
@given(st.sampled_from(sorted(LOSSY_CODECS)), HOSTILE, HOSTILE, st.binary(max_size=3))
def test_following_never_raises_and_never_alters(key: Any, prompt: str, text: str, rest: bytes) -> None:
    codec = LOSSY_CODECS[key]
    start = codec.prompt(prompt)
    for data in (text.encode(), text.encode() + rest, text.encode()[:-1]):
        ids = codec.follow(start, data)
        if ids is not None:
            assert codec.vocab.decode(ids) == codec.vocab.decode(start.head) + start.tail.encode() + data
    if not set(ALTERED) & set(prompt + text):
        assert codec.follow(start, text.encode()) is not None


@pytest.mark.parametrize("key", LOSSY_CODECS)
def test_an_altered_character_is_an_error_where_it_must_be_spelt_and_none_where_it_is_followed(key: Any) -> None:
    codec = LOSSY_CODECS[key]
    character = next(c for c in ALTERED if codec.follow(codec.prompt("a"), c.encode()) is None)
    assert codec.follow(codec.prompt("a"), b"the") is not None
    assert not codec.prompt(f"a {character} b").spelt
    assert codec.follow(codec.prompt(f"a {character} b"), b"the") is None
    with pytest.raises(VocabularyError, match=f"U\\+{ord(character):04X}"):
        codec.encode(f"a {character} b")


# Roles are no marks: what the file does not mark as special is text.


def with_roles(tokenizer: Tokenizer, **roles: Any) -> TextCodec:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    eos = () if wrapped.eos_token_id is None else (wrapped.eos_token_id,)
    return codec_of(wrapped, eos=eos)


@pytest.mark.parametrize("family", ["byte_level", "llama", "unigram"])
@pytest.mark.parametrize("role", ["pad_token", "bos_token", "unk_token", "eos_token"])
def test_a_piece_with_a_role_is_still_text(family: str, role: str) -> None:
    make = {"byte_level": byte_level, "llama": lambda: sentencepiece_bpe(DUMMY)}
    tokenizer = make.get(family, lambda: unigram(byte_fallback=True))()
    for piece in ("!", "("):
        codec = with_roles(tokenizer, **{role: piece})
        assert codec.vocab.decode(codec.encode("so (it) is!")) == b"so (it) is!"
        assert codec.vocab.ids_of[piece.encode()]
        assert tokenizer.token_to_id(piece) in codec.encode("so (it) is!")


def test_a_newline_that_ends_a_text_can_be_spelt() -> None:
    for tokenizer, piece in ((byte_level(), "\u010a"), (sentencepiece_bpe(DUMMY), "<0x0A>")):
        end = tokenizer.token_to_id(piece)
        codec = with_roles(tokenizer, eos_token=piece)
        text = f"one\ntwo {piece}\n\n"
        assert codec.vocab.eos == (end,) and end in codec.encode(text)
        assert codec.vocab.decode(codec.encode(text)) == text.encode()
        assert codec.vocab.ids_of[b"\n"] == (end,) and end not in codec.vocab.control
        events = codec.vocab.events  # what comes next is an end, and no newline
        assert end in events.control and events.pieces[end] == b"" and b"\n" not in events.ids_of
        assert events.eos == codec.vocab.eos and events.events is events


def test_an_end_of_text_that_no_file_marks_is_text_where_texts_are_spelt_with_it() -> None:
    tokenizer = sentencepiece_bpe([*DUMMY, ("<", "e"), ("<e", ">")])
    spec, end = spec_of(tokenizer), tokenizer.token_to_id("<e>")
    assert text_pieces(spec, [end, 1, 2, 10**6]) == {end}  # nothing spells <s> and </s>
    codec = codec_of(tokenizer, eos=(end, 2))
    assert codec.encode("<e>") == (end,) and codec.vocab.decode(codec.encode("</s>")) == b"</s>"
    listed = {**spec, "added_tokens": [*spec["added_tokens"], {"id": end, "content": "<e>", "special": True}]}
    assert text_pieces(listed, [end]) == frozenset()
    low = unigram(byte_fallback=True)
    assert text_pieces({**spec_of(low), "added_tokens": []}, [1, low.token_to_id("ing")]) == {low.token_to_id("ing")}


def test_an_added_token_is_matched_as_the_text_it_is() -> None:
    """A token of the byte alphabet that is listed as an added token: its content is another text than its bytes."""
    tokenizer = byte_level([AddedToken("\u00e9", normalized=False), AddedToken("\u010a", normalized=False)])
    codec = codec_of(tokenizer)
    for text in ("caf\u00e9\n", "\u010a"):
        assert codec.vocab.decode(codec.encode(text)) == text.encode()


# A tokenizer that is larger than its model.


@pytest.mark.parametrize("special", [False, True])
def test_a_token_without_a_logit_is_spelt_with_others(special: bool) -> None:
    for tokenizer in (byte_level(), sentencepiece_bpe(DUMMY), unigram(byte_fallback=True)):
        size = tokenizer.get_vocab_size()
        tokenizer.add_tokens([AddedToken("<new>", special=special), AddedToken(" newer", special=special)])
        for known in (None, size):
            codec = codec_of(tokenizer, size=size if known is None else size + 2, known=known)
            text = "a <new> newer b"
            assert codec.vocab.decode(codec.encode(text)) == text.encode()
            assert max(codec.encode(text)) < size
            assert codec.vocab.unused == (set() if known is None else {size, size + 1})


def test_pieces_of_the_model_itself_may_lack_a_logit() -> None:
    tokenizer = sentencepiece_bpe(DUMMY)
    last = tokenizer.get_vocab_size() - 1
    assert last in tokenizer.encode("\u00e9\u4e2d").ids
    codec = codec_of(tokenizer, size=last)
    assert codec.vocab.decode(codec.encode("\u00e9\u4e2d")) == "\u00e9\u4e2d".encode()
    assert max(codec.encode(" \u00e9\u4e2d the")) < last


def test_a_prompt_that_begins_with_a_token_without_a_logit_is_refused() -> None:
    tokenizer = byte_level()
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", size)])
    with pytest.raises(VocabularyError, match=rf"member 'm': .* puts '<bos>' \(id {size}\) before a text"):
        codec_of(tokenizer, size=size)


def test_what_is_read_does_not_depend_on_how_it_is_called() -> None:
    """The function that the codec uses, called as before: every role is control."""
    spec = json.loads(byte_level().to_str())
    vocab = byte_vocab_from_json(spec, size=400, eos=[5], extra_control=[6], name="m")
    assert {5, 6} <= vocab.control and vocab.events is vocab
