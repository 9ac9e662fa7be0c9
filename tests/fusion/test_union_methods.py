"""GaC and UniTE against slow, obvious references, and what the engine owes to pieces the main member lacks."""

from __future__ import annotations

import math

import naive
import naive_fusion
import pytest
import torch
from harness import deepen, requests
from tensor_worlds import renormalised, rows, trio, view

from lm_eval_deepen.engine.ensemble import view as member_view
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.fusion._maps import first_pieces
from lm_eval_deepen.fusion._union import unite_vocabularies
from lm_eval_deepen.fusion.base import Spelling
from lm_eval_deepen.fusion.gac import Gac
from lm_eval_deepen.fusion.unite import Unite
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

WEIGHTS = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.6, 0.0], [0.2, 0.0, 0.8], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.9, 0.1]])


def small(*pieces: bytes, tag: str = "m", **roles) -> object:
    """A member with these pieces; id 0 is EOS unless roles say otherwise."""
    roles = {"control": frozenset({0}), "eos": (0,), **roles}
    return view(tag, ByteVocab(pieces, **roles), torch.eye(len(pieces)))


@pytest.fixture
def store(tmp_path) -> MatrixStore:
    return MatrixStore(tmp_path, progress=False)


# ---- the union


def test_the_union_is_of_bytes_and_begins_with_the_main_member() -> None:
    main = ByteVocab((b"", b"caf\xc3\xa9", b" ing", b"x"), frozenset({0}), eos=(0,))
    other = ByteVocab((b"y", b" ing", b"", b"ing", b"y", b"", b"caf\xc3\xa9"), frozenset({2}), frozenset({5}), (2,))
    union = unite_vocabularies([main, other])
    assert union.vocabulary.pieces == (b"", b"caf\xc3\xa9", b" ing", b"x", b"y", b"ing")
    assert union.columns[0].tolist() == [0, 1, 2, 3]
    assert union.columns[1].tolist() == [4, 2, 0, 5, 4, -1, 1]  # " ing" and "ing" are two pieces, "y" is one


def test_without_an_end_in_the_main_member_nobody_ends() -> None:
    main, other = ByteVocab((b"a", b"b")), ByteVocab((b"", b"a"), frozenset({0}), eos=(0,))
    assert unite_vocabularies([main, other]).columns[1].tolist() == [-1, 0]


# ---- gac


@pytest.mark.parametrize("byte_pieces", [False, True])
def test_gac_equals_the_reference(store: MatrixStore, byte_pieces: bool) -> None:
    members = trio(byte_pieces)
    logp, fuser = rows(members, 5), Gac().build(members, store)
    got = fuser.fuse(logp, WEIGHTS).logp
    for n in range(5):
        fused = naive_fusion.gac(members, [x[n] for x in logp], WEIGHTS[n])
        expected = naive_fusion.as_row(fuser.out_vocab, members[0].vocabulary, logp[0][n], fused)
        torch.testing.assert_close(got[n].double().exp(), expected, atol=1e-7, rtol=1e-5)


def test_gac_of_one_model_twice_is_that_model(store: MatrixStore) -> None:
    main = trio()[0]
    logp = [renormalised(rows([main], 4)[0], main.vocabulary)] * 2
    got = Gac().build([main, main], store).fuse(logp, torch.full((4, 2), 0.5)).logp
    torch.testing.assert_close(got.exp(), logp[0].exp(), atol=1e-6, rtol=1e-5)


def test_gac_gives_a_piece_that_one_member_lacks_the_others_share(store: MatrixStore) -> None:
    members = [small(b"", b"a", b"b"), small(b"", b"a", b"c")]
    logp = [torch.tensor([[0.0, 0.6, 0.4]]).log(), torch.tensor([[0.1, 0.2, 0.7]]).log()]
    fused = Gac().build(members, store).fuse(logp, torch.tensor([[0.75, 0.25]]))
    torch.testing.assert_close(fused.logp.exp(), torch.tensor([[0.025, 0.5, 0.3, 0.175]]))


