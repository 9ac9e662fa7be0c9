"""Paired statistics: textbook values, naive references, scipy, simulation."""

from __future__ import annotations

import itertools
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_deepen.results.statistics import intervals as intervals_module
from lm_eval_deepen.results.statistics.correction import Comparisons, holm, level_of_each, rivals, step_down
from lm_eval_deepen.results.statistics.distributions import student_quantile
from lm_eval_deepen.results.statistics.intervals import (
    change_interval,
    mean_interval,
    paired_interval,
    proportion_interval,
    pseudo_values,
    score_interval,
    standard_error,
)
from lm_eval_deepen.results.statistics.paired import discordant, mcnemar, sign_flip
from lm_eval_deepen.results.statistics.power import detectable_drop, detectable_shift, mcnemar_power, paired_needs

ROOT = Path(__file__).resolve().parents[2]
level = runpy.run_path(str(ROOT / "benchmarks" / "statistics_level.py"))


def column(values) -> np.ndarray:
    return np.asarray(values, dtype=np.float64)[:, None]


# McNemar -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("below", "above", "exact", "mid"),
    [
        # Fagerland et al. 2013, airway hyper-responsiveness before and after transplantation, 1 against 7: 0.070
        # exact, 0.039 mid-p.
        (1, 7, 0.0703125, 0.0390625),
        # Agresti, Categorical Data Analysis, approval of the prime minister, 86 against 150.
        (86, 150, 3.716e-5, 2.893e-5),
        (0, 5, 0.0625, 0.03125),
        (0, 0, 1.0, 1.0),
        (3, 3, 1.0, 1.0),
    ],
)
def test_mcnemar_gives_published_values(below, above, exact, mid):
    assert mcnemar(below, above) == pytest.approx(exact, rel=1e-3, abs=1e-12)
    assert mcnemar(below, above, mid_p=True) == pytest.approx(mid, rel=1e-3, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_binomial_test(below, above):
    if below + above == 0:
        return
    for alternative in ("two-sided", "less", "greater"):
        expected = scipy.stats.binomtest(above, below + above, 0.5, alternative=alternative).pvalue
        assert mcnemar(below, above, alternative) == pytest.approx(expected, rel=1e-9)
    half = scipy.stats.binom.pmf(above, below + above, 0.5) / 2
    one_sided = mcnemar(below, above, "less", mid_p=True)
    assert one_sided == pytest.approx(mcnemar(below, above, "less") - half, rel=1e-9, abs=1e-15)


def test_mcnemar_stays_exact_where_floats_would_underflow():
    assert mcnemar(0, 1000, "greater") == 2.0**-1000
    assert mcnemar(0, 3000) == 0.0  # below the smallest float
    assert mcnemar(4000, 4000, "less") == pytest.approx(0.5044599, rel=1e-6)


def test_mcnemar_refuses_negative_counts():
    with pytest.raises(ValueError, match="cannot be negative, got -1 and 2"):
        mcnemar(-1, 2)


def test_discordant_counts_both_ways():
    first, second = np.array([1.0, 1, 0, 0, 0.5]), np.array([0.0, 1, 1, 1, 0.4])
    assert discordant(first, second) == (2, 2)


# Permutation -------------------------------------------------------------------------------------------

# Fisher, The Design of Experiments, section 21 (Darwin's maize, eighths of an inch): 863 of 32,768 sign patterns give a
# sum of at least 314, the observed one, and as many one of at most -314: 5.267 per cent.
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


def test_permutation_gives_fishers_value_for_darwins_maize():
    zeros, values = column([0] * len(DARWIN)), column(DARWIN)
    assert sign_flip(zeros, values, resamples=2**15) == pytest.approx(1726 / 32768)
    assert sign_flip(zeros, values, alternative="greater", resamples=2**15) == pytest.approx(863 / 32768)
    assert sign_flip(zeros, values, resamples=20_000, seed=1) == pytest.approx(1726 / 32768, abs=0.006)


def naive_permutation(first, second, score, alternative):
    observed = score(second) - score(first)
    hits = total = 0
    for swaps in itertools.product([False, True], repeat=len(first)):
        a = [y if s else x for s, x, y in zip(swaps, first, second, strict=True)]
        b = [x if s else y for s, x, y in zip(swaps, first, second, strict=True)]
        found = score(b) - score(a)
        extreme = {
            "two-sided": abs(found) >= abs(observed) - 1e-12,
            "less": found <= observed + 1e-12,
            "greater": found >= observed - 1e-12,
        }[alternative]
        hits, total = hits + extreme, total + 1
    return hits / total


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0), st.integers(1, 5)), min_size=1, max_size=8),
    st.sampled_from(["two-sided", "less", "greater"]),
)
def test_permutation_of_a_ratio_is_the_naive_enumeration(rows, alternative):
    first, second = np.array([(a, w) for a, _, w in rows]), np.array([(b, w) for _, b, w in rows])

    def ratio(means):
        return -means[..., 0] / means[..., 1]

    def score(pairs):
        return -sum(x for x, _ in pairs) / sum(w for _, w in pairs)

    expected = naive_permutation(first.tolist(), second.tolist(), score, alternative)
    assert sign_flip(first, second, ratio, alternative) == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 4))
