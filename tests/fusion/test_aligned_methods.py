"""MinED and EVA: nearest pieces by edit distance, and alignment of output embeddings, against slow references."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_worlds import renormalised, rows, trio, view, with_output_rows

from lm_eval_deepen.errors import ConfigError, MatrixError, VocabularyError
from lm_eval_deepen.fusion import _edit
from lm_eval_deepen.fusion._edit import distance, nearest
from lm_eval_deepen.fusion.eva import Eva, align, procrustes
from lm_eval_deepen.fusion.mined import Mined, nearest_pieces
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.vocabulary.anchors import find_anchors
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab


@pytest.fixture
def store(tmp_path) -> MatrixStore:
    return MatrixStore(tmp_path, progress=False)


# ---- edit distance


def slow_distance(a: bytes, b: bytes) -> int:
    """The textbook recurrence."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def strings(least: int, most: int) -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from(b"ab\xc3\x00"), min_size=least, max_size=most).map(bytes)


@given(strings(1, 80), strings(0, 80))
@settings(max_examples=60, deadline=None)
def test_the_distance_is_the_textbooks(a: bytes, b: bytes) -> None:
    assert distance(a, b) == slow_distance(a, b)


SIZES = st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 32, 33, 64, 65, 70])
SIZED = SIZES.flatmap(lambda n: strings(n, n))


@given(st.lists(SIZED, min_size=1, max_size=12, unique=True), st.lists(st.one_of(SIZED, strings(0, 5)), max_size=8))
@settings(max_examples=40, deadline=None)
def test_the_nearest_candidate_is_the_first_of_those_at_least_distance(candidates, queries) -> None:
    index, found = nearest(queries, candidates)
    for n, query in enumerate(queries):
        distances = [slow_distance(query, candidate) for candidate in candidates]
        assert (found[n], index[n]) == (min(distances), distances.index(min(distances)))


@given(*[st.lists(st.one_of(SIZED, strings(0, 5)), max_size=8)] * 2)
@settings(max_examples=40, deadline=None)
def test_all_distances_are_the_textbooks(queries, candidates) -> None:
    found = _edit.distances(queries, candidates)
    assert found.tolist() == [[slow_distance(query, candidate) for candidate in candidates] for query in queries]


def test_many_candidates_and_long_queries(monkeypatch) -> None:
    monkeypatch.setattr(_edit, "CHUNK", 7)  # several chunks per word size
    candidates = [b"%d" % (n * 7919) * (1 + n % 4) for n in range(60)]
    queries = [b"%d" % (n * 104729) for n in range(40)] + [b"12" * 150, b"7919"]
    index, found = nearest(queries, candidates)
    for n, query in enumerate(queries):
        distances = [slow_distance(query, candidate) for candidate in candidates]
        assert (found[n], index[n]) == (min(distances), distances.index(min(distances)))


def test_nearest_refuses_what_has_no_answer() -> None:
    for candidates in ([], [b"a", b""]):
        with pytest.raises(ValueError, match="nearest needs candidates"):
            nearest([b"x"], candidates)
    assert nearest([], [b"a"])[0].tolist() == []


# ---- mined


def targets(vocabulary: ByteVocab, main: ByteVocab) -> list[int]:
    matrix = nearest_pieces(vocabulary, main)
    return torch.where(matrix.values[:, 0] > 0, matrix.indices[:, 0], -1).tolist()


def test_mined_maps_equal_bytes_first_then_the_nearest_and_ends_to_the_end() -> None:
    main = ByteVocab((b"", b"walk", b" walk", b"talk", b"walk", b"x"), frozenset({0}), eos=(0,))
    pieces = (b" walk", b"walks", b"", b"balk", b"walk", b"", b"")
    other = ByteVocab(pieces, frozenset({2, 6}), frozenset({5}), (6,))
    # "walks" is one edit from "walk"; "balk" is one edit from "walk" and from "talk": the lower id
    assert targets(other, main) == [2, 1, -1, 1, 1, -1, 0]


