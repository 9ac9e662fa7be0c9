"""Requests made of hostile pieces, through `hf` and one member: the same answer, or a refusal that names the cause.

`pytest tests/harness/test_hostile_requests.py --hypothesis-profile=nightly` runs thousands.
"""

from __future__ import annotations

import copy
import math

import pytest
from generation_values import ANSWERED, DRAWN, REFUSED, VALUES
from harness import deepen, hf, requests
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lm_eval_deepen.errors import RequestError

WINDOW = 40
LOOSE = settings(deadline=None, suppress_health_check=list(HealthCheck))
PIECES = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|end|>", "<unk>", "<bos>", "<eos>", "<pad>"),
    *("<0x0A>", "<0xE4>", "\u2581", "\u0120", "<|", "|>", "</", "##", "\ufffd", "\ufeff", "\ufeffa"),
    *("\x00", "\x00\x00a", "\x7f", "\x1b[0m", "\r\n", "\r", "\x85", "\u2028", "\u200b", "\u202eabc", "\xa0"),
    *("\U0010ffff", "\U0001f1e7", "e\u0301", "\u0301", "🙂", "👨‍👩‍👧", "中国", "Ω≈ç√"),
    *("", " ", "  ", "\n", "\n\n", "\t", " \n ", "a", "walk", "ing", " the", "The fox", "Answer:", "1" * 30, "a" * 90),
]
TEXTS = ["The capital of France is", "Question: What is 1 + 1?\nAnswer:", "def add(a, b):\n    return a"]
LINE = 100_000  # characters
SURROGATES = ["\ud800", "\udc00", "\ud83d\ude42"]  # no bytes, and no tokens
piece = st.sampled_from(PIECES * 4 + SURROGATES) | st.text(max_size=6) | st.sampled_from(TEXTS)
text = st.lists(piece, max_size=7).map("".join)
long_line = st.tuples(piece, st.sampled_from([4_000] * 7 + [LINE])).map(lambda p: p[0] * (p[1] // max(len(p[0]), 1)))
stops = st.lists(st.sampled_from([p for p in PIECES if len(p) < 30]) | st.text(max_size=3), max_size=4)
LENGTHS = [WINDOW - 1, WINDOW, WINDOW + 1, 0, -1, -(10**9), 10**9, 2**63, 2**70, True]
LENGTHS += [3.7, -0.5, math.nan, math.inf, "5", "five", "", [3], {}, None]
NO_STOPS = [None, 5, 1.5, {}, ("a",), b"a", [None], [5], [["a"]], True, ["\ud800"], "\ud800"]
OTHERS = {
    "max_length": [1, 6, 12, WINDOW + 5, -1, 0, 9.5, "12", None],
    "temperature": [0, 0.0, -1.0, "0", "0.7", None, math.nan, [], 1e-40],
    "do_sample": [False, None, "false", "no", 0, 2],
}
# `assistant_early_exit` takes layers off the model of `hf`, and leaves them off where a request then fails.
SETTINGS = {
    field: [value for value in values if value != "the first"]
    for field, values in VALUES.items()
    if field not in (*OTHERS, *DRAWN, *ANSWERED, "max_new_tokens", "max_time", "assistant_early_exit", "another")
    and "cache" not in field
}


# Refused where `hf` has an answer: what it reads as something else than it says, or not at all.
MISREAD = {("temperature", "0"), ("temperature", "0.7"), ("do_sample", "no"), ("do_sample", 2)}
MISREAD |= {("max_length", 9.5), ("max_length", None), *REFUSED}


@st.composite
def arguments(draw):
    """Generation arguments: stops, a length and other settings; now and then what is none of them."""
    seldom = st.integers(0, 11).map(lambda number: number == 5)
    found = {
        "until": draw(st.sampled_from(NO_STOPS) if draw(seldom) else piece if draw(seldom) else stops),
        "max_gen_toks": draw(st.sampled_from(LENGTHS) if draw(seldom) else st.integers(1, 9)),
    }
    for field, values in OTHERS.items():
        if draw(seldom):
            found[field] = draw(st.sampled_from(values))
    for field in draw(st.lists(st.sampled_from(sorted(SETTINGS)), max_size=2, unique=True)):
        found[field] = draw(st.sampled_from(SETTINGS[field]))
    if draw(seldom):
        del found["until"]
    return found


@st.composite
def asked(draw):
    kind = draw(st.sampled_from(["loglikelihood", "loglikelihood_rolling", "generate_until", "generate_until"]))
    long = st.integers(0, 3).flatmap(lambda number: text if number else long_line)
    if kind == "loglikelihood":
        return kind, (draw(long), draw(piece | long))
    return kind, (draw(long),) if kind == "loglikelihood_rolling" else (draw(long), draw(arguments()))


@pytest.fixture(scope="module")
def models(pico):
    return {
        family: (deepen(path, max_length=WINDOW, batch_size=8), hf(path, max_length=WINDOW, batch_size=8))
        for family, path in pico.items()
    }


def outcome(model, kind, request):
    try:
        (found,) = getattr(model, kind)(requests(kind, copy.deepcopy(request)), disable_tqdm=True)
        return found
    except Exception as error:
        return error


def misread(given):
    return [key for key, value in given.items() if not isinstance(value, (list, dict)) and (key, value) in MISREAD]


def as_hf_means_it(kind, parts):
    """Return a request without empty stop strings, which end a text under `hf` and are no text to stop at here."""
    if kind != "generate_until":
        return parts
    context, given = parts
    until = given.get("until")
    until = [stop for stop in until if stop != ""] if isinstance(until, list) else [] if until == "" else until
    return context, given | ({"until": until} if "until" in given else {})


@LOOSE
@given(family=st.sampled_from(["bytelevel", "metaspace", "padded"]), asked=asked())
def test_a_hostile_request_has_the_answer_of_hf_or_is_refused(models, family, asked):
    kind, parts = asked
    ours, theirs = models[family]
    got, expected = outcome(ours, kind, parts), outcome(theirs, kind, as_hf_means_it(kind, parts))
    if isinstance(got, Exception):
        event(f"{kind}: refused")
        assert isinstance(got, RequestError), got
        assert len(str(got)) < 1_500, "the message quotes no whole document"
        given = parts[1] if kind == "generate_until" else {}
        assert isinstance(expected, Exception) or any(key in str(got) for key in misread(given)), (got, expected)
    elif isinstance(expected, Exception):
        event(f"{kind}: a value where hf has none")
        assert isinstance(got, str) or (-1e7 < (got[0] if isinstance(got, tuple) else got) <= 0)
    elif kind == "generate_until":
        event(f"{kind}: equal")
        assert got == expected
    else:
        event(f"{kind}: equal")
        tokens = len(theirs.tok_encode("".join(parts)))
        pair = (got, expected) if kind == "loglikelihood_rolling" else (got[0], expected[0])
        assert pair[0] == pytest.approx(pair[1], abs=1e-4 * max(tokens, 1), rel=1e-6)
        assert kind == "loglikelihood_rolling" or got[1] is expected[1]
