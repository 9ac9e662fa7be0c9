"""Selective fusion: which steps are left to the main member, counted, and what that changes."""

from __future__ import annotations

import math

import naive
import pytest
import torch
from harness import deepen, requests

from lm_eval_deepen.engine import base
from lm_eval_deepen.engine.bits_per_byte import Document, Reading, Variant
from lm_eval_deepen.engine.drafts import drafter
from lm_eval_deepen.engine.following import Job
from lm_eval_deepen.engine.generation import generate
from lm_eval_deepen.engine.scoring import score
from lm_eval_deepen.engine.selective import identity, inside
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
    with pytest.raises(ConfigError, match="skip_check.*nothing is skipped; set skip_when"):
        configure({**pair, "skip_check": True})
    for more in ({}, {"skip_when": "agree"}):
        with pytest.raises(ConfigError, match="skip_above=0.5 is for skip_when=confident"):
            configure({**pair, "skip_above": 0.5, **more})
    checked = [configure({**pair, "skip_when": "agree", "skip_check": check}).fingerprint() for check in (True, False)]
    assert checked[0] == checked[1] != configure(pair).fingerprint()


def test_safe_leaves_tokens_half_written_agreement_and_a_majority(pico, folder):
    """As in SAFE: a step is fused where no member is inside a token and the main member's piece is not decided."""
    model, plain = make(pico, folder, skip_when="safe"), make(pico, folder)
    main, other = (member.codec.vocab for member in model.ensemble.members)
    rows = [logp[:1].repeat(4, 1) for logp in rows_of(model)]
    a, b = (vocab.ids_of[piece][0] for vocab, piece in ((main, b"a"), (other, b"b")))
    for row, (own, others) in enumerate([(0.6, 0.3), (0.8, 0.3), (0.6, 0.3)]):
        rows[0][row], rows[1][row] = towards(rows[0][row], a, own), towards(rows[1][row], b, others)
    rows[1][1, other.ids_of[b"a"][0]] = math.log(0.25)  # on average 0.525
    rows[0][3], rows[1][3] = towards(rows[0][3], a, 0.4), towards(rows[1][3], other.ids_of[b"a"][0], 0.2)
    inside = torch.tensor([[False, False], [False, False], [False, True], [False, False]])
    present = torch.ones(4, 2, dtype=torch.bool)
    found, expected = model.ensemble.fuse(rows, present, inside=inside), plain.ensemble.fuse(rows, present)
    assert torch.allclose(found[0], expected[0], atol=1e-6) and torch.equal(found[1:], rows[0][1:])
    assert model.get_model_info()["deepen"]["selective"] == {"skipped": 3, "checked": 0, "changed": 0}
    present[2, 1] = False  # a member that abstains is inside nothing: the row is the main member's all the same
    assert torch.equal(model.ensemble.fuse(rows, present, inside=inside)[2], rows[0][2])


def safe_row(ensemble, prompts, ids, seen):
    """Return the row [K] after a prompt and a continuation, and why it was left to the main member, if it was."""
    main = ensemble.main
    own = naive.member_logp(main, prompts[0].ids + tuple(ids))
    token, best, mass, halves = int(own.argmax()), [], [], []
    piece = b"" if token in main.eos_ids else main.codec.vocab.pieces[token]
    for member, prompt in zip(ensemble.active, prompts, strict=True):
        path = member.codec.follow(prompt, seen)
        row = own if member is main else naive.member_logp(member, path)
        vocab = member.codec.vocab
        best.append(identity(vocab, int(row.argmax())))
        same = [i for i in range(len(vocab)) if identity(vocab, i) == identity(main.codec.vocab, token)]
        mass.append(float(row[0, same].exp().sum()))
        after = member.codec.follow(prompt, seen + piece)
        ends = {vocab.decode(after[:n]) for n in range(len(after) + 1)}
        halves.append(member is not main and vocab.decode(path) not in ends)
    if any(halves) or len(set(best)) == 1 or sum(mass) / len(mass) > 0.5:
        return own[0], any(halves)
    return naive.fused_row(ensemble, prompts, ids, seen), None


