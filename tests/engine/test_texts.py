"""Calls from Python give the harness's numbers, exactly."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import deepen, requests

from lm_eval_deepen.errors import RequestError

CONTEXT, CHOICES = "The dog did not", [" mind", " walk away", ", and the fox", " café 中国"]
PROMPTS = ["The dog", "In 1969 the first", "", "The dog"]
LONG = "She was walking and talking while they were singing. 中国 🙂\n" * 18


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        ("bytelevel metaspace padded", {"batch_size": 2}),
        ("bytelevel metaspace", {"method": "gac", "weighting": "bayes"}),
        ("metaspace bytelevel", {"method": "mixture"}),
        ("bytelevel metaspace", {"weighting": "perplexity", "speculate": "lookup", "batch_size": "auto"}),
        ("padded", {}),
    ],
    ids=lambda value: str(value),
)
def test_the_numbers_are_the_harness_s(names: str, keys: dict[str, Any], pico: dict[str, Path]) -> None:
    paths = [pico[name] for name in names.split()]
    model, ensemble = deepen(*paths, **keys), deepen(*paths, **keys).ensemble
    pairs = [(CONTEXT, choice) for choice in CHOICES]
    expected = model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    found = ensemble.score(CONTEXT, CHOICES)
    assert [(one.logp, one.greedy) for one in found] == expected
    assert [one.text for one in found] == CHOICES and all(sum(one.token_logp) == one.logp for one in found)
    for arguments in (
        {"until": ["\n"], "max_gen_toks": 12},
        {"do_sample": True, "temperature": 0.7, "max_gen_toks": 6},
    ):
        torch.manual_seed(5)
        asked = requests("generate_until", *((prompt, dict(arguments)) for prompt in PROMPTS))
        texts = model.generate_until(asked, disable_tqdm=True)
        torch.manual_seed(5)
        for traced in (False, True):
            made = ensemble.generate(PROMPTS, traced=traced, **arguments)
            assert [one.text for one in made] == texts
            assert [bool(one.steps) for one in made] == [traced] * len(PROMPTS)
            for one in made if traced else ():
                assert one.logp == tuple(step.logp for step in one.steps)[: len(one.logp)]
                assert len(one.steps) - len(one.logp) == (one.reason == "eos")
    if keys.get("method") == "mixture":
        for call in (lambda: ensemble.trace(LONG), lambda: ensemble.score(CONTEXT, CHOICES, traced=True)):
            with pytest.raises(RequestError, match="by stretches, which have no steps"):
                call()
        return
    [total] = model.loglikelihood_rolling(requests("loglikelihood_rolling", (LONG,)), disable_tqdm=True)
    traced = ensemble.trace(LONG)
    assert traced.logp == total and len(traced.steps) == len(traced.token_logp) > 100
    data = b"".join(step.piece.data for step in traced.steps)
    assert data.decode().strip() == LONG.strip()
    assert [step.logp for step in traced.steps] == pytest.approx(traced.token_logp, abs=2e-4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        traced.steps[0].logp = 0.0


def test_what_cannot_be_answered_says_so(pico: dict[str, Path]) -> None:
    pair = deepen(pico["bytelevel"], pico["metaspace"]).ensemble
    with pytest.raises(RequestError, match="2 contexts for 1 continuations"):
        pair.score(["a", "b"], ["c"])
    with pytest.raises(RequestError, match="leaves no room for a prompt"):
        pair.generate(["a"], max_gen_toks=100_000)
    with pytest.raises(RequestError, match="lone surrogate"):
        pair.score("a", ["\ud800"])
    assert pair.generate([]) == () and pair.score("a", []) == ()
    pooled = deepen(pico["bytelevel"], pico["metaspace"], pooling="vote").ensemble
    for call in (
        lambda: pooled.generate(["a"]),
        lambda: pooled.score("a", ["b"]),
        lambda: pooled.trace("a"),
        lambda: pooled.next_logp("a"),
    ):
        with pytest.raises(RequestError, match="pooling=vote combines whole answers"):
            call()


def test_what_comes_next_is_the_first_step_of_a_text(pico: dict[str, Path]) -> None:
    for keys in (
        {},
        {"weighting": "bayes"},
        {"weighting": "perplexity"},
        {"skip_when": "agree"},
        {"covers": "on"},
        None,
    ):
        others = [] if keys is None else [pico["metaspace"]]
        ensemble = deepen(pico["bytelevel"], *others, **(keys or {})).ensemble
        found = ensemble.next_logp("The dog")
        (text,) = ensemble.generate(["The dog"], max_gen_toks=1, until=[], traced=True)
        ((piece, probability), *others) = found.likeliest(3)
        step = text.steps[0]
        assert (piece, found.context) == (step.piece.data, "The dog") and found.pieces == ensemble.pieces
        assert math.log(probability) == pytest.approx(step.logp, abs=1e-5) == float(found.logp.max())
        assert found.logp.shape == (len(found.pieces),) and float(found.logp.exp().sum()) == pytest.approx(1, abs=1e-4)
        assert probability >= others[0][1] >= others[1][1] and b" the" in found.pieces
        with pytest.raises(dataclasses.FrozenInstanceError):
            found.context = ""
