"""Rows of a table, and what a regression check decides, from scores of the same documents."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lm_eval_deepen.results.aggregation import AGGREGATIONS, Scores, group_scores, mean_scores
from lm_eval_deepen.results.regression import GateRule, Pair, decide, detectable
from lm_eval_deepen.results.rows import MCNEMAR, SIGN_FLIP, Measured, corrected, rows_of
from lm_eval_deepen.results.statistics.paired import mcnemar

# Rows --------------------------------------------------------------------------------------------------


def measured(higher=True, **values):
    return Measured("t", "acc", "none", higher, {name: mean_scores(v) for name, v in values.items()})


def test_a_row_states_everything_about_its_system():
    a, b = [1] * 60 + [0] * 40, [0] * 5 + [1] * 75 + [0] * 20
    first, second = rows_of(measured(a=a, b=b), candidates=["a"])
    assert (first.system, first.comparison, first.oracle, first.documents) == ("a", None, None, 100)
    assert first.stderr == pytest.approx(np.std(a, ddof=1) / 10)
    found = second.comparison
    assert (found.reference, found.below, found.above, found.test) == ("a", 5, 20, MCNEMAR)
    assert found.difference == pytest.approx(0.15)
    assert found.low < 0.15 < found.high and found.low > 0
    assert found.p == mcnemar(5, 20)
    assert found.agreement == pytest.approx(0.75)
    assert second.oracle == pytest.approx(0.80)  # 80 documents are right in one of them
    assert second.verdict(0.05) == "better" and first.verdict(0.05) is None


def test_lower_is_better_turns_best_oracle_and_verdict_round():
    rows = rows_of(measured(higher=False, a=[2.0] * 30, b=[1.0] * 29 + [3.0]))
    assert rows[1].comparison is None  # b is best
    assert rows[0].comparison.test == SIGN_FLIP
    assert rows[0].verdict(0.05) == "worse"
    assert rows[0].oracle == pytest.approx((29 + 2) / 30)


def test_a_leaderboard_compares_with_the_best_single_member_and_gives_their_oracle():
    found = measured(a=[1, 1, 0, 0, 0], b=[0, 0, 1, 0, 0], ab=[1, 1, 1, 1, 0])
    rows = rows_of(found, candidates=["a", "b"], pool=["a", "b"])
    assert [row.comparison and row.comparison.reference for row in rows] == [None, "a", "a"]
    assert {row.oracle for row in rows} == {0.6} and rows[0].pool == ("a", "b")
    assert rows[2].verdict(0.05) == "not significant"


def test_the_oracle_needs_to_know_which_way_is_good():
    assert rows_of(measured(higher=None, a=[1.0, 0.0], b=[0.0, 1.0]))[1].oracle is None


def test_a_score_has_an_interval_of_its_own_kind():
    rows = rows_of(measured(a=[0] * 4, b=[0.2, 0.4, 0.9, 1.0], c=[3.0, 3.0, 3.0, 3.0]), candidates=["a"])
    a, b, c = rows
    assert (a.stderr, a.low) == (0.0, 0.0) and a.high > 0.4  # 0 of 4 is not certainly nothing
    assert 0 <= b.low < b.score < b.high <= 1
    assert (c.low, c.high) == (None, None)
    assert b.comparison.low < b.comparison.difference < b.comparison.high


def test_no_interval_of_a_perplexity_holds_what_none_can_be():
    for name, least in (("perplexity", 1), ("weighted_perplexity", 1), ("bits_per_byte", 0)):
        width, statistic = AGGREGATIONS[name]
        values = np.array([[-1.0, 2.0], [-2.5, 3.0], [-3.0, 1.0]])[:, :width]
        found = Scores(values, statistic, False).interval()
        assert found.low == least < found.estimate < found.high


def test_a_reference_that_is_picked_costs_wider_intervals_and_larger_p_values():
    generator = np.random.default_rng(0)
    values = {name: (generator.random(200) < 0.5).astype(float) for name in "abcdefgh"}
    fixed = corrected(rows_of(measured(**values), candidates=["a"]))
    best = corrected(rows_of(measured(**values)))
    [reference] = [row.system for row in best if row.comparison is None]
    same = corrected(rows_of(measured(**values), candidates=[reference]))
    for picked, given_one in zip(best, same, strict=True):
        if picked.comparison:
            assert picked.comparison.p == given_one.comparison.p
            assert picked.comparison.p_holm >= given_one.comparison.p_holm
            assert picked.comparison.low < given_one.comparison.low < given_one.comparison.high < picked.comparison.high
            assert picked.comparison.level > given_one.comparison.level == 0.95
            assert picked.comparison.candidates == tuple("abcdefgh") and given_one.comparison.candidates == (reference,)
    assert max(row.comparison.level for row in fixed if row.comparison) == 0.95


def test_one_document_and_scores_that_overflow_have_rows_too():
    [one, other] = rows_of(measured(a=[1.0], b=[0.0]))
    assert (one.comparison, other.comparison.low, other.low) == (None, None, None)
    values = {name: np.array([[-800.0], [-1.0], [-2.0 - i]]) for i, name in enumerate("ab")}
    scores = {
        name: Scores(own, lambda means: np.exp(-4 * means[..., 0]), averaged=False) for name, own in values.items()
    }
    with np.errstate(over="ignore", invalid="ignore"):
        rows = corrected(rows_of(Measured("t", "perplexity", "none", False, scores)))
    assert {row.low for row in rows} == {None}


def test_a_reference_beyond_doubt_costs_the_intervals_nothing():
    values = {
        name: [1.0 if i < right else 0.0 for i in range(300)]
        for name, right in {"a": 290, "b": 90, "c": 92, "d": 95}.items()
    }
    rows = rows_of(measured(**values))
    assert {row.comparison.level for row in rows if row.comparison} == {0.95}


def test_a_group_whose_tasks_count_alike_has_the_scatter_within_its_tasks():
    """With values weighted by 11 and 1.1, the group's perfect score once had the interval [0.73, 1.52]."""
    perfect = group_scores([mean_scores([1] * 5), mean_scores([1] * 50)], by_size=False)
    assert (perfect.score, perfect.stderr) == (pytest.approx(1), 0)
    assert 0.7 < perfect.interval().low < 0.8 and perfect.interval().high == 1
    small, large = mean_scores([1, 1, 1, 1, 0]), mean_scores([1, 0] * 25)
    other = group_scores([small, large], by_size=False)
    assert other.stderr == pytest.approx(np.hypot(small.stderr, large.stderr) / 2)
    [a, b] = rows_of(Measured("g", "acc", "none", True, {"a": perfect, "b": other}), ["a"])
    assert (a.stderr, b.stderr, b.score) == (0, other.stderr, pytest.approx(0.65))
    drop = [scores.change(mean_scores([1] * len(scores.values)), 0.95) for scores in (small, large)]
    assert b.comparison.difference == pytest.approx(-0.35) == np.mean([one.estimate for one in drop])
    assert b.comparison.low == pytest.approx(-0.35 - np.hypot(*(one.estimate - one.low for one in drop)) / 2)
    assert (b.comparison.below, b.comparison.above, b.comparison.test) == (26, 0, SIGN_FLIP)
    same = perfect.change(perfect)
    assert same.estimate == 0 and same.low == pytest.approx(-same.high) and -0.5 < same.low < 0
    by_size = group_scores([small, large], by_size=True)
    assert by_size.binary and by_size.stderr == mean_scores([*small.values[:, 0], *large.values[:, 0]]).stderr


