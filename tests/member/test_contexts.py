"""A text that one member has no room for: that member abstains, which is counted, and nothing else changes.

Where the main member's context ends, a text ends.
"""

from __future__ import annotations

import itertools
import logging

import naive
import pytest
from harness import STATIC, requests

from lm_eval_deepen.engine.bits_per_byte import Document, Reading, Variant
from lm_eval_deepen.engine.drafts import drafter
from lm_eval_deepen.engine.following import Job
from lm_eval_deepen.engine.generation import generate
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.scoring import score
from lm_eval_deepen.engine.self_check import examine
from lm_eval_deepen.engine.windows import rolling_spans
from lm_eval_deepen.errors import SpellingError, UnansweredError
from lm_eval_deepen.harness.model import DeepenLM

LONG = "In 1969 the first people walked on the moon; über 中国 🙂 there were many. " * 4
CONTEXTS = ["The quick brown fox", "café 中国", "walk " * 30, "", LONG]
CHOICES = [" jumps over the lazy dog, and nothing was said after that; " * 2, " 🙂 smile", "\n\n  indented"]
ORDERS = [("bytelevel", "metaspace"), ("metaspace", "bytelevel"), ("padded", "padded")]


@pytest.fixture(scope="module")
def ensemble(pico, tmp_path_factory):
    """Loads members, each with a context of its own."""
    folder = str(tmp_path_factory.mktemp("matrices"))

    def load(names, lengths, **options):
        members = [
            {"name": f"m{i}", "pretrained": str(pico[name]), "max_length": length}
            for i, (name, length) in enumerate(zip(names, lengths, strict=True))
        ]
        static = {"covers": "off"} if "weights" in options else STATIC
        options = {"matrix_dir": folder, "batch_size": 3, "self_check": False, **static, **options}
        return DeepenLM(members[0]["pretrained"], members=members, device="cpu", **options)

    return load


def beyond(model) -> dict[str, int]:
    return model.get_model_info()["deepen"].get("steps_beyond_context", {})


def generated(model, contexts, steps, batch=3, speculate="off"):
    jobs = [Job(Prompter(model.ensemble).prompts(context, steps), steps) for context in contexts]
    found = dict(generate(model.ensemble, jobs, batch, drafter(speculate)))
    return [found[index] for index in range(len(jobs))]


@pytest.mark.parametrize("order", ORDERS, ids="+".join)
def test_a_text_that_outgrows_another_member_goes_on_without_it(ensemble, order, caplog):
    """Steps equal the naive loop, the batch changes nothing, and what is left out is counted and told."""
    model = ensemble(order, (64, 36))
    batch = requests("generate_until", *((context, {"until": [], "max_gen_toks": 40}) for context in CONTEXTS))
    with caplog.at_level(logging.WARNING, "lm_eval_deepen"):
        together = model.generate_until(batch)
    told = model.get_model_info()["deepen"]
    assert 0 < beyond(model)["m1"] <= told["steps_sat_out"]["m1"] < told["steps_fused"] + told["steps_skipped"]
    assert (
        f"member 'm1' abstained from {beyond(model)['m1']} steps, whose texts do not fit into its context of 36"
        in caplog.text
    )
    for request, text in zip(batch, together, strict=True):
        assert model.generate_until([request]) == [text]
    for context, found in zip(CONTEXTS[1:3], generated(model, CONTEXTS[1:3], 40), strict=True):
        ids, logp = naive.generate_ids(model, context, 40)
        assert found.ids == ids and found.logp == pytest.approx(logp, abs=2e-4)


@pytest.mark.parametrize("speculate", ["lookup", "draft"])
def test_drafts_change_nothing_where_a_member_sits_out(ensemble, speculate):
    model = ensemble(("bytelevel", "metaspace"), (128, 40))
    contexts = ["a b a b a b a", "1 2 3 1 2 3 1", "walk " * 30]
    assert [found.ids for found in generated(model, contexts, 32, speculate=speculate)] == [
        found.ids for found in generated(model, contexts, 32)
    ]
    drafts = model.get_model_info()["deepen"]["steps_beyond_context"]
    assert drafts["m1"] > 0


def test_a_text_ends_where_the_main_members_context_does(ensemble):
    """Whatever a request asks for, and however much room the others have."""
    for other in (512, 20):
        small, large = (ensemble(("bytelevel", "metaspace"), (length, other)) for length in (32, 64))
        prompts = Prompter(small.ensemble).prompts("The fox", 8)
        room = 32 - len(prompts[0].ids)
        (found,), (expected,) = (
            [text for _, text in generate(model.ensemble, [Job(prompts, most)], 1)]
            for model, most in ((small, 500), (large, room + 1))
        )
        assert found.reason == "length" and len(found.ids) == room + 1  # what was chosen last is not taken in
        assert found.ids == expected.ids