@pytest.mark.parametrize("names", [("bytelevel", "metaspace"), ("metaspace", "bytelevel", "padded")], ids="+".join)
def test_safe_scores_and_generates_as_the_obvious_way_does(pico, folder, names):
    members = [pico[name] for name in names]
    model = deepen(*members, matrix_dir=folder, skip_when="safe", weighting="uniform", covers="off", batch_size=3)
    ensemble = model.ensemble
    pairs = [
        (context, f" {text} jumps over")
        for context, text in zip(CONTEXTS, ["brown", "12 é", "中", "walking", "it"], strict=True)
    ]
    spans = [model.texts.prompter.span(*pair) for pair in pairs]
    found, kinds = dict(score(ensemble, spans, 16)), set()
    for index, span in enumerate(spans):
        seen = b""
        for at, target in enumerate(span.target):
            row, half = safe_row(ensemble, span.prompts, span.target[:at], span.lead + seen[span.skip :])
            kinds.add(half)
            assert found[index].logp[at] == pytest.approx(float(row[target]), abs=1e-4)
            seen += ensemble.main.codec.vocab.pieces[target]
    assert None in kinds
    jobs = [Job(model.texts.prompter.prompts(context, 8), 8) for context in CONTEXTS]
    for index, out in generate(ensemble, jobs, 3, drafter("off")):
        for n, (token, value) in enumerate(zip(out.ids, out.logp, strict=True)):
            data = ensemble.main.codec.vocab.decode(out.ids[:n])
            row, _ = safe_row(ensemble, jobs[index].prompts, out.ids[:n], data)
            assert float(row.max() - row[token]) < 1e-4
            assert value == pytest.approx(float(row[token]), abs=1e-4)


TEXTS = [
    "The quick brown fox jumps over the lazy dog while talking and singing",
    "Question: What is 12 + 345?\n\nAnswer:  357, café 中国 🙂  walk\twalking\n  12",
]


@pytest.mark.parametrize("names", [("bytelevel", "metaspace"), ("metaspace", "bytelevel")], ids="+".join)
def test_a_place_is_inside_a_token_where_the_whole_text_has_no_token_that_ends_there(pico, folder, names):
    main, other = (
        member.codec for member in deepen(*(pico[name] for name in names), matrix_dir=folder).ensemble.members
    )
    seen = set()
    for text in TEXTS:
        ids, data = main.encode(text), b""
        for after in (main.vocab.pieces[token] for token in ids):
            whole = other.spell(data + after)
            ends = {other.vocab.decode(whole[:n]) for n in range(len(whole) + 1)}
            found = inside(other, other.spell(data), after)
            assert found == (data not in ends), (data, after)
            assert not inside(other, other.spell(data), b"")  # the text ends
            seen.add(found)
            data += after
    assert seen == {True, False}


@pytest.mark.parametrize("options", [{}, {"speculate": "lookup", "weighting": "uniform"}], ids=["learnt", "drafts"])
def test_safe_gives_the_same_in_every_batch_and_a_text_its_generated_score(pico, folder, options, monkeypatch):
    # by the bytes alone, so that it is so at half of the places
    monkeypatch.setattr(base, "inside", lambda codec, path, more: sum(codec.vocab.decode(path[-3:]) + more) % 2 == 0)
    members = [pico[name] for name in ("bytelevel", "metaspace", "padded")]
    model, one = (
        deepen(*members, matrix_dir=folder, skip_when="safe", covers="on", batch_size=size, **more)
        for size, more in ((4, options), (1, {**options, "speculate": "off"}))
    )
    texts = model.ensemble.generate(CONTEXTS, max_gen_toks=8, until=[], traced=True)
    assert [text.text for text in texts] == [
        text.text for text in one.ensemble.generate(CONTEXTS, max_gen_toks=8, until=[])
    ]
    reasons = {step.skipped for text in texts for step in text.steps}
    assert any("skip_when=safe" in reason for reason in reasons) and "" in reasons
    compared = 0
    for context, text in zip(CONTEXTS, texts, strict=True):
        (again,) = one.ensemble.score(context, [text.text], traced=True)
        pieces = [[step.piece.data for step in steps if step.piece.data] for steps in (text.steps, again.steps)]
        if pieces[0] == pieces[1]:  # else the text is cut otherwise than it was written
            compared += 1
            total = sum(step.logp for step in text.steps if step.piece.data)
            assert again.logp == pytest.approx(total, abs=1e-3)
    assert compared


def test_safe_counts_bits_as_it_scores(pico, folder):
    model = make(pico, folder, skip_when="safe", weighting="uniform")
    pairs = [("The quick", " brown fox walking"), ("1 2", " 3 jumps over it")]
    reading = Reading.of(model.ensemble, [Document(text, context) for context, text in pairs])
    bits = reading.bits(reading.logp([Variant.of(model.ensemble)]))[0]
    scores = [score for score, _ in model.loglikelihood(requests("loglikelihood", *pairs))]
    assert (-bits * math.log(2)).tolist() == pytest.approx(scores, abs=1e-3)
