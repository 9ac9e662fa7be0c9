"""Safe cuts: places where both sides of a text are tokenised independently."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_deepen.vocabulary import ByteVocab
from lm_eval_deepen.vocabulary.cuts import last_safe_cut, safe_cut_allowed, safe_cuts, safe_segments


@given(st.text(alphabet="a1 ,\n\u00e9\u00a0\u4e2d", max_size=20))
def test_cuts_are_spaces_after_letters_and_digits(text: str) -> None:
    expected = [i for i in range(1, len(text)) if text[i] == " " and text[i - 1] in "a1\u00e9\u4e2d"]
    assert safe_cuts(text) == expected
    assert last_safe_cut(text) == (expected[-1] if expected else 0)
    assert "".join(safe_segments(text)) == text
    assert len(safe_segments(text)) == (len(expected) + 1 if text else 0)
    assert all(safe_cuts(segment) == [] for segment in safe_segments(text))


def test_segments_of_plain_prose() -> None:
    assert safe_segments("two words, then\n three  ") == ["two", " words, then\n three", "  "]
    assert last_safe_cut("walk") == last_safe_cut("") == last_safe_cut(" a") == 0


PIECES = st.lists(st.text(alphabet="a ,\u00e9", min_size=1, max_size=3).map(str.encode), max_size=8)
PARTS = st.lists(st.sampled_from([b"\xa9 ", b"\xc3", b"\xa9", b" \xc3", b"\xa9a"]), max_size=2)


@given(PIECES, PARTS, st.lists(st.text(alphabet="a ,\u00e9", max_size=12), min_size=1, max_size=5))
@settings(max_examples=300)
def test_allowed_means_no_token_can_span_a_cut(whole: list[bytes], parts: list[bytes], texts: list[str]) -> None:
    pieces = tuple(whole + parts)
    allowed = safe_cut_allowed(ByteVocab(pieces))
    for text in [*texts, *(p.decode() for p in whole), "\u00e9 a"]:
        data = text.encode()
        for cut in (len(text[:at].encode()) for at in safe_cuts(text)):
            spanning = [
                piece
                for piece in pieces
                for start in range(max(0, cut - len(piece) + 1), cut)
                if data.startswith(piece, start)
            ]
            assert not (allowed and spanning)
    bad = any(piece[n - 1 : n + 1] in (b"a ", b"\xa9 ") for piece in pieces for n in range(1, len(piece)))
    assert allowed == (not bad)


def test_one_odd_piece_does_not_forbid_cuts() -> None:
    assert safe_cut_allowed(ByteVocab((b"a", b" b", b"> </", b"\n ", "\u3000 ".encode(), b"  ")))
    assert not safe_cut_allowed(ByteVocab((b"a b",)))
    assert not safe_cut_allowed(ByteVocab(("\u00e9 ".encode(),)))
    assert not safe_cut_allowed(ByteVocab((b"\xa9 ",)))