def test_on_right_and_wrong_the_permutation_test_is_mcnemars(below, above, same):
    first = column([1] * below + [0] * above + [1] * same + [0])
    second = column([0] * below + [1] * above + [1] * same + [0])
    for alternative in ("two-sided", "less", "greater"):
        assert sign_flip(first, second, alternative=alternative) == pytest.approx(mcnemar(below, above, alternative))


def test_permutation_is_seeded_and_never_zero():
    generator = np.random.default_rng(0)
    first = generator.normal(size=(200, 1))
    shifted = first + generator.normal(size=(200, 1))
    assert sign_flip(first, shifted, seed=3) == sign_flip(first, shifted, seed=3)
    assert sign_flip(first, shifted, seed=3) == pytest.approx(
        scipy.stats.ttest_rel(shifted[:, 0], first[:, 0]).pvalue, abs=0.02
    )
    second = first + 1 + 0.1 * generator.normal(size=(200, 1))
    assert 0 < sign_flip(first, second, resamples=500) < 1e-9


def test_small_p_values_are_told_apart_with_few_resamples():
    # With equal chances alone nothing below 1 / (1 + resamples) could be told: a table of 600 real-valued comparisons
    # could have had no significant one.
    change = np.concatenate([np.full(16, 1.0), np.full(2, -1.0), np.linspace(0.1, 0.3, 4)])  # 22 of 2^22
    every = sum(
        math.comb(18, up) * (abs(2 * up - 18 + s) >= change.sum() - 1e-12)
        for up in range(19)
        for s in (sum(x) for x in itertools.product(*((-v, v) for v in change[18:])))
    )
    exact = every / 2**22
    assert exact < 1e-3
    found = [sign_flip(column(np.zeros(22)), column(change), resamples=1000, seed=seed) for seed in range(20)]
    assert np.mean(found) == pytest.approx(exact, rel=0.1) and np.std(found) < 0.3 * exact
    generator = np.random.default_rng(1)
    large = 0.5 + generator.normal(size=(150, 1))
    t = scipy.stats.ttest_1samp(large[:, 0], 0).pvalue
    assert 1e-10 < t < 1e-6
    assert math.log10(sign_flip(0 * large, large, resamples=1000)) == pytest.approx(math.log10(t), abs=0.6)


def test_exchanges_are_ties_however_large_the_scores_are():
    change = column([0.1, 0.23, 0.37, 0.41, 0.77])
    for level in (0.0, 1e6 + np.arange(1.1, 6), 1e9):  # the exchange of all documents gives the same difference
        assert sign_flip(column(level + 0 * change[:, 0]), column(level + change[:, 0])) == 2 / 2**5
    far = column([-800.0, -801, -802, -803, -804])
    with np.errstate(over="ignore", invalid="ignore"):  # a score without bound has no p-value
        assert sign_flip(0.1 * far, far, lambda means: np.exp(-means[..., 0])) == 1
        assert sign_flip(far, far - 1, lambda means: np.exp(-means[..., 0])) == 1


