"""Alignment and matching of the two real tokenizers, and one block of the real source."""

from __future__ import annotations

import pytest
import torch

from lm_eval_deepen.build.demo_models import GEMMA3, SMOLLM2, prepare
from lm_eval_deepen.build.distill.alignment import by_bytes, by_dtw
from lm_eval_deepen.build.distill.corpus import Tokens, neutral_documents
from lm_eval_deepen.build.distill.teacher_logits import block_rows
from lm_eval_deepen.build.distill.token_alignment import BYTES, match
from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.member import Member, load_member

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def pair() -> list[Member]:
    configs = [MemberConfig(name=model.name, pretrained=str(prepare(model))) for model in (SMOLLM2, GEMMA3)]
    return [load_member(config, "cpu") for config in configs]


def test_the_real_pair_shares_most_contexts_and_dtw_finds_fewer(pair) -> None:
    aligned = warped = wrong = total = 0
    for text in neutral_documents()[:12]:
        target, source = (Tokens.of(member.codec, text[:600]) for member in pair)
        at = by_bytes(target.ends, source.ends)
        pieces = [[m.codec.vocab.pieces[i] for i in t.ids] for m, t in zip(pair, (target, source), strict=True)]
        dtw = by_dtw(*pieces)
        aligned, warped, total = aligned + (at >= 0).sum(), warped + (dtw >= 0).sum(), total + len(at)
        wrong += ((dtw >= 0) & (dtw != at)).sum()
    assert 0.9 < aligned / total < 1 and 0.8 < warped / total < aligned / total and wrong / total < 0.03


def test_real_newlines_characters_and_byte_pieces_map_exactly(pair) -> None:
    target, source = (member.codec.vocab for member in pair)
    found = match(source, target, ())
    for text in ("\n", "\t", "é", " the", "0"):
        meant = {int(found.target[i]) for i in source.ids_of[text.encode()]}
        assert [target.pieces[i] for i in meant] == [text.encode()]
    assert len(source.byte_fallback) == 256
    for i in source.byte_fallback:
        piece = source.pieces[i]
        assert (found.kind[i] == BYTES) == (piece in target.ids_of)
        assert found.kind[i] != BYTES or target.pieces[found.target[i]] == piece


def test_a_block_of_the_real_source_is_its_own_forward_pass(pair) -> None:
    source = pair[1]
    block = Tokens.of(source.codec, "The capital of France is Paris, and the capital of Italy is Rome.")
    rows = block_rows(source, block, 10)
    with torch.inference_mode():
        logits = source.lm.model(torch.tensor([[*block.prefix, *block.ids]])).logits[0, len(block.prefix) - 1 : -1]
    logp = torch.log_softmax(logits.float(), dim=1)
    top = logp.topk(10, dim=1)
    torch.testing.assert_close(torch.from_numpy(rows.logp).float(), top.values, atol=0.02, rtol=2e-3)
    assert (torch.from_numpy(rows.ids)[:, 0] == top.indices[:, 0]).all()
    own = -logp.gather(1, torch.tensor(block.ids)[:, None]).double().sum()
    assert rows.nats == pytest.approx(float(own), rel=1e-4)
