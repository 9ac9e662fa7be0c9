"""Rows from bytes, and the averages over the classes they make, against slow references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.fusion.base import MemberView, Spelling
from lm_eval_deepen.fusion.deepen import Deepen
from lm_eval_deepen.relative.rows_from_bytes import Tokenizers, anchor_classes, class_matrix
from lm_eval_deepen.relative.rows_from_embeddings import MatrixSpec
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.vocabulary.anchors import AnchorSet, find_anchors
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

ANCHORS = AnchorSet((b"a", b"ab", b"abc", b"b", b"x"))
PIECES = (b"", b"a", b"ab", b"abcd", b"ac", b"zz", b"xyz", b"b", b"abd")


def member(name: str, pieces, encode=None, fingerprint: str = "", seed: int = 0) -> MemberView:
    rows = torch.randn(len(pieces), 4, generator=torch.Generator().manual_seed(seed))
    vocab = ByteVocab(tuple(pieces), frozenset({0}), frozenset(), (0,))
    spelling = None if encode is None else Spelling(encode, fingerprint)
    return MemberView(name, vocab, lambda: rows, lambda: f"rows{seed}", spelling=spelling)


def by(table: dict[bytes, bytes], pieces):
    """A tokenizer that begins some bytes as a table says, and others with the longest piece."""

    def encode(data: bytes):
        first = table.get(data)
        if first is None:
            first = next((data[:n] for n in range(len(data), 0, -1) if data[:n] in pieces), None)
        return None if first is None else [pieces.index(first)]

    return encode


def test_without_tokenizers_it_is_the_longest_anchor_a_piece_begins_with() -> None:
    vocab = member("m", PIECES).vocabulary
    found = anchor_classes(vocab, ANCHORS).tolist()
    assert [ANCHORS.pieces[a] if a < 5 else None for a in found] == [
        None, b"a", b"ab", b"abc", b"a", None, b"x", b"b", b"ab",
    ]  # fmt: skip


def test_tokenizers_say_how_another_member_would_begin_a_piece() -> None:
    vocab = member("m", PIECES).vocabulary
    other = member("o", (b"", b"a", b"ab", b"abc", b"b", b"x", b"bd"), None)
    spelt = by({b"abcd": b"a", b"abd": b"a"}, other.vocabulary.pieces)
    tokenizers = Tokenizers.of([member("o", other.vocabulary.pieces, spelt, "f")])
    found = dict(zip(PIECES, anchor_classes(vocab, ANCHORS, tokenizers).tolist(), strict=True))
    assert ANCHORS.pieces[found[b"abcd"]] == b"a" == ANCHORS.pieces[found[b"abd"]]  # not the longest
    assert ANCHORS.pieces[found[b"xyz"]] == b"x" and found[b"zz"] == len(ANCHORS)


def test_a_piece_is_shortened_until_all_members_have_it() -> None:
    anchors = AnchorSet((b"a", b"b"))
    chain = [{b"abcd": b"abc"}, {b"abc": b"ab"}, {b"ab": b"a"}]
    members = [member(f"m{i}", PIECES + (b"abc",), by(t, PIECES + (b"abc",)), f"f{i}") for i, t in enumerate(chain)]
    assert anchors.pieces[anchor_classes(members[0].vocabulary, anchors, Tokenizers.of(members))[3]] == b"a"
    forward, backward = Tokenizers.of(members), Tokenizers.of(members[::-1])
    assert forward.fingerprints == backward.fingerprints  # whoever is the main member


def test_a_tokenizer_that_would_alter_the_bytes_counts_as_silent() -> None:
    def refuse(data: bytes):
        raise VocabularyError("does not spell that")

    tokenizers = Tokenizers.of([member("o", PIECES, refuse, "f")])
    vocab = member("m", PIECES).vocabulary
    assert torch.equal(anchor_classes(vocab, ANCHORS, tokenizers), anchor_classes(vocab, ANCHORS))


@given(st.lists(st.text("abc", min_size=1, max_size=4).map(str.encode), unique=True, max_size=30))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_classes_against_brute_force(pieces: list[bytes]) -> None:
    vocab = ByteVocab((b"", *pieces), frozenset({0}))
    anchors = AnchorSet(tuple(sorted(pieces[::2])))
    for piece, found in zip(vocab.pieces, anchor_classes(vocab, anchors).tolist(), strict=True):
        fitting = [a for a in anchors.pieces if piece and piece.startswith(a)]
        assert (anchors.pieces[found] if found < len(anchors) else None) == max(fitting, key=len, default=None)


def test_rows_are_one_hot_and_products_are_those_of_the_dense_matrix() -> None:
    classes, described = torch.tensor([5, 0, 1, 2, 0, 5, 4]), torch.tensor([False, *[True] * 6])
    matrix = class_matrix(classes, described, 5)
    dense = torch.zeros(7, 6)
    dense[torch.arange(1, 7), classes[1:]] = 1
    op, p, q = matrix.full(), torch.rand(3, 7), torch.rand(3, 6)
    torch.testing.assert_close(op.project(p), p @ dense)
    torch.testing.assert_close(op.back(q), q @ dense.T)


SMALL = ((b"", b"a", b"b", b"ab", b"c", b"ca", b"q"), (b"", b"a", b"b", b"c", b"cab", b"aa", b"bb", b"bba"))


def pair() -> list[MemberView]:
    return [member("m", SMALL[0], by({}, SMALL[0]), "m"), member("o", SMALL[1], by({}, SMALL[1]), "o", 1)]


def slow(members, logp, weights, average: str, classes) -> torch.Tensor:
    """Class by class: average over classes and end of text, then share each class as the main member does."""
    p = [row.double().exp() for row in logp]
    width = int(max(c.max() for c in classes)) + 1
    mass = torch.zeros(len(members), width + 1).double()
    for m, own in enumerate(p):
        for i, value in enumerate(own):
            mass[m, width if i == 0 else classes[m][i]] += value
    if average == "linear":
        mixed = (weights[:, None].double() * mass).sum(0)
        reachable = mass[0] > 0
        text = mixed[:width].sum()
        mixed = torch.where(reachable, mixed, 0.0)
        mixed[:width] *= text / mixed[:width].sum()
    else:
        text, end = mass[:, :width].sum(1), mass[:, width]
        own = mass[:, :width] / text[:, None]
        own = torch.where(own == 0, 1e-12, own)
        mixed = (weights[:, None].double() * own.log()).sum(0).exp()
        mixed = torch.where(mass[0, :width] > 0, mixed, 0.0)
        text, end = ((weights.double() * x.log()).sum().exp() for x in (text, end))
        mixed = torch.cat([mixed / mixed.sum() * text, end[None]]) / (text + end)
    out = [p[0][i] / mass[0, width if i == 0 else classes[0][i]] for i in range(len(p[0]))]
    return torch.stack([out[i] * mixed[width if i == 0 else classes[0][i]] for i in range(len(out))]).log().float()


@pytest.mark.parametrize("average", ["linear", "geometric"])
@pytest.mark.parametrize("rows", ["prefix", "canonical"])
def test_fusion_is_what_the_definition_says(average: str, rows: str, tmp_path) -> None:
    members = pair()
    anchors = find_anchors([m.vocabulary for m in members], names=["m", "o"], min_anchors=1)
    tokenizers = Tokenizers.of(members) if rows == "canonical" else Tokenizers()
    classes = [anchor_classes(m.vocabulary, anchors, tokenizers) for m in members]
    g = torch.Generator().manual_seed(4)
    logp = [torch.log_softmax(2 * torch.randn(5, len(m.vocabulary), generator=g), dim=1) for m in members]
    weights = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8], [0.01, 0.99], [0.7, 0.3]])
    store = MatrixStore(tmp_path, progress=False)
    fuser = Deepen(rows=rows, average=average, min_anchors=1).build(members, store)
    got = fuser.fuse(logp, weights).logp
    for b in range(5):
        expected = slow(members, [row[b] for row in logp], weights[b], average, classes)
        torch.testing.assert_close(got[b], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("average", ["linear", "geometric"])
def test_a_copy_with_permuted_ids_gains_and_loses_nothing(average: str, tmp_path) -> None:
    main, order = member("m", PIECES), torch.randperm(len(PIECES), generator=torch.Generator().manual_seed(1))
    pieces = [PIECES[i] for i in order]
    end = pieces.index(b"")
    vocab = ByteVocab(tuple(pieces), frozenset({end}), frozenset(), (end,))
    rows = main.load_embeddings()[order]
    copy = MemberView("copy", vocab, lambda: rows, lambda: "copy")
    logp = torch.log_softmax(3 * torch.randn(7, len(PIECES), generator=torch.Generator().manual_seed(2)), dim=1)
    fuser = Deepen(average=average, min_anchors=1).build([main, copy], MatrixStore(tmp_path, progress=False))
    got = fuser.fuse([logp, logp[:, order]], torch.tensor([[0.3, 0.7]]).expand(7, 2)).logp
    torch.testing.assert_close(got, logp, atol=2e-6, rtol=0)


def test_a_matrix_from_bytes_knows_its_tokenizers_and_no_embedding(tmp_path) -> None:
    members = pair()
    anchors = find_anchors([m.vocabulary for m in members], names=["m", "o"], min_anchors=1)
    store, spec = MatrixStore(tmp_path, progress=False), MatrixSpec(pieces="canonical")
    store.get(members[0], anchors, spec, Tokenizers.of(members))
    info = store.info(members[0], anchors, spec, Tokenizers.of(members))
    assert "embedding" not in info.identity and len(info.identity["tokenizers"]) == 2
    merged = [members[0], member("o", SMALL[1], by({b"ca": b"c"}, SMALL[1]), "merges otherwise", 1)]
    assert store.path(members[0], anchors, spec, Tokenizers.of(merged)) != info.path
    prefix = store.identity(members[0], anchors, MatrixSpec(pieces="prefix"), Tokenizers.of(members))
    assert "tokenizers" not in prefix
