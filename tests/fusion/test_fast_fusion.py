"""The fast paths of a fusion step, each against a slow, obvious reference: long rows, nonzero entries, supports."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_worlds import member, rows, trio, vocabulary

from lm_eval_deepen.engine.trace import Trace
from lm_eval_deepen.fusion.deepen import Deepen, support_bytes
from lm_eval_deepen.relative.matrix import DenseMatrix, OneHotOperator, SparseMatrix
from lm_eval_deepen.relative.operators import GatheredOperator, share_columns
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.relative.support import WIDER, TopRule, make_side, split, supports, tops
from lm_eval_deepen.relative.topk import argmax, largest, scan
from lm_eval_deepen.solvers import SOLVERS
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


@settings(max_examples=40, deadline=None)
@given(WIDTHS, st.integers(0, 9), st.floats(-200, 50), st.integers(30, 50))
def test_a_scan_finds_what_torch_finds_in_double_precision(width: int, seed: int, shift: float, anchors: int) -> None:
    long, generator = noise(seed, width) + shift, torch.Generator().manual_seed(seed)
    mask = torch.where(torch.rand(width, generator=generator) < 0.1, NEG_INF, 0.0)
    classes = torch.randint(anchors + 1, (width,), generator=generator)
    found = scan(long, mask, grouped=True, one_hot=OneHotOperator(classes, anchors))
    masked = (long + mask).double()
    expected = torch.logsumexp(masked, dim=1)
    torch.testing.assert_close(found.log_mass.double(), expected, atol=2e-6, rtol=2e-7)
    p = torch.where(expected[:, None] > NEG_INF, (masked - expected[:, None]).exp(), 0.0)
    one_hot = torch.nn.functional.one_hot(classes, anchors + 1)[:, :-1].double()
    torch.testing.assert_close(found.classes.double(), p @ one_hot, atol=1e-6, rtol=2e-5)
    for k in {1, min(width, 300)}:
        values, ids = largest(long, k, mask=mask, maxima=found.maxima)
        assert torch.equal(values.sort(dim=1, descending=True).values, (long + mask).topk(k, dim=1).values)
        assert torch.equal((long + mask).gather(1, ids), values)


def test_a_scan_of_nothing_of_a_large_vocabulary_and_of_nan() -> None:
    long = torch.full((3, 262_144), -9.0)
    long[0] = NEG_INF
    long[1, 7] = 3.0
    long[2, 5] = float("nan")
    classes = torch.zeros(262_144, dtype=torch.int64)
    found = scan(long, torch.zeros(262_144), one_hot=OneHotOperator(classes, 1))
    assert found.log_mass[0] == NEG_INF and found.log_mass[2].isnan() and found.classes[0] == 0
    assert found.log_mass[1].item() == pytest.approx(torch.logsumexp(long[1].double(), 0).item(), abs=2e-6)


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
        torch.testing.assert_close(
            r.sum(1), wide[0].project(logp[0].exp()).sum(1) * 0.4 + 0.6 * (wide[1].project(logp[1].exp()).sum(1))
        )
        options = SOLVERS[solver].options
        run = options(**{key: value for key, value in {"learning_rate": 0.15}.items() if key in options.names()}).solve
        found.append(run(logp[0], r, ops[0]))
        again = run(logp[0], r, ops[0], ops[0].project(logp[0].exp()))
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
            assert torch.equal(world[0][m].mask == 0, torch.tensor(is_text))


def slow_top(p: np.ndarray, m, rule: TopRule) -> tuple[list[int], bool]:
    """One member's own pieces of one row, likeliest first, and whether the bound asked for more than the rule."""
    text = [i for i, piece in enumerate(m.vocabulary.pieces) if piece]
    order = sorted(text, key=lambda i: -p[i])
    held = np.cumsum(p[order]) / p[text].sum()
    asked = len(text) if rule.mass is None else int((held < rule.mass).sum()) + 1
    asked = min(asked, rule.pieces or len(text), len(text))
    needed = min(int((held < 1 - rule.max_truncated).sum()) + 1, len(text))
    return order[: max(asked, needed)], needed > asked


