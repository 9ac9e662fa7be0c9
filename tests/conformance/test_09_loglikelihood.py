"""Items 9 to 12: loglikelihood."""

from __future__ import annotations

import itertools
from pathlib import Path

import lm_eval
import naive
import pytest
from harness import deepen, hf, requests
from lm_eval.tasks import TaskManager

from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.scoring import score
from lm_eval_deepen.errors import RequestError

FAMILIES = ["bytelevel", "metaspace", "padded"]
DEMO = Path(__file__).resolve().parents[2] / "task_configs" / "demo"
LONG = "In 1969 the first people walked on the moon; in 2024 there were many. " * 6


@pytest.fixture(scope="module")
def pair(pico, matrices):
    return deepen(pico["metaspace"], pico["bytelevel"], matrix_dir=matrices, batch_size=4)


def ask(model, *pairs):
    return model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def same(got, expected, tokens=8):
    assert got[0] == pytest.approx(expected[0], abs=1e-4 * tokens)
    assert got[1] is expected[1]


def test_09_a_multiple_choice_set_gives_the_answers_of_hf(both):
    manager = TaskManager(include_path=str(DEMO), include_defaults=False)
    ours, theirs = (
        lm_eval.simple_evaluate(
            model=model, tasks=["deepen_demo_choice"], limit=12, task_manager=manager, bootstrap_iters=0
        )
        for model in both
    )
    samples = [found["samples"]["deepen_demo_choice"] for found in (ours, theirs)]
    assert len(samples[0]) == 12
    for mine, other in zip(*samples, strict=True):
        for [got], [expected] in zip(mine["resps"], other["resps"], strict=True):
            same(got, expected, 12)
        assert (mine["acc"], mine["acc_norm"]) == (other["acc"], other["acc_norm"])


def test_09_all_weight_on_the_main_member_is_that_member(pico):
    ours, theirs = deepen(pico["metaspace"], pico["bytelevel"], weights=[1.0, 0.0]), hf(pico["metaspace"])
    pairs = [("The fox walked ", "away"), ("", "Paris is the capital"), ("The capital of France is", " Paris")]
    for got, expected in zip(ask(ours, *pairs), ask(theirs, *pairs), strict=True):
        same(got, expected)
    batch = requests("generate_until", *((text, {"until": ["\n"], "max_gen_toks": 10}) for text, _ in pairs))
    assert ours.generate_until(batch) == theirs.generate_until(batch)


def test_09_is_greedy_is_exact_for_greedy_texts_and_for_others(both):
    ours, theirs = both
    contexts = ["The quick brown fox", "Paris is", "walk", "10 + 20 =", "The dog"]
    batch = [(context, {"max_gen_toks": 1, "until": []}) for context in contexts]
    texts = theirs.generate_until(requests("generate_until", *batch))
    pairs = [
        pair
        for context, text in zip(contexts, texts, strict=True)
        if text
        for pair in ((context, text), (context, text + "x"))
    ]
    flags = [greedy for _, greedy in ask(ours, *pairs)]
    assert flags == [greedy for _, greedy in ask(theirs, *pairs)]
    assert set(flags) == {True, False}


def test_10_a_space_after_the_context_is_a_space_before_the_continuation(both, pair):
    ours, theirs = both
    for model in (ours, pair):
        (after, before) = ask(model, ("The fox walked ", "away"), ("The fox walked", " away"))
        same(after, before)
    same(ask(ours, ("The fox walked \n ", "away"))[0], ask(theirs, ("The fox walked \n ", "away"))[0])


def test_10_an_empty_context_is_the_prefix_token(both, pair):
    ours, theirs = both
    bos = theirs.tok_decode([theirs.prefix_token_id], skip_special_tokens=False)
    for pairs in ([("", "Paris is")], [("", f"{bos}Paris is")], [("", f"{bos} Paris")]):
        same(ask(ours, *pairs)[0], ask(theirs, *pairs)[0])
    assert ask(pair, ("", "Paris is"))[0][0] < 0


def test_10_where_hf_fails_an_assertion_there_is_a_value(both, pair):
    """A context of spaces, a continuation that merges with its context, an empty continuation."""
    pairs = [("   ", "spaces before"), ("walk", "ing"), ("The fox", ""), ("", "")]
    for model in (both[0], pair):
        for total, greedy in ask(model, *pairs):
            assert -1000 < total <= 0 and isinstance(greedy, bool)
        assert ask(model, ("The fox", "")) == [(0.0, True)]