def test_mined_keeps_leading_spaces_and_bytes_apart() -> None:
    main = ByteVocab((b"ing", b" ing", "é".encode(), b"\xc3"))
    other = ByteVocab((b" in", b"in", "è".encode(), b"\xc3\xb0"))
    assert targets(other, main) == [1, 0, 2, 2]


@pytest.mark.parametrize("byte_pieces", [False, True])
def test_mined_equals_the_reference(store: MatrixStore, byte_pieces: bool) -> None:
    members, weights = trio(byte_pieces), torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.6, 0.0]])
    logp, fuser = rows(members, 2), Mined().build(members, store)
    got, main = fuser.fuse(logp, weights).logp.double().exp(), members[0].vocabulary
    for n in range(2):
        expected = torch.zeros(len(main), dtype=torch.float64)
        for member, row, weight in zip(members, logp, weights[n], strict=True):
            vocab = member.vocabulary
            p = row[n].double().exp()
            text = [i for i, piece in enumerate(vocab.pieces) if piece]
            p = p / (p[text].sum() + p[list(vocab.eos)].sum())
            for i in text + list(vocab.eos):
                if vocab is main:
                    ids = [i]
                elif i in vocab.eos:
                    ids = list(main.eos)
                else:
                    near = min(main.ids_of, key=lambda c: (slow_distance(vocab.pieces[i], c), main.ids_of[c][0]))
                    ids = list(main.ids_of[near])
                own = logp[0][n][ids].double().softmax(0)
                expected[ids] += float(weight) * p[i] * own
        own = renormalised(logp[0][n : n + 1], main)[0].double().exp()
        control = [i for i in main.control if i not in main.eos]
        expected *= 1 - own[control].sum()
        expected[control] = own[control]
        torch.testing.assert_close(got[n], expected, atol=1e-7, rtol=1e-5)


def test_mined_maps_are_made_once(store: MatrixStore, monkeypatch) -> None:
    members = trio()
    before = Mined().build(members, store).fuse(rows(members, 2), torch.full((2, 3), 1 / 3)).logp
    monkeypatch.setattr("lm_eval_deepen.fusion.mined.nearest", lambda *_: pytest.fail("built twice"))
    renamed = [replace(member, name=f"another {n}") for n, member in enumerate(members)]
    fuser = Mined().build(renamed, store)
    assert torch.equal(fuser.fuse(rows(members, 2), torch.full((2, 3), 1 / 3)).logp, before)
    assert [fact["member"] for fact in fuser.facts["maps"]] == ["another 1", "another 2"]


