"""Paired statistics: textbook values, naive references, scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_deepen.statistics import (
    detectable_drop,
    detectable_shift,
    discordant,
    holm,
    mcnemar,
    mcnemar_power,
    paired_bootstrap,
    sign_flip,
    standard_error,
)


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
    second = first + 1 + 0.1 * generator.normal(size=(200, 1))
    assert sign_flip(first, second, resamples=500) == 1 / 501
    shifted = first + generator.normal(size=(200, 1))
    assert sign_flip(first, shifted, seed=3) == sign_flip(first, shifted, seed=3)
    assert sign_flip(first, shifted, seed=3) == pytest.approx(
        scipy.stats.ttest_rel(shifted[:, 0], first[:, 0]).pvalue, abs=0.02
    )


# Bootstrap ---------------------------------------------------------------------------------------------


def test_interval_is_scipys_bca():
    generator = np.random.default_rng(1)
    first = generator.exponential(size=(60, 1))
    second = first * generator.uniform(0.7, 1.2, size=(60, 1)) + 0.05
    found = paired_bootstrap(first, second, resamples=20_000)
    expected = scipy.stats.bootstrap(
        (second[:, 0] - first[:, 0],), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(2)
    )
    assert found.estimate == pytest.approx((second - first).mean())
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.006)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.006)
    assert found.stderr == pytest.approx(expected.standard_error, rel=0.05)


@pytest.mark.parametrize(
    "change",
    [np.random.default_rng(3).lognormal(0, 1.3, size=25), np.array([1.0] * 6 + [-1.0] + [0.0] * 40)],
    ids=["skewed", "ties"],
)
def test_corrections_for_skewness_and_ties_are_scipys(change):
    found = paired_bootstrap(np.zeros((len(change), 1)), change[:, None], resamples=20_000)
    expected = scipy.stats.bootstrap((change,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(2))
    plain = np.quantile(expected.bootstrap_distribution, [0.025, 0.975])
    assert [found.low, found.high] == pytest.approx(list(expected.confidence_interval), rel=0.07)
    assert [found.low, found.high] != pytest.approx(list(plain), rel=0.07)


def test_interval_of_right_and_wrong_draws_documents_as_the_naive_bootstrap_does():
    generator = np.random.default_rng(4)
    first, second = (generator.random((120, 1)) < 0.6) * 1.0, (generator.random((120, 1)) < 0.7) * 1.0
    found = paired_bootstrap(first, second, resamples=20_000)
    difference = (second - first)[:, 0]
    naive = np.array([difference[generator.integers(120, size=120)].mean() for _ in range(20_000)])
    assert found.stderr == pytest.approx(naive.std(), rel=0.03)
    low, high = np.quantile(naive, [0.025, 0.975])  # the bias and skewness of this sample are small
    assert (found.low, found.high) == (pytest.approx(low, abs=0.017), pytest.approx(high, abs=0.017))


def test_interval_of_a_ratio_uses_documents_not_values():
    generator = np.random.default_rng(5)
    words = generator.integers(5, 50, size=200).astype(float)
    first = np.stack([-3 * words + generator.normal(size=200) * 5, words], axis=1)
    second = np.stack([first[:, 0] + 0.2 * words, words], axis=1)

    def per_word(means):
        return -means[..., 0] / means[..., 1]

    found = paired_bootstrap(first, second, per_word)
    assert found.estimate == pytest.approx(-0.2)
    assert found.low == pytest.approx(-0.2) and found.high == pytest.approx(-0.2)  # the same per word everywhere


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(6)
    covered = 0
    for seed in range(300):
        change = generator.choice([-1.0, 0.0, 1.0], p=[0.15, 0.6, 0.25], size=(100, 1))
        found = paired_bootstrap(np.zeros((100, 1)), change, resamples=1000, seed=seed)
        covered += found.low <= 0.1 <= found.high
    assert 0.91 <= covered / 300 <= 0.98


def test_intervals_of_equal_runs_and_of_one_document():
    same = column([0, 1, 1])
    assert (paired_bootstrap(same, same).low, paired_bootstrap(same, same).high) == (0.0, 0.0)
    one = paired_bootstrap(column([0]), column([1]))
    assert (one.estimate, one.low, one.high, one.stderr) == (1.0, None, None, None)


def test_standard_error_is_the_harnesss_for_means_and_bootstrapped_for_the_rest():
    values = column([0, 1, 1, 0, 1])
    assert standard_error(values) == pytest.approx(math.sqrt(0.3) / math.sqrt(5))
    assert standard_error(column([1])) is None
    large = np.random.default_rng(0).normal(2, 0.5, size=(400, 1))
    assert standard_error(large, lambda means: np.exp(-means[..., 0])) == pytest.approx(
        math.exp(-2) * 0.5 / 20,
        rel=0.15,  # delta method
    )


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
    shift = detectable_shift(0.1, 0.05, 0.8)
    assert shift == pytest.approx((1.6449 + 0.8416) * 0.1, rel=1e-3)
    assert detectable_shift(0.1, 0.05, 0.8, min_observed=0.3) == pytest.approx(0.3 + 0.08416, rel=1e-3)
    observed = np.random.default_rng(0).normal(shift, 0.1, size=20_000)
    assert (observed > 1.6449 * 0.1).mean() == pytest.approx(0.8, abs=0.01)
