"""`weighting: bayes` at token steps: scoring, generation and bits per byte against plain fusions of every expert."""

from __future__ import annotations

import functools
import itertools
import math

import naive
import pytest
import torch
from harness import deepen, requests

from lm_eval_deepen.engine.bits_per_byte import Document, Reading, Variant
from lm_eval_deepen.engine.following import Job
from lm_eval_deepen.engine.generation import generate
from lm_eval_deepen.engine.prompts import Prompter, Span
from lm_eval_deepen.engine.scoring import score, score_together
from lm_eval_deepen.errors import ConfigError

CONTEXTS = ["The quick brown fox", "Question: 1 + 1?\nAnswer:", "café 中国", ""]
CHOICES = [" jumps over the lazy dog", " two 🙂", "\n\nmoon"]
REQUESTS = list(itertools.product(CONTEXTS, CHOICES))
ORDERS = [("bytelevel", "metaspace"), ("metaspace", "padded"), ("padded", "bytelevel", "metaspace")]


@pytest.fixture(autouse=True)
def each_plain_pass_once(monkeypatch):
    """All experts read the same rows of the members."""
    found = functools.cache(naive.member_logp)
    monkeypatch.setattr(naive, "member_logp", lambda member, tokens: found(member, tuple(tokens)))


@pytest.fixture(scope="module", params=ORDERS, ids="+".join)
def make(request, pico, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("matrices"))

    def make(**options):
        return deepen(*(pico[name] for name in request.param), matrix_dir=folder, batch_size=2, **options)

    return make


def experts_of(make, model):
    """Return a plain ensemble, with constant weights and one average, per expert.

    All weight on the main member would skip fusion, and give mass to embedding rows without a token.
    """
    experts = model.ensemble.experts
    nearly = (1 - 1e-6) * experts.weights + 1e-6 / experts.weights.shape[1]
    base = make().ensemble
    found = []
    for weights, kind in zip(nearly.float(), experts.kinds(), strict=True):
        found.append(type(base)(base.config, base.members, base.fuser.pooled_as(*kind), weights, base.counters))
    return found


def mixture(model, by_expert):
    """Return the mixture's log-probability of every token, from the experts' [K, T]."""
    prior = model.ensemble.experts.log_prior
    cumulative = torch.cat([prior[:, None], prior[:, None] + by_expert.double().cumsum(1)], dim=1)
    return torch.diff(cumulative.logsumexp(0)).tolist()


def by_each(plain, span):
    """Return every expert's log-probability of every target [K, T] by plain forward passes, corners fused as well."""
    return torch.tensor([naive.score_span(ensemble, span) for ensemble in plain])


def test_scoring_equals_the_mixture_of_plain_ensembles(make):
    model = make(weighting="bayes")
    plain = experts_of(make, model)
    prompter = Prompter(model.ensemble)
    spans = [prompter.span(*request) for request in REQUESTS]
    found = dict(score(model.ensemble, spans, 16))
    for index in (2, 6, 10):  # every choice, and a context without text
        assert found[index].logp == pytest.approx(mixture(model, by_each(plain, spans[index])), abs=5e-4)


def test_one_pass_serves_learning_and_constant_weights(make):
    models = [make(weighting="bayes"), make(), make(weighting="bayes", averages="linear")]
    first = models[0].ensemble
    prompter = Prompter(first)
    spans = [prompter.span(*request) for request in REQUESTS]
    same = [type(first)(m.ensemble.config, first.members, m.ensemble.fuser, m.ensemble.weights, m.ensemble.counters,
                        m.ensemble.weigher) for m in models]  # fmt: skip
    together = dict(score_together(same, spans, 16))
    for at, ensemble in enumerate(same):
        for index, own in score(ensemble, spans, 16):
            assert together[index][at].logp == pytest.approx(own.logp, abs=1e-4)


def test_generation_learns_from_its_prompt_as_scoring_does(make):
    model = make(weighting="bayes", learn_from="prompt")
    jobs = [Job(Prompter(model.ensemble).prompts(context, 6), 6) for context in CONTEXTS[:3]]
    for index, found in generate(model.ensemble, jobs, 2):
        ((_, scored),) = score(model.ensemble, [Span(jobs[index].prompts, tuple(found.ids))], 16)
        assert scored.logp == pytest.approx(found.logp, abs=1e-3)


