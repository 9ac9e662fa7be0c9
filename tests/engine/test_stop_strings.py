"""Random stop strings and lengths against a decoder that looks at the whole text after every token."""

from __future__ import annotations

import naive
import pytest
from harness import deepen, requests
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lm_eval_deepen.engine.drafts import drafter
from lm_eval_deepen.engine.following import BatchRow, Generation, Job
from lm_eval_deepen.engine.generation import append, generate
from lm_eval_deepen.engine.prompts import Prompter

CONTEXTS = ["The quick brown fox", "a b a b a b a", "café 中国 café", "1 2 3 1 2 3 1"]
ORDERS = [("bytelevel", "metaspace"), ("metaspace", "padded"), ("padded", "bytelevel")]
STEPS = 24
ALPHABET = "aab é🙂\nQ中"
PLENTY = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=ORDERS, ids="+".join)
def model(request, pico, tmp_path_factory):
    return deepen(
        *(pico[name] for name in request.param), matrix_dir=str(tmp_path_factory.mktemp("matrices")), batch_size=3
    )


@pytest.fixture(scope="module")
def unstopped(model):
    return {context: naive.generate_ids(model, context, STEPS)[0] for context in CONTEXTS}


def slow_stop(model, ids: list[int], stops: list[str], max_new: int, ended: bool) -> tuple[int, str]:
    """Return how many of some tokens are kept, and why no more; `ended`: end of text follows the last."""
    for count in range(1, len(ids) + 1):
        text = model.tok_decode(ids[:count], skip_special_tokens=False)
        if any(stop in text for stop in stops):
            return count, "stop"
        if count == max_new:
            return count, "length"
    assert ended
    return len(ids), "eos"


def cut(text: str, stops: list[str]) -> str:
    """Return what comes before the first stop string, as the harness cuts: by one after the other."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


@st.composite
def stop_strings(draw, text: str) -> list[str]:
    """Up to four: parts of a text, the same with another end, beginnings and ends of each other, and others."""
    found: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["part", "missed", "shorter", "other"]))
        start = draw(st.integers(0, max(0, len(text) - 1)))
        part = text[start : start + draw(st.integers(1, 8))]
        if kind == "missed":
            part += draw(st.text(ALPHABET, min_size=1, max_size=2))
        elif kind == "shorter" and found:
            part = found[-1][draw(st.integers(0, 1)) :][: draw(st.integers(1, 5))]
        elif kind == "other":
            part = draw(st.text(ALPHABET, min_size=1, max_size=3))
        if part and "\ufffd" not in part:  # what is half a character is no text
            found.append(part)
    return found


@st.composite
def spelled(draw, vocab) -> list[int]:
    """Tokens of a text in any segmentation that the vocabulary has, ends inside characters included."""
    data = draw(st.text(ALPHABET, min_size=1, max_size=14)).lstrip(" ").encode() or b"a"
    ids = []
    while data:
        sizes = [size for size in range(1, 9) if data[:size] in vocab.ids_of and size <= len(data)]
        size = draw(st.sampled_from(sizes))
        ids.append(draw(st.sampled_from(sorted(vocab.ids_of[data[:size]]))))
        data = data[size:]
    return ids


def drawn(data, model, unstopped):
    """Draw a context, stop strings and a length, and say where its text ends, and why."""
    context = data.draw(st.sampled_from(CONTEXTS))
    ids = unstopped[context]
    stops, most = data.draw(stop_strings(model.tok_decode(ids))), data.draw(st.integers(1, STEPS))
    return context, stops, most, *slow_stop(model, ids, stops, most, ended=len(ids) < STEPS)


@PLENTY
@given(data=st.data())
def test_a_text_stops_where_a_look_at_all_of_it_stops(model, data):
    """Stops over several tokens, inside and at the ends of tokens and characters, one within another."""
    vocab = model.ensemble.main.codec.vocab
    ids = data.draw(spelled(vocab))
    pieces = [vocab.pieces[token] for token in ids]
    whole = b"".join(pieces).decode()
    stops, most = data.draw(stop_strings(whole)), data.draw(st.integers(1, len(ids)))
    count, reason = slow_stop(model, ids, stops, most, ended=False)
    row = BatchRow(0, Job((), most, tuple(stops)), Generation())
    for token in ids:
        if row.out.reason:
            break
        append(model.ensemble, row, token, 0.0)
    event(reason)
    assert (len(row.out.ids), row.out.reason) == (count, reason)
    assert row.out.data == b"".join(pieces[:count])
    assert model.texts.finished(row.out, stops) == cut(model.tok_decode(ids[:count]), stops)
    if reason == "length" and count == len(ids):  # whole characters: the text is its bytes
        assert model.texts.finished(row.out, stops) == whole


@FEW
@given(data=st.data(), speculate=st.sampled_from(["off", "lookup", "draft"]))
def test_generated_texts_stop_where_the_plain_loop_does(model, unstopped, data, speculate):
    """Texts with stops and lengths of their own, in any order and batch: none changes another."""
    ensemble = model.ensemble
    jobs, expected = [], []
    for _ in range(data.draw(st.integers(1, 6))):
        context, stops, most, count, reason = drawn(data, model, unstopped)
        jobs.append(Job(Prompter(ensemble).prompts(context, STEPS), most, tuple(stops)))
        expected.append((context, count, reason))
    drafts = drafter(speculate)
    found = dict(generate(ensemble, jobs, data.draw(st.integers(1, 4)), drafts))
    tied = {tie["request"] for tie in drafts.near_ties}
    for index, (context, count, reason) in enumerate(expected):
        event(reason)
        if index not in tied:
            assert (found[index].ids, found[index].reason) == (unstopped[context][:count], reason)


@FEW
@given(data=st.data())
def test_answers_are_cut_at_the_first_stop_string(model, unstopped, data):
    """Through the harness's requests."""
    asked, expected = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        context, stops, most, count, _ = drawn(data, model, unstopped)
        asked.append((context, {"until": list(stops), "max_gen_toks": most}))
        expected.append(cut(model.tok_decode(unstopped[context][:count]), stops))
    assert model.generate_until(requests("generate_until", *asked)) == expected
