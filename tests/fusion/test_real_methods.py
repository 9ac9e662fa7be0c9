"""Every method against its slow reference on the two real vocabularies, in both orders, with random logits.

No weight is loaded: vocabularies and tokenizers are real, embeddings and logits are not. Methods whose maps take
minutes to make (`mined`, `eva`, rows from embeddings) run on parts of the vocabularies, byte pieces included.
"""

from __future__ import annotations

from dataclasses import replace

import naive_fusion
import pytest
import torch
from tensor_worlds import view
from transformers import AutoTokenizer

from lm_eval_deepen.build.demo_models import GEMMA3, SMOLLM2, prepare
from lm_eval_deepen.fusion._edit import distance
from lm_eval_deepen.fusion.base import MemberView, Spelling
from lm_eval_deepen.fusion.deepen import Deepen
from lm_eval_deepen.fusion.eva import Eva, procrustes
from lm_eval_deepen.fusion.gac import Gac
from lm_eval_deepen.fusion.mined import Mined
from lm_eval_deepen.fusion.unite import Unite
from lm_eval_deepen.member import Prompt, TextCodec
from lm_eval_deepen.vocabulary.anchors import find_anchors
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

pytestmark = pytest.mark.real
SIZES = {SMOLLM2.name: 49_152, GEMMA3.name: 262_144}  # logits
WEIGHTS = torch.tensor([[0.5, 0.5], [0.3, 0.7]])
ROWS = 2
ORDERS = [(0, 1), (1, 0)]


@pytest.fixture(scope="module")
def members() -> list[MemberView]:
    """SmolLM2 and Gemma 3 with random embeddings."""
    found = []
    for model in (SMOLLM2, GEMMA3):
        tokenizer = AutoTokenizer.from_pretrained(prepare(model))
        eos, size = tokenizer.eos_token_id, SIZES[model.name]
        codec = TextCodec.build(tokenizer, size=size, eos=[eos], prefix_id=eos, add_special=True, name=model.name)
        spelling = Spelling(lambda data, codec=codec: codec.follow(Prompt((), "", ()), data), str(codec.identity[0]))
        found.append(replace(view(model.name, codec.vocab, noise(size)), spelling=spelling))
    return found


def noise(size: int, dim: int = 12) -> torch.Tensor:
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(size))


def rows(members: list[MemberView], wanted: list[list[int]]) -> list[torch.Tensor]:
    """Random rows [ROWS, V_m], in which the ids that are wanted of a member have most of the mass."""
    generator, found = torch.Generator().manual_seed(0), []
    for member, ids in zip(members, wanted, strict=True):
        logits = 2 * torch.randn(ROWS, len(member.vocabulary), generator=generator)
        logits[:, ids] += 12 + torch.randn(ROWS, len(ids), generator=generator)
        found.append(torch.log_softmax(logits, dim=1))
    return found


def of_several_ids(vocab: ByteVocab) -> dict[bytes, tuple[int, ...]]:
    return {piece: ids for piece, ids in vocab.ids_of.items() if len(ids) > 1}


def hard(members: list[MemberView]) -> list[list[int]]:
    """For every member: ids of one piece, and ids of pieces that another spells with a first token of several ids."""
    found = [[i for ids in list(of_several_ids(m.vocabulary).values())[:40] for i in ids] for m in members]
    for n, member in enumerate(members):
        lacking = members[1 - n].vocabulary.ids_of
        alike = of_several_ids(members[1 - n].vocabulary)
        begins = [piece for piece in member.vocabulary.ids_of if piece not in lacking and piece[:1] in alike]
        first = [piece for piece in begins if naive_fusion.first_token(members[1 - n], piece) in alike]
        found[n] += [member.vocabulary.ids_of[piece][0] for piece in first[:40]]
    return found


def check(fuser, members, logp, weights, reference) -> None:
    """Compare fused rows with what `reference` makes of each."""
    got = fuser.fuse(logp, weights).logp
    for n in range(ROWS):
        fused = reference([x[n] for x in logp], weights[n].tolist())
        expected = naive_fusion.as_row(fuser.out_vocab, members[0].vocabulary, logp[0][n], fused)
        torch.testing.assert_close(got[n].double().exp(), expected, atol=2e-7, rtol=5e-4)