@pytest.mark.parametrize("alternative", ["two-sided", "less"])
def test_p_values_by_resampling_keep_their_level(alternative):
    generator = np.random.default_rng(2)
    found = []
    for seed in range(1500):
        change = generator.exponential(size=(20, 1)) - generator.exponential(size=(20, 1))
        found.append(sign_flip(0 * change, change, alternative=alternative, resamples=40, seed=seed))
    for alpha in (0.005, 0.05, 0.3):
        assert np.mean(np.array(found) <= alpha) <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / len(found))
    assert np.mean(np.array(found) <= 0.05) > 0.03


def test_numbers_that_resampling_cannot_take_are_refused():
    values = column([0, 1])
    for keys in ({"resamples": 0}, {"resamples": 10**12}, {"seed": -1}, {"seed": 2**32}):
        with pytest.raises(ValueError, match=f"{next(iter(keys))} must lie between .* got {next(iter(keys.values()))}"):
            sign_flip(values, values, **keys)


# Intervals ---------------------------------------------------------------------------------------------


def ends(interval):
    return [interval.low, interval.high]


def test_students_quantiles_are_scipys():
    for degrees in (1, 2, 3, 4, 7, 29, 199, 200, 201, 5000):
        for probability in (0.75, 0.975, 0.99999):
            expected = scipy.stats.t.ppf(probability, degrees)
            assert student_quantile(probability, degrees) == pytest.approx(expected, rel=1e-7)


def test_intervals_of_proportions_are_blakers():
    # The example of the R package BlakerCI: 3 of 10.
    assert proportion_interval(3, 10) == pytest.approx((0.08726443, 0.61941066), abs=1e-8)
    assert proportion_interval(0, 4) == (0.0, pytest.approx(0.527, abs=1e-3))
    assert proportion_interval(4, 4) == (pytest.approx(0.473, abs=1e-3), 1.0)
    for right, documents in ((1, 30), (15, 30), (299, 300), (7000, 14042)):
        low, high = proportion_interval(right, documents)
        widest = scipy.stats.binomtest(right, documents).proportion_ci()  # Clopper and Pearson's
        assert widest.low - 1e-9 <= low < right / documents < high <= widest.high + 1e-9


@pytest.mark.parametrize("documents", [5, 30, 60])
def test_intervals_of_proportions_cover_exactly_enough(documents):
    chances = np.concatenate([np.geomspace(1e-3, 0.1, 40), np.linspace(0.1, 0.5, 60)])
    assert min(level["proportion_coverage"](documents, float(p)) for p in chances) > 0.9499
    if documents > 10:  # with 5 documents nothing else is possible
        assert np.mean([level["proportion_coverage"](documents, float(p)) for p in chances[40:]]) < 0.968


def naive_tango(below, above, documents, z=1.959963984540054):
    """The differences that the likeliest table with that difference does not refute, one by one."""
    kept = []
    for difference in np.linspace(-1, 1, 2001)[1:-1]:
        b = np.linspace(max(0.0, -difference), (1 - difference) / 2, 4001)[1:-1]  # share of documents that get worse
        likelihood = (
            above * np.log(b + difference)
            + below * np.log(b)
            + (documents - above - below) * np.log(np.maximum(1e-300, 1 - 2 * b - difference))
        )
        worse = b[likelihood.argmax()]
        variance = (2 * worse + difference - difference**2) / documents
        if ((above - below) / documents - difference) ** 2 <= z**2 * variance:
            kept.append(difference)
    return kept[0], kept[-1]


def test_intervals_of_paired_proportions_are_tangos(monkeypatch):
    # Fagerland et al. 2014, Statistics in Medicine 33:2850-2875, airway hyper-responsiveness, 1 against 7 of 21.
    first, second = column([1] * 7 + [0] * 14), column([0] * 7 + [1] + [0] * 13)
    monkeypatch.setattr(intervals_module, "CONTINUITY", 0.0)
    intervals_module.paired_proportions.cache_clear()
    found = paired_interval(first, second)
    assert ends(found) == pytest.approx([-0.517, -0.026], abs=5e-4)
    for below, above, documents in ((2, 3, 40), (0, 4, 25), (0, 0, 30)):
        change = column([-1] * below + [1] * above + [0] * (documents - below - above))
        exact = paired_interval(np.maximum(-change, 0), np.maximum(change, 0))
        assert ends(exact) == pytest.approx(naive_tango(below, above, documents), abs=2e-3)
    intervals_module.paired_proportions.cache_clear()
    monkeypatch.undo()
    corrected = paired_interval(first, second)
    assert corrected.low < found.low and corrected.high > found.high
    assert corrected.high - corrected.low - (found.high - found.low) < 2 * 0.1 / 21


