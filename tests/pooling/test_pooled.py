"""Pooling in the harness's requests: what every member answers alone, combined."""

from __future__ import annotations

import itertools

import pytest
from harness import deepen, hf, requests

from lm_eval_deepen.errors import RequestError
from lm_eval_deepen.harness.model import DeepenLM, configure
from lm_eval_deepen.harness.requests import share_passes

NAMES = ("bytelevel", "metaspace", "padded")
PAIRS = list(itertools.product(["The quick brown fox", "café"], [" jumps over", " two"]))
TEXTS = ["The quick brown fox", "walk walk", "1 2 3"]


@pytest.fixture(scope="module")
def members(pico):
    return [hf(pico[name]) for name in NAMES]


def generation(*contexts):
    return requests("generate_until", *((c, {"until": ["e"], "max_gen_toks": 6}) for c in contexts))


def test_the_mean_of_the_members_own_scores(pico, members):
    model = deepen(*(pico[n] for n in NAMES), pooling="logp-mean", weights=[0.5, 0.3, 0.2])
    own = [member.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True) for member in members]
    for index, (value, _) in enumerate(model.loglikelihood(requests("loglikelihood", *PAIRS))):
        expected = sum(w * column[index][0] for w, column in zip([0.5, 0.3, 0.2], own, strict=True))
        assert value == pytest.approx(expected, abs=1e-3)
    rolling = requests("loglikelihood_rolling", *((text,) for text in TEXTS))
    own = [member.loglikelihood_rolling(rolling, disable_tqdm=True) for member in members]
    for index, value in enumerate(model.loglikelihood_rolling(rolling)):
        expected = sum(w * column[index] for w, column in zip([0.5, 0.3, 0.2], own, strict=True))
        assert value == pytest.approx(expected, abs=1e-3)
    told = model.get_model_info()["deepen"]
    assert told["pooling"] == "logp-mean" and told["pooled"]["requests"] == len(PAIRS) + len(TEXTS)
    assert told["pooled"]["mean_spread"] > 0 and told["steps_fused"] == 0


def test_a_vote_gives_a_text_that_most_weight_agrees_on(pico, members):
    """Two members of three are the same model: their text wins over the first one's, whatever it says."""
    model = deepen(pico["bytelevel"], pico["metaspace"], pico["metaspace"], pooling="vote")
    expected = members[1].generate_until(generation(*TEXTS), disable_tqdm=True)
    assert model.generate_until(generation(*TEXTS)) == expected
    assert expected != members[0].generate_until(generation(*TEXTS), disable_tqdm=True)


def test_samples_of_one_prompt_differ_however_many_requests_there_are(pico, monkeypatch):
    """Members answer some requests at a time; a prompt that comes again in the next ones is drawn anew."""
    drawing = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", *[("The quick", drawing)] * 6)
    model = deepen(pico["bytelevel"], pico["metaspace"], pooling="vote")
    together = model.generate_until(asked)
    assert len(set(together)) == 6
    monkeypatch.setattr("lm_eval_deepen.harness.pooled.AT_ONCE", 4)
    assert model.generate_until(asked) == together


def test_the_fused_ensemble_can_vote_as_well(pico, tmp_path):
    pair = [pico["bytelevel"], pico["metaspace"]]
    fused = deepen(*pair, matrix_dir=str(tmp_path)).generate_until(generation(*TEXTS))
    model = deepen(*pair, matrix_dir=str(tmp_path), pooling="vote", with_fused=True)
    assert model.generate_until(generation(*TEXTS)) == fused  # three different texts: the tie is the fused one's
    assert model.get_model_info()["deepen"]["steps_fused"] > 0


@pytest.mark.parametrize("method", ["deepen", "mixture"])
def test_reranking_gives_the_text_that_the_fused_ensemble_finds_likeliest(pico, members, tmp_path, method):
    pair, asked = [pico["bytelevel"], pico["metaspace"]], generation(*TEXTS)
    model = deepen(*pair, matrix_dir=str(tmp_path), pooling="rerank", method=method)
    fused = deepen(*pair, matrix_dir=str(tmp_path), method=method)
    own = [member.generate_until(asked, disable_tqdm=True) for member in members[:2]]
    expected = []
    for context, *texts in zip(TEXTS, *own, strict=True):
        scored = fused.loglikelihood(requests("loglikelihood", *((context, text) for text in texts if text)))
        scores = iter(value for value, _ in scored)
        by_text = [next(scores) / len(text.encode()) if text else float("-inf") for text in texts]
        expected.append(texts[by_text.index(max(by_text))])
    assert model.generate_until(asked) == expected and own[0] != own[1]
    told = model.get_model_info()["deepen"]
    assert told["pooled"]["requests"] == len(TEXTS) and told["method"] == method
    with pytest.raises(RequestError, match="pooling=rerank combines answers to generate_until"):
        model.loglikelihood(requests("loglikelihood", *PAIRS))


def test_requests_that_a_method_cannot_combine_are_refused(pico):
    model = deepen(pico["bytelevel"], pico["metaspace"], pooling="vote")
    with pytest.raises(RequestError, match="pooling=vote combines answers to generate_until"):
        model.loglikelihood(requests("loglikelihood", *PAIRS))


def test_each_member_reads_a_conversation_in_its_own_template(pico, members):
    model = deepen(pico["padded"], pico["metaspace"], pooling="mbr", chat_fallback="plain")
    context = model.apply_chat_template([{"role": "user", "content": "The fox"}])
    seen = model.pool._own(1, requests("generate_until", (context, {})))[0].args[0]
    assert type(seen) is str and seen == model.ensemble.members[1].render(context.messages, True, "plain")
    assert model.pool._own(0, requests("generate_until", (context, {})))[0].args[0] is context


def test_models_of_the_same_members_score_in_one_pass(pico, tmp_path):
    first = deepen(pico["bytelevel"], pico["metaspace"], matrix_dir=str(tmp_path))
    named = [{"name": f"m{i}", "pretrained": m.config.pretrained} for i, m in enumerate(first.ensemble.members)]
    config = configure(
        {"pretrained": named[0]["pretrained"], "members": named, "weights": [0.2, 0.8], "matrix_dir": str(tmp_path)}
    )
    second = DeepenLM.around(config, first.ensemble.members)
    batch, rolling = requests("loglikelihood", *PAIRS), requests("loglikelihood_rolling", *((t,) for t in TEXTS))
    expected = second.loglikelihood(batch), second.loglikelihood_rolling(rolling)
    own = first.loglikelihood(batch), first.loglikelihood_rolling(rolling)
    share_passes([first, second])
    assert [v for v, _ in first.loglikelihood(batch)] == pytest.approx([v for v, _ in own[0]], abs=1e-4)
    assert first.loglikelihood_rolling(rolling) == pytest.approx(own[1], abs=1e-4)
    for member in first.ensemble.members:
        member.runner.forwarded = 0
    assert [v for v, _ in second.loglikelihood(batch)] == pytest.approx([v for v, _ in expected[0]], abs=1e-4)
    assert second.loglikelihood_rolling(rolling) == pytest.approx(expected[1], abs=1e-4)
    assert [member.runner.forwarded for member in first.ensemble.members] == [0, 0]
    other = deepen(pico["metaspace"], pico["bytelevel"], matrix_dir=str(tmp_path))
    with pytest.raises(ValueError, match="same loaded members"):
        share_passes([first, other])
