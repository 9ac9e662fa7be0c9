"""When a text ends: EOS of every member; stop strings and lengths are in `test_stop_strings.py`."""

from __future__ import annotations

import math

import pytest
import torch
from harness import deepen, hf, requests

from lm_eval_deepen.engine.following import Job
from lm_eval_deepen.engine.generation import generate
from lm_eval_deepen.engine.prompts import Prompter

ORDERS = [("bytelevel", "metaspace"), ("metaspace", "padded"), ("padded", "bytelevel")]


@pytest.fixture(scope="module", params=ORDERS, ids="+".join)
def pair(request, pico, tmp_path_factory):
    return deepen(*(pico[name] for name in request.param), matrix_dir=str(tmp_path_factory.mktemp("matrices")))


def wants(member, token_mass):
    """Return a member's `logp` that puts the given masses on tokens and spreads the rest."""

    def logp(states):
        rows = torch.full((len(states), member.vocab_size), (1 - sum(token_mass.values())) / member.vocab_size)
        for token, mass in token_mass.items():
            rows[:, token] += mass
        return rows.log()

    return logp


def run(model, max_new=8):
    job = Job(Prompter(model.ensemble).prompts("The fox", max_new), max_new)
    ((_, found),) = generate(model.ensemble, [job], 1)
    return found


def test_members_that_all_want_to_stop_stop(pair, monkeypatch):
    """Each by its own EOS, however many it has: the masses meet at one event."""
    for member in pair.ensemble.members:
        ends = {token: 0.8 / len(member.eos_ids) for token in member.eos_ids}
        monkeypatch.setattr(member, "logp", wants(member, ends))
    found = run(pair)
    assert (found.reason, found.ids) == ("eos", [])


@pytest.mark.parametrize("average", ["linear", "geometric"])
def test_members_that_disagree_are_weighed(pair, monkeypatch, average):
    """One member's certain end of text is its weight of the fused mass, and does not leak into text.

    The geometric average weighs by the masses' roots: what is left for the other's choice decides.
    """
    main, other = pair.ensemble.members
    config = pair.ensemble_config.replace(options=pair.ensemble_config.options.replace(average=average))
    pair = pair.around(config, pair.ensemble.members)
    word = main.codec.vocab.ids_of[b"a"][0]
    monkeypatch.setattr(main, "logp", wants(main, {word: 0.98}))
    monkeypatch.setattr(other, "logp", wants(other, {other.eos_ids[0]: 0.98}))
    fused = pair.ensemble.next_logp("The fox").logp.exp()
    end, chosen = float(fused[list(main.eos_ids)].sum()), float(fused[word])
    if average == "linear":
        assert end == pytest.approx(0.49, abs=0.02)
        assert chosen == pytest.approx(0.49, abs=0.02)
    else:
        ends = [0.02 / main.vocab_size * len(main.eos_ids), 0.98 + 0.02 / other.vocab_size * len(other.eos_ids)]
        log_end = sum(math.log(mass) for mass in ends) / 2
        log_text = sum(math.log(1 - mass) for mass in ends) / 2
        assert end == pytest.approx(1 / (1 + math.exp(log_text - log_end)), rel=0.1)


def test_an_end_of_the_main_member_alone_does_not_stop_the_others(pair, monkeypatch):
    main, other = pair.ensemble.members
    text = other.codec.vocab.ids_of[b"a"][0]
    monkeypatch.setattr(main, "logp", wants(main, {main.eos_ids[0]: 0.4, main.codec.vocab.ids_of[b"a"][0]: 0.3}))
    monkeypatch.setattr(other, "logp", wants(other, {text: 0.9}))
    found = run(pair, max_new=3)
    assert found.reason == "length" and len(found.ids) == 3


def test_a_stop_string_in_the_prompt_stops_nothing(pico):
    ours, theirs = deepen(pico["bytelevel"]), hf(pico["bytelevel"])
    batch = requests("generate_until", ("STOP here\nSTOP", {"until": ["STOP"], "max_gen_toks": 6}))
    assert ours.generate_until(batch) == theirs.generate_until(batch) != [""]