def test_one_construction_gives_wilsons_and_tangos_intervals_and_any_other_value():
    z2 = 1.959963984540054**2
    end = intervals_module.score_end
    right = np.array([1.0] * 7 + [0.0] * 23)
    centred = right - right.mean()
    low, high = right.mean() + end(centred, z2, -right.mean()), right.mean() - end(-centred, z2, right.mean() - 1)
    assert [low, high] == pytest.approx(list(scipy.stats.binomtest(7, 30).proportion_ci(method="wilson")), abs=1e-9)
    change = np.array([1.0] * 3 + [-1.0] * 5 + [0.0] * 92)
    low, high = change.mean() + end(change - change.mean(), z2, -1 - change.mean()), None
    assert low == pytest.approx(naive_tango(5, 3, 100)[0], abs=2e-3)


def test_right_and_wrong_cover_as_often_as_they_say():
    # The first three missed too often with the bootstrap: 0.894, 0.917, 0.916, up to 72 % of them without any width.
    cells = {(30, 0.05, 0.05), (100, 0.02, 0.02), (300, 0.005, 0.005), (100, 0.045, 0.015), (50, 0.138, 0.01)}
    for documents, worse, better in cells:
        assert 0.935 <= level["paired_coverage"](documents, worse, better) <= 0.98, (documents, worse, better)
    assert ends(paired_interval(column([0] * 30), column([0] * 30))) == pytest.approx([-0.118, 0.118], abs=1e-3)


