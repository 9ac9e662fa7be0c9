"""What an ensemble does that is given nothing but its members: covers, and weights that learn from the text."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from harness import by_default, deepen, requests
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_deepen.harness.model import configure

PAIR = {"members": ["org/a", "org/b"]}
CONTEXTS = ["The quick brown fox", "Question: What is 1 + 1?\nAnswer:", "café 中国 🙂", "walk", ""]
CHOICES = [" jumps over the lazy dog", "ing and talking", "\n\n  indented"]
PAIRS = list(itertools.product(CONTEXTS, CHOICES))
TEXTS = [("In 1969 the first people walked on the moon; über 中国 🙂 there were many. " * 3,), ("walk",), ("",)]
LEARNING, STATIC_COVERED, PLAIN = ("bayes", "on"), (None, "on"), (None, "off")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, LEARNING),
        ({"method": "deepen", "rows": "prefix", "min_anchors": 8, "seed": 1}, LEARNING),
        ({"method": "mixture"}, LEARNING),
        ({"learn_from": "prompt"}, LEARNING),
        ({"covers": "off"}, ("bayes", "off")),
        ({"weights": [0.5, 0.5]}, STATIC_COVERED),
        ({"weights": "0.5+0.5", "method": "mixture"}, STATIC_COVERED),
        ({"members": [{"pretrained": "org/a", "weight": 0.3}, {"pretrained": "org/b", "weight": 0.7}]}, STATIC_COVERED),
        ({"weighting": "uniform"}, ("uniform", "on")),
        ({"weighting": "uniform", "covers": "off"}, ("uniform", "off")),
        ({"average": "geometric"}, STATIC_COVERED),
        ({"average": "linear"}, STATIC_COVERED),
        ({"trust_region": 0.1}, STATIC_COVERED),
        ({"support": 64}, STATIC_COVERED),
        ({"rows": "embedding"}, PLAIN),
        ({"compat": "reference"}, PLAIN),
        ({"method": "gac"}, PLAIN),
        ({"method": "unite", "compat": "reference"}, PLAIN),
        ({"pooling": "vote"}, PLAIN),
        ({"pooling": "vote", "with_fused": True}, PLAIN),
        ({"members": ["org/a"]}, PLAIN),
    ],
    ids=str,
)
def test_what_is_not_given_is_learnt_and_what_is_given_holds(keys, expected) -> None:
    config = configure({**PAIR, **keys})
    assert (config.weighting, config.covers) == expected
    again = configure(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.fingerprint() == config.fingerprint()
    if config.weighting != "bayes" and "members" not in keys:
        assert config.weights == (0.5, 0.5)


def test_equal_weights_by_name_are_equal_weights_by_hand() -> None:
    by_name, by_hand = configure({**PAIR, "weighting": "uniform"}), configure({**PAIR, "weights": [0.5, 0.5]})
    assert by_name.fingerprint() == by_hand.fingerprint() != configure(PAIR).fingerprint()


# --- answers


def answers(model):
    generated = [(context, {"max_gen_toks": 6 + n, "until": ["\n"]}) for n, context in enumerate(CONTEXTS[:4])]
    return (
        [value for value, _ in model.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)],
        model.loglikelihood_rolling(requests("loglikelihood_rolling", *TEXTS), disable_tqdm=True),
        model.generate_until(requests("generate_until", *generated), disable_tqdm=True),
    )


@pytest.mark.parametrize("method", ["deepen", "mixture"])
@pytest.mark.parametrize(
    "names", [("bytelevel", "metaspace"), ("padded", "bytelevel", "metaspace")], ids=lambda names: "+".join(names)
)
def test_no_answer_depends_on_the_batch_or_the_order_or_on_drafts(pico, tmp_path, names, method) -> None:
    keys = {"matrix_dir": str(tmp_path), "method": method, "max_length": 96}
    paths = [pico[name] for name in names]
    scored, rolled, texts = answers(by_default(*paths, **keys, batch_size=3))
    assert all(math.isfinite(value) and value <= 0 for value in scored + rolled)
    alone = by_default(*paths, **keys, speculate="lookup")
    for index in (0, 4, 11):
        ((value, _),) = alone.loglikelihood(requests("loglikelihood", PAIRS[index]), disable_tqdm=True)
        assert value == pytest.approx(scored[index], abs=2e-4)
    assert alone.loglikelihood_rolling(requests("loglikelihood_rolling", *TEXTS[::-1]))[::-1] == pytest.approx(
        rolled, abs=2e-3
    )
    assert answers(alone)[2] == texts


def test_a_member_without_room_sits_out_and_the_others_learn_without_it(pico, tmp_path) -> None:
    members = [{"pretrained": str(pico["bytelevel"])}, {"pretrained": str(pico["metaspace"]), "max_length": 12}]
    model = by_default(pico["bytelevel"], matrix_dir=str(tmp_path))
    short = type(model)(members[0]["pretrained"], members=members, device="cpu", self_check=False,
                        matrix_dir=str(tmp_path))  # fmt: skip
    long = ("The dog did not mind,", " and the fox walked away" * 3)
    ((value, _),) = short.loglikelihood(requests("loglikelihood", long), disable_tqdm=True)
    ((alone, _),) = model.loglikelihood(requests("loglikelihood", long), disable_tqdm=True)
    experts = short.ensemble.experts
    assert 0 > value >= alone - math.log(len(experts) / experts.prior_share) - 1e-3
    assert short.get_model_info()["deepen"]["steps_sat_out"]["metaspace"] > 10


# --- adversaries


@pytest.fixture(scope="module")
def adversaries(pico, tmp_path_factory) -> dict[str, Path]:
    """`metaspace` with other random weights, with permuted pieces, and all but certain of wrong pieces."""
    found = {}
    for name in ("random", "permuted", "certain"):
        model = AutoModelForCausalLM.from_pretrained(pico["metaspace"], dtype=torch.float32)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            if name == "random":
                for weights in model.parameters():
                    weights.copy_(weights.std() * torch.randn(weights.shape, generator=generator) + weights.mean())
            elif name == "permuted":
                table = model.get_input_embeddings().weight
                table.copy_(table[torch.randperm(len(table), generator=generator)])
            else:
                model.model.norm.weight.fill_(5_000.0)
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        AutoTokenizer.from_pretrained(pico["metaspace"]).save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", ["random", "permuted", "certain"])
@pytest.mark.parametrize("method", ["deepen", "mixture"])
def test_an_adversary_costs_at_most_log2_k_bits_a_text(pico, adversaries, tmp_path, method, name) -> None:
    """In both orders; under `deepen` against the honest member in the main member's pieces, as every expert is."""
    for first in (True, False):
        paths = [pico["bytelevel"], adversaries[name]][:: 1 if first else -1]
        keys = {"matrix_dir": str(tmp_path), "method": method}
        model = by_default(*paths, **keys)
        experts = model.ensemble.experts
        honest = [1 - 1e-6, 1e-6][:: 1 if first else -1]  # all weight would skip fusion
        alone = by_default(*paths, **keys, weights=honest)
        learnt = model.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
        best = alone.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
        for (value, _), (other, _) in zip(learnt, best, strict=True):
            assert math.isfinite(value) and value >= other - math.log(len(experts) / experts.prior_share) - 1e-3