def part(member: MemberView, step: int) -> MemberView:
    """The member with a part of its vocabulary: all byte pieces and their text pieces, one other in `step`."""
    vocab = member.vocabulary
    kept = {i for ids in of_several_ids(vocab).values() for i in ids[:2]} | vocab.byte_fallback | set(vocab.eos)
    kept |= {vocab.ids_of[bytes([byte])][0] for byte in range(256) if bytes([byte]) in vocab.ids_of}
    kept |= set(range(0, 8)) | {i for i in range(0, len(vocab), step) if i not in vocab.unused}
    ids = sorted(kept)
    place = {i: n for n, i in enumerate(ids)}
    roles = {name: frozenset(place[i] for i in getattr(vocab, name) if i in place) for name in ("control", "unused")}
    small = ByteVocab(
        tuple(vocab.pieces[i] for i in ids),
        eos=tuple(place[i] for i in vocab.eos),
        byte_fallback=frozenset(place[i] for i in vocab.byte_fallback),
        **roles,
    )
    return view(member.name, small, noise(len(small)))


@pytest.fixture(scope="module")
def parts(members) -> list[MemberView]:
    return [part(members[0], 150), part(members[1], 700)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_gac(members, store, order) -> None:
    members = [members[n] for n in order]
    logp, fuser = rows(members, hard(members)), Gac().build(members, store)
    lacking = set(members[1].vocabulary.ids_of) - set(members[0].vocabulary.ids_of)
    assert set(fuser.out_vocab.pieces[len(members[0].vocabulary) :]) == lacking
    check(fuser, members, logp, WEIGHTS, lambda own, w: naive_fusion.gac(members, own, w))


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_unite(members, store, order) -> None:
    members = [members[n] for n in order]
    logp = rows(members, hard(members))
    for k, tail in ((10, "main"), (60, "none")):
        fuser = Unite(top_k=k, tail=tail).build(members, store)
        check(fuser, members, logp, WEIGHTS, lambda own, w, k=k, t=tail: naive_fusion.unite(members, own, w, k, t))
    for member, lookup in zip(members, fuser._placed[torch.device("cpu")][2], strict=True):
        vocab, ids = member.vocabulary, lookup.tolist()
        for piece, i in zip(fuser.out_vocab.pieces, ids, strict=True):
            if i < 0 or i in vocab.eos:
                continue
            assert piece.startswith(vocab.pieces[i])
            assert i == vocab.ids_of[vocab.pieces[i]][0]  # where the mass of all ids with these bytes is


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({}, (0, 1)),
        ({"average": "geometric"}, (1, 0)),
        ({"rows": "prefix"}, (0, 1)),
        *[({"average": average}, (0, 1)) for average in (-1.5, 2, "min", "max", [1.5, 0.7], [1.0, -0.5], "consistent")],
    ],
    ids=str,
)
def test_deepen_with_rows_from_bytes(members, store, options, order) -> None:
    members = [members[n] for n in order]
    logp = rows(members, hard(members))
    fuser = Deepen(**options).build(members, store)
    common = set(find_anchors([m.vocabulary for m in members], names=["a", "b"]).pieces)
    anchor_of = []
    for member, side in zip(members, fuser._sides(torch.device("cpu")), strict=True):
        pieces = {a: member.vocabulary.pieces[i] for a, i in enumerate(side.anchor_ids.tolist())}
        own = side.matrix.full().classes.tolist()
        found = {piece: pieces.get(own[ids[0]]) for piece, ids in member.vocabulary.ids_of.items()}
        for piece, ids in of_several_ids(member.vocabulary).items():
            assert {pieces.get(own[i]) for i in ids} == {found[piece]}
        for n, (piece, anchor) in enumerate(found.items()):
            if piece in common:
                assert anchor == piece
            elif options.get("rows") == "prefix":
                assert anchor == next((piece[:k] for k in range(len(piece) - 1, 0, -1) if piece[:k] in common), None)
            elif n % 200 == 0:
                assert anchor == canonical(piece, members, common)
        anchor_of.append(found)
    average = options.get("average", "linear")
    check(fuser, members, logp, WEIGHTS, lambda own, w: naive_fusion.classes(members, own, w, anchor_of, average))