def test_p_at_most_a_level_leaves_0_out_of_the_interval_of_right_and_wrong():
    apart = 0
    for changed in range(1, 120):
        for below in range(changed // 2 + 1):
            above = changed - below
            p = mcnemar(below, above)
            low, _ = intervals_module.paired_proportions(below, above, 150, 0.95)
            assert p > 0.05 or low > 0
            # The other way round the test asks for one changed document on the other side.
            assert low <= 0 or p <= 0.05 or below == 0 or mcnemar(below - 1, above + 1) <= 0.05
            apart += low > 0 and p > 0.05
    assert apart > 10


def populations(generator, n):
    """Changes of documents of many kinds, and their true mean: few differ, skewed either way, heavy tails."""
    sparse = np.where(generator.random(n) < 0.2, generator.uniform(-1, 1, size=n), 0.0)
    rising = np.where(generator.random(n) < 0.3, generator.beta(2, 2, size=n), 0.0)
    yield "few differ", sparse, 0.0, (-1.0, 1.0)
    yield "few rise", rising, 0.15, (-1.0, 1.0)
    yield "normal", 0.3 + generator.normal(size=n), 0.3, None
    yield "skewed", generator.exponential(size=n), 1.0, None
    yield "skewed down", -generator.exponential(size=n), -1.0, None
    yield "heavy", generator.standard_t(3, size=n), 0.0, None


@pytest.mark.parametrize("n", [30, 100])
def test_intervals_of_real_values_cover_about_as_often_as_they_say(n):
    generator = np.random.default_rng(6)
    held = {}
    for _ in range(400):
        for name, change, truth, limits in populations(generator, n):
            found = change_interval(column(change), limits=limits)
            held.setdefault(name, []).append(found.low <= truth <= found.high)
    for name, hits in held.items():
        assert 0.935 - 0.02 <= np.mean(hits) <= 0.98 + 0.014, name


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_intervals_of_few_real_values_are_wide_enough(n):
    """Ends at the values themselves would hold in half of all cases with two documents, in three of four with three."""
    generator = np.random.default_rng(8)
    held = {}
    for _ in range(200):
        for name, change, truth, limits in populations(generator, n):
            found = change_interval(column(change), limits=limits)
            held.setdefault(name, []).append(found.low is None or found.low <= truth <= found.high)
    assert min(map(np.mean, held.values())) >= 0.9, {name: np.mean(hits) for name, hits in held.items()}


def test_intervals_are_those_of_student_in_large_samples():
    generator = np.random.default_rng(1)
    first = generator.exponential(size=(5000, 1))
    second = first * generator.uniform(0.7, 1.2, size=(5000, 1)) + 0.05
    found = paired_interval(first, second)
    change = (second - first)[:, 0]
    expected = scipy.stats.ttest_1samp(change, 0).confidence_interval(0.95)
    assert found.estimate == pytest.approx(change.mean())
    assert ends(found) == pytest.approx(list(expected), abs=0.03 * (expected.high - expected.low))
    assert found.stderr == pytest.approx(change.std(ddof=1) / math.sqrt(5000))
    wide = paired_interval(first, second, confidence=0.999)
    assert wide.low < found.low and found.high < wide.high


def per_word(means):
    return -means[..., 0] / means[..., 1]


def test_interval_of_a_ratio_uses_documents_not_values():
    generator = np.random.default_rng(5)
    words = generator.integers(5, 50, size=200).astype(float)
    first = np.stack([-3 * words + generator.normal(size=200) * 5, words], axis=1)
    second = np.stack([first[:, 0] + 0.2 * words, words], axis=1)
    found = paired_interval(first, second, per_word)
    assert found.estimate == pytest.approx(-0.2)
    assert ends(found) == pytest.approx([-0.2, -0.2])  # the same per word everywhere
    second[:, 0] += 5 * generator.normal(size=200)
    found = paired_interval(first, second, per_word)
    loss = first[:, 0] - second[:, 0]
    spread = (loss - found.estimate * words).std() / words.mean() / math.sqrt(200)  # delta method
    assert found.stderr == pytest.approx(spread, rel=0.05)
    assert ends(found) == pytest.approx(
        [found.estimate - 1.97 * spread, found.estimate + 1.97 * spread], abs=0.3 * spread
    )


def test_intervals_stay_where_scores_can_be_and_say_when_they_cannot_be_told():
    assert ends(score_interval(column([0, 0, 0, 0]))) == [0.0, pytest.approx(0.527, abs=1e-3)]
    assert ends(score_interval(column([0, 0, 100, 100]))) == [100 * end for end in proportion_interval(2, 4)]
    thirds = score_interval(column([0, 0, 1 / 3, 0, 0, 2 / 3, 0, 0]))
    assert 0 <= thirds.low < 1 / 8 < thirds.high <= 1
    same = score_interval(column([0.5] * 9))  # within [0, 1], and nothing else is known
    assert 0 < same.low < 0.5 < same.high < 1
    assert ends(score_interval(column([7.5] * 9))) == [None, None]
    two = score_interval(column([3.2, 4.7]))  # any two documents have at most two values
    assert two.low < 3.2 and 4.7 < two.high
    equal = column([2.5, 7.25, 3.0])
    assert ends(paired_interval(equal, equal)) == [None, None]
    assert ends(paired_interval(column([0, 0.5, 1]), column([0, 0.5, 1]))) == pytest.approx(
        [-x for x in ends(paired_interval(column([0, 0.5, 1]), column([0, 0.5, 1])))[::-1]]
    )
    tenfold = paired_interval(column([0] * 30), column([10] * 3 + [0] * 27))
    assert ends(tenfold) == [10 * end for end in ends(paired_interval(column([0] * 30), column([1] * 3 + [0] * 27)))]
    one = paired_interval(column([0]), column([1]))
    assert (one.estimate, one.low, one.high, one.stderr) == (1.0, None, None, None)
    overflow = score_interval(column([-800.0, -1.0, -2.0]), lambda means: np.exp(-1e3 * means[..., 0]))
    assert ends(overflow) == [None, None]


def test_a_mean_over_tasks_has_the_standard_error_of_the_harness_and_covers_as_often_as_it_says():
    generator = np.random.default_rng(4)
    for sizes, rights in (
        ((5, 50), (0.6, 0.7)),
        ((20, 200), (0.9, 0.95)),
        ((2, 40), (0.5, 0.5)),
        ((7, 7, 99), (1, 1, 1)),
    ):
        hits = []
        for _ in range(200):
            tasks = [generator.random((n, 1)) < p for n, p in zip(sizes, rights, strict=True)]
            own = [score_interval(values.astype(float)) for values in tasks]
            found = mean_interval(own)
            assert 0 <= found.low <= found.estimate <= found.high <= 1
            hits.append(found.low <= np.mean(rights) <= found.high)
        assert found.stderr == pytest.approx(math.sqrt(sum(one.stderr**2 for one in own)) / len(own))
        assert np.mean(hits) >= 0.93, sizes
    alone = mean_interval([own[0], score_interval(column([1.0]))])
    assert (alone.low, alone.high, alone.stderr, alone.estimate) == (None, None, None, 1.0)


def test_standard_error_is_the_harnesss_for_means_and_the_jackknifes_for_the_rest():
    values = column([0, 1, 1, 0, 1])
    assert standard_error(values) == pytest.approx(math.sqrt(0.3) / math.sqrt(5))
    assert standard_error(column([1])) is None
    large = np.random.default_rng(0).normal(2, 0.5, size=(400, 1))
    assert standard_error(large, lambda means: np.exp(-means[..., 0])) == pytest.approx(
        math.exp(-2) * 0.5 / 20,
        rel=0.15,  # delta method
    )
    pairs = np.stack([large[:, 0], np.arange(1.0, 401)], axis=1)
    shares = pseudo_values(pairs, per_word)
    assert shares.mean() == pytest.approx(float(per_word(pairs.mean(axis=0))))


# Correction --------------------------------------------------------------------------------------------


def test_holm_gives_published_values():
    # R's help of p.adjust and Holm's procedure by hand: 4 p1, 3 p2, 2 p3, p4, made monotone.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"\[0, 1\], got \[1.5\]"):
        holm([1.5])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.5))
