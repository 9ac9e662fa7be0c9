"""Anchors are the byte strings common to all members: sorted, hashed, the same everywhere."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabulary_helpers import CAFE, SPACE, byte_level, sentencepiece_bpe, spec_of

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.vocabulary import ByteVocab
from lm_eval_deepen.vocabulary.anchors import AnchorSet, anchor_ids, duplicates, find_anchors
from lm_eval_deepen.vocabulary.tokenizer_json import byte_vocab_from_json

PIECES = [bytes([b]) for b in range(97, 123)]
ROOT = Path(__file__).resolve().parents[2]


@st.composite
def vocabularies(draw: st.DrawFn) -> ByteVocab:
    """Random pieces over a small alphabet: repetitions, control and unused ids among them."""
    kinds = st.sampled_from(["text"] * 5 + ["control", "unused"])
    drawn = draw(st.lists(st.tuples(kinds, st.binary(min_size=1, max_size=2).map(_small)), max_size=40))
    ids = {kind: [i for i, (k, _) in enumerate(drawn) if k == kind] for kind in ("control", "unused")}
    text = [i for i, (kind, _) in enumerate(drawn) if kind == "text"]
    return ByteVocab(
        tuple(piece if kind == "text" else b"" for kind, piece in drawn),
        control=frozenset(ids["control"]),
        unused=frozenset(ids["unused"]),
        byte_fallback=frozenset(draw(st.sets(st.sampled_from(text), max_size=5)) if text else ()),
    )


def _small(data: bytes) -> bytes:
    return bytes(b"ab \xc3\xa9"[byte % 5] for byte in data)


@given(st.lists(vocabularies(), min_size=1, max_size=4))
def test_anchors_against_brute_force(vocabs: list[ByteVocab]) -> None:
    found = find_anchors(vocabs, min_anchors=0, names=[str(n) for n in range(len(vocabs))])
    expected = []
    for piece in vocabs[0].pieces:
        if piece and all(any(piece == other for other in vocab.pieces) for vocab in vocabs):
            expected.append(piece)
    assert list(found.pieces) == sorted(set(expected))
    for vocab in vocabs:
        ids, others = anchor_ids(vocab, found), duplicates(vocab, found)
        assert [vocab.pieces[i] for i in ids] == list(found.pieces)
        assert not set(ids) & (vocab.control | vocab.unused | set(others))
        sharing = {i for i, piece in enumerate(vocab.pieces) if piece in found.pieces and piece}
        assert sharing == set(ids) | set(others)
        assert all(vocab.pieces[i] == found.pieces[a] for i, a in others.items())
        for i, piece in zip(ids, found.pieces, strict=True):
            candidates = [j for j, other in enumerate(vocab.pieces) if other == piece]
            trained = [j for j in candidates if j not in vocab.byte_fallback]
            assert i == min(trained or candidates)


@given(st.lists(vocabularies(), min_size=2, max_size=3), st.integers(1, 6), st.integers(-5, 5))
def test_a_subset_is_the_lowest_hashes(vocabs: list[ByteVocab], limit: int, seed: int) -> None:
    names = [str(n) for n in range(len(vocabs))]
    whole = find_anchors(vocabs, min_anchors=0, names=names)
    part = find_anchors(vocabs, min_anchors=0, max_anchors=limit, seed=seed, names=names)
    ranked = sorted(whole.pieces, key=lambda p: hashlib.sha256(str(seed).encode() + b"\0" + p).hexdigest())
    assert part.pieces == tuple(sorted(ranked[:limit]))
    assert (part == whole) == (len(whole) <= limit)


def test_subsets_differ_by_seed_and_grow_with_the_limit() -> None:
    vocab = ByteVocab(tuple(PIECES))
    subsets = [find_anchors([vocab], max_anchors=16, seed=seed, names=["m"]) for seed in range(4)]
    assert len({subset.pieces for subset in subsets}) == 4
    larger = find_anchors([vocab], max_anchors=20, seed=0, names=["m"])
    assert set(subsets[0].pieces) < set(larger.pieces)


def test_the_order_of_members_does_not_matter() -> None:
    left, right = ByteVocab(tuple(PIECES[:20])), ByteVocab(tuple(reversed(PIECES)))
    a = find_anchors([left, right], names=["a", "b"])
    b = find_anchors([right, left], names=["b", "a"])
    assert a == b and a.fingerprint == b.fingerprint and list(a.pieces) == PIECES[:20]


def test_the_fingerprint_covers_pieces_lengths_and_subset() -> None:
    sets = [
        AnchorSet((b"a", b"bc")),
        AnchorSet((b"ab", b"c")),
        AnchorSet((b"abc",)),
        AnchorSet((b"a", b"bc"), max_anchors=2),
        AnchorSet((b"a", b"bc"), max_anchors=2, seed=1),
        AnchorSet(()),
    ]
    assert len({anchors.fingerprint for anchors in sets}) == len(sets)
    assert AnchorSet((b"a", b"bc")).fingerprint == sets[0].fingerprint
    assert len(sets[0]) == 2


@pytest.mark.parametrize("pieces", [(b"b", b"a"), (b"a", b"a"), (b"", b"a")])
def test_unsorted_repeated_or_empty_anchors_are_an_error(pieces: tuple[bytes, ...]) -> None:
    with pytest.raises(VocabularyError, match="strictly ascending byte strings"):
        AnchorSet(pieces)


def test_too_few_common_pieces_is_an_error() -> None:
    left, right = ByteVocab(tuple(PIECES)), ByteVocab((*PIECES[:3], b"?"))
    message = (
        r"members 'A' \(26 pieces\), 'B' \(4 pieces\) have 3 pieces in common as bytes; "
        r"at least 16 anchors are needed\. Leave out the member"
    )
    with pytest.raises(VocabularyError, match=message):
        find_anchors([left, right], names=["A", "B"])
    assert len(find_anchors([left, right], min_anchors=3, names=["A", "B"])) == 3


def test_a_limit_below_the_minimum_and_missing_names_are_errors() -> None:
    vocab = ByteVocab(tuple(PIECES))
    with pytest.raises(VocabularyError, match=r"max_anchors is 8, but at least 16 .*Raise max_anchors"):
        find_anchors([vocab], max_anchors=8, names=["m"])
    with pytest.raises(VocabularyError, match="got 1 names for 2"):
        find_anchors([vocab, vocab], names=["m"])
    with pytest.raises(VocabularyError, match="got 0 names for 0"):
        find_anchors([], names=[])
    with pytest.raises(VocabularyError, match=r"anchor b'\?' is not in the vocabulary of 26 pieces"):
        anchor_ids(vocab, AnchorSet((b"?",)))


def test_families_share_bytes_not_strings() -> None:
    mangled, marked = byte_level(), sentencepiece_bpe(CAFE)
    vocabs = [
        byte_vocab_from_json(spec_of(t), size=t.get_vocab_size() + pad, eos=[2], name="m")
        for t, pad in ((mangled, 0), (marked, 37))
    ]
    anchors = find_anchors(vocabs, names=["mangled", "marked"])
    pairs = {
        piece: (mangled.id_to_token(i), marked.id_to_token(j))
        for piece, i, j in zip(anchors.pieces, *(anchor_ids(v, anchors) for v in vocabs), strict=True)
    }
    assert pairs[" caf\u00e9".encode()] == ("\u0120caf\u00c3\u00a9", SPACE + "caf\u00e9")
    assert pairs["\u4e2d".encode()] == ("\u00e4\u00b8\u0143", "\u4e2d")
    assert pairs[b"\n"] == ("\u010a", "<0x0A>")
    assert pairs[b"\xe9"] == ("\u00e9", "<0xE9>")
    assert pairs[b"A"] == ("A", "A")  # the text piece, not <0x41>
    assert duplicates(vocabs[1], anchors)[marked.token_to_id("<0x41>")] == anchors.pieces.index(b"A")
    assert b"</s>" not in pairs  # special in both
    assert max(anchor_ids(vocabs[1], anchors)) < marked.get_vocab_size()  # no padded row


def test_the_same_under_every_hash_seed() -> None:
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from lm_eval_deepen.vocabulary.anchors import ByteVocab, find_anchors\n"
        "pieces = tuple(str(n).encode() for n in range(500))\n"
        "v = [ByteVocab(pieces, control=frozenset([5, 500])), ByteVocab(pieces[::-1])]\n"
        "a, b = (find_anchors(v, max_anchors=m, seed=3, names=['a', 'b']) for m in (None, 50))\n"
        "print(a.fingerprint, b.fingerprint, v[0].fingerprint, b.pieces)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-S", "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(outputs) == 1 and len(outputs.pop().split()) == 53
