"""Relative rows from the output head, on pico models: Llama and GPT-NeoX have heads of their own, Gemma ties them."""

from __future__ import annotations

import logging

import pytest
import torch
from harness import deepen

from lm_eval_deepen.engine.ensemble import view
from lm_eval_deepen.fusion import METHODS
from lm_eval_deepen.fusion.deepen import Deepen
from lm_eval_deepen.relative.normalization import unit_rows
from lm_eval_deepen.relative.rows_from_embeddings import described_rows
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.tuning.search import (
    BYTE_SPACES,
    EMBEDDING_SPACES,
    OUTPUT_SPACES,
    Candidate,
    FrozenDict,
    Fusers,
    spaces_of,
    with_spaces,
)
from lm_eval_deepen.vocabulary.anchors import anchor_ids, find_anchors

DENSE = {"rows": "embedding", "top_m": 0, "support": "full"}


@pytest.fixture(scope="module")
def load(pico, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("matrices"))
    return lambda *names, **options: deepen(*(pico[name] for name in names), matrix_dir=folder, **options).ensemble


def described(ensemble):
    return [entry.get("embeddings") for entry in ensemble.fuser.facts["matrices"]]


def test_rows_are_cosines_of_the_head(load) -> None:
    ensemble = load("bytelevel", "metaspace", **DENSE, embeddings="output")
    assert described(ensemble) == ["output", "output, tied to the input"]
    member = ensemble.members[0]
    head = member.lm.model.lm_head.weight.detach()
    assert not torch.equal(head, member.embeddings())
    vocabularies = [member.codec.vocab for member in ensemble.members]
    pieces, text = vocabularies[0].pieces, described_rows(vocabularies[0])
    unit = unit_rows(head - head[text].mean(0), None)
    anchors = find_anchors(vocabularies, names=["a", "b"])
    expected = torch.softmax(100 * unit @ unit[list(anchor_ids(vocabularies[0], anchors))].T, dim=1)
    store = MatrixStore(ensemble.config.matrix_dir)
    relative = store.get(view(member), anchors, Deepen(**DENSE, embeddings="output").matrix_spec()).relative
    once = text & torch.tensor([pieces.count(piece) == 1 for piece in pieces])  # duplicates have their anchor's row
    torch.testing.assert_close(relative[once], expected[once], atol=1e-5, rtol=1e-3)


def test_they_change_what_is_fused_and_are_the_same_for_tied_members(load, pico, caplog) -> None:
    def fused(ensemble):
        generator = torch.Generator().manual_seed(0)
        logp = [torch.log_softmax(3 * torch.randn(2, len(m.codec.vocab), generator=generator), -1)
                for m in ensemble.members]  # fmt: skip
        return ensemble.fuser.fuse(logp, torch.full((2, len(logp)), 1 / len(logp))).logp

    with caplog.at_level(logging.WARNING, "lm_eval_deepen"):
        untied = [fused(load("bytelevel", "padded", **DENSE, embeddings=which)) for which in ("input", "output")]
        assert not torch.allclose(*untied, atol=1e-3)
        assert "changes nothing" not in caplog.text
        tied = [load("metaspace", "metaspace", **DENSE, embeddings=which) for which in ("input", "output")]
    assert torch.equal(*(fused(ensemble) for ensemble in tied))
    assert described(tied[0]) == ["input"] * 2 and described(tied[1]) == ["output, tied to the input"] * 2
    assert "embeddings: output changes nothing here" in caplog.text
    assert described(load("bytelevel", "padded")) == [None, None]  # rows from bytes


def test_a_digest_tells_heads_apart_and_knows_tied_ones(load) -> None:
    llama, gemma, neox = (view(member) for member in load("bytelevel", "metaspace", "padded").members)
    assert [one.tied for one in (llama, gemma, neox)] == [False, True, False]
    assert torch.equal(gemma.load_rows("output"), gemma.load_rows("input"))
    assert llama.load_rows("output").shape == llama.load_rows("input").shape


def test_the_search_tries_them_where_a_head_is_not_tied(load) -> None:
    every = (*BYTE_SPACES, *EMBEDDING_SPACES)
    assert spaces_of(load("metaspace", "metaspace"), everything=True) == every
    assert spaces_of(load("metaspace", "bytelevel"), everything=True) == (*every, *OUTPUT_SPACES)
    assert spaces_of(load("metaspace", "bytelevel"), everything=False) == BYTE_SPACES


@pytest.mark.parametrize(
    "given",
    [
        {"max_truncated": 0.2},
        {"support": 0.99, "max_support": 64, "max_truncated": 0.2},
        {"inverse": "adamw", "steps": 2, "learning_rate": 0.1, "top_m": 0, "support": "full", "embeddings": "output"},
    ],
)
def test_options_of_one_space_leave_no_other_space_out(load, given) -> None:
    ensemble = load("metaspace", "bytelevel", rows="embedding", **given)
    at = Candidate(FrozenDict(ensemble.config.options_dict()), (0.5, 0.5), (1.0, 1.0))
    found = list(with_spaces(at, spaces_of(ensemble, everything=True)))
    assert len(found) == len(BYTE_SPACES) + len(EMBEDDING_SPACES) + len(OUTPUT_SPACES)
    for candidate in found:
        METHODS["deepen"].options(**candidate.options)  # raises where an option does not fit the space
    Fusers(ensemble).variant(found[0])
