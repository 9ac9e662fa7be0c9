"""The two real models of the extra `demo`: parity with `hf`, both orders, invariances.

The matrices are those of the user's cache folder, which other tests and the demo use, too.
"""

from __future__ import annotations

import json
from pathlib import Path

import naive
import pytest
from harness import deepen, hf, requests

from lm_eval_deepen.build.demo_models import GEMMA3, SMOLLM2, prepare
from lm_eval_deepen.engine.following import Job
from lm_eval_deepen.engine.generation import generate
from lm_eval_deepen.engine.prompts import Prompter, Span
from lm_eval_deepen.engine.scoring import score

pytestmark = pytest.mark.real
DEMO = Path(__file__).resolve().parents[2] / "task_configs" / "demo"
NAMES = [SMOLLM2.name, GEMMA3.name]
ORDERS = [NAMES, NAMES[::-1]]
NODES = 64  # tokens that a member forwards at once


@pytest.fixture(scope="module")
def folders():
    return {model.name: prepare(model) for model in (SMOLLM2, GEMMA3)}


@pytest.fixture(scope="module")
def pairs():
    items = [json.loads(line) for line in (DEMO / "choice.jsonl").read_text().splitlines()[:4]]
    asked = [(f"Question: {item['question']}\nAnswer:", item["choices"]) for item in items]
    return [(question, f" {choice}") for question, choices in asked for choice in choices]


@pytest.fixture(scope="module")
def prompts():
    shots = [json.loads(line) for line in (DEMO / "short_fewshot.jsonl").read_text().splitlines()]
    items = [json.loads(line) for line in (DEMO / "short.jsonl").read_text().splitlines()[:3]]
    head = "".join(f"Question: {shot['question']}\nAnswer: {shot['answers'][0]}\n\n" for shot in shots[:3])
    return [f"{head}Question: {item['question']}\nAnswer:" for item in items]


@pytest.fixture(scope="module", params=ORDERS, ids="+".join)
def model(request, folders):
    return deepen(*(folders[name] for name in request.param), batch_size=8)


@pytest.mark.parametrize("name", NAMES)
def test_one_member_is_hf(folders, pairs, prompts, name):
    ours, theirs = deepen(folders[name], batch_size=8), hf(folders[name], batch_size=8)
    batch = requests("loglikelihood", *pairs[::2])
    both = zip(batch, ours.loglikelihood(batch), theirs.loglikelihood(batch), strict=True)
    for request, got, expected in both:
        tokens = len(theirs.tok_encode(request.args[1]))
        assert got[0] == pytest.approx(expected[0], abs=1e-4 * tokens)
        assert got[1] is expected[1]
    text = [(" ".join(context for context, _ in pairs[::4]),)]
    batch = requests("loglikelihood_rolling", *text)
    tokens = len(theirs.tok_encode(text[0][0]))
    assert ours.loglikelihood_rolling(batch)[0] == pytest.approx(
        theirs.loglikelihood_rolling(batch)[0], abs=1e-4 * tokens
    )
    batch = requests("generate_until", *((p, {"until": ["\n"], "max_gen_toks": 10}) for p in prompts))
    assert ours.generate_until(batch) == theirs.generate_until(batch)


def test_scoring_equals_the_naive_reference(model, pairs):
    prompter = Prompter(model.ensemble)
    for pair in pairs[::8]:  # of two questions
        span = prompter.span(*pair)
        ((_, got),) = score(model.ensemble, [span], NODES)
        assert got.logp == pytest.approx(naive.score_span(model.ensemble, span), abs=1e-3)


def test_batch_and_order_change_nothing(model, pairs, prompts):
    spans = [Prompter(model.ensemble).span(*pair) for pair in pairs[::2]]
    some, many = dict(score(model.ensemble, spans, 7)), dict(score(model.ensemble, spans[::-1], NODES))
    for index in some:
        assert some[index].logp == pytest.approx(many[len(spans) - 1 - index].logp, abs=1e-4)
    batch = requests("generate_until", *((p, {"until": ["\n"], "max_gen_toks": 6}) for p in prompts))
    together = model.generate_until(batch)
    assert [model.generate_until([request])[0] for request in batch] == together


def test_a_generated_text_scores_the_sum_of_its_steps(model, prompts):
    prompter = Prompter(model.ensemble)
    jobs = [Job(prompter.prompts(prompt, 12), 12) for prompt in prompts]
    for index, found in generate(model.ensemble, jobs, 3):
        span = Span(jobs[index].prompts, tuple(found.ids))
        ((_, scored),) = score(model.ensemble, [span], NODES)
        assert scored.logp == pytest.approx(found.logp, abs=1e-3)


def test_identical_members_are_the_single_member(folders, pairs, prompts):
    path = folders[NAMES[0]]
    twin = deepen(path, path, batch_size=8)
    single = deepen(path, batch_size=8)
    batch = requests("loglikelihood", *pairs[::2])
    for got, expected in zip(twin.loglikelihood(batch), single.loglikelihood(batch), strict=True):
        assert got[0] == pytest.approx(expected[0], abs=1e-3)
    batch = requests("generate_until", *((p, {"until": ["\n"], "max_gen_toks": 6}) for p in prompts))
    assert twin.generate_until(batch) == single.generate_until(batch)
