"""Item 21 on the two real models of the extra `demo`: an instruction-tuned one with a template, a base one without."""

from __future__ import annotations

import pytest
from harness import deepen, hf, requests

from lm_eval_deepen.build.demo_models import GEMMA3, SMOLLM2, prepare
from lm_eval_deepen.engine.prompts import Prompter

pytestmark = pytest.mark.real
TALK = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is the capital of Italy?"},
    {"role": "assistant", "content": "Rome"},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture(scope="module")
def model():
    return deepen(prepare(SMOLLM2), prepare(GEMMA3), chat_fallback="plain")


def test_21_an_instructed_and_a_base_model_converse(model):
    prompt = model.apply_chat_template(TALK)
    assert prompt == hf(prepare(SMOLLM2)).apply_chat_template(TALK)
    own = Prompter(model.ensemble).prompts(prompt)
    texts = [
        m.lm.tok_decode(list(p.ids), skip_special_tokens=False)
        for m, p in zip(model.ensemble.members, own, strict=True)
    ]
    assert texts[0] == prompt and prompt.endswith("<|im_start|>assistant\n")
    assert texts[1].endswith("Assistant:\nRome\n\nUser:\nWhat is the capital of France?\n\nAssistant:\n")
    assert own[1].ids[:2].count(model.ensemble.members[1].lm.tokenizer.bos_token_id) == 1
    (text,) = model.generate_until(requests("generate_until", (prompt, {"until": ["\n"], "max_gen_toks": 5})))
    assert "Paris" in text
    pairs = [(prompt, "Paris"), (prompt, "bicycle")]
    right, wrong = model.loglikelihood(requests("loglikelihood", *pairs))
    assert right[0] > wrong[0]
