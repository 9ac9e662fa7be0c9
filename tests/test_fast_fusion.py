"""The fast paths of a fusion step, each against a slow, obvious reference: long rows, nonzero entries, supports."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_worlds import member, rows, trio, vocabulary

from lm_eval_deepen.fusion.deepen import Deepen
from lm_eval_deepen.inverse import SOLVERS
from lm_eval_deepen.relative.gathered import GatheredOperator, share_columns
from lm_eval_deepen.relative.matrix import DenseMatrix, SparseMatrix
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.relative.support import make_side, split, supports
from lm_eval_deepen.relative.topk import argmax, largest, logsumexp
from lm_eval_deepen.vocabulary.anchors import anchor_ids, duplicates, find_anchors

NEG_INF = float("-inf")
WIDTHS = st.one_of(st.integers(1, 40), st.integers(8_190, 8_200), st.integers(16_000, 16_700), st.just(49_152))


def noise(seed: int, width: int, count: int = 3, coarse: bool = False) -> torch.Tensor:
    """Random rows; coarse ones have many equal entries, and a part of every other row is excluded."""
    generator = torch.Generator().manual_seed(seed)
    found = 3 * torch.randn(count, width, generator=generator)
    found = found.round() if coarse else found
    found[::2, : width // 3] = NEG_INF
    return found


@settings(max_examples=40, deadline=None)
@given(WIDTHS, st.integers(1, 600), st.integers(0, 9), st.booleans())
def test_largest_finds_the_largest_whatever_is_beside_them(width: int, k: int, seed: int, coarse: bool) -> None:
    long, k = noise(seed, width, coarse=coarse), min(k, width)
    values, ids = largest(long, k)
    assert torch.equal(values.sort(dim=1, descending=True).values, long.topk(k, dim=1).values)
    assert torch.equal(long.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())
    for i in range(len(long)):  # of equal entries the same ones, too
        assert set(largest(long[i : i + 1], k)[1][0].tolist()) == set(ids[i].tolist())


@settings(max_examples=40, deadline=None)
@given(WIDTHS, st.integers(0, 9), st.booleans(), st.floats(0, 1))
def test_argmax_is_the_first(width: int, seed: int, coarse: bool, where: float) -> None:
    long = noise(seed, width, coarse=coarse)
    long[1, int(where * (width - 1)) :] = float("nan")
    assert argmax(long).tolist() == long.numpy().argmax(1).tolist()
    assert argmax(torch.full((2, width), NEG_INF)).tolist() == [0, 0]


@settings(max_examples=30, deadline=None)
@given(WIDTHS, st.integers(0, 9), st.floats(-200, 50))
def test_logsumexp_is_torchs_in_double_precision(width: int, seed: int, shift: float) -> None:
    long = noise(seed, width) + shift
    expected = torch.logsumexp(long.double(), dim=1)
    torch.testing.assert_close(logsumexp(long).double(), expected, atol=2e-6, rtol=2e-7)


def test_logsumexp_of_nothing_of_a_large_vocabulary_and_of_nan() -> None:
    long = torch.full((3, 262_144), -9.0)
    long[0] = NEG_INF
    long[1, 7] = 3.0
    long[2, 5] = float("nan")
    got = logsumexp(long)
    assert got[0] == NEG_INF and got[2].isnan()
    assert got[1].item() == pytest.approx(torch.logsumexp(long[1].double(), 0).item(), abs=2e-6)


def sparse(seed: int, num_rows: int = 60, anchors: int = 40, width: int = 6) -> tuple[SparseMatrix, torch.Tensor]:
    """A matrix most of whose entries are 0, with empty rows, and the same in full [V, A]."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(anchors, generator=generator)[:width] for _ in range(num_rows)])
    values = torch.rand(num_rows, width, generator=generator)
    values *= torch.rand(num_rows, width, generator=generator) < 0.3
    values[::7] = 0.0
    matrix = SparseMatrix(values, indices, anchors, torch.zeros(num_rows))
    return matrix, torch.zeros(num_rows, anchors).scatter_(1, indices, matrix.values)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 30))
def test_products_with_nonzero_entries_are_the_full_ones(seed: int, batch: int, pieces: int) -> None:
    matrix, dense = sparse(seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(dense), (batch, pieces), generator=generator)
    ids[0] = 0  # a row of the batch without any entry
    p, q = torch.rand(batch, pieces, generator=generator), torch.rand(batch, 40, generator=generator)
    op = matrix.at(ids)
    assert isinstance(op, GatheredOperator) and op.num_anchors == 40
    torch.testing.assert_close(op.project(p), torch.einsum("bk,bka->ba", p, dense[ids]))
    torch.testing.assert_close(op.back(q), torch.einsum("bka,ba->bk", dense[ids], q))