def test_gac_leaves_sure_rows_to_the_main_member(store: MatrixStore) -> None:
    members = [small(b"", b"a", b"b"), small(b"", b"a", b"c")]
    logp = [torch.tensor([[0.1, 0.5, 0.4], [0.1, 0.8, 0.1]]).log(), torch.full((2, 3), 1 / 3).log()]
    weights = torch.full((2, 2), 0.5)
    assert Gac().build(members, store).skip(logp, weights).tolist() == [False, False]
    assert Gac(threshold=0.8).build(members, store).skip(logp, weights).tolist() == [False, True]
    assert Gac(threshold=0.5).build(members, store).skip(logp, weights).tolist() == [True, True]


def test_a_tiny_probability_still_has_a_score(store: MatrixStore) -> None:
    members = [small(b"", b"a", b"b"), small(b"", b"a", b"c")]
    logp = [torch.tensor([[-900.0, -1e-9, -300.0]]), torch.tensor([[0.0, -200.0, -200.0]])]
    got = Gac().build(members, store).fuse(logp, torch.tensor([[0.5, 0.5]])).logp[0]
    assert float(got[2]) == pytest.approx(-300 + math.log(0.5), abs=1e-3)
    assert float(got[3]) == -math.inf  # 0.5 exp(-200) of the other member, which the main one lacks


# ---- unite


@pytest.mark.parametrize("tail", ["main", "none"])
@pytest.mark.parametrize("k", [1, 5, 10_000])
@pytest.mark.parametrize("byte_pieces", [False, True])
def test_unite_equals_the_reference(store: MatrixStore, byte_pieces: bool, k: int, tail: str) -> None:
    members = trio(byte_pieces)
    logp, fuser = rows(members, 5), Unite(top_k=k, tail=tail).build(members, store)
    got = fuser.fuse(logp, WEIGHTS).logp
    for n in range(5):
        fused = naive_fusion.unite(members, [x[n] for x in logp], WEIGHTS[n], k, tail)
        expected = naive_fusion.as_row(fuser.out_vocab, members[0].vocabulary, logp[0][n], fused)
        torch.testing.assert_close(got[n].double().exp(), expected, atol=1e-7, rtol=1e-5)


def test_a_missing_piece_takes_its_first_token(store: MatrixStore) -> None:
    members = [small(b"", b" So", b"f", b" Sof"), small(b"", b" Sofia", b"f")]
    logp = [torch.tensor([[0.1, 0.2, 0.4, 0.3]]).log(), torch.tensor([[0.1, 0.6, 0.3]]).log()]
    fuser = Unite(top_k=1, tail="none").build(members, store)
    got = fuser.fuse(logp, torch.tensor([[0.5, 0.5]])).logp.exp()[0]
    # candidates "f" and " Sofia": (0.4, 0.3 as " Sof") and (0.3, 0.6), each normalised
    assert got.tolist() == pytest.approx([0, 0, (4 / 7 + 1 / 3) / 2, 0, (3 / 7 + 2 / 3) / 2])


def test_the_first_token_is_the_tokenizers_own(store: MatrixStore) -> None:
    main = small(b"", b" So", b"f", b" Sof")
    assert first_pieces(main, [b" Sofia", b"x", b"fx"]).tolist() == [3, -1, 2]
    split = {b" Sofia": (1, 2), b"x": None, b"fx": ()}
    spelt = view("m", main.vocabulary, torch.eye(4))
    spelt = type(spelt)(**{**vars(spelt), "spelling": Spelling(split.get, "by hand")})
    assert first_pieces(spelt, [b" Sofia", b"x", b"fx"]).tolist() == [1, -1, -1]


def test_the_map_of_first_tokens_is_kept_and_belongs_to_its_tokenizer(store: MatrixStore, monkeypatch) -> None:
    members = trio()
    Unite().build(members, store)
    files = set(store.folder.glob("*.safetensors"))
    assert len(files) == 3
    monkeypatch.setattr("lm_eval_deepen.fusion.unite.first_pieces", lambda *_: pytest.fail("built twice"))
    Unite(top_k=3).build(members, store)
    assert set(store.folder.glob("*.safetensors")) == files
    monkeypatch.undo()
    spelt = [type(m)(**{**vars(m), "spelling": Spelling(lambda data: None, "another")}) for m in members]
    Unite().build(spelt, store)
    assert len(set(store.folder.glob("*.safetensors"))) == 6