def test_10_a_merging_continuation_scores_the_text_once_with_several_members(pair):
    """The main member's tokens of the whole text, from the last boundary inside the context on."""
    prompter = Prompter(pair.ensemble)
    for context, continuation in (("walk", "ing"), ("The fo", "x"), ("1", "0")):
        span = prompter.span(context, continuation)
        seen = [member.codec.vocab.decode(p.ids) for member, p in zip(pair.ensemble.members, span.prompts, strict=True)]
        assert seen[0] + pair.ensemble.main.codec.vocab.decode(span.target) == (context + continuation).encode()
        assert seen[0] == seen[1]


def test_11_a_long_context_is_cut_on_the_left_as_by_hf(pico):
    for family in FAMILIES:
        ours, theirs = deepen(pico[family], max_length=24), hf(pico[family], max_length=24)
        pairs = [(LONG, " the moon"), (LONG[:40], " a"), (LONG, " people walked on the moon")]
        for got, expected in zip(ask(ours, *pairs), ask(theirs, *pairs), strict=True):
            same(got, expected)


def test_11_a_continuation_that_is_too_long_is_a_clear_error(pico, tmp_path):
    short = {"max_length": 16, "matrix_dir": str(tmp_path)}
    for model in (deepen(pico["bytelevel"], **short), deepen(pico["metaspace"], pico["bytelevel"], **short)):
        with pytest.raises(RequestError, match="does not fit into the context of 16 tokens of member 'm0'.*max_length"):
            ask(model, ("The fox", " word" * 30))


def test_12_duplicates_are_answered_in_order(both):
    pairs = [("The fox", " jumps"), ("A dog", " sleeps"), ("The fox", " jumps"), ("The fox", " walks")] * 2
    pairs += [("Question: What is 1?\nAnswer:", " the café in 中国 🙂"), ("a newline\n", "def add(a, b):\n    return")]
    ours, theirs = both
    for got, expected in zip(ask(ours, *pairs), ask(theirs, *pairs), strict=True):
        same(got, expected)


def test_12_one_text_split_in_several_places_equals_hf_without_its_logits_cache(both, pair):
    """With the cache `hf` reads such requests at the wrong positions; here nothing depends on the neighbours."""
    words = ["The", " quick", " brown", " fox", " jumps"]
    pairs = [("".join(words[:i]), "".join(words[i:])) for i in range(1, len(words))]
    pairs += [("".join(words[:i]), "".join(words[i:-1]) + last) for i in (2, 4) for last in (" walks", " is")]
    ours, theirs = both
    for got, expected in zip(ask(ours, *pairs), ask(theirs, *pairs), strict=True):
        same(got, expected)
    for request, got in zip(pairs, ask(pair, *pairs), strict=True):
        same(got, ask(pair, request)[0])


def test_12_batch_sizes_and_order_change_nothing(pico, pair, tmp_path):
    contexts = ["The quick brown fox", "Question: What is 1 + 1?\nAnswer:", "", "walk", "café 中国"]
    pairs = list(itertools.product(contexts, [" jumps over", " 🙂 smile", "ing"]))
    for one, four in (
        (deepen(pico["metaspace"]), deepen(pico["metaspace"], batch_size=4)),
        (deepen(pico["metaspace"], pico["bytelevel"], matrix_dir=str(tmp_path)), pair),
    ):
        found = ask(one, *pairs)
        for got, expected in zip(ask(four, *pairs[::-1])[::-1], found, strict=True):
            same(got, expected)
        assert all(type(total) is float and type(greedy) is bool for total, greedy in found)
        assert ask(one) == []


@pytest.mark.parametrize("names", [["padded"], ["bytelevel", "padded", "metaspace"]], ids="+".join)
def test_12_the_shared_prefix_scorer_is_the_naive_scorer(pico, tmp_path, names):
    model = deepen(*(pico[name] for name in names), matrix_dir=str(tmp_path))
    prompter = Prompter(model.ensemble)
    pairs = itertools.product(["Question: What is 1 + 1?\nAnswer:", "walk", ""], [" 2", " 20", "ing", " 中国"])
    spans = [prompter.span(*pair) for pair in pairs]
    for index, got in score(model.ensemble, spans, 8):
        assert got.logp == pytest.approx(naive.score_span(model.ensemble, spans[index]), abs=2e-4)
