"""Pooling methods: what they combine, ties, and the members' own answers."""

from __future__ import annotations

import math

import pytest
from dropped_in import dropped_in

from lm_eval_deepen.errors import ConfigError, RequestError
from lm_eval_deepen.pooling import POOLINGS
from lm_eval_deepen.pooling.base import Candidate, Pooled, Scored, check_request, fused_takes_part, scores_texts
from lm_eval_deepen.pooling.logp_mean import LogpMean
from lm_eval_deepen.pooling.mbr import Mbr, chrf, word_f1
from lm_eval_deepen.pooling.rerank import Rerank
from lm_eval_deepen.pooling.vote import Vote

NAMES = sorted(POOLINGS)
KINDS = {"loglikelihood", "loglikelihood_rolling", "generate_until"}
EQUAL = [1 / 3] * 3


@pytest.fixture(params=NAMES)
def method(request):
    return POOLINGS[request.param].options()


def answers_for(method) -> list:
    if "generate_until" in method.REQUESTS:
        texts = ["a b c", "a b d", "a b c"]
        return [Candidate(text, -1.0) for text in texts] if scores_texts(method) else texts
    return [Scored(-1.0, True), Scored(-3.0, False), Scored(-2.0, True)]


def test_they_are_options_with_a_source_and_a_meaning_for_each(method) -> None:
    assert POOLINGS[method.NAME].options is type(method) and method.KIND == "pooling"
    assert POOLINGS[method.NAME].paper and type(method).__doc__
    assert all(field.description for field in type(method).model_fields.values())
    assert method.REQUESTS and method.REQUESTS <= KINDS


def test_equal_answers_are_the_answer(method) -> None:
    one = answers_for(method)[0]
    pooled = method.combine([one] * 3, [0.2, 0.5, 0.3])
    assert pooled.answer == getattr(one, "text", one) or pooled.answer.logp == pytest.approx(one.logp)
    assert all(math.isfinite(value) for value in pooled.stats.values())


def test_all_weight_on_one_member_is_that_member(method) -> None:
    answers = answers_for(method)
    for n in range(3):
        weights = [float(m == n) for m in range(3)]
        got = method.combine(answers, weights).answer
        assert got == getattr(answers[n], "text", answers[n]) or got.logp == pytest.approx(answers[n].logp)


def test_a_member_without_weight_has_no_vote_and_gives_no_text() -> None:
    vote = Vote(answer_pattern=r"\d+")
    assert vote.combine(["none", "5", "none too"], [0.5, 0.0, 0.5]).answer == "none"
    assert vote.combine(["it is 5", "so 5", "6"], [0.0, 0.6, 0.4]).answer == "so 5"
    assert vote.combine(["x", "y", "7"], [0.0, 1.0, 0.0]).answer == "y"
    assert Mbr().combine(["a b c", "a b x y", "x y z"], [0.5, 0.0, 0.5]).answer == "a b c"
    yes, no = Scored(-1.0, True), Scored(-1.0, False)
    assert LogpMean().combine([no, yes, no], [0.0, 0.5, 0.5]).answer.greedy


def test_other_request_types_are_refused(method) -> None:
    for kind in method.REQUESTS:
        check_request("x", method, kind)
    for kind in KINDS - method.REQUESTS:
        with pytest.raises(RequestError, match=f"pooling=x combines answers to .* the task has {kind} requests"):
            check_request("x", method, kind)


def test_a_wrong_number_of_answers_is_refused(method) -> None:
    with pytest.raises(ValueError, match="2 answers for 4 members"):
        method.combine(answers_for(method)[:2], [0.25] * 4)


# ---- logp-mean


def test_logp_mean_is_the_weighted_mean() -> None:
    pooled = LogpMean().combine([Scored(-1.0, True), Scored(-5.0)], [0.75, 0.25])
    assert pooled.answer == Scored(pytest.approx(-2.0), True) and pooled.stats["spread"] == 4.0


def test_greedy_needs_more_than_half_and_the_main_member_breaks_the_tie() -> None:
    yes, no = Scored(-1.0, True), Scored(-1.0, False)
    assert LogpMean().combine([no, yes, yes], EQUAL).answer.greedy
    assert not LogpMean().combine([yes, no, no], EQUAL).answer.greedy
    assert LogpMean().combine([yes, no], [0.5, 0.5]).answer.greedy
    assert not LogpMean().combine([no, yes], [0.5, 0.5]).answer.greedy


def test_an_impossible_continuation_is_impossible_unless_its_member_has_no_weight() -> None:
    answers = [Scored(-1.0), Scored(-math.inf)]
    assert LogpMean().combine(answers, [0.5, 0.5]).answer.logp == -math.inf
    assert LogpMean().combine(answers, [1.0, 0.0]).answer.logp == -1.0


# ---- vote


def test_the_majority_wins_up_to_case_and_space() -> None:
    pooled = Vote().combine(["Rome", " paris\n", "Paris"], EQUAL)
    assert pooled.answer == " paris\n" and pooled.stats == {"share": pytest.approx(2 / 3), "abstained": 0.0}
    assert Vote().combine(["Rome", "paris", "Paris"], [0.6, 0.2, 0.2]).answer == "Rome"