def test_a_matrix_of_zeros_and_no_rows_at_all_have_products() -> None:
    zeros = SparseMatrix(torch.zeros(5, 3), torch.zeros(5, 3), 7, torch.zeros(5))
    op = zeros.at(torch.tensor([[0, 4]]))
    assert torch.equal(op.project(torch.ones(1, 2)), torch.zeros(1, 7))
    assert torch.equal(op.back(torch.ones(1, 7)), torch.zeros(1, 2))
    assert torch.equal(zeros.full().project(torch.ones(1, 5)), torch.zeros(1, 7))
    none = torch.zeros(0, 4, dtype=torch.int64)
    assert sparse(0)[0].at(none).project(torch.zeros(0, 4)).shape == (0, 40)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("seed", range(4))
def test_columns_that_the_main_member_does_not_reach_change_nothing(solver: str, seed: int) -> None:
    (main, _), (other, _) = sparse(seed), sparse(seed + 100)
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(60, (4, 25), generator=generator) for _ in range(2)]
    logp = [torch.log_softmax(torch.randn(4, 25, generator=generator), dim=1) for _ in range(2)]
    wide = [main.at(ids[0]), other.at(ids[1])]
    narrow = share_columns(wide)
    assert narrow[0].num_columns < 60 and [op.num_anchors for op in narrow] == [40, 40]
    found = []
    for ops in (wide, narrow):
        r = 0.4 * ops[0].project(logp[0].exp()) + 0.6 * ops[1].project(logp[1].exp())
        torch.testing.assert_close(r.sum(1), wide[0].project(logp[0].exp()).sum(1) * 0.4 + 0.6 * (
            wide[1].project(logp[1].exp()).sum(1)
        ))
        found.append(SOLVERS[solver].run(logp[0], r, ops[0], 5, 0.15))
        again = SOLVERS[solver].run(logp[0], r, ops[0], 5, 0.15, ops[0].project(logp[0].exp()))
        torch.testing.assert_close(again.logp, found[-1].logp, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1].logp, found[0].logp, atol=1e-5, rtol=0)
    for name, value in found[0].stats.items():
        torch.testing.assert_close(found[1].stats[name], value, atol=1e-6, rtol=1e-5)
    assert (found[0].stats["lost_mass"] > 0.01).any()


def test_dense_operators_keep_their_columns() -> None:
    ops = [DenseMatrix(torch.rand(6, 5)).at(torch.tensor([[0, 1]])), sparse(1)[0].at(torch.tensor([[0, 1]]))]
    assert share_columns(ops) == ops


LONG = [member("main", vocabulary(9_000, tag="a", padded=3), 16, 0), *trio()[1:]]
LONG.append(member("fourth", vocabulary(12_000, tag="d", eos=(0, 2)), 16, 5))
WEIGHTS = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.4, 0.6, 0.0, 0.0], [0.2, 0.0, 0.0, 0.8], [0.1, 0.2, 0.3, 0.4]])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> MatrixStore:
    return MatrixStore(tmp_path_factory.mktemp("matrices"), progress=False)


@pytest.fixture(scope="module")
def world(store: MatrixStore):
    """Sides of four members, two of them with long rows, and their matrices in full."""
    anchors = find_anchors([m.vocabulary for m in LONG], names=list("abcd"))
    sides, relative = [], []
    for m in LONG:
        matrix = store.get(m, anchors, Deepen(rows="embedding").matrix_spec())
        ids, twins = anchor_ids(m.vocabulary, anchors), duplicates(m.vocabulary, anchors)
        sides.append(make_side(m.vocabulary, matrix, ids, twins, "text"))
        full = np.zeros(matrix.shape)
        np.put_along_axis(full, matrix.indices.numpy().astype(np.int64), matrix.values.double().numpy(), axis=1)
        relative.append(full)
    return sides, relative


def logp_of(seed: int = 7) -> list[torch.Tensor]:
    """Rows of which one is nearly sure to stop and one nearly sure not to."""
    found = rows(LONG, 4, seed=seed)
    for x in found:
        x[0, 3:] -= 100.0
        x[1, :3] -= 100.0
    return [torch.log_softmax(x, dim=1) for x in found]


def slow_masses(p: np.ndarray, m) -> tuple[np.ndarray, float, float, float]:
    """Return which ids of a row are text, and the masses of text, end and control pieces."""
    vocab = m.vocabulary
    text = np.array([bool(piece) for piece in vocab.pieces])
    end = sum(p[i] for i in vocab.eos)
    return text, p[text].sum(), end, sum(p[i] for i in vocab.control if i not in vocab.eos)