def test_holm_rejects_what_the_stepwise_rule_rejects(p_values, alpha):
    rejected = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] * (len(p_values) - rank) > alpha:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


def naive_possible(systems, candidates, different):
    """The most pairs with a candidate that can be equal if the reference, 0, differs from some: over all partitions."""
    best = 0
    for groups in itertools.product(range(systems), repeat=systems):
        if all(groups[0] != groups[other] for other in different):
            pairs = itertools.combinations(range(systems), 2)
            best = max(best, sum(groups[i] == groups[j] for i, j in pairs if min(i, j) < candidates))
    return best


@pytest.mark.parametrize(("systems", "candidates"), [(4, 1), (4, 2), (5, 2), (5, 3), (4, 4)])
def test_pairs_that_may_still_be_equal_are_counted_as_by_trying_all_groupings(systems, candidates):
    for out in itertools.product([False, True], repeat=systems - 1):
        flags = tuple(i < candidates - 1 for i in range(systems - 1))
        different = [i + 1 for i, gone in enumerate(out) if gone]
        found = Comparisons((0.5,) * (systems - 1), flags).still_true(out)
        assert found == naive_possible(systems, candidates, different), (out, flags)


def test_a_reference_that_was_picked_costs_the_pairs_that_it_could_have_been_in():
    p = (0.01, 0.02, 0.9)
    given_one = step_down([Comparisons(p, (False,) * 3)])
    assert given_one == [holm(p)]
    (picked,) = step_down([Comparisons(p, (True,) * 3)])
    assert picked == pytest.approx([6 * 0.01, 3 * 0.02, 1.0])  # all six pairs; then those among three
    (members,) = step_down([Comparisons(p, (True, False, False))])
    assert members == pytest.approx([5 * 0.01, 5 * 0.01, 1.0])  # 2 * 0.02 is no less significant
    both = step_down([Comparisons(p, (True,) * 3), Comparisons((0.004,), (True,))])
    assert both[1] == pytest.approx([7 * 0.004]) and both[0][0] == pytest.approx(6 * 0.01)


