"""Weights that change by request or by step, in the engine: against plain passes over one prompt at a time."""

from __future__ import annotations

import itertools
import json

import naive
import pytest
import torch
from harness import deepen

from lm_eval_deepen.engine.following import Job
from lm_eval_deepen.engine.generation import generate
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.scoring import score, score_together
from lm_eval_deepen.harness.model import configure

CONTEXTS = ["The quick brown fox", "Question: 1 + 1?\nAnswer:", "café 中国", ""]
CHOICES = [" jumps over", " two 🙂", "\n\nmoon"]
ORDERS = [("bytelevel", "metaspace"), ("metaspace", "padded")]


@pytest.fixture(scope="module", params=ORDERS, ids="+".join)
def pair(request, pico, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("matrices"))

    def make(**options):
        return deepen(*(pico[name] for name in request.param), matrix_dir=folder, batch_size=2, **options)

    return make


def places(member, ids):
    """Return, for each text token that something precedes, its place and how many bytes are left from its start on."""
    vocab = member.codec.vocab
    return {len(vocab.decode(ids[at:])): at for at, token in enumerate(ids) if at and token not in vocab.control}


def prompt_weights(model, prompts):
    """Return softmax(-mean loss) over the longest end of the prompt that all members' tokens begin with."""
    members = model.ensemble.members
    found = [places(member, prompt.ids) for member, prompt in zip(members, prompts, strict=True)]
    common = set.intersection(*map(set, found))
    if not common:
        return model.ensemble.weights
    means = []
    for member, prompt, own in zip(members, prompts, found, strict=True):
        first = own[max(common)]
        values = [
            float(naive.member_logp(member, prompt.ids[:at])[0, prompt.ids[at]]) for at in range(first, len(prompt.ids))
        ]
        means.append(sum(values) / len(values))
    return torch.softmax(torch.tensor(means), dim=0)


def with_weights(model, weights):
    """Return a plain ensemble of the same members with fixed weights."""
    fixed = model.ensemble
    return type(fixed)(fixed.config, fixed.members, fixed.fuser, weights, fixed.counters)


def test_weights_by_prompt_equal_plain_losses(pair):
    model = pair(weighting="perplexity")
    prompter = Prompter(model.ensemble)
    spans = [prompter.span(*request) for request in itertools.product(CONTEXTS, CHOICES)]
    found = dict(score(model.ensemble, spans, 16))
    changed = 0
    for index, span in enumerate(spans):
        weights = prompt_weights(model, span.prompts)
        changed += float(abs(weights[0] - 0.5)) > 0.01
        expected = naive.score_span(with_weights(model, weights), span)
        assert found[index].logp == pytest.approx(expected, abs=5e-4)
    assert changed >= 6


def plain_embedding(member, prompts, own):
    """Return the mean of the hidden states before a prompt's tokens that are evidence, from plain passes."""
    members_places = [places(one, prompt.ids) for one, prompt in zip(own, prompts, strict=True)]
    first = members_places[0][max(set.intersection(*map(set, members_places)))]
    ids = torch.tensor([list(prompts[0].ids)])
    with torch.inference_mode():
        states = member.lm.model.base_model(ids).last_hidden_state[0]
    return states[first - 1 : ids.shape[1] - 1].mean(0)


def test_a_router_compares_prompts_by_the_main_members_states(pair, tmp_path):
    texts = ["The quick brown dog", "Question: 2 + 2?\nAnswer:", "a café 国", "Question: 1 + 3?\nAnswer:"]
    scores = [[1, 0], [0, 1], [1, 0], [0, 1]]
    file = tmp_path / "router.jsonl"
    file.write_text("".join(json.dumps({"prompt": t, "scores": s}) + "\n" for t, s in zip(texts, scores, strict=True)))
    model = pair(weighting="knn", router=str(file), nearest=1)
    prompter, members = Prompter(model.ensemble), model.ensemble.members
    known = torch.stack([plain_embedding(members[0], prompter.prompts(text), members) for text in texts])
    spans = [prompter.span(*request) for request in itertools.product(CONTEXTS[:3], CHOICES[:1])]
    found, chosen = dict(score(model.ensemble, spans, 16)), []
    for index, span in enumerate(spans):
        own = plain_embedding(members[0], span.prompts, members)
        near = torch.cosine_similarity(known - known.mean(0), (own - known.mean(0))[None])
        chosen.append(scores[int(near.argmax())])
        expected = naive.score_span(with_weights(model, torch.tensor(chosen[-1], dtype=torch.float32)), span)
        assert found[index].logp == pytest.approx(expected, abs=5e-4)
    assert len({tuple(one) for one in chosen}) == 2


def test_generation_uses_the_weights_of_its_prompt(pair):
    model = pair(weighting="perplexity")
    jobs = [Job(Prompter(model.ensemble).prompts(context, 6), 6) for context in CONTEXTS[:3]]
    found = dict(generate(model.ensemble, jobs, 2))
    for index, context in enumerate(CONTEXTS[:3]):
        fixed = with_weights(model, prompt_weights(model, jobs[index].prompts))
        plain = type("Plain", (), {"ensemble": fixed})
        ids, logp = naive.generate_ids(plain, context, 6)
        assert found[index].ids == ids
        assert found[index].logp == pytest.approx(logp, abs=5e-4)


def test_weights_by_step_follow_the_members_entropies(pair):
    model = pair(weighting="confidence")
    ensemble = model.ensemble
    span = Prompter(ensemble).span(CONTEXTS[0], CHOICES[0])
    ((_, found),) = score(ensemble, [span], 16)
    for at, target in enumerate(span.target):
        rows = [naive.member_logp(m, path) for m, path in zip(ensemble.members, span.paths(ensemble, at), strict=True)]
        entropies = torch.stack([-(row.exp() * row.clamp_min(-200)).sum() for row in rows])
        weights = torch.softmax(ensemble.weights.log() - entropies, dim=0)
        expected = ensemble.fuser.fuse(rows, weights[None]).logp[0, target]
        assert found.logp[at] == pytest.approx(float(expected), abs=5e-4)


def test_ensembles_that_differ_in_weights_or_method_share_one_pass(pair):
    first = pair(weights=[0.7, 0.3])
    spans = [first.texts.prompter.span(*request) for request in itertools.product(CONTEXTS, CHOICES)]
    members = [{"name": f"m{i}", "pretrained": m.config.pretrained} for i, m in enumerate(first.ensemble.members)]
    arguments = {"pretrained": members[0]["pretrained"], "members": members}
    folder = first.ensemble_config.matrix_dir
    variants = [
        type(first.ensemble).assemble(configure({**arguments, "matrix_dir": folder, **options}), first.ensemble.members)
        for options in ({"weights": [0.2, 0.8]}, {"weighting": "perplexity"}, {"support": "full"})
    ]
    ensembles = [first.ensemble, *variants]
    alone = [dict(score(ensemble, spans, 64)) for ensemble in ensembles]
    for member in first.ensemble.members:
        member.runner.forwarded = 0
    together = dict(score_together(ensembles, spans, 64))
    forwarded = [member.runner.forwarded for member in first.ensemble.members]
    for number, expected in enumerate(alone):
        for index in range(len(spans)):
            assert together[index][number].logp == pytest.approx(expected[index].logp, abs=1e-4)
    for member in first.ensemble.members:
        member.runner.forwarded = 0
    dict(score(variants[1], spans, 64))
    assert forwarded == [member.runner.forwarded for member in first.ensemble.members]