def test_a_damaged_map_and_an_unusable_folder_are_errors(store: MatrixStore, tmp_path) -> None:
    Mined().build(trio(), store)
    file = next(iter(sorted(store.folder.glob("mined-*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(MatrixError, match=f"{file.name} is damaged.*Delete it"):
        Mined().build(trio(), store)
    (tmp_path / "occupied").write_text("")
    with pytest.raises(MatrixError, match="Matrix folder .*occupied.below cannot be used .*matrix_dir"):
        Mined().build(trio(), MatrixStore(tmp_path / "occupied" / "below"))


# ---- eva


def rotated(d: int, wider: int, seed: int = 3) -> torch.Tensor:
    """A map [d, wider] with orthonormal rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(wider, d, generator=generator)).Q.T


@pytest.mark.parametrize(("d", "wider"), [(8, 8), (8, 12), (12, 8)])
def test_procrustes_undoes_a_rotation(d: int, wider: int) -> None:
    source = torch.randn(50, d, generator=torch.Generator().manual_seed(0))
    if d > wider:  # the source lives in as many dimensions as the target has
        source = source @ rotated(wider, d).T @ rotated(wider, d)
        target = source @ rotated(wider, d).T
    else:
        target = source @ rotated(d, wider)
    found = procrustes(source, target)
    torch.testing.assert_close(source @ found, target, atol=1e-5, rtol=0)
    small = found @ found.T if d <= wider else found.T @ found
    torch.testing.assert_close(small, torch.eye(min(d, wider)), atol=1e-5, rtol=0)


def twins(common: int = 40, private: int = 10) -> list:
    """Two members with the same rows up to a rotation, whose private pieces have other names."""
    base = torch.randn(common + private, 8, generator=torch.Generator().manual_seed(1))
    members = []
    for tag, turn in (("a", torch.eye(8)), ("b", rotated(8, 12))):
        pieces = [b""] + [b"s%d" % n for n in range(common)] + [f"{tag}{n}".encode() for n in range(private)]
        rows_of = torch.cat([torch.zeros(1, turn.shape[1]), base @ turn])
        members.append(view(tag, ByteVocab(tuple(pieces), frozenset({0}), eos=(0,)), rows_of))
    return members


def test_eva_finds_the_twins_of_pieces_that_are_not_common() -> None:
    main, other = twins()
    common = find_anchors([other.vocabulary, main.vocabulary], names=["b", "a"])
    found = align(other, main, common, neighbours=3, floor=0.5)
    assert torch.equal(found.indices[torch.arange(51), found.values.argmax(1)].long(), torch.arange(51))
    assert torch.allclose(found.values.sum(1), torch.ones(51), atol=1e-3)


@pytest.mark.parametrize("byte_pieces", [False, True])
def test_eva_equals_the_reference_for_its_map(byte_pieces: bool) -> None:
    members = trio(byte_pieces)
    main, other = members[0], members[1]
    common = find_anchors([other.vocabulary, main.vocabulary], names=["b", "a"])
    found = align(other, main, common, neighbours=4, floor=0.3)

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm(dim=-1, keepdim=True)

    def prepared(member) -> dict[bytes, torch.Tensor]:
        vocab = member.vocabulary
        own = {
            piece: next((i for i in ids if i not in vocab.byte_fallback), ids[0]) for piece, ids in vocab.ids_of.items()
        }
        values = unit(member.load_embeddings()[list(own.values())].double())
        return dict(zip(own, unit(values - values.mean(0)), strict=True))

    source, target = prepared(other), prepared(main)
    x = torch.stack([source[piece] for piece in common.pieces])
    z = torch.stack([target[piece] for piece in common.pieces])
    u, _, v = torch.linalg.svd(x.T @ z, full_matrices=False)
    for i, piece in enumerate(other.vocabulary.pieces):
        expected = torch.zeros(len(main.vocabulary))
        if piece:
            cosines = {key: float(unit(source[piece] @ u @ v) @ vector) for key, vector in target.items()}
            top = sorted(cosines, key=cosines.get, reverse=True)[:4]
            for key in top:
                if cosines[key] >= 0.3:
                    expected[main.vocabulary.ids_of[key][0]] = cosines[key]
            expected /= expected.sum().clamp(min=1e-9)
        elif i in other.vocabulary.eos:
            expected[min(main.vocabulary.eos)] = 1
        got = torch.zeros(len(main.vocabulary)).scatter_add_(0, found.indices[i].long(), found.values[i])
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_a_piece_without_neighbours_is_counted_and_the_rest_renormalised(store: MatrixStore) -> None:
    members = trio()[:2]
    logp, weights = rows(members, 3), torch.full((3, 2), 0.5)
    strict = Eva(similarity_floor=0.8).build(members, store).fuse(logp, weights)
    assert (strict.stats["unmapped_mass"] > 0.1).all()
    assert torch.allclose(strict.logp.exp().sum(1), torch.ones(3), atol=1e-5)
    loose = Eva(similarity_floor=0.0).build(members, store).fuse(logp, weights)
    assert (loose.stats["unmapped_mass"] < 0.01).all()


def test_the_filter_leaves_out_who_stands_alone(store: MatrixStore) -> None:
    main, other = twins()
    third = replace(main, name="third")

    def row(best: int, second: int) -> torch.Tensor:
        logits = torch.zeros(1, 51)
        logits[0, best], logits[0, second] = 9.0, 6.0
        return torch.log_softmax(logits, dim=1)

    fuser = Eva(filter_top=2, neighbours=1).build([main, other, third], store)
    weights = torch.full((1, 3), 1 / 3)
    # the second member's best piece is nobody's first or second
    got = fuser.fuse([row(5, 7), row(20, 30), row(7, 5)], weights).logp[0].exp()
    expected = (row(5, 7).exp() + row(7, 5).exp())[0] / 2
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    # the third's best is the main member's second, the main member's best is neither of the third's
    got = fuser.fuse([row(5, 7), row(20, 30), row(7, 9)], weights).logp[0].exp()
    expected = row(7, 9).exp()[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    # nobody agrees with anybody: all stay
    got = fuser.fuse([row(5, 7), row(20, 30), row(11, 12)], weights).logp[0].exp()
    expected = (row(5, 7).exp() + row(20, 30).exp() + row(11, 12).exp())[0] / 3
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_the_filter_takes_ids_with_the_same_bytes_for_one_piece(store: MatrixStore) -> None:
    """The main member's "x" has most mass, half of it under its byte piece, and is the other's second piece."""
    vocab = ByteVocab((b"", b"x", b"y", b"z", b"x"), frozenset({0}), eos=(0,), byte_fallback=frozenset({1}))
    filler = [b"f%d" % n for n in range(20)]
    vocab = replace(vocab, pieces=(*vocab.pieces, *filler))
    members = [view(name, vocab, torch.eye(25) + (name == "b")) for name in "ab"]
    logits = [torch.full((1, 25), -20.0) for _ in members]
    for row, masses in zip(logits, ({1: 0.3, 4: 0.3, 2: 0.4}, {3: 0.6, 1: 0.15, 4: 0.15, 2: 0.1}), strict=True):
        for i, p in masses.items():
            row[0, i] = math.log(p)
    fuser = Eva(filter_top=2, neighbours=1).build(members, store)
    got = fuser.fuse(logits, torch.tensor([[0.5, 0.5]])).logp[0].exp()
    # "x" is among the other's two best pieces, "z" is none of the main member's two best: the main member alone
    torch.testing.assert_close(got[1:5], torch.tensor([0.3, 0.4, 0.0, 0.3]), atol=1e-5, rtol=0)


def test_eva_uses_output_embeddings_and_its_maps_belong_to_them(store: MatrixStore) -> None:
    main, other = twins()
    logp, weights = rows([main, other], 2), torch.full((2, 2), 0.5)
    tied = Eva().build([main, other], store).fuse(logp, weights).logp
    same = with_output_rows(other, other.load_embeddings())
    assert torch.equal(Eva().build([main, same], store).fuse(logp, weights).logp, tied)
    assert len(list(store.folder.glob("eva-*.safetensors"))) == 1  # tied: one identity
    shuffled = other.load_embeddings().roll(7, 0)
    untied = with_output_rows(other, shuffled)
    assert not torch.allclose(Eva().build([main, untied], store).fuse(logp, weights).logp, tied, atol=1e-3)
    assert len(list(store.folder.glob("eva-*.safetensors"))) == 2


def test_eva_refuses_what_it_cannot_align(store: MatrixStore) -> None:
    main, other = twins()
    short = with_output_rows(other, torch.zeros(5, 4))
    with pytest.raises(MatrixError, match=r"'b' has output embeddings of shape \(5, 4\) for 51 pieces"):
        Eva().build([main, short], store)
    nan = with_output_rows(other, torch.full((51, 4), float("nan")))
    with pytest.raises(MatrixError, match="one finite row per piece"):
        Eva().build([main, nan], store)
    with pytest.raises(VocabularyError, match="have 3 pieces in common"):
        Eva().build(twins(common=3), store)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": 0}, "neighbours must be a whole number of at least 1; got 0"),
        ({"filter_top": 0}, "filter_top must be a whole number of at least 1; got 0"),
        ({"similarity_floor": 1.0}, "similarity_floor must be a number of at least 0 and below 1; got 1.0"),
        ({"similarity_floor": -0.1}, "similarity_floor must be"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Eva(**options)


def test_edit_distances_count_every_pair_once() -> None:
    queries = [b"a", b"ab", b"abcdefghij", b"x" * 30]
    candidates = [b"a", b"abc", b"abcdefghijkl", b"y" * 20, b"z" * 70]
    steps: list[int] = []
    nearest(queries, candidates, steps.append)
    assert sum(steps) == len(queries) * len(candidates)