def test_generation_learns_from_its_own_text(make):
    model = make(weighting="bayes")
    plain = experts_of(make, model)
    jobs = [Job(Prompter(model.ensemble).prompts(context, 6), 6) for context in CONTEXTS[:3]]
    found = dict(generate(model.ensemble, jobs, 2))
    for index, job in enumerate(jobs):
        log_posterior = model.ensemble.experts.log_prior.clone()
        ids: list[int] = []
        for token, value in zip(found[index].ids, found[index].logp, strict=True):
            data = model.ensemble.main.codec.vocab.decode(ids)
            rows = torch.stack([naive.fused_row(e, job.prompts, ids, data) for e in plain]).double()
            fused = torch.logsumexp(rows + log_posterior[:, None], dim=0)
            assert fused.max() - fused[token] < 1e-3
            assert value == pytest.approx(float(fused[token]), abs=1e-3)
            log_posterior = torch.log_softmax(log_posterior + rows[:, token], dim=0)
            ids.append(token)


@pytest.mark.parametrize(("last", "share"), [(32, 0.25), (3, 0.0)])
def test_what_the_prompt_teaches_is_what_stretches_say(make, last, share):
    """The weights after a prompt are those of the last stretches between the places where all members' tokens end."""
    model = make(weighting="bayes", learn_from="prompt", prompt_stretches=last, prior_share=share)
    context = "The quick brown fox jumps over the lazy dog. The dog did not mind,"
    span = Prompter(model.ensemble).span(context, " and the fox walked away")
    (score_here,) = [found for _, found in score(model.ensemble, [span], 16)]
    ends, sums = [], []
    for member, prompt in zip(model.ensemble.active, span.prompts, strict=True):
        texts = [member.codec.vocab.decode(prompt.ids[: n + 1]) for n in range(len(prompt.ids))]
        skip = len(texts[-1]) - len(context.encode())
        own = {}
        for n, text in enumerate(texts):
            if n:
                value = float(naive.member_logp(member, prompt.ids[:n])[0, prompt.ids[n]])
                own[len(text) - skip] = own.get(len(text) - skip, 0.0) + value
            else:
                own.setdefault(len(text) - skip, 0.0)
        ends.append({place for place in own if place > 0} | ({0} if 0 in own and len(texts[0]) == skip else set()))
        sums.append(own)
    common = sorted(set.intersection(*ends))
    experts = model.ensemble.experts
    log_posterior = experts.log_prior.clone()
    assert len(common) > 4
    for begin, end in itertools.pairwise(common[-last - 1 :]):
        values = torch.tensor([sum(v for place, v in own.items() if begin < place <= end) for own in sums]).double()
        log_posterior += torch.logsumexp(experts.weights.log() + values, dim=1)
    posterior = (1 - share) * torch.softmax(log_posterior, dim=0) + share * experts.log_prior.exp()
    log_posterior = posterior.log()
    got = model.ensemble.experts
    plain = by_each(experts_of(make, model), span).double()
    expected = torch.logsumexp(log_posterior + plain.sum(1), dim=0)
    assert score_here.total == pytest.approx(float(expected), abs=2e-3)
    assert len(got) == len(plain)


def test_a_text_of_several_windows_is_one_text(make):
    text = "The dog did not mind, and the fox walked away. " * 4
    model = make(weighting="bayes", max_length=64)
    (got,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    each = []
    for weights, (pools, power) in zip(
        model.ensemble.experts.weights.tolist(), model.ensemble.experts.kinds(), strict=True
    ):
        if weights[0] < 1 and power == 1:
            plain = make(weights=weights, average="geometric" if pools else "linear", max_length=64)
            each += plain.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert got >= max(each) - math.log(len(model.ensemble.experts)) - 1e-3


def test_bits_per_byte_start_anew_for_every_document(make):
    model = make(weighting="bayes")
    documents = [Document("The dog did not mind, and the fox walked away."), Document("10 + 20 = 30, 12 * 12 = 144")]
    variant = [Variant.of(model.ensemble)]
    both = Reading.of(model.ensemble, documents)
    together = both.bits(both.logp(variant))[0]
    for document, bits in zip(documents, together.tolist(), strict=True):
        alone = Reading.of(model.ensemble, [document])
        assert float(alone.bits(alone.logp(variant))[0]) == pytest.approx(bits, abs=1e-3)


def test_a_prior_has_a_number_for_each_expert(pico, make):
    pair = pico["bytelevel"], pico["metaspace"]
    for prior in ([1, -1], [0, 0]):
        with pytest.raises(ConfigError, match="prior must be numbers of 0 or more with a finite sum above 0"):
            deepen(*pair, weighting="bayes", prior=prior)
    for method in ("deepen", "mixture"):
        with pytest.raises(ConfigError, match=r"prior has 1 values for \d+ experts; give one for each"):
            deepen(*pair, method=method, weighting="bayes", prior=[1])
    count = len(make(weighting="bayes").ensemble.experts)
    prior = [2.0, *[0.0] * (count - 2), 6.0]
    found = make(weighting="bayes", prior=prior).ensemble.experts.log_prior.exp()
    assert found.tolist() == pytest.approx([share / 8 for share in prior])