def test_splitting_is_adding_up(world) -> None:
    logp = logp_of()
    parts = split(logp, world[0], with_end=True)
    for m, (x, one) in enumerate(zip(logp, LONG, strict=True)):
        for i in range(len(x)):
            p = x[i].double().exp().numpy()
            is_text, text, end, control = slow_masses(p, one)
            expected = [text, text / (text + end), end / (text + end), (text + end) / (text + end + control)]
            got = [part[i, m] for part in (parts.log_sum, parts.log_text, parts.log_end, parts.log_kept)]
            np.testing.assert_allclose(torch.stack(got).numpy(), np.log(expected), atol=2e-6, rtol=3e-7)
            assert parts.dropped[i, m].item() == pytest.approx(1 - (text + end) / p.sum(), abs=1e-6)
            assert torch.equal(parts.texts[m][i], torch.where(torch.tensor(is_text), x[i], NEG_INF))


def slow_supports(logp: list[np.ndarray], used: list[bool], k: int) -> list[list[int]]:
    """The supports of one row, as sets of ids."""
    tops = []
    for p, m in zip(logp, LONG, strict=True):
        text = [i for i, piece in enumerate(m.vocabulary.pieces) if piece]
        tops.append(sorted(text, key=lambda i, p=p: -p[i])[:k])
    anchors = find_anchors([m.vocabulary for m in LONG], names=list("abcd"))
    ids = [anchor_ids(m.vocabulary, anchors) for m in LONG]
    found = []
    for m in range(len(LONG)):
        mine = set(tops[m])
        for other in range(len(LONG)):
            if other != m and used[other]:
                wanted = {LONG[other].vocabulary.pieces[i] for i in tops[other]}
                mine |= {i for i, piece in zip(ids[m], anchors.pieces, strict=True) if piece in wanted}
        found.append(sorted(mine))
    return found


@pytest.mark.parametrize("k", [1, 30, 400])
def test_supports_are_unions_of_sets(world, k: int) -> None:
    logp, used = logp_of(), WEIGHTS > 0
    found = supports(split(logp, world[0], with_end=True).texts, world[0], used, k)
    for i in range(4):
        expected = slow_supports([x[i].numpy() for x in logp], used[i].tolist(), k)
        for support, ids, x in zip(found, expected, logp, strict=True):
            assert support.ids[i][support.mask[i]].tolist() == ids
            assert support.log_mass[i].item() == pytest.approx(torch.logsumexp(x[i, ids].double(), 0).item(), abs=5e-6)


def slow_row(logp: list[np.ndarray], weights: list[float], relative: list[np.ndarray], k: int) -> np.ndarray:
    """One fused row with truncated supports, in double precision."""
    probabilities = [np.exp(x) for x in logp]
    masses = [slow_masses(p, m) for p, m in zip(probabilities, LONG, strict=True)]
    given = [(text / (text + end), end / (text + end)) for _, text, end, _ in masses]
    text_mass, end_mass = (sum(w * part[j] for w, part in zip(weights, given, strict=True)) for j in (0, 1))
    ids = slow_supports(logp, [True, *(w > 0 for w in weights[1:])], k)
    inside = [p[at] / p[at].sum() for p, at in zip(probabilities, ids, strict=True)]
    r = sum(
        w * part[0] / text_mass * p @ matrix[at]
        for w, part, p, at, matrix in zip(weights, given, inside, ids, relative, strict=True)
    )
    p, matrix = inside[0], relative[0][ids[0]]
    for _ in range(5):
        reached = p @ matrix
        p = p * (matrix @ np.where(reached > 0, r / np.where(reached > 0, reached, 1.0), 0.0))
    is_text, text, end, control = masses[0]
    out, main = np.zeros(len(is_text)), probabilities[0]
    kept = (text + end) / (text + end + control)
    out[is_text] = kept * text_mass * main[is_text] / text
    out[ids[0]] = out[ids[0]].sum() * p / p.sum()
    for i in LONG[0].vocabulary.eos:
        out[i] = kept * end_mass * main[i] / end
    for i in LONG[0].vocabulary.control - set(LONG[0].vocabulary.eos):
        out[i] = main[i] / (text + end + control)
    with np.errstate(divide="ignore"):
        return np.log(out)


@pytest.mark.parametrize("k", [5, 60])
def test_a_truncated_step_is_the_slow_one(store: MatrixStore, world, k: int) -> None:
    logp = logp_of()
    fuser = Deepen(rows="embedding", average="linear", support=k).build(LONG, store)
    fused = fuser.fuse(logp, WEIGHTS).logp
    for i, weights in enumerate(WEIGHTS.tolist()):
        expected = slow_row([x[i].double().numpy() for x in logp], weights, world[1], k)
        np.testing.assert_allclose(fused[i].double().numpy(), expected, atol=1e-4, rtol=1e-6)
        alone = fuser.fuse([x[i : i + 1] for x in logp], WEIGHTS[i : i + 1]).logp[0]
        torch.testing.assert_close(alone, fused[i], atol=2e-6, rtol=1e-6)