def test_no_member_is_cut_for_whose_context_max_gen_toks_fills(ensemble):
    """The main member's prompt stays whole; the other takes part for as long as it can."""
    model = ensemble(("bytelevel", "metaspace"), (256, 32))
    (prompt, other) = Prompter(model.ensemble).prompts(LONG[:150], 32)
    assert model.ensemble.main.codec.vocab.decode(prompt.ids) == LONG[:150].encode()
    assert model.ensemble.members[1].codec.vocab.decode(other.ids) == LONG[:150].encode()
    assert model.ensemble.path(1, other, (), b"") is None
    batch = requests("generate_until", *((c, {"until": [], "max_gen_toks": 40}) for c in ("The fox", LONG[:150])))
    assert all(model.generate_until(batch)) and beyond(model)["m1"] > 40


@pytest.mark.parametrize("order", ORDERS, ids="+".join)
def test_scores_beyond_another_members_context_equal_the_naive_reference(ensemble, order):
    model = ensemble(order, (256, 24))
    prompter = Prompter(model.ensemble)
    pairs = list(itertools.product(CONTEXTS[1:], CHOICES))[::2]
    spans = [prompter.span(*pair) for pair in pairs]
    found = dict(score(model.ensemble, spans, 32))
    for index, span in enumerate(spans):
        assert found[index].logp == pytest.approx(naive.score_span(model.ensemble, span), abs=2e-4)
        alone = dict(score(model.ensemble, [span], 512))[0]
        assert found[index].logp == pytest.approx(alone.logp, abs=1e-4)
    assert beyond(model)["m1"] > 0
    for (context, _), span in zip(pairs, spans, strict=True):
        if span.target[:-1] and len(span.tokens(model.ensemble, len(span.target) - 1)[1]) > 24:  # not cut for
            assert context.rstrip().encode() in model.ensemble.main.codec.vocab.decode(span.prompts[0].ids)


