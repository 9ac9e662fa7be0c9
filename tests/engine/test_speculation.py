"""Drafting changes no text, and continuous batching none either: both against the plain loop."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import naive
import pytest
from harness import deepen, requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm_eval_deepen.engine.drafts import Cheapest, Drafter, Lookup, drafter, look_up
from lm_eval_deepen.engine.following import Job
from lm_eval_deepen.engine.generation import generate
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.trace import Trace
from lm_eval_deepen.errors import ConfigError, UnansweredError
from lm_eval_deepen.harness.model import configure

CONTEXTS = ["The quick brown fox", "a b a b a b a", "café 中国 café", "walk walk walk", "ends\n", "1 2 3 1 2 3 1"]
ORDERS = [("bytelevel", "metaspace"), ("metaspace", "bytelevel"), ("padded", "bytelevel"), ("padded", "padded")]
QUICK = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=ORDERS, ids="+".join)
def model(request, pico, tmp_path_factory):
    return deepen(*(pico[name] for name in request.param), matrix_dir=str(tmp_path_factory.mktemp("matrices")))


@pytest.fixture(scope="module")
def references(model):
    return {context: naive.generate_ids(model, context, 24) for context in CONTEXTS}


@pytest.fixture
def where_it_pays(monkeypatch):
    """Drafts are made as they are outside tests; see `conftest.py`."""
    monkeypatch.setattr("lm_eval_deepen.engine.drafts.MARGIN", 1.25)


@pytest.mark.parametrize("speculate", ["lookup", "draft"])
def test_drafting_changes_no_token(model, references, speculate):
    """Every token is that of the plain loop, unless its two best pieces are nearly tied, which is listed."""
    drafts = drafter(speculate)
    jobs = [Job(Prompter(model.ensemble).prompts(context, 24), 24) for context in CONTEXTS]
    found = dict(generate(model.ensemble, jobs, 4, drafts))
    tied = {(tie["request"], tie["token"]) for tie in drafts.near_ties}
    for index, context in enumerate(CONTEXTS):
        ids, logp = references[context]
        pairs = enumerate(zip(found[index].ids, ids, strict=False))
        first = next((at for at, (got, expected) in pairs if got != expected), None)
        assert first is None or (index, first) in tied
        if first is None:
            assert found[index].ids == ids
            assert found[index].logp == pytest.approx(logp, abs=2e-4)
    assert drafts.counts["drafted"] >= drafts.counts["accepted"] > 0
    assert drafts.counts["steps"] >= drafts.counts["blocks"] + drafts.counts["accepted"] - len(CONTEXTS)


@QUICK
@given(data=st.data(), speculate=st.sampled_from(["off", "lookup", "draft"]))
def test_texts_do_not_depend_on_batches_lengths_or_drafts(model, references, data, speculate):
    """Jobs of unequal lengths in any order and batch size: each is the beginning of the plain loop's text."""
    order = data.draw(st.lists(st.sampled_from(CONTEXTS), min_size=1, max_size=9))
    lengths = [data.draw(st.integers(0, 24)) for _ in order]
    prompter = Prompter(model.ensemble)
    jobs = [Job(prompter.prompts(context, 24), length) for context, length in zip(order, lengths, strict=True)]
    drafts = drafter(speculate)
    found = dict(generate(model.ensemble, jobs, data.draw(st.integers(1, 4)), drafts))
    tied = {tie["request"] for tie in drafts.near_ties}
    for index, (context, length) in enumerate(zip(order, lengths, strict=True)):
        ids = references[context][0]
        if index not in tied:
            assert found[index].ids == ids[:length]
            assert found[index].reason == ("eos" if len(ids) < length else "length")


def test_a_finished_row_leaves_its_place_to_the_next(model):
    """Rows of unequal lengths keep the batch full: the steps are those of the tokens, not of the longest rows."""
    batches = []
    original = model.ensemble.fuse
    lengths = [12, 1, 1, 3, 1, 12, 1, 1]
    jobs = [Job(Prompter(model.ensemble).prompts("The fox", 12), length) for length in lengths]
    model.ensemble.fuse = lambda logp, *rest: (batches.append(len(logp[0])), original(logp, *rest))[1]
    try:
        done = dict(generate(model.ensemble, jobs, 2))
    finally:
        del model.ensemble.fuse
    places = [0, 0]
    for index in range(len(lengths)):  # each job goes where a place is free first
        at = places.index(min(places))
        places[at] += len(done[index].ids) + (done[index].reason == "eos")
    assert len(batches) == max(places) and sum(batches) == sum(places) and max(batches) == 2


