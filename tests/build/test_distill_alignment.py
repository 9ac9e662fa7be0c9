"""Positions of a source for positions of the target: against the bytes that both have read, spelt out."""

from __future__ import annotations

import itertools
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_deepen.build.distill.alignment import by_bytes, by_dtw, warp
from lm_eval_deepen.build.distill.corpus import Tokens
from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.member import Member, load_member

TEXT = "The café, 中国 and 🙂👨‍👩‍👧:\n\tdef f(x):\r\n    return x  + 1 ∮ Sofia is the capital of Bulgaria."


@pytest.fixture(scope="module")
def members(pico: dict[str, Path]) -> dict[str, Member]:
    return {name: load_member(MemberConfig(name=name, pretrained=str(path)), "cpu") for name, path in pico.items()}


def starts(tokens: list[bytes]) -> np.ndarray:
    sizes = [len(token) for token in tokens]
    return np.array([sum(sizes[:i]) for i in range(len(tokens))], dtype=np.int64)


def reference(target: list[bytes], source: list[bytes]) -> list[int]:
    """The source's position that has read the same bytes, by comparing the bytes."""
    found = []
    for i in range(len(target)):
        read = b"".join(target[:i])
        found.append(next((j for j in range(len(source)) if b"".join(source[:j]) == read), -1))
    return found


@st.composite
def two_cuts(draw: st.DrawFn) -> tuple[list[bytes], list[bytes]]:
    data = draw(st.binary(min_size=1, max_size=24))
    cuts = [sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=12))) for _ in range(2)]
    edges = [[0, *(c for c in cut if c < len(data)), len(data)] for cut in cuts]
    first, second = ([data[a:b] for a, b in zip(e, e[1:], strict=False)] for e in edges)
    return first, second


@settings(max_examples=200, deadline=None)
@given(two_cuts())
def test_equal_contexts_are_found_and_no_others(cuts: tuple[list[bytes], list[bytes]]) -> None:
    target, source = cuts
    assert by_bytes(starts(target), starts(source)).tolist() == reference(target, source)


@pytest.mark.parametrize("names", list(itertools.permutations(["bytelevel", "metaspace", "padded"], 2)))
def test_aligned_positions_have_read_the_same_text_under_real_tokenizers(members, names) -> None:
    target, source = (Tokens.of(members[name].codec, TEXT) for name in names)
    read = {}
    for name, tokens in zip(names, (target, source), strict=True):
        vocab = members[name].codec.vocab
        extra = len(vocab.decode(tokens.ids)) - len(TEXT.encode())  # a space that only this tokenizer has put first
        assert extra == (name == "padded")
        # what of the text has been read before each token; None where the space itself is yet to come
        whole = [vocab.decode(tokens.ids[:i]) for i in range(len(tokens.ids))]
        read[name] = [spelt[extra:] if len(spelt) >= extra else None for spelt in whole]
        assert all(text is None or TEXT.encode().startswith(text) for text in read[name])
    at = by_bytes(target.ends, source.ends)
    for i, text in enumerate(read[names[0]]):
        expected = [j for j, other in enumerate(read[names[1]]) if other == text and text is not None]
        assert ([at[i]] if at[i] >= 0 else []) == expected
    assert (at >= 0).mean() > 0.3


def test_a_tokenizer_is_aligned_with_itself_everywhere(members) -> None:
    for member in members.values():
        tokens = Tokens.of(member.codec, TEXT)
        assert by_bytes(tokens.ends, tokens.ends).tolist() == list(range(len(tokens.ids)))


def test_tokens_that_do_not_spell_the_text_are_refused(members, monkeypatch) -> None:
    codec = members["bytelevel"].codec
    monkeypatch.setattr(type(codec), "encode_prompt", lambda self, text: (5, 6))
    with pytest.raises(VocabularyError, match="does not spell 'some text' exactly"):
        Tokens.of(codec, "some text")


def edit_distance(a: bytes, b: bytes) -> int:
    @cache
    def d(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return d(len(a), len(b))


def least_cost(target: list[bytes], source: list[bytes]) -> int:
    """Over all monotone ways from the first pair to the last, by brute force."""

    @cache
    def best(i: int, j: int) -> float:
        before = [best(a, b) for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if a >= 0 and b >= 0]
        return edit_distance(target[i], source[j]) + (min(before) if before else 0)

    return best(len(target) - 1, len(source) - 1)


@settings(max_examples=100, deadline=None)
@given(two_cuts())
def test_warping_is_a_way_of_least_cost(cuts: tuple[list[bytes], list[bytes]]) -> None:
    target, source = cuts
    pairs = [(i, j) for i, found in enumerate(warp(target, source)) for j in found]
    assert pairs[0] == (0, 0) and pairs[-1] == (len(target) - 1, len(source) - 1)
    steps = {(b[0] - a[0], b[1] - a[1]) for a, b in zip(pairs, pairs[1:], strict=False)}
    assert steps <= {(0, 1), (1, 0), (1, 1)}
    assert sum(edit_distance(target[i], source[j]) for i, j in pairs) == least_cost(target, source)


def warped_slowly(target: list[bytes], source: list[bytes]) -> list[list[int]]:
    """Cell by cell; of equal ways the last step goes along both, else along the source."""
    costs = {(-1, -1): 0.0}
    for i, a in enumerate(target):
        for j, b in enumerate(source):
            before = [costs.get(place, math.inf) for place in ((i - 1, j - 1), (i, j - 1), (i - 1, j))]
            costs[i, j] = edit_distance(a, b) + min(before)
    partners: list[list[int]] = [[] for _ in target]
    i, j = len(target) - 1, len(source) - 1
    while i >= 0 and j >= 0:
        partners[i].insert(0, j)
        i, j = min([(i - 1, j - 1), (i, j - 1), (i - 1, j)], key=lambda place: costs.get(place, math.inf))
    return partners


@settings(max_examples=200, deadline=None)
@given(*[st.lists(st.text("ab ", max_size=3).map(str.encode), max_size=9)] * 2)
def test_warping_goes_the_way_of_the_plain_table(target: list[bytes], source: list[bytes]) -> None:
    assert warp(target, source) == warped_slowly(target, source)


def test_dtw_takes_the_distribution_after_the_equal_token_and_masks_the_rest() -> None:
    target, source = [b"it", b" gets", b" now", b" here"], [b"it", b" get", b"s", b" now", b" here"]
    assert warp(target, source) == [[0], [1, 2], [3], [4]]
    # after "it": after "it"; after " gets": two tokens, masked; after " now": after " now"
    assert by_dtw(target, source).tolist() == [0, 1, -1, 4]
    # the paper also aligns tokens that the vocabulary map sends to each other
    assert by_dtw(target, source[:2] + source[3:], target).tolist() == [0, 1, 2, 3]
    assert by_dtw(target, source[:2] + source[3:]).tolist() == [0, 1, -1, 3]


@pytest.mark.parametrize("tokens", [[], [b"a"]])
def test_short_sequences_have_no_way_or_a_trivial_one(tokens: list[bytes]) -> None:
    assert by_dtw(tokens, [b"a"]).tolist() == [0] * len(tokens)
    assert by_dtw(tokens, []).tolist() == [-1] * len(tokens)
    assert by_bytes(starts(tokens), starts([])).tolist() == [-1] * len(tokens)


def test_two_tokens_warped_onto_one_have_no_distribution_after_them() -> None:
    target, source = [b"a", b"a", b"b", b"c"], [b"a", b"b", b"c"]
    assert warp(target, source) == [[0], [0], [1], [2]]
    assert by_dtw(target, source).tolist() == [0, -1, -1, 2]