def test_rivals_are_one_where_the_best_is_beyond_doubt_and_all_where_all_are_equal():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(500, 6))
    assert rivals(values + 10 * np.eye(6)[2]) == 1
    assert 3 < rivals(values - values.mean(axis=0)) <= 6 + 1e-9
    assert rivals(values + np.array([0, 0, 5, 5, 0, 0])) <= 2 + 1e-9
    assert rivals(values + np.array([0, 0, 5, 0, 0, 0]), higher_is_better=False) > 2
    assert rivals(values[:, :1]) == 1 and rivals(values[:1]) == 1
    assert rivals(np.where(values > 2.5, np.inf, values)) == 6
    assert level_of_each(0.95, 2, 2.0) == pytest.approx(0.95)
    assert level_of_each(0.95, 20, 1.0) == pytest.approx(0.95)
    assert level_of_each(0.95, 20, 20.0) == pytest.approx(1 - 0.05 * 19 / 190)


# Power -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "discordance", "drop", "min_observed"),
    [(100, 0.2, 0.1, 0.0), (300, 0.3, 0.05, 0.0), (60, 0.1, 0.1, 0.0), (200, 0.2, 0.0, 0.0), (200, 0.2, 0.1, 0.08)],
)
def test_power_is_that_of_simulated_runs(documents, discordance, drop, min_observed):
    generator = np.random.default_rng(0)
    worse, better = (discordance + drop) / 2, (discordance - drop) / 2
    counts = generator.multinomial(documents, [worse, better, 1 - discordance], size=4000)
    least = min_observed * documents
    found = np.mean([mcnemar(int(w), int(b), "less") <= 0.05 and w - b >= least for w, b, _ in counts])
    assert mcnemar_power(documents, discordance, drop, 0.05, min_observed) == pytest.approx(found, abs=0.025)


def test_power_of_certain_changes_is_a_step():
    # 5 of 5 are significant at 0.05 (1/32), 4 of 4 are not (1/16).
    assert mcnemar_power(5, 1.0, 1.0, 0.05) == pytest.approx(1.0)
    assert mcnemar_power(4, 1.0, 1.0, 0.05) == 0.0
    assert mcnemar_power(50, 0.0, 0.0, 0.05) == 0.0
    with pytest.raises(ValueError, match="drop 0.3 and discordance 0.2"):
        mcnemar_power(10, 0.2, 0.3, 0.05)


def test_what_a_comparison_needs_is_found_as_often_as_was_asked():
    generator = np.random.default_rng(0)
    sample = generator.normal(0.1, 0.4, 200)
    seen, needed = paired_needs(sample, 0.05, 0.8)
    for documents, effect in ((200, seen), (needed, sample.mean())):
        runs = generator.normal(effect, sample.std(ddof=1), (4000, documents))
        z = runs.mean(1) / (runs.std(1, ddof=1) / np.sqrt(documents))
        assert (np.abs(z) > 1.96).mean() == pytest.approx(0.8, abs=0.02)
    assert paired_needs([0.0, 0.0], 0.05, 0.8) == paired_needs([1.0], 0.05, 0.8) == (None, None)
    assert paired_needs([1.0, -1.0], 0.05, 0.8)[1] is None


def test_differences_without_a_scatter_need_nothing_that_can_be_told():
    for differences in ([0.5], [0.5, 0.5], [math.nan, 1.0]):
        assert paired_needs(differences, 0.05, 0.8) == (None, None)


def test_detectable_drop_is_where_power_reaches_what_was_asked():
    for documents, discordance, least in ((300, 0.2, 0.0), (300, 0.2, 0.1), (100, 0.0, 0.0)):
        found = detectable_drop(documents, discordance, 0.05, 0.8, least)
        assert mcnemar_power(documents, discordance + found, found, 0.05, least) >= 0.8
        below = found - 0.002
        assert mcnemar_power(documents, discordance + below, below, 0.05, least) < 0.8
    assert detectable_drop(4, 0.0, 0.05) is None


def test_detectable_drop_is_near_connors_sample_size():
    # Connor 1987, Biometrics 43:207-211: n = (z_a sqrt(psi) + z_b sqrt(psi - d^2))^2 / d^2, one-sided.
    psi, drop = 0.25, 0.1
    documents = (1.6449 * math.sqrt(psi) + 0.8416 * math.sqrt(psi - drop**2)) ** 2 / drop**2
    assert detectable_drop(round(documents), psi - drop, 0.05) == pytest.approx(drop, rel=0.12)


