"""Selective fusion: which steps are left to the main member, counted, and what that changes."""

from __future__ import annotations

import pytest
import torch
from harness import deepen, requests

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.model import configure

CONTEXTS = ["The quick brown fox", "1 2 3", "café 中国", "walk walk", "Question: What is"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("matrices"))


def make(pico, folder, **options):
    return deepen(pico["bytelevel"], pico["metaspace"], matrix_dir=folder, **options)


def rows_of(model):
    """Return the members' distributions after each context, [B, V_m] each."""
    prompts = [model.texts.prompter.prompts(context) for context in CONTEXTS]
    return [m.logp(m.states_at([p[i].ids for p in prompts])) for i, m in enumerate(model.ensemble.members)]


def fuse(model, rows):
    return model.ensemble.fuse(rows, torch.ones(len(rows[0]), 2, dtype=torch.bool))


def towards(rows, token, mass=0.95):
    """Return a row [V] that puts a mass on one token."""
    return torch.full_like(rows, (1 - mass) / (len(rows) - 1)).index_fill_(0, torch.tensor([token]), mass).log()


def test_rows_on_which_all_members_agree_are_skipped(pico, folder):
    model, plain = make(pico, folder, skip_when="agree"), make(pico, folder)
    main, other = (member.codec.vocab for member in model.ensemble.members)
    rows = rows_of(model)
    rows[0][0], rows[1][0] = towards(rows[0][0], main.ids_of[b"a"][0]), towards(rows[1][0], other.ids_of[b"a"][0])
    rows[0][1], rows[1][1] = towards(rows[0][1], main.ids_of[b"a"][0]), towards(rows[1][1], other.ids_of[b"b"][0])
    rows[0][2], rows[1][2] = towards(rows[0][2], main.eos[0]), towards(rows[1][2], other.eos[0])
    best = [
        {member.codec.vocab.pieces[int(r[i].argmax())] for member, r in zip(model.ensemble.members, rows, strict=True)}
        for i in range(len(CONTEXTS))
    ]
    skipped = [len(pieces) == 1 for pieces in best]
    assert skipped[0] and not skipped[1] and skipped[2]
    found, expected = fuse(model, rows), fuse(plain, rows)
    for i, skip in enumerate(skipped):
        assert torch.allclose(found[i], rows[0][i] if skip else expected[i], atol=1e-6)
    told = model.get_model_info()["deepen"]
    assert told["selective"] == {"skipped": sum(skipped), "checked": 0, "changed": 0}
    assert told["steps_fused"] == len(CONTEXTS) - sum(skipped)


def test_rows_of_which_the_main_member_is_sure_are_skipped_and_checked(pico, folder):
    model = make(pico, folder, skip_when="confident", skip_above=0.6, skip_check=True, weights=[0.1, 0.9])
    main, other = (member.codec.vocab for member in model.ensemble.members)
    rows = [logp[:3] for logp in rows_of(model)]
    a, b = main.ids_of[b"a"][0], other.ids_of[b"b"][0]
    rows[0][0], rows[1][0] = towards(rows[0][0], a, 0.7), towards(rows[1][0], b, 0.99)  # fusion would change it
    rows[0][1], rows[1][1] = towards(rows[0][1], a, 0.7), towards(rows[1][1], other.ids_of[b"a"][0], 0.99)
    rows[0][2] = towards(rows[0][2], a, 0.5)
    found = fuse(model, rows)
    assert torch.equal(found[:2], rows[0][:2]) and not torch.equal(found[2], rows[0][2])
    assert model.get_model_info()["deepen"]["selective"] == {"skipped": 2, "checked": 2, "changed": 1}


def test_skipping_everything_is_the_main_member(pico, folder):
    model, alone = make(pico, folder, skip_when="confident", skip_above=1e-9), deepen(pico["bytelevel"])
    batch = requests("generate_until", *((context, {"until": [], "max_gen_toks": 6}) for context in CONTEXTS))
    assert model.generate_until(batch) == alone.generate_until(batch)


def test_bad_values_are_named():
    pair = {"pretrained": "a", "members": ["a", "b"]}
    with pytest.raises(ConfigError, match="skip_when.*confident"):
        configure({**pair, "skip_when": "sometimes"})
    with pytest.raises(ConfigError, match="skip_above must be a number above 0 and up to 1; got 90"):
        configure({**pair, "skip_above": 90})
    prints = {configure({**pair, **more}).fingerprint() for more in ({}, {"skip_above": 0.5}, {"skip_check": True})}
    assert len(prints) == 1 and configure({**pair, "skip_when": "agree"}).fingerprint() not in prints