def test_a_tie_goes_to_the_earliest_member_or_to_the_fused_answer() -> None:
    assert Vote().combine(["b", "a"], [0.5, 0.5]).answer == "b"
    assert Vote(with_fused=True).combine(["b", "a", "c"], [0.5, 0.5]).answer == "c"
    assert Vote(with_fused=True).combine(["b", "a", " A"], [0.5, 0.5]).answer == " A"
    assert Vote(with_fused=True).combine(["b", "b", "c"], [0.5, 0.5]).answer == "b"
    assert fused_takes_part(Vote(with_fused=True)) and not fused_takes_part(Vote()) and not fused_takes_part(LogpMean())


def test_answers_are_found_by_the_pattern_and_texts_without_one_abstain() -> None:
    vote = Vote(answer_pattern=r"#### (-?\d+)")
    texts = ["2 #### 3 and #### 4", "so it is 5", "it is #### 4."]
    pooled = vote.combine(texts, [0.2, 0.6, 0.2])
    assert pooled.answer == texts[0] and pooled.stats == {"share": pytest.approx(0.4), "abstained": 1.0}
    assert vote.combine(["x", "y", "y"], EQUAL).answer == "x"  # all abstain
    assert Vote(answer_pattern=r"\d+").answer("1 then 22") == "22"


def test_a_bad_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"answer_pattern '\(' is no regular expression"):
        Vote(answer_pattern="(")


# ---- mbr


def slow_chrf(text: str, reference: str) -> float:
    text, reference = "".join(text.split()), "".join(reference.split())
    scores = []
    for n in range(1, 7):
        mine = [text[i : i + n] for i in range(len(text) - n + 1)]
        theirs = [reference[i : i + n] for i in range(len(reference) - n + 1)]
        if not mine and not theirs:
            continue
        left, common = list(theirs), 0
        for gram in mine:
            if gram in left:
                left.remove(gram)
                common += 1
        p, r = common / max(1, len(mine)), common / max(1, len(theirs))
        scores.append(5 * p * r / (4 * p + r) if common else 0.0)
    return sum(scores) / len(scores) if text != reference else 1.0


@pytest.mark.parametrize("text", ["the cat sat", "a cat", "", "the cat sat on the mat", "ca"])
def test_chrf_equals_the_reference(text: str) -> None:
    for other in ("the cat sat on a mat", "dogs", "cat", ""):
        assert chrf(text, other) == pytest.approx(slow_chrf(text, other))


def test_word_f1() -> None:
    assert word_f1("The cat sat", "the CAT ran off") == pytest.approx(2 * 2 / 7)
    assert word_f1("", "") == 1.0 and word_f1("a", "") == 0.0


@pytest.mark.parametrize("utility", ["chrf", "f1"])
def test_mbr_takes_the_text_in_the_middle(utility: str) -> None:
    texts = ["dogs bark", "the cat sat on the mat", "the cat sat on a mat", "a cat sat on a mat"]
    pooled = Mbr(utility=utility).combine(texts, [0.25] * 4)
    assert pooled.answer == "the cat sat on a mat"
    score = {"chrf": slow_chrf, "f1": word_f1}[utility]
    assert pooled.stats["expected_utility"] == pytest.approx(sum(score(pooled.answer, other) for other in texts) / 4)


def test_mbr_of_two_equal_members_is_a_tie_that_the_fused_answer_breaks() -> None:
    texts = ["cats sit", "cats bit"]
    assert Mbr(utility="f1").combine(texts, [0.5, 0.5]).answer == texts[0]
    assert Mbr(utility="f1", with_fused=True).combine([*texts, "cats hit"], [0.5, 0.5]).answer == "cats hit"
    with pytest.raises(ConfigError, match="utility must be 'chrf' or 'f1'; got 'bleu'"):
        Mbr(utility="bleu")


# ---- rerank


def test_rerank_takes_the_likeliest_text_by_its_length() -> None:
    answers = [Candidate("a long text", -9.0), Candidate("short", -6.0), Candidate("", 0.0)]
    assert Rerank().combine(answers, EQUAL).answer == "a long text"  # 0.82 nats a byte, and 1.2
    assert Rerank(score_per="text").combine(answers, EQUAL).answer == "short"
    assert Rerank().combine(answers, [0.0, 0.5, 0.5]) == Pooled("short", {"winner": 1.0, "unscored": 1.0})
    equal = [Candidate("x", -math.inf), Candidate("é", -2.0), Candidate("ab", -2.0)]  # bytes, not characters
    assert Rerank().combine(equal, EQUAL).answer == "é"
    assert Rerank().combine([Candidate("", 0.0), Candidate("x", -math.inf)], [0.5, 0.5]).answer == ""


def test_a_new_file_is_a_new_method(tmp_path) -> None:
    (tmp_path / "new_one.py").write_text(
        "from lm_eval_deepen.config import Options\nfrom lm_eval_deepen.pooling.base import pooling\n\n"
        '@pooling("first", paper="none")\nclass First(Options):\n    pass\n'
    )
    with dropped_in(POOLINGS, tmp_path):
        assert set(POOLINGS) == {*NAMES, "first"}
    assert set(POOLINGS) == set(NAMES)