def test_correction_is_over_all_comparisons_of_the_table():
    rows = rows_of(measured(a=[0] * 20, b=[1] * 7 + [0] * 13, c=[1] * 9 + [0] * 11), candidates=["a"])
    b, c = (row.comparison for row in corrected(rows)[1:])
    assert (b.p, c.p) == (2 / 2**7, 2 / 2**9)
    assert (b.p_holm, c.p_holm) == (2 / 2**7, 4 / 2**9)
    assert corrected(rows)[0].comparison is None
    near = [replace(row, comparison=row.comparison and replace(row.comparison, p=0.03)) for row in rows]
    assert [row.verdict(0.05) for row in near] == [None, "better", "better"]
    assert [row.verdict(0.05) for row in corrected(near)] == [None, "not significant", "not significant"]


# Regression --------------------------------------------------------------------------------------------


def pair(baseline, candidate, higher=True):
    return Pair("t", "acc", "none", higher, mean_scores(baseline), mean_scores(candidate))


def test_a_regression_is_significant_and_large_enough():
    worse = pair([1] * 100, [0] * 10 + [1] * 90)
    [found] = decide([worse], GateRule())
    assert (found.difference, found.p, found.regressed) == (pytest.approx(-0.1), 2.0**-10, True)
    assert decide([worse], GateRule(min_effect=0.1))[0].regressed
    assert not decide([worse], GateRule(min_effect=0.11))[0].regressed
    assert not decide([worse], GateRule(alpha=2.0**-11))[0].regressed
    assert not decide([pair([0] * 10 + [1] * 90, [1] * 100)], GateRule())[0].regressed


def test_levels_are_shared_over_everything_tested():
    worse, same = pair([1] * 20, [0] * 5 + [1] * 15), pair([1] * 20, [1] * 20)
    assert decide([worse], GateRule())[0].regressed  # 1/32
    assert not any(found.regressed for found in decide([worse, same], GateRule()))


def test_real_valued_metrics_of_either_direction():
    generator = np.random.default_rng(0)
    base = generator.normal(size=80)
    up = base + 0.5 + 0.2 * generator.normal(size=80)
    assert decide([pair(base, up, higher=False)], GateRule(resamples=999))[0].regressed
    [fine] = decide([pair(base, up)], GateRule(resamples=999))
    assert not fine.regressed and fine.test == SIGN_FLIP and fine.difference > 0
    shown, rule = pair(base, up, higher=False), GateRule(resamples=999)
    # However large the difference is: a smaller one would scatter as this one does.
    assert detectable(shown, 1, rule) == pytest.approx((1.6449 + 0.8416) * np.std(up - base) / np.sqrt(80), rel=0.05)
    assert shown.changes == (80, 0) and shown.interval.low > 0
    # Of 16 exchanges the observed one is the most extreme, 0.0625.
    assert detectable(pair(base[:4], up[:4], higher=False), 1, GateRule()) is None
    assert detectable(pair(base, base), 1, GateRule()) is None  # nothing is known of their scatter


def test_the_detectable_drop_grows_with_what_is_tested_and_with_what_differs():
    same = pair([1] * 200, [1] * 200)
    noisy = pair([1] * 200, [0] * 20 + [1] * 180)
    alone = detectable(same, 1, GateRule())
    assert 5 / 200 <= alone < detectable(same, 10, GateRule())
    assert alone < detectable(noisy, 1, GateRule())
