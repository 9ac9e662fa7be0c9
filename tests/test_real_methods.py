"""The union of the two real vocabularies, in both orders."""

from __future__ import annotations

import pytest
import torch
from harness import deepen

from lm_eval_deepen.tools.demo_models import GEMMA3, SMOLLM2, is_available, prepare

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (is_available(SMOLLM2) and is_available(GEMMA3)),
        reason="the models of the extra `demo` are not installed",
    ),
]


@pytest.mark.parametrize("order", [(SMOLLM2, GEMMA3), (GEMMA3, SMOLLM2)], ids=lambda pair: pair[0].name)
def test_gac_over_the_real_union(order) -> None:
    ensemble = deepen(*(prepare(model) for model in order), method="gac").ensemble
    vocabs, out = [member.codec.vocab for member in ensemble.members], ensemble.fuser.out_vocab
    lacking = set(vocabs[1].ids_of) - set(vocabs[0].ids_of)
    assert out.pieces[: len(vocabs[0])] == vocabs[0].pieces and set(out.pieces[len(vocabs[0]) :]) == lacking
    row = ensemble.next_logp("The capital of France is")
    assert out.pieces[int(row.argmax())] == b" Paris"
    torch.testing.assert_close(row.double().exp().sum(), torch.tensor(1.0).double(), atol=1e-5, rtol=0)
    text = [i for i, piece in enumerate(vocabs[0].pieces) if piece]
    assert row[text].isfinite().all()
