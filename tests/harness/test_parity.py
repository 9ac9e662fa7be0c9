"""One member is `hf`, exactly: the same requests through both classes."""

from __future__ import annotations

import pytest
from harness import deepen, hf, requests

FAMILIES = ["bytelevel", "metaspace", "padded"]
PAIRS = [
    ("Question: What is the largest planet?\nAnswer:", " Jupiter"),
    ("Question: What is the largest planet?\nAnswer:", " the café in 中国 🙂"),
    ("The fox walked ", "away"),
    ("The fox walked", " away"),
    ("", "Paris is the capital"),
    ("ends with a newline\n", "def add(a, b):\n    return"),
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Paris"),
]
TEXTS = ["The quick brown fox jumps over the lazy dog.", "café 中国 🙂 and 10 + 20 = 30\n\n\tend", "a"]
LONG = "In 1969 the first people walked on the moon; in 2024 there were many. " * 6


def close(got, expected, tokens):
    assert got == pytest.approx(expected, abs=1e-4 * max(tokens, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_loglikelihood_equals_hf(pico, family):
    ours, theirs = deepen(pico[family], batch_size=4), hf(pico[family])
    batch = requests("loglikelihood", *PAIRS)
    for pair, got, expected in zip(PAIRS, ours.loglikelihood(batch), theirs.loglikelihood(batch), strict=True):
        close(got[0], expected[0], len(theirs.tok_encode(pair[1])))
        assert got[1] is expected[1]
        assert isinstance(got[0], float) and isinstance(got[1], bool)


@pytest.mark.parametrize("family", FAMILIES)
def test_where_hf_fails_an_assertion_there_is_a_value(pico, family):
    """A continuation that merges with its context, an empty continuation, a context of spaces."""
    batch = requests("loglikelihood", ("walk", "ing"), ("The fox", ""), ("   ", "spaces before"))
    for total, greedy in deepen(pico[family]).loglikelihood(batch):
        assert -1000 < total <= 0 and isinstance(greedy, bool)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_are_recognised(pico, family):
    theirs = hf(pico[family])
    (text,) = theirs.generate_until(requests("generate_until", ("The fox", {"max_gen_toks": 1, "until": []})))
    batch = requests("loglikelihood", ("The fox", text), ("The fox", " zebra"))
    got = deepen(pico[family]).loglikelihood(batch)
    assert [answer[1] for answer in got] == [answer[1] for answer in theirs.loglikelihood(batch)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_length", [16, 64, None])
def test_rolling_equals_hf(pico, family, max_length):
    ours, theirs = deepen(pico[family], max_length=max_length), hf(pico[family], max_length=max_length)
    batch = requests("loglikelihood_rolling", *((text,) for text in [*TEXTS, LONG]))
    for text, got, expected in zip(
        [*TEXTS, LONG], ours.loglikelihood_rolling(batch), theirs.loglikelihood_rolling(batch), strict=True
    ):
        close(got, expected, len(theirs.tok_encode(text)))


def test_rolling_of_an_empty_text_is_zero(pico):
    assert deepen(pico["bytelevel"]).loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_left_truncation_equals_hf(pico, family):
    ours, theirs = deepen(pico[family], max_length=24), hf(pico[family], max_length=24)
    batch = requests("loglikelihood", (LONG, " the moon"), (LONG[:40], " a"))
    for got, expected in zip(ours.loglikelihood(batch), theirs.loglikelihood(batch), strict=True):
        close(got[0], expected[0], 4)
    batch = requests("generate_until", (LONG, {"max_gen_toks": 6, "until": []}))
    assert ours.generate_until(batch) == theirs.generate_until(batch)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("until", [[], ["\n"], ["e", "the"], "a", [" "]])
def test_greedy_generation_equals_hf(pico, family, until):
    ours, theirs = deepen(pico[family], batch_size=3), hf(pico[family])
    contexts = ["The quick brown", "Question: What is 1 + 1?\nAnswer:", "café 中国", "walk", "x" * 30]
    batch = requests("generate_until", *((c, {"until": until, "max_gen_toks": 12}) for c in contexts))
    assert ours.generate_until(batch) == theirs.generate_until(batch)


def test_all_weight_on_the_main_member_is_that_member(pico):
    ours = deepen(pico["metaspace"], pico["bytelevel"], weights=[1.0, 0.0])
    theirs = hf(pico["metaspace"])
    batch = requests("loglikelihood", *PAIRS)
    for got, expected in zip(ours.loglikelihood(batch), theirs.loglikelihood(batch), strict=True):
        close(got[0], expected[0], 12)
    batch = requests("generate_until", *((text, {"until": ["\n"], "max_gen_toks": 10}) for text in TEXTS))
    assert ours.generate_until(batch) == theirs.generate_until(batch)


def test_no_request_gives_no_answer(pico):
    model = deepen(pico["bytelevel"])
    assert (model.loglikelihood([]), model.loglikelihood_rolling([]), model.generate_until([])) == (
        [],
        [],
        [],
    )