def test_a_text_is_scored_in_windows_of_the_members_that_have_room_for_one(ensemble):
    model = ensemble(("metaspace", "bytelevel"), (48, 2))
    text = LONG[:90]
    spans = rolling_spans(model.ensemble, text)
    assert max(len(span.target) for span in spans) > 40  # as wide as the main member alone would have them
    (got,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert got == pytest.approx(sum(sum(naive.score_span(model.ensemble, span)) for span in spans), abs=1e-3)
    assert beyond(model)["m1"] > 0
    with pytest.raises(UnansweredError, match="fits into the context of 1 tokens of member 'm0'"):
        ensemble(("metaspace", "bytelevel"), (1, 48)).loglikelihood_rolling(requests("loglikelihood_rolling", ("🙂é",)))


def test_a_conversation_that_one_member_has_no_room_for(ensemble):
    """It is never cut: that member abstains. The main member's is, where it can still be answered, a shorter text."""
    model = ensemble(("bytelevel", "padded"), (64, 20), chat_fallback="plain")
    chat = model.apply_chat_template([{"role": "user", "content": "Where is the fox?"}])
    prompts = Prompter(model.ensemble).prompts(chat, 8)
    assert len(prompts[0].ids) < 56 and len(prompts[1].ids) > 20
    batch = requests("generate_until", (chat, {"until": [], "max_gen_toks": 60}), (chat, {"max_gen_toks": 8}))
    texts = model.generate_until(batch)
    assert texts[0].startswith(texts[1]) and beyond(model)["m1"] > 0
    assert len(generated(model, [chat], 60)[0].ids) == 64 - len(prompts[0].ids) + 1
    span = Prompter(model.ensemble).span(chat, " in the forest")
    ((total, _),) = model.loglikelihood(requests("loglikelihood", (chat, " in the forest")))
    assert total == pytest.approx(sum(naive.score_span(model.ensemble, span)), abs=1e-3)
    long = model.apply_chat_template([{"role": "user", "content": "word " * 80}])
    for kind, rest in (("generate_until", {"max_gen_toks": 8}), ("loglikelihood", " x")):
        with pytest.raises(
            UnansweredError, match="of 64 tokens of member 'm0', and a rendered chat template cannot be"
        ):
            getattr(model, kind)(requests(kind, (long, rest)))


def test_weights_by_prompt_are_those_of_the_members_that_can_read_it(ensemble):
    """Of two, the main member alone; of three, as if the third were not there."""
    names = ("bytelevel", "metaspace", "padded")
    trio, pair = (
        ensemble(names[:count], (256, 256, 16)[:count], weighting="perplexity", method="mined") for count in (3, 2)
    )
    context = "Sofia is the capital of Bulgaria. Paris is the capital of France, and Rome"
    spans = [Prompter(model.ensemble).span(context, " is the capital of Italy. " * 12) for model in (trio, pair)]
    assert spans[0].prompts[:2] == spans[1].prompts and len(spans[0].prompts[2].ids) > 16
    weights = []
    for model, span in zip((trio, pair), spans, strict=True):
        fuse, seen = model.ensemble.fuse, []

        def noted(logp, present, base, *others, fuse=fuse, seen=seen):
            seen.append(base[0].tolist())
            return fuse(logp, present, base, *others)

        model.ensemble.fuse = noted
        list(score(model.ensemble, [span], 512))
        list(generate(model.ensemble, [Job(Prompter(model.ensemble).prompts(context, 200), 4)], 1))
        assert len(seen) > 2 and seen[0] == pytest.approx(seen[-1], abs=1e-6)
        weights.append(seen[0])
    assert weights[0] == pytest.approx([*weights[1], 0.0], abs=1e-6) and abs(weights[1][0] - 0.5) > 0.01


def test_a_prompt_that_another_member_cannot_spell(ensemble, monkeypatch):
    """That member abstains from the request; the main member's is set aside. So it is for a text in the middle."""
    model = ensemble(("bytelevel", "metaspace"), (256, 256))
    main, other = model.ensemble.members

    def lossy(codec):
        encode, follow = codec.encode, codec.follow

        def checked(text):
            if "é" in text:
                raise SpellingError("member 'm': it has no piece for é")
            return encode(text)

        monkeypatch.setattr(codec, "encode", checked)

        def followed(prompt, data):
            return None if "é" in prompt.tail + data.decode(errors="ignore") else follow(prompt, data)

        monkeypatch.setattr(codec, "follow", followed)

    lossy(other.codec)
    pairs = [("The café", " is here"), ("The fox", " café"), ("The fox", " jumps"), ("", "é")]
    spans = [Prompter(model.ensemble).span(*pair) for pair in pairs]
    assert [span.prompts[1].spelt for span in spans] == [False, True, True, True]
    for (got, _), span in zip(model.loglikelihood(requests("loglikelihood", *pairs)), spans, strict=True):
        assert got == pytest.approx(sum(naive.score_span(model.ensemble, span)), abs=1e-3)
    batch = requests("generate_until", *((context, {"until": [], "max_gen_toks": 5}) for context, _ in pairs))
    for request, text in zip(batch, model.generate_until(batch), strict=True):
        assert model.generate_until([request]) == [text]
    model.loglikelihood_rolling(requests("loglikelihood_rolling", ("The café",)))
    assert model.ensemble.next_logp("The café").logp.isfinite().any()
    assert model.get_model_info()["deepen"]["steps_sat_out"]["m1"] > 10 and beyond(model) == {}
    lossy(main.codec)
    for kind, args in (
        ("loglikelihood", ("The café", " x")),
        ("loglikelihood", ("The fox", " é")),
        ("loglikelihood_rolling", ("é",)),
        ("generate_until", ("café", {"max_gen_toks": 8})),
    ):
        with pytest.raises(UnansweredError, match="it has no piece for é"):
            getattr(model, kind)(requests(kind, args))


def test_figures_without_a_member_that_has_no_room(ensemble):
    """Bits per byte, and the check before the first request."""
    model = ensemble(("bytelevel", "metaspace"), (256, 1))
    for documents, first in (([Document(LONG[:60]), Document(" moon", "The")], 1), ([Document(" moon", "The")], 0)):
        reading = Reading.of(model.ensemble, documents)
        alone, fused = reading.own_logp((1.0,)).flatten(), reading.logp([Variant.of(model.ensemble)]).flatten()
        assert fused[first:].tolist() == pytest.approx(alone[first:].tolist(), abs=1e-4)
    assert examine(ensemble(("bytelevel", "metaspace"), (256, 8)).ensemble)["bits_per_byte"]["ensemble"] > 0
    assert examine(ensemble(("metaspace", "bytelevel"), (1, 64)).ensemble)["warnings"][-1]["code"] == "unmeasured"


@pytest.mark.parametrize("weighting", [None, "bayes"])
def test_a_member_that_sits_out_agrees_with_nobody_and_with_everybody(ensemble, weighting):
    """The share of steps at which members agree is of those that take part."""
    names, options = ("bytelevel", "bytelevel", "metaspace"), {} if weighting is None else {"weighting": weighting}
    model = ensemble(names, (256, 256, 1), **options)
    span = Prompter(model.ensemble).span("The quick brown", " fox jumps over the lazy dog.")
    list(score(model.ensemble, [span], 512))
    assert model.ensemble.counters.sat_out["m2"] == len(span.target)
    assert model.get_model_info()["deepen"]["members_agree"] == 1  # the first two are the same model