def canonical(piece: bytes, members: list[MemberView], common: set[bytes]) -> bytes | None:
    """The anchor that a piece begins with under the tokenizers, in the order of their fingerprints."""
    ranked = sorted(members, key=lambda m: f"{m.vocabulary.fingerprint}:{m.spelling.fingerprint}")
    while piece not in common:
        firsts = [naive_fusion.first_token(member, piece) for member in ranked]
        shorter = next((first for first in firsts if first and first != piece), None)
        if shorter is None:
            return next((piece[:k] for k in range(len(piece), 0, -1) if piece[:k] in common), None)
        piece = shorter
    return piece


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_mined(parts, store, order) -> None:
    members = [parts[n] for n in order]
    main = members[0].vocabulary.ids_of

    def nearest(piece: bytes) -> bytes:
        return piece if piece in main else min(main, key=lambda other: (distance(other, piece), main[other][0]))

    to = {piece: {nearest(piece): 1.0} for piece in members[1].vocabulary.ids_of}
    check(
        Mined().build(members, store), members, rows(members, hard(members)), WEIGHTS,
        lambda own, w: naive_fusion.mapped(members, own, w, [to]),
    )  # fmt: skip


def unit(values: torch.Tensor) -> torch.Tensor:
    return values / values.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_eva(parts, store, order) -> None:
    members = [parts[n] for n in order]
    points = []
    for member in members:
        vocab = member.vocabulary
        own = {p: next((i for i in ids if i not in vocab.byte_fallback), ids[0]) for p, ids in vocab.ids_of.items()}
        values = unit(member.load_embeddings()[list(own.values())])
        points.append(dict(zip(own, unit(values - values.mean(0)), strict=True)))
    target, source = points
    common = sorted(source.keys() & target.keys())
    turn = procrustes(torch.stack([source[p] for p in common]), torch.stack([target[p] for p in common]))
    names, cosines = (
        list(target),
        unit(torch.stack(list(source.values())) @ turn) @ torch.stack(list(target.values())).T,
    )
    to = {}
    for piece, row in zip(source, cosines, strict=True):
        values, near = row.topk(10)
        kept = {names[n]: float(v) for v, n in zip(values, near.tolist(), strict=True) if v >= 0.2}
        to[piece] = {name: v / sum(kept.values()) for name, v in kept.items()}
    got = Eva().build(members, store).fuse(logp := rows(members, hard(members)), WEIGHTS).logp
    for n in range(ROWS):
        fused = naive_fusion.mapped(members, [x[n] for x in logp], WEIGHTS[n].tolist(), [to])
        expected = naive_fusion.as_row(members[0].vocabulary, members[0].vocabulary, logp[0][n], fused)
        torch.testing.assert_close(got[n].double().exp(), expected, atol=1e-5, rtol=2e-3)  # maps are kept in fp16


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("rows_from", ["embedding", "exact"])
def test_equal_bytes_have_equal_rows(parts, store, order, rows_from: str) -> None:
    """Of pieces that are no anchors, too."""
    members = [parts[n] for n in order]
    spec = Deepen(rows=rows_from, max_anchors=64, top_m=0).matrix_spec()
    anchors = find_anchors([m.vocabulary for m in members], names=["a", "b"], max_anchors=64)
    apart = 0
    for member in members:
        matrix = store.get(member, anchors, spec)
        full = matrix.full().project(torch.eye(len(member.vocabulary)))
        for piece, ids in of_several_ids(member.vocabulary).items():
            assert all(torch.equal(full[i], full[ids[0]]) for i in ids)
            apart += piece not in anchors.pieces
    assert apart > 20