def test_detectable_shift_of_real_valued_scores_is_that_of_simulated_ones():
    shift = detectable_shift(0.1, 10_000, 0.05, 0.8)
    assert shift == pytest.approx((1.6449 + 0.8416) * 0.1, rel=1e-3)
    assert detectable_shift(0.1, 10_000, 0.05, 0.8, min_observed=0.3) == pytest.approx(0.3 + 0.08416, rel=1e-3)
    generator = np.random.default_rng(0)
    for documents, alpha in ((20, 0.05), (40, 0.0025)):
        shift = detectable_shift(1 / math.sqrt(documents), documents, alpha)
        changes = generator.normal(shift, 1, size=(500, documents, 1))
        found = [sign_flip(0 * x, x, alternative="greater", resamples=200, seed=i) for i, x in enumerate(changes)]
        assert np.mean(np.array(found) <= alpha) == pytest.approx(0.8, abs=0.06)


def test_no_shift_is_found_where_all_exchanges_are_too_few():
    assert detectable_shift(0.1, 4, 0.05) is None  # 1/16 at best
    assert detectable_shift(0.1, 5, 0.05) is not None
    assert detectable_shift(0.1, 1, 0.6) is None


# Tables ------------------------------------------------------------------------------------------------

EQUAL = [  # population, documents, systems, reference, columns, repetitions
    (0, 100, 20, "best of all", 1, 250),
    (0, 100, 5, "given", 1, 400),
    (0, 100, 10, "best of two", 1, 250),
    (2, 100, 10, "best of all", 1, 250),
    (0, 30, 5, "best of all", 3, 200),
    (4, 30, 5, "best of all", 1, 150),
    (6, 30, 5, "best of all", 1, 150),
]


@pytest.mark.parametrize(("population", "documents", "systems", "reference", "columns", "repetitions"), EQUAL)
def test_tables_of_equal_systems_rarely_call_any_better_or_worse(
    population, documents, systems, reference, columns, repetitions
):
    # Holm over the differences to the best alone: 0.06 at 3 systems, 0.18 at 20.
    found = level["simulate"](
        level["POPULATIONS"][population], documents, systems, reference, "equal", repetitions, columns
    )
    assert found["false alarms"]["rate"] <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repetitions)
    covered = found["differences"]
    assert covered["coverage"] >= 0.935 - 3 * covered["stderr"]
    assert 0.935 - 0.015 <= found["scores"]["coverage"] <= 0.98


def test_unequal_systems_are_told_apart_and_their_intervals_hold():
    found = level["simulate"](level["POPULATIONS"][0], 300, 10, "best of all", "unequal", 150)
    assert found["false alarms"]["rate"] <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)
    assert 0.935 - 3 * found["differences"]["stderr"] <= found["differences"]["coverage"] <= 0.98


def test_the_gate_finds_what_it_says_it_finds():
    for found in (level["gate"](100, 4, 0.2, 150), level["gate_real"](30, 4, 150)):
        assert found["false alarms"]["rate"] <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 150)
        assert found["found"]["rate"] == pytest.approx(0.8, abs=0.1)


def test_the_measurement_goes_on_where_it_stopped_and_ends_in_a_line_of_json(tmp_path, monkeypatch, capsys):
    state = tmp_path / "state.jsonl"
    page = tmp_path / "page.md"
    page.write_text(f"a\n{level['BEGIN']}\nold\n{level['END']}\nb\n")
    options = ["--repetitions", "2", "--real", "2", "--documents", "30", "--systems", "2", "--state", str(state)]
    monkeypatch.setattr(sys, "argv", ["statistics_level.py", *options, "--into", str(page)])
    level["main"]()
    first = capsys.readouterr().out.splitlines()
    level["main"]()
    second = capsys.readouterr().out.splitlines()
    assert first[-1] == second[-1] and len(second) < len(first)
    assert "| bits per byte | best of all | unequal |" in page.read_text() and "old" not in page.read_text()
    assert len(state.read_text().splitlines()) == len(first) - len(second)