@pytest.mark.parametrize("method", ["deepen", "mixture"])
def test_five_members_two_of_them_adversaries(pico, adversaries, tmp_path, method) -> None:
    paths = [pico["bytelevel"], adversaries["certain"], pico["metaspace"], pico["padded"], adversaries["permuted"]]
    keys = {"matrix_dir": str(tmp_path), "method": method}
    model = by_default(*paths, **keys)
    experts = model.ensemble.experts
    learnt = [value for value, _ in model.loglikelihood(requests("loglikelihood", *PAIRS[:6]), disable_tqdm=True)]
    for m in (0, 2, 3):
        weights = [1e-6] * 5
        weights[m] = 1 - 4e-6
        alone = by_default(*paths, **keys, weights=weights)
        own = [value for value, _ in alone.loglikelihood(requests("loglikelihood", *PAIRS[:6]), disable_tqdm=True)]
        bound = math.log(len(experts) / experts.prior_share)
        assert all(a >= b - bound - 1e-3 for a, b in zip(learnt, own, strict=True))
    if method == "mixture":  # and the order changes nothing
        turned = by_default(*paths[::-1], **keys)
        again = [value for value, _ in turned.loglikelihood(requests("loglikelihood", *PAIRS[:6]), disable_tqdm=True)]
        assert again == pytest.approx(learnt, abs=1e-6)
    assert deepen(*paths, **keys).ensemble.weigher is None