def test_published_unite_scores_what_is_no_candidate_minus_infinity(store: MatrixStore) -> None:
    members = trio()
    logp = rows(members, 5)
    published = Unite(**Unite.COMPAT["reference"]).build(members, store).fuse(logp, WEIGHTS)
    text = [i for i, piece in enumerate(members[0].vocabulary.pieces) if piece]
    assert (published.logp[:, text] == -math.inf).any(1).all()
    assert torch.allclose(published.logp.exp().sum(1), torch.ones(5), atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Gac(threshold=0.0), "threshold must be a number above 0 and up to 1; got 0.0"),
        (lambda: Gac(threshold=1.5), "threshold must be"),
        (lambda: Unite(top_k=0), "top_k must be a whole number of at least 1; got 0"),
        (lambda: Unite(tail="all"), "tail must be 'main' or 'none'; got 'all'"),
    ],
)
def test_bad_options_are_named(build, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_real_member_spells_what_it_lacks_with_its_own_tokenizer(pico, store: MatrixStore) -> None:
    main = deepen(pico["bytelevel"]).ensemble.main
    seen, piece = member_view(main), b" Sofia is"
    assert piece not in seen.vocabulary.ids_of
    assert int(first_pieces(seen, [piece])[0]) == main.codec.encode(piece.decode())[0]


# ---- pieces the main member lacks, in a run
# The other member has nearly all the weight, so that its own pieces win.

UNION = [("gac", {}), ("unite", {"top_k": 4})]
CONTEXTS = ["The quick brown", "Sofia", "Question: What is", "def add(", "She was walking", "10 + 20 =", "In 19"]
STEPS = 6


@pytest.fixture(params=UNION, ids=[name for name, _ in UNION])
def model(request, pico, tmp_path):
    name, options = request.param
    return deepen(
        pico["bytelevel"], pico["metaspace"], method=name, weights=[0.02, 0.98], matrix_dir=str(tmp_path), **options
    )


def continuation(model, context: str) -> tuple[bytes, int]:
    """The bytes chosen greedily, and how many of the chosen pieces the main member lacks.

    The main member keeps the tokens that were chosen for as long as all of them are its own; from then on it
    encodes all bytes anew, as the others do at every step.
    """
    ensemble = model.ensemble
    prompts, out, data, lacking = Prompter(ensemble).prompts(context, STEPS), ensemble.fuser.out_vocab, b"", 0
    ids: list[int] = []
    for _ in range(STEPS):
        paths = [m.codec.follow(prompt, data) for m, prompt in zip(ensemble.active, prompts, strict=True)]
        paths[0] = paths[0] if lacking else prompts[0].ids + tuple(ids)
        logp = [naive.member_logp(m, path) for m, path in zip(ensemble.active, paths, strict=True)]
        piece = int(ensemble.fuse(logp, torch.ones(1, 2, dtype=torch.bool))[0].argmax())
        if piece in out.eos:
            break
        ids.append(piece)
        data += out.pieces[piece]
        lacking += piece >= len(ensemble.main.codec.vocab)
    return data, lacking


def readable(model) -> dict[str, tuple[bytes, int]]:
    """The continuations that are text."""
    found = {context: continuation(model, context) for context in CONTEXTS}
    return {context: pair for context, pair in found.items() if "\ufffd" not in pair[0].decode(errors="replace")}


def test_the_reference_does_choose_pieces_the_main_member_lacks(model) -> None:
    found = readable(model)
    assert sum(lacking > 0 for _, lacking in found.values()) >= 2


def test_generation_goes_on_from_a_piece_the_main_member_lacks(model) -> None:
    found = readable(model)
    batch = requests("generate_until", *((context, {"until": [], "max_gen_toks": STEPS}) for context in found))
    assert [text.encode() for text in model.generate_until(batch)] == [data for data, _ in found.values()]


def test_the_results_say_that_scores_are_lower_bounds(model) -> None:
    model.loglikelihood(requests("loglikelihood", ("The quick", " brown fox")))
    assert model.get_model_info()["deepen"]["scores_are_lower_bounds"] is True


def test_scores_equal_the_naive_reference(model) -> None:
    prompter = Prompter(model.ensemble)
    pairs = [("The quick", " brown fox"), ("She was", " walking and talking"), ("Le caf\u00e9", " est bon")]
    for pair, (got, _) in zip(pairs, model.loglikelihood(requests("loglikelihood", *pairs)), strict=True):
        assert got == pytest.approx(sum(naive.score_span(model.ensemble, prompter.span(*pair))), abs=1e-3)