def slow_supports(logp: list[np.ndarray], used: list[bool], rule: TopRule) -> list[list[int]]:
    """The supports of one row, as sets of ids."""
    own = [slow_top(np.exp(x.astype(np.float64)), m, rule)[0] for x, m in zip(logp, LONG, strict=True)]
    anchors = find_anchors([m.vocabulary for m in LONG], names=list("abcd"))
    ids = [anchor_ids(m.vocabulary, anchors) for m in LONG]
    found = []
    for m in range(len(LONG)):
        mine = set(own[m])
        for other in range(len(LONG)):
            if other != m and used[other]:
                wanted = {LONG[other].vocabulary.pieces[i] for i in own[other]}
                mine |= {i for i, piece in zip(ids[m], anchors.pieces, strict=True) if piece in wanted}
        found.append(sorted(mine))
    return found


RULES = [
    TopRule(1, None, 1.0),
    TopRule(30, None, 1.0),
    TopRule(400, None, 1.0),
    TopRule(30, None, 0.2),
    TopRule(None, 0.5, 1.0),
    TopRule(None, 0.9, 1.0),
    TopRule(25, 0.9, 1.0),
    TopRule(25, 0.7, 0.1),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_supports_are_unions_of_sets(world, rule: TopRule) -> None:
    logp, used = logp_of(), torch.cat([torch.ones(4, 1, dtype=torch.bool), WEIGHTS[:, 1:] > 0], dim=1)
    parts = split(logp, world[0], with_end=True, grouped=True)
    own = [tops(parts, m, side, torch.arange(4), used[:, m], rule, 3_000) for m, side in enumerate(world[0])]
    for m, one in enumerate(LONG):
        for i in used[:, m].nonzero()[:, 0].tolist():
            expected, widened = slow_top(logp[m][i].double().exp().numpy(), one, rule)
            assert sorted(own[m].ids[i][own[m].ids[i] < len(one.vocabulary)].tolist()) == sorted(expected)
            assert bool(own[m].widened[i]) == widened
    found = supports(logp, torch.arange(4), world[0], used, [top.ids for top in own])
    for i in range(4):
        expected = slow_supports([x[i].numpy() for x in logp], used[i].tolist(), rule)
        for m, (support, ids, x) in enumerate(zip(found, expected, logp, strict=True)):
            if not used[i, m]:
                continue  # what is left of a member that abstains has no weight
            assert support.ids[i][support.mask[i]].tolist() == ids
            assert support.log_mass[i].item() == pytest.approx(torch.logsumexp(x[i, ids].double(), 0).item(), abs=5e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.floats(0.5, 12), st.floats(0.02, 0.999), st.floats(0.001, 1.0), st.integers(1, 700))
def test_no_more_pieces_than_it_takes(seed: int, scale: float, mass: float, bound: float, most: int) -> None:
    """Whatever the row: the mass that is asked for is held, the bound kept, and one piece fewer would not do."""
    vocab = vocabulary(9_000, tag="a", padded=3)
    side = make_side(vocab, None, [], {}, "text")
    x = torch.log_softmax(scale * torch.randn(2, len(vocab), generator=torch.Generator().manual_seed(seed)), dim=1)
    parts = split([x], [side], with_end=True, grouped=True)
    here = torch.tensor([True, True])
    text = (x + side.mask).double().log_softmax(1).exp()
    order = text.sort(dim=1, descending=True).values.cumsum(1)
    for rule in (TopRule(None, mass, bound), TopRule(most, mass, bound), TopRule(most, None, bound)):
        found = tops(parts, 0, side, torch.arange(2), here, rule, len(vocab))
        early = tops(parts, 0, side, torch.arange(2), here, rule, rule.first)
        assert found.enough.all()
        for i in range(2):
            ids = found.ids[i][found.ids[i] < len(vocab)]
            count, held = len(ids), text[i, ids].sum().item()
            assert held == pytest.approx(order[i, count - 1].item(), abs=1e-9)  # they are the likeliest
            assert 1 - held <= bound + 1e-5
            asked = most if rule.mass is None else min(rule.pieces or 9_999, int((order[i] < mass).sum()) + 1)
            assert count >= asked or held >= mass - 1e-5
            before = order[i, count - 2].item() if count > 1 else 0.0
            assert count <= asked or before < max(1 - bound, rule.mass or 0.0) + 1e-5
            if early.enough[i]:
                assert set(early.ids[i].tolist()) - {len(vocab)} == set(ids.tolist())


def slow_row(logp: list[np.ndarray], weights: list[float], relative: list[np.ndarray], rule: TopRule) -> np.ndarray:
    """One fused row with truncated supports, in double precision."""
    probabilities = [np.exp(x) for x in logp]
    masses = [slow_masses(p, m) for p, m in zip(probabilities, LONG, strict=True)]
    given = [(text / (text + end), end / (text + end)) for _, text, end, _ in masses]
    text_mass, end_mass = (sum(w * part[j] for w, part in zip(weights, given, strict=True)) for j in (0, 1))
    ids = slow_supports(logp, [True, *(w > 0 for w in weights[1:])], rule)
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


EVERYTHING = TopRule(1_000_000, None, 1.0)


def is_too_wide(longest: int, rule: TopRule) -> bool:
    """Whether a row with that many pieces of a member is fused in full: a look at fewer did not do."""
    width = rule.first
    while width < longest:
        width *= WIDER
    return width > rule.first and any(4 * width > len(m.vocabulary) for m in LONG)


TRUNCATED = [
    {"support": 5, "max_truncated": 1},
    {"support": 60, "max_truncated": 1},
    {"support": 0.6, "max_truncated": 1},
    {"support": 0.8, "max_support": 40, "max_truncated": 1},
    {"support": 12, "max_truncated": 0.4},
    {"support": 0.5},
]


@pytest.mark.parametrize("options", TRUNCATED, ids=str)
def test_a_truncated_step_is_the_slow_one(store: MatrixStore, world, options: dict) -> None:
    logp = logp_of()
    method = Deepen(rows="embedding", average="linear", **options)
    fuser, rule = method.build(LONG, store), method.support_rule()
    fused = fuser.fuse(logp, WEIGHTS)
    for i, weights in enumerate(WEIGHTS.tolist()):
        row = [x[i].double().numpy() for x in logp]
        used = [True, *(w > 0 for w in weights[1:])]
        tops_of = [slow_top(np.exp(x), m, rule) for x, m in zip(row, LONG, strict=True)]
        longest = max(len(ids) for (ids, _), here in zip(tops_of, used, strict=True) if here)
        expected = slow_row(row, weights, world[1], EVERYTHING if is_too_wide(longest, rule) else rule)
        np.testing.assert_allclose(fused.logp[i].double().numpy(), expected, atol=1e-4, rtol=1e-6)
        alone = fuser.fuse([x[i : i + 1] for x in logp], WEIGHTS[i : i + 1])
        torch.testing.assert_close(alone.logp[0], fused.logp[i], atol=2e-6, rtol=1e-6)
        widened = [more for (_, more), here in zip(tops_of, used, strict=True) if here]
        assert fused.stats["rows_widened"][i] == (any(widened) or is_too_wide(longest, rule))
        for (ids, _), x, here, m in zip(tops_of, row, used, LONG, strict=True):
            assert not here or np.exp(x[ids]).sum() >= (1 - rule.max_truncated) * slow_masses(np.exp(x), m)[1] - 1e-5
        assert fused.stats["truncated_mass"][i] <= rule.max_truncated + 1e-5
    torch.testing.assert_close(fused.stats["max_truncated_mass"], fused.stats["truncated_mass"])


@pytest.mark.parametrize("rows_from", ["canonical", "embedding"])
@pytest.mark.parametrize("inverse", ["em", "adamw", "mirror"])
def test_rows_that_need_most_of_a_vocabulary_are_fused_in_full(store: MatrixStore, rows_from: str, inverse: str):
    """Flat rows: next to nothing may be left out, so that all pieces take part."""
    logp = [torch.log_softmax(0.1 * x, dim=1) for x in logp_of()]
    peaked = [x.clone() for x in logp_of()]
    for x in peaked:
        x[:, 10] += 60.0
    logp = [torch.cat([a, torch.log_softmax(b, dim=1)]) for a, b in zip(logp, peaked, strict=True)]
    weights, common = torch.cat([WEIGHTS, WEIGHTS]), {"rows": rows_from, "inverse": inverse, "average": "linear"}
    narrow = Deepen(**common, support=8, max_truncated=1e-4).build(LONG, store).fuse(logp, weights)
    full = Deepen(**common, support="full").build(LONG, store).fuse(logp, weights)
    assert narrow.stats["rows_widened"].tolist() == [1.0] * 4 + [0.0] * 4
    assert (narrow.stats["truncated_mass"][:4] == 0).all()
    torch.testing.assert_close(narrow.logp[:4], full.logp[:4], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(narrow.logp.exp(), full.logp.exp(), atol=1e-3, rtol=0)
    torch.testing.assert_close(narrow.logp.exp().sum(1), torch.ones(8), atol=2e-5, rtol=0)


def test_wide_rows_are_taken_in_turns(store: MatrixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fuser = Deepen(rows="embedding", support=4, max_truncated=0.3).build(LONG, store)
    logp = [torch.log_softmax(1.5 * x, dim=1) for x in logp_of()]
    whole = fuser.fuse(logp, WEIGHTS)
    assert 0 < whole.stats["rows_widened"].sum()
    sides = fuser._sides(torch.device("cpu"))
    monkeypatch.setattr("lm_eval_deepen.fusion.deepen.CHUNK_BYTES", support_bytes(sides, 4 * WIDER**3))
    parts = fuser.fuse(logp, WEIGHTS)
    torch.testing.assert_close(parts.logp, whole.logp, atol=2e-5, rtol=2e-6)
    assert torch.equal(parts.stats["rows_widened"], whole.stats["rows_widened"])


@pytest.mark.parametrize("average", ["linear", "geometric"])
@pytest.mark.parametrize("form", ["canonical", "prefix"])
def test_sums_by_class_are_products_with_the_matrix(store: MatrixStore, average: str, form: str) -> None:
    """One-hot rows with everything in them: the short way is em's, which knows rows of any kind."""
    logp = logp_of()
    short = Deepen(rows=form, average=average).build(LONG, store).fuse(logp, WEIGHTS)
    slow = Deepen(rows=form, average=average, inverse="em", steps=1).build(LONG, store)
    for side in slow._sides(torch.device("cpu")):
        side.matrix.__dict__["_one_hot"] = None
    expected = slow.fuse(logp, WEIGHTS)
    torch.testing.assert_close(short.logp, expected.logp, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(short.stats["lost_mass"], expected.stats["lost_mass"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("average", ["linear", "geometric"])
@pytest.mark.parametrize("form", ["canonical", "prefix"])
@pytest.mark.parametrize("support", [20, 0.5])
def test_a_truncated_step_with_one_hot_rows_is_ems(store: MatrixStore, average: str, form: str, support) -> None:
    """In supports, too, one exact step is where em ends."""
    logp, common = logp_of(), {"rows": form, "average": average, "support": support, "max_truncated": 0.9}
    found = Deepen(**common).build(LONG, store).fuse(logp, WEIGHTS)
    expected = Deepen(**common, inverse="em", steps=20).build(LONG, store).fuse(logp, WEIGHTS)
    torch.testing.assert_close(found.logp, expected.logp, atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(found.stats["rows_widened"], expected.stats["rows_widened"])
    full = Deepen(rows=form, average=average).build(LONG, store).fuse(logp, WEIGHTS)
    wide = found.stats["rows_widened"] > 0
    torch.testing.assert_close(found.logp[wide], full.logp[wide], atol=2e-5, rtol=1e-6)


def test_results_have_means_maxima_and_counts_over_all_processes() -> None:
    """`truncated_mass` is averaged, `max_...` the largest of any row, `rows_...` counted."""
    logp, vocabs = logp_of(), [m.vocabulary for m in LONG]
    traces = [Trace(["a", "b", "c", "d"]) for _ in range(2)]
    for trace, values in zip(traces, ([0.1, 0.3, 0.0, 0.0], [0.05, 0.05, 0.08, 0.02]), strict=True):
        share = torch.tensor(values)
        stats = {"truncated_mass": share, "max_truncated_mass": share, "rows_widened": (share > 0.06).float()}
        trace.record_fused(logp, vocabs, logp[0], vocabs[0], stats)
        trace.record_fused([x[:0] for x in logp], vocabs, logp[0][:0], vocabs[0], {k: v[:0] for k, v in stats.items()})
    found = Trace.total(traces).summary()
    assert found["steps_fused"] == 8 and found["rows_widened"] == 3
    assert found["max_truncated_mass"] == pytest.approx(0.3) and found["mean_truncated_mass"] == pytest.approx(0.075)
    assert "mean_rows_widened" not in found and "mean_max_truncated_mass" not in found