def test_a_shared_prompt_is_prefilled_once(model):
    trunk = "Question: What is one and one?\nAnswer: two\n\n" * 3
    contexts = [trunk + f"Question: {word}?\nAnswer:" for word in ("fox", "dog", "walk", "moon", "1", "2")]
    prompter = Prompter(model.ensemble)
    jobs = [Job(prompter.prompts(context, 1), 1) for context in contexts]
    for member in model.ensemble.active:
        member.runner.forwarded = 0
    list(generate(model.ensemble, jobs, 2))
    for m, member in enumerate(model.ensemble.active):
        paths = [job.prompts[m].ids for job in jobs]
        assert member.runner.forwarded == len({path[:n] for path in paths for n in range(1, len(path) + 1)})


def test_sampled_texts_are_never_drafted(model):
    arguments = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.7}
    batch = requests("generate_until", *((context, arguments) for context in CONTEXTS))
    plain = model.generate_until(batch)
    drafts = Lookup()
    jobs = [model.texts.job(context, arguments, Counter())[0] for context in CONTEXTS]
    found = dict(generate(model.ensemble, jobs, 3, drafts))
    assert [model.tok_decode(found[i].ids) for i in range(len(jobs))] == plain
    assert drafts.counts["drafted"] == 0


def test_the_option_is_read_before_anything_loads():
    for value, expected in (("lookup", "lookup"), ("draft", "draft"), (False, "off"), ("off", "off")):
        found = configure({"pretrained": "a", "members": ["a", "b"], "speculate": value})
        assert found.speculate == expected
        assert configure(found.to_dict()) == found
        assert found.fingerprint() == configure({"pretrained": "a", "members": ["a", "b"]}).fingerprint()
    with pytest.raises(ConfigError, match="speculate.*lookup"):
        configure({"pretrained": "a", "members": ["a", "b"], "speculate": "ngram"})
    assert [type(drafter(name)) for name in ("off", "lookup", "draft")] == [Drafter, Lookup, Cheapest]


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(0, 5))
def test_look_up_finds_what_followed_the_end(tokens, count):
    found = look_up(tuple(tokens), count)
    expected: tuple[int, ...] = ()
    for size in (3, 2):
        starts = [s for s in range(len(tokens) - size) if tokens[s : s + size] == tokens[-size:]]
        if starts and not expected:
            expected = tuple(tokens[starts[-1] + size :][:count])
    assert found == expected


def test_results_tell_what_drafting_did(pico, tmp_path):
    model = deepen(pico["bytelevel"], pico["bytelevel"], speculate="draft", matrix_dir=str(tmp_path))
    model.generate_until(requests("generate_until", ("The quick", {"until": [], "max_gen_toks": 16})))
    told = model.get_model_info()["deepen"]["speculation"]
    assert told["drafted"] >= told["accepted"] > 0 and told["blocks"] < told["steps"]
    assert isinstance(told["near_ties"], list)


def test_near_ties_are_named_as_results_name_requests(pico, tmp_path, monkeypatch):
    """Whatever is answered in another way beside them: set aside, sampled by turns, or by another process."""
    monkeypatch.setattr("lm_eval_deepen.engine.drafts.NEAR_TIE", 1e9)  # every step
    model = deepen(
        pico["bytelevel"], pico["bytelevel"], speculate="lookup", sampling="member", matrix_dir=str(tmp_path)
    )
    greedy = {"until": [], "max_gen_toks": 2}
    sampled = {**greedy, "do_sample": True, "temperature": 1.0, "top_k": 0}
    pairs = [("The", sampled), (3, greedy), ("walk", greedy), ("fox", sampled), ("dog", greedy)]
    asked = requests("generate_until", *pairs)
    asked = [replace(one, idx=at % 2, metadata=("task", 10 + at, 1)) for at, one in enumerate(asked)]
    with pytest.raises(UnansweredError):
        model.generate_until(asked)
    told = model.get_model_info()["deepen"]
    ties = told["speculation"]["near_ties"]
    assert {(tie["task"], tie["doc_id"], tie["request"]) for tie in ties} == {("task", 12, 0), ("task", 14, 0)}
    assert {tie["token"] for tie in ties} == {0, 1} and told["sampled_by_turns"]
    model.ensemble.generate(["The", "fox"], max_gen_toks=1)
    later = model.get_model_info()["deepen"]["speculation"]["near_ties"][len(ties) :]
    assert [sorted(tie) for tie in later] == [["margin", "request", "token"]] * 2
    assert {tie["request"] for tie in later} == {0, 1}


