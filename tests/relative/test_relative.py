"""Relative rows, both matrix forms and the block builder, each against a plain formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tensor_worlds import trio, view, vocabulary

import lm_eval_deepen.relative.rows_from_embeddings as build
from lm_eval_deepen.errors import MatrixError
from lm_eval_deepen.relative.matrix import DenseMatrix, SparseMatrix, _ChunkedOperator, row_entropy_share
from lm_eval_deepen.relative.normalization import NORMALIZATIONS
from lm_eval_deepen.relative.rows_from_embeddings import MatrixSpec, build_matrix, described_rows
from lm_eval_deepen.relative.topk import largest
from lm_eval_deepen.vocabulary.anchors import anchor_ids, duplicates, find_anchors

MEMBERS = trio()
ANCHORS = find_anchors([m.vocabulary for m in MEMBERS], names=["a", "b", "c"])


def make(spec: MatrixSpec, index: int = 0, member=None):
    m = MEMBERS[index] if member is None else member
    ids, twins = anchor_ids(m.vocabulary, ANCHORS), duplicates(m.vocabulary, ANCHORS)
    return build_matrix(m.name, m.vocabulary, m.load_embeddings(), ids, twins, spec)


def plain_row(member, w: int, normalization: str, temperature: float = 100.0):
    """One relative row, one anchor at a time."""
    rows = member.load_embeddings().double()
    if normalization in ("centered", "decorrelated"):
        rows = rows - rows[described_rows(member.vocabulary)].mean(0)
    if normalization == "decorrelated":  # 1 % of 12 to 24 dimensions, at least one
        top = torch.linalg.svd(rows[described_rows(member.vocabulary)]).Vh[0]
        rows = rows - (rows @ top)[:, None] * top
    ids = anchor_ids(member.vocabulary, ANCHORS)
    w = ids[ANCHORS.pieces.index(member.vocabulary.pieces[w])] if member.vocabulary.pieces[w] in ANCHORS.pieces else w
    cosines = torch.stack([torch.cosine_similarity(rows[w], rows[a], dim=0) for a in ids])
    if normalization == "reference":
        cosines = cosines / cosines.square().sum().sqrt()
    return torch.softmax(temperature * cosines, dim=0).float()


@pytest.mark.parametrize("normalization", sorted(NORMALIZATIONS))
@pytest.mark.parametrize("index", [0, 1, 2])
def test_dense_rows_follow_the_formula(normalization: str, index: int) -> None:
    member = MEMBERS[index]
    matrix = make(MatrixSpec(normalization, top_m=0), index)
    for w in (3, 8, 40, 70, len(described_rows(member.vocabulary).nonzero()) + 2):
        torch.testing.assert_close(matrix.relative[w], plain_row(member, w, normalization), atol=2e-6, rtol=1e-4)


def test_control_and_unused_rows_are_zero_and_text_rows_sum_to_one() -> None:
    vocab = MEMBERS[0].vocabulary
    for top_m in (0, 8):
        spec = MatrixSpec("cosine", 100.0, top_m)
        matrix = make(spec)
        sums = matrix.full().project(torch.eye(len(vocab))).sum(1)
        torch.testing.assert_close(sums, described_rows(vocab).float(), atol=1e-6, rtol=0)
    everything = make(MatrixSpec("reference", 100.0, 0, "all")).relative.sum(1)
    assert everything[:3].eq(0).sum() == 0 and everything[sorted(vocab.unused)].eq(0).all()


def test_ids_with_an_anchors_bytes_get_its_row() -> None:
    vocab = MEMBERS[0].vocabulary
    first, twin = vocab.ids_of[b"s5"]
    matrix = make(MatrixSpec("cosine", top_m=0))
    assert not torch.equal(MEMBERS[0].load_embeddings()[first], MEMBERS[0].load_embeddings()[twin])
    torch.testing.assert_close(matrix.relative[first], matrix.relative[twin])


def test_a_zero_norm_row_has_no_nan() -> None:
    member = MEMBERS[0]
    rows = member.load_embeddings().clone()
    rows[[3, 100]] = 0.0  # an anchor and a piece of its own
    for normalization in NORMALIZATIONS:
        matrix = make(MatrixSpec(normalization, top_m=0), member=view("zeros", member.vocabulary, rows))
        assert matrix.relative.isfinite().all()
        if normalization not in ("centered", "decorrelated"):
            torch.testing.assert_close(matrix.relative[100], torch.full((60,), 1 / 60))


def test_sparse_keeps_the_largest_entries_and_records_what_it_drops() -> None:
    dense, sparse = make(MatrixSpec("cosine", top_m=0)), make(MatrixSpec("cosine", top_m=7))
    text = described_rows(MEMBERS[0].vocabulary)
    kept, where = dense.relative.topk(7, dim=1)
    torch.testing.assert_close(sparse.dropped_mass[text], 1 - kept.sum(1)[text], atol=1e-5, rtol=0)
    expected = torch.zeros_like(dense.relative).scatter_(1, where, kept)
    expected[text] /= expected[text].sum(1, keepdim=True)
    got = sparse.full().project(torch.eye(len(text)))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)  # 16-bit storage


def test_top_m_of_all_anchors_is_the_dense_matrix() -> None:
    eye = torch.eye(len(MEMBERS[1].vocabulary))
    dense, sparse = make(MatrixSpec(top_m=0), 1), make(MatrixSpec(top_m=999), 1)
    assert sparse.values.shape == (len(eye), len(ANCHORS))
    torch.testing.assert_close(sparse.full().project(eye), dense.relative, atol=1e-3, rtol=0)


def random_pair() -> tuple[DenseMatrix, SparseMatrix]:
    generator = torch.Generator().manual_seed(3)
    indices = torch.stack([torch.randperm(50, generator=generator)[:6] for _ in range(300)])
    values = torch.rand(300, 6, generator=generator).half()
    values[:4] = 0
    sparse = SparseMatrix(values, indices, 50, torch.zeros(300))
    return DenseMatrix(torch.zeros(300, 50).scatter_(1, indices, sparse.values)), sparse


@pytest.mark.parametrize("form", ["dense", "csr", "chunked"])
def test_full_products_match_plain_matrix_products(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval_deepen.relative.matrix.CHUNK_ROWS", 64)
    dense, sparse = random_pair()
    op = {
        "dense": dense.full(),
        "csr": sparse._csr,
        "chunked": _ChunkedOperator(sparse.values, sparse.indices, sparse.num_anchors),
    }[form]
    p, q = torch.rand(5, 300), torch.rand(5, 50)
    torch.testing.assert_close(op.project(p), p @ dense.relative)
    torch.testing.assert_close(op.back(q), q @ dense.relative.T)


@pytest.mark.parametrize("form", [0, 1])
def test_products_at_a_support_match_the_full_ones(form: int) -> None:
    matrix = random_pair()[form]
    ids = torch.stack([torch.randperm(300)[:20] for _ in range(4)])
    p, q = torch.rand(4, 20), torch.rand(4, 50)
    op = matrix.at(ids)
    torch.testing.assert_close(op.project(p), matrix.full().project(torch.zeros(4, 300).scatter_(1, ids, p)))
    torch.testing.assert_close(op.back(q), matrix.full().back(q).gather(1, ids))


def test_sixteen_bit_rows_sum_to_one_after_loading() -> None:
    rows = torch.softmax(4 * torch.randn(1000, 64), dim=1).half()
    assert (rows.float().sum(1) - 1).abs().max() > 1e-6
    matrix = SparseMatrix(rows, torch.zeros(1000, 64), 64, torch.zeros(1000))
    torch.testing.assert_close(matrix.values.sum(1), torch.ones(1000), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("width", "k"), [(20_000, 64), (20_001, 1), (16_389, 500), (9_000, 9_000), (100, 64)])
def test_largest_is_exact(width: int, k: int) -> None:
    rows = torch.randn(3, width)
    rows[0, : width // 2] = float("-inf")
    values, ids = largest(rows, k)
    torch.testing.assert_close(values.sort(descending=True).values, rows.topk(k).values)
    torch.testing.assert_close(rows.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_a_matrix_that_drops_too_much_is_refused_with_the_remedy() -> None:
    with pytest.raises(MatrixError, match=r"member 'main'.*drop 0\.\d+.*top_m 2 of 60 anchors.*Raise top_m"):
        make(MatrixSpec("cosine", temperature=1.0, top_m=2))


def test_a_hopeless_matrix_is_refused_from_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SAMPLE_ROWS", 16)
    monkeypatch.setattr(build, "_blocks", lambda *a: pytest.fail("the build went on"))
    with pytest.raises(MatrixError, match=r"mean over a sample of \d+ rows"):
        make(MatrixSpec("cosine", temperature=1.0, top_m=2))


def test_a_dense_matrix_beyond_the_limit_names_the_number_of_anchors_that_fits(monkeypatch) -> None:
    monkeypatch.setattr(build, "DENSE_LIMIT_BYTES", 159 * 4 * 10)
    assert len(MEMBERS[0].vocabulary) == 159
    with pytest.raises(MatrixError, match=r"159 pieces x 60 anchors.*Set max_anchors to at most 10"):
        make(MatrixSpec("reference", top_m=0))


def test_embeddings_that_do_not_fit_are_refused() -> None:
    vocab = MEMBERS[0].vocabulary
    with pytest.raises(MatrixError, match=r"member 'short'|Member 'short'.*\(100, 8\) for 159 pieces"):
        make(MatrixSpec(), member=view("short", vocab, torch.randn(100, 8)))
    damaged = MEMBERS[0].load_embeddings().clone()
    damaged[7, 1] = float("nan")
    with pytest.raises(MatrixError, match="not finite"):
        make(MatrixSpec(), member=view("damaged", vocab, damaged))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_embeddings_are_described_in_fp32(dtype: torch.dtype) -> None:
    member = MEMBERS[2]
    rows = member.load_embeddings().to(dtype)
    low = make(MatrixSpec(top_m=0), member=replace(member, load_embeddings=lambda: rows))
    exact = make(MatrixSpec(top_m=0), member=replace(member, load_embeddings=lambda: rows.float()))
    torch.testing.assert_close(low.relative, exact.relative)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"normalization": "cosin"}, "normalization"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_m": -1}, "top_m"),
        ({"rows": "some"}, "rows"),
    ],
)
def test_bad_specs_name_the_option(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MatrixSpec(**values)


def test_described_rows_leave_out_pieces_without_bytes() -> None:
    vocab = vocabulary(5, tag="x", padded=2)
    assert described_rows(vocab).tolist() == [False] * 3 + [True] * 67 + [False] * 2
    assert described_rows(vocab, "all").tolist() == [True] * 70 + [False] * 2


def test_exact_rows_are_one_hot_for_anchors_alone() -> None:
    member = MEMBERS[0]
    ids, twins = anchor_ids(member.vocabulary, ANCHORS), duplicates(member.vocabulary, ANCHORS)
    plain, exact = make(MatrixSpec(top_m=0)), make(MatrixSpec(top_m=0, pieces="exact"))
    torch.testing.assert_close(exact.relative[ids], torch.eye(len(ANCHORS)))
    for other, anchor in twins.items():
        torch.testing.assert_close(exact.relative[other], torch.eye(len(ANCHORS))[anchor])
    rest = described_rows(member.vocabulary)
    rest[[*ids, *twins]] = False
    torch.testing.assert_close(exact.relative[rest], plain.relative[rest])


@pytest.mark.parametrize("pieces", ["embedding", "exact"])
def test_row_entropy_chooses_each_members_temperature(pieces: str) -> None:
    for index in (0, 1, 2):
        vocab = MEMBERS[index].vocabulary
        rows = make(MatrixSpec(top_m=0, pieces=pieces, entropy=1.5), index).relative
        found = -torch.xlogy(rows, rows).sum(1)
        described = described_rows(vocab)
        if pieces == "exact":
            described[[*anchor_ids(vocab, ANCHORS), *duplicates(vocab, ANCHORS)]] = False
        assert found[described].mean() == pytest.approx(1.5, abs=1e-3)


def test_flatness_tells_flat_rows_from_one_hot_ones() -> None:
    assert row_entropy_share(make(MatrixSpec("reference", temperature=1.0, top_m=0, rows="all"))) > 0.99
    assert row_entropy_share(DenseMatrix(torch.full((9, 40), 1 / 40))) == pytest.approx(1)
    assert row_entropy_share(DenseMatrix(torch.eye(40))) == 0
    assert 0 < row_entropy_share(make(MatrixSpec(top_m=20))) < 0.5
