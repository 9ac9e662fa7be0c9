"""The fusion method `deepen` against a slow, obvious reference, and its rules for end of text and support."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensor_worlds import member, renormalised, rows, trio, view, vocabulary

from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.fusion.deepen import Deepen
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.vocabulary.anchors import find_anchors
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

NEG_INF = float("-inf")
PAPER = {"rows": "embedding", "average": "linear"}
MEMBERS = trio()
WEIGHTS = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.6, 0.0], [0.2, 0.0, 0.8], [0.0, 0.5, 0.5]])


def masses(p: np.ndarray, vocab: ByteVocab) -> tuple[float, float, float]:
    """Text, end and control mass of one row."""
    text = sum(p[i] for i, piece in enumerate(vocab.pieces) if piece)
    end = sum(p[i] for i in vocab.eos)
    control = sum(p[i] for i in vocab.control if i not in vocab.eos)
    return float(text), float(end), float(control)


def slow_fuse(members, logp, weights, relative, steps: int = 5) -> np.ndarray:
    """One row, full support, em: every rule of docs/design.md spelled out."""
    probabilities = [np.exp(x.double().numpy()) for x in logp]
    main, vocab = probabilities[0], members[0].vocabulary
    end, r, text_mass = 0.0, 0.0, 0.0
    for w, p, m, matrix in zip(weights, probabilities, members, relative, strict=True):
        if w == 0:
            continue
        text, own_end, _ = masses(p, m.vocabulary)
        is_text = np.array([bool(piece) for piece in m.vocabulary.pieces])
        end += w * own_end / (text + own_end)
        text_mass += w * text / (text + own_end)
        r = r + w * np.where(is_text, p, 0.0) / (text + own_end) @ matrix
    r = r / text_mass
    is_text = np.array([bool(piece) for piece in vocab.pieces])
    solution = np.where(is_text, main, 0.0) / main[is_text].sum()
    for _ in range(steps):
        reached = solution @ relative[0]
        solution = solution * (relative[0] @ np.where(reached > 0, r / np.where(reached > 0, reached, 1), 0))
    text, own_end, control = masses(main, vocab)
    kept = (text + own_end) / (text + own_end + control)
    out = kept * text_mass * solution / solution.sum()
    for i in vocab.eos:
        out[i] = kept * end * main[i] / own_end
    for i in vocab.control - set(vocab.eos):
        out[i] = main[i] / (text + own_end + control)
    return np.log(np.maximum(out, 1e-300))


@pytest.mark.parametrize(
    "options",
    [
        {**PAPER, "support": "full"},
        {**PAPER, "support": 10_000},
        {**PAPER, "support": "full", "top_m": 0},
        {**PAPER, "rows": "exact", "support": "full", "top_m": 0},
        {**PAPER, "rows": "prefix"},
        {**PAPER, "support": "full", "max_anchors": 30},
        {**PAPER, "rows": "exact", "support": "full", "top_m": 0, "max_anchors": 30},
    ],
)
@pytest.mark.parametrize("byte_pieces", [False, True])
def test_it_is_the_slow_reference(store: MatrixStore, options: dict, byte_pieces: bool) -> None:
    members = trio(byte_pieces)
    method = Deepen(**options)
    fuser, logp = method.build(members, store), rows(members, 4)
    anchors = find_anchors([m.vocabulary for m in members], names=["a", "b", "c"], max_anchors=method.max_anchors)
    relative = []
    for m in members:
        matrix = store.get(m, anchors, method.matrix_spec())
        relative.append(matrix.full().project(torch.eye(len(m.vocabulary))).double().numpy())
    fused = fuser.fuse(logp, WEIGHTS).logp
    for i, weights in enumerate(WEIGHTS.tolist()):
        expected = slow_fuse(members, [x[i] for x in logp], weights, relative)
        used = [j for j in range(fused.shape[1]) if j not in members[0].vocabulary.unused]
        np.testing.assert_allclose(fused[i, used].numpy(), expected[used], atol=2e-4)


@pytest.mark.parametrize("inverse", ["em", "adamw"])
def test_a_support_of_everything_is_the_full_support(store: MatrixStore, inverse: str) -> None:
    logp = rows(MEMBERS, 4)
    full = Deepen(rows="embedding", inverse=inverse, support="full").build(MEMBERS, store).fuse(logp, WEIGHTS)
    cut = Deepen(rows="embedding", inverse=inverse, support=500).build(MEMBERS, store).fuse(logp, WEIGHTS)
    torch.testing.assert_close(cut.logp, full.logp, atol=1e-3 if inverse == "adamw" else 1e-5, rtol=1e-5)
    torch.testing.assert_close(cut.stats["truncated_mass"], torch.zeros(4), atol=1e-5, rtol=0)


def test_a_truncated_support_leaves_the_rest_to_the_main_member(store: MatrixStore) -> None:
    logp = rows(MEMBERS, 4)
    logp[0] = renormalised(logp[0], MEMBERS[0].vocabulary)
    fused = Deepen(**PAPER, support=12, max_truncated=1).build(MEMBERS, store).fuse(logp, WEIGHTS)
    text = torch.tensor([bool(piece) for piece in MEMBERS[0].vocabulary.pieces])
    for i in range(4):
        given_text = [torch.where(text, x[i], NEG_INF).log_softmax(0) for x in (fused.logp, logp[0])]
        same = ((given_text[0] - given_text[1]).abs() < 1e-4) & text
        assert 159 - 7 - 3 * 12 <= same.sum() < 159 - 7 - 5  # outside: at most k pieces per member are inside
        top = torch.where(text, logp[0][i], NEG_INF).topk(12).indices
        assert not same[top].all()
    assert (fused.stats["truncated_mass"] > 0).all() and (fused.stats["truncated_mass"] < 0.5).all()


def test_pieces_that_others_want_are_in_the_support(store: MatrixStore) -> None:
    logp = rows(MEMBERS, 1)
    anchor = [m.vocabulary.ids_of[b"s20"][0] for m in MEMBERS]
    logp[0][0, anchor[0]] = -30.0  # far outside the main member's own top pieces
    for other in (1, 2):
        logp[other][0, anchor[other]] = 20.0
    logp = [torch.log_softmax(x, dim=1) for x in logp]
    weights = torch.tensor([[0.2, 0.4, 0.4]])
    fused = Deepen(support=8, inverse="em", steps=100).build(MEMBERS, store).fuse(logp, weights).logp
    assert fused.argmax(1).item() == anchor[0]
    assert fused[0, anchor[0]].exp() > 0.5


@pytest.mark.parametrize("support", [3, 20, "full"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_identical_members_are_a_fixed_point(store: MatrixStore, support, count: int) -> None:
    twin = MEMBERS[1]
    logp = rows([twin], 6)[0]
    logp[0, 3:] -= 100.0  # a row that is nearly sure to stop
    logp[1, :3] -= 100.0  # and one that is nearly sure not to
    logp = torch.log_softmax(logp, dim=1)
    weights = torch.softmax(torch.randn(6, count, generator=torch.Generator().manual_seed(0)), dim=1)
    fused = Deepen(support=support).build([twin] * count, store).fuse([logp] * count, weights)
    torch.testing.assert_close(fused.logp, logp, atol=1e-5, rtol=1e-6)
    assert (fused.stats["residual_kl"] < 1e-6).all()


def two(eos_main: tuple[int, ...], eos_other: tuple[int, ...]):
    return [
        member("main", vocabulary(30, tag="a", eos=eos_main), 16, 0),
        member("other", vocabulary(50, tag="b", eos=eos_other), 16, 1),
    ]


HALF = torch.tensor([[0.5, 0.5]])


def stopping(members, shares) -> list[torch.Tensor]:
    """One row per member whose EOS ids together have this share and whose other control pieces have none."""
    logp = []
    for m, share in zip(members, shares, strict=True):
        p = rows([m], 1)[0].exp()
        p[:, sorted(m.vocabulary.control)] = 0.0
        p = p / p.sum() * (1 - share)
        for rank, i in enumerate(m.vocabulary.eos):
            p[:, i] = share * (rank + 1) / sum(range(len(m.vocabulary.eos) + 1))
        logp.append(p.log())
    return logp


@pytest.mark.parametrize("support", [5, "full"])
def test_end_mass_is_the_weighted_mean_in_the_main_members_proportions(store: MatrixStore, support) -> None:
    members = two((1, 2), (0,))
    fused = Deepen(average="linear", support=support).build(members, store).fuse(stopping(members, (0.3, 0.8)), HALF)
    torch.testing.assert_close(fused.stats["end_mass"], torch.tensor([0.55]), atol=1e-5, rtol=0)
    share = fused.logp[0, [1, 2]].exp()
    torch.testing.assert_close(share, torch.tensor([0.55 / 3, 1.1 / 3]), atol=1e-5, rtol=0)
    torch.testing.assert_close(fused.logp[0, 3:].exp().sum(), torch.tensor(0.45), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("average", "expected"), [("linear", 0.975), ("geometric", 0.97549)])
def test_members_that_all_want_to_stop_stop(store: MatrixStore, average: str, expected: float) -> None:
    members = two((1,), (2,))  # odds of 0.97 and 0.98: 32.3 and 49, whose geometric mean is 39.8
    fused = Deepen(average=average).build(members, store).fuse(stopping(members, (0.97, 0.98)), HALF).logp
    assert fused.argmax(1).item() == 1 and fused[0, 1].exp() == pytest.approx(expected, abs=1e-4)
    certain = Deepen(average=average).build(members, store).fuse(stopping(members, (1.0, 1.0)), HALF).logp
    assert not certain.isnan().any() and certain[0, 1] == pytest.approx(0.0, abs=1e-6)


def test_a_main_member_that_never_stops_gets_the_others_end_mass_evenly(store: MatrixStore) -> None:
    members = two((1, 2), (0,))
    fused = Deepen(average="linear").build(members, store).fuse(stopping(members, (0.0, 0.8)), HALF).logp
    torch.testing.assert_close(fused[0, [1, 2]].exp(), torch.tensor([0.2, 0.2]), atol=1e-5, rtol=0)


def test_without_an_end_in_the_main_vocabulary_the_others_text_is_renormalised(store: MatrixStore) -> None:
    members = two((), (0,))
    fused = Deepen().build(members, store).fuse(stopping(members, (0.0, 0.8)), HALF)
    text = Deepen().build(members, store).fuse(stopping(members, (0.0, 0.0)), HALF)
    torch.testing.assert_close(fused.logp, text.logp, atol=1e-5, rtol=1e-5)
    assert fused.stats["end_mass"].item() == 0.0
    torch.testing.assert_close(fused.stats["dropped_control_mass"], torch.tensor([0.4]), atol=1e-5, rtol=0)


def test_the_main_members_control_pieces_keep_their_probability(store: MatrixStore) -> None:
    members = two((1,), (1,))
    logp = rows(members, 3)
    fused = Deepen().build(members, store).fuse(logp, HALF.expand(3, -1))
    torch.testing.assert_close(fused.logp[:, [0, 2]], logp[0][:, [0, 2]], atol=1e-5, rtol=0)
    dropped = 0.5 * logp[1][:, [0, 2]].exp().sum(1)
    torch.testing.assert_close(fused.stats["dropped_control_mass"], dropped, atol=1e-6, rtol=0)


def test_members_without_text_mass_leave_the_row_to_the_main_member(store: MatrixStore) -> None:
    members = two((1,), (1,))
    logp = rows(members, 3)
    logp[0][0] = NEG_INF
    logp[0][0, 0] = 0.0  # all of the main member's mass on a control piece
    logp[1][1] = NEG_INF
    logp[1][1, 2] = 0.0  # all of the other member's: it has nothing to say
    for support in (6, "full"):
        fused = Deepen(support=support).build(members, store).fuse(logp, HALF.expand(3, -1))
        assert not fused.logp.isnan().any() and all(v.isfinite().all() for v in fused.stats.values())
        torch.testing.assert_close(fused.logp[:2], logp[0][:2], atol=1e-5, rtol=0)


def test_reference_policy_leaves_rows_that_want_to_stop(store: MatrixStore) -> None:
    members = two((1, 2), (0,))
    logp = [x.repeat(3, 1) for x in rows(members, 1)]
    logp[0][1, 2] = 10.0
    logp = [torch.log_softmax(x, dim=1) for x in logp]
    weights = HALF.expand(3, -1)
    compat = Deepen.COMPAT["reference"]
    assert Deepen(**compat).build(members, store).skip(logp, weights).tolist() == [False, True, False]
    assert Deepen(**compat, learning_rate=0.0).build(members, store).skip(logp, weights).all()
    assert not Deepen().build(members, store).skip(logp, weights).any()
    assert Deepen().build(members, store).skip(logp, torch.tensor([[1.0, 0.0]] * 3)).all()


def test_chunks_of_rows_change_nothing(store: MatrixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fuser, logp = Deepen(support=12).build(MEMBERS, store), rows(MEMBERS, 4)
    whole = fuser.fuse(logp, WEIGHTS)
    monkeypatch.setattr("lm_eval_deepen.fusion.deepen.CHUNK_BYTES", 1)
    parts = fuser.fuse(logp, WEIGHTS)
    torch.testing.assert_close(parts.logp, whole.logp, atol=2e-6, rtol=2e-6)
    assert parts.stats.keys() == whole.stats.keys()
    empty = fuser.fuse([x[:0] for x in logp], WEIGHTS[:0])
    assert empty.logp.shape == (0, 159) and all(v.shape == (0,) for v in empty.stats.values())


def test_low_precision_rows_are_fused_in_fp32(store: MatrixStore) -> None:
    logp = rows(MEMBERS, 4)
    fuser = Deepen().build(MEMBERS, store)
    low = fuser.fuse([x.bfloat16() for x in logp], WEIGHTS).logp
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, fuser.fuse([x.bfloat16().float() for x in logp], WEIGHTS).logp)


def test_the_fuser_states_its_anchors_and_matrices(store: MatrixStore) -> None:
    facts = Deepen(max_anchors=40, anchor_seed=3).build(MEMBERS, store).facts
    assert facts["anchors"] == 40
    assert [matrix["member"] for matrix in facts["matrices"]] == ["main", "second", "third"]
    assert all(len(matrix["content_sha256"]) == 64 for matrix in facts["matrices"])


def test_members_without_enough_common_anchors_are_refused(store: MatrixStore) -> None:
    with pytest.raises(VocabularyError, match="61"):
        Deepen(min_anchors=61).build(MEMBERS, store)


def test_an_anchor_twin_in_one_vocabulary_shares_its_row_and_its_ratio(store: MatrixStore) -> None:
    vocab = MEMBERS[0].vocabulary
    first, twin = vocab.ids_of[b"s5"]
    logp = rows(MEMBERS, 4)
    fused = Deepen(support="full").build(MEMBERS, store).fuse(logp, WEIGHTS).logp
    ratio, own = fused[:, first] - fused[:, twin], logp[0][:, first] - logp[0][:, twin]
    torch.testing.assert_close(ratio, own, atol=1e-4, rtol=0)


def test_padded_rows_that_are_zero_vectors_do_not_reach_the_result(store: MatrixStore) -> None:
    base = MEMBERS[0]
    noisy = base.load_embeddings().clone()
    noisy[sorted(base.vocabulary.unused)] = 50.0
    logp = rows(MEMBERS, 4)
    fused = [
        Deepen().build([view("main", base.vocabulary, e), *MEMBERS[1:]], store).fuse(logp, WEIGHTS).logp
        for e in (base.load_embeddings(), noisy)
    ]
    torch.testing.assert_close(fused[0], fused[1])