@pytest.mark.parametrize("kind", [Lookup, Cheapest])
def test_drafts_are_made_where_they_pay(model, where_it_pays, kind):
    """Never in a full batch, always for one text while they stand, again after a while where they did not."""
    drafts, row = kind(), SimpleNamespace(index=0)
    assert not drafts.pays(model.ensemble, 8) and drafts.pays(model.ensemble, 1)
    assert not drafts.pays(model.ensemble, 1, own=0.5)
    for _ in range(8):
        drafts.learn(row, 4, 0)
    assert not drafts.pays(model.ensemble, 1)
    later = [drafts.pays(model.ensemble, 1) for _ in range(100)]
    assert later[-1] and later == sorted(later)
    for _ in range(30):
        drafts.learn(row, 4, 4)
    assert drafts.pays(model.ensemble, 8)


def test_a_full_batch_forwards_what_it_forwards_without_drafts(model, where_it_pays):
    jobs = [Job(Prompter(model.ensemble).prompts(f"The fox {n}", 8), 8) for n in range(8)]
    counts = []
    for drafts in (Drafter(), Lookup()):
        before = [member.runner.forwarded for member in model.ensemble.active]
        list(generate(model.ensemble, jobs, 8, drafts))
        counts.append([m.runner.forwarded - old for m, old in zip(model.ensemble.active, before, strict=True)])
    assert counts[0] == counts[1]


class Wrong(Drafter):
    """Drafts two tokens that follow, and then what falls."""

    def __init__(self, texts):
        super().__init__()
        self.texts, self.stood = texts, []

    def draft(self, ensemble, rows, followers):
        return [
            (*self.texts[row.index][len(row.out.ids) :][:2], *ensemble.main.codec.encode(" fox café fox"))
            for row in rows
        ]

    def learn(self, row, drafted, accepted):
        self.stood.append((drafted, accepted))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weighting": "bayes"},
        {"skip_when": "agree", "skip_check": True},
        {"skip_when": "confident", "skip_above": 0.02, "weighting": "bayes"},
        {"rows": "embedding", "support": 8, "max_truncated": 0.5},
        {"max_length": 20},
        {"weights": [1.0, 0.0]},
    ],
    ids=str,
)
def test_drafted_tokens_that_fall_are_no_steps(pico, tmp_path, options):
    """Every statistic is that of the same texts without drafts."""
    given = {"weighting": "uniform"} if "weights" not in options else {}
    pair = deepen(pico["bytelevel"], pico["padded"], matrix_dir=str(tmp_path), **{**given, **options})
    jobs = [Job(Prompter(pair.ensemble).prompts(context, 8), 8) for context in CONTEXTS]
    told, texts, drafts = [], [], None
    for _ in range(2):
        ensemble = replace(pair.ensemble, counters=Trace(pair.ensemble.counters.names))
        found = dict(generate(ensemble, jobs, 1, drafts))
        texts.append([found[at].ids for at in range(len(jobs))])
        told.append(ensemble.counters.summary())
        drafts = drafts or Wrong(texts[0])
    assert texts[0] == texts[1] and any(drafted > accepted > 0 for drafted, accepted in drafts.stood)
    assert told[0]["steps_fused"] + told[0]["steps_skipped"] > 0
    assert told[1] == {key: pytest.approx(value, abs=1e-5) for key, value in told[0].items()}


def test_a_drafted_token_that_ends_the_text_stood(pico, tmp_path):
    model = deepen(pico["bytelevel"], pico["metaspace"], matrix_dir=str(tmp_path))
    job = Job(Prompter(model.ensemble).prompts("The fox", 8), 8)
    [(_, text)] = generate(model.ensemble, [job], 1)
    stop = model.ensemble.main.lm.tok_decode(text.ids[:2])
    drafts = Wrong([text.ids])
    [(_, short)] = generate(model.ensemble, [replace(job, stops=(stop,))], 1, drafts)
    assert short.ids == text.ids[: len(short.ids)] and short.reason == "stop"
    assert drafts.stood[-1][1] == len(short.ids)
