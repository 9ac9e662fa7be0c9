"""Bayes' rule over static ensembles: at most log2 K bits a text above the best of them, whatever members say."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_eval_deepen.engine.stretches import StretchReading, weigh
from lm_eval_deepen.weighting.base import PromptLoss
from lm_eval_deepen.weighting.bayes import after_prompt
from lm_eval_deepen.weighting.experts import Experts, posteriors, simplex_grid

EVERYTHING = st.floats(-60, 0) | st.just(-math.inf)  # an adversary is certain of what does not come


@st.composite
def readings(draw) -> StretchReading:
    """Two to five members and what they give to up to 12 stretches; some abstain, not all."""
    members, count = draw(st.integers(2, 5)), draw(st.integers(0, 12))
    logp = draw(st.lists(st.lists(EVERYTHING, min_size=count, max_size=count), min_size=members, max_size=members))
    present = draw(st.lists(st.booleans(), min_size=members, max_size=members).filter(any))
    values = torch.tensor(logp, dtype=torch.float64).reshape(members, count)
    here = torch.tensor(present)
    values[~here] = -torch.inf
    return StretchReading(
        values[None], torch.zeros(members, count, dtype=torch.bool), here, draw(st.integers(0, count))
    )


@pytest.mark.parametrize("members", range(2, 9))
def test_the_grid_has_every_member_alone_and_equal_weights_and_prefers_nobody(members: int) -> None:
    points = list(simplex_grid(members))
    assert len(set(points)) == len(points)
    assert all(math.fsum(point) == pytest.approx(1) and min(point) >= 0 for point in points)
    for m in range(members):
        assert tuple(float(k == m) for k in range(members)) in points
    assert points[-1] == (1 / members,) * members
    swapped = {(point[1], point[0], *point[2:]) for point in points}
    assert swapped == set(points)


@settings(max_examples=200, deadline=None)
@given(readings(), st.booleans())
def test_no_text_costs_more_than_log_k_above_any_member(reading: StretchReading, learn: bool) -> None:
    members = reading.logp.shape[1]
    experts = Experts.of_steps(members, geometric=False)
    score = weigh(experts, reading)
    scored = reading.logp[0, :, reading.evidence :].sum(1)
    best = max(float(scored[m]) for m in range(members) if reading.present[m])
    assert score.total >= best - math.log(len(experts)) - 1e-9
    if learn:  # with the prompt as evidence, the bound is on prompt and text together
        whole = weigh(experts, StretchReading(reading.logp, reading.greedy, reading.present))
        together = max(float(reading.logp[0, m].sum()) for m in range(members) if reading.present[m])
        assert whole.total >= together - math.log(len(experts)) - 1e-9


@settings(max_examples=100, deadline=None)
@given(readings(), st.integers(0, 5), st.sampled_from([0.1, 0.25, 1.0]))
def test_what_a_prompt_teaches_wrongly_costs_at_most_its_share(reading, stretches: int, share: float) -> None:
    """Against the best member on the continuation alone, whatever came before."""
    members = reading.logp.shape[1]
    experts = replace(Experts.of_steps(members, geometric=False), prompt_stretches=stretches, prior_share=share)
    score = weigh(experts, reading)
    best = max(float(reading.logp[0, m, reading.evidence :].sum()) for m in range(members) if reading.present[m])
    assert score.total >= best - math.log(len(experts) / share) - 1e-9


@settings(max_examples=100, deadline=None)
@given(readings(), st.randoms())
def test_the_order_of_the_members_changes_no_score(reading: StretchReading, random) -> None:
    order = list(range(reading.logp.shape[1]))
    random.shuffle(order)
    turned = StretchReading(reading.logp[:, order], reading.greedy[order], reading.present[order], reading.evidence)
    for stretches, share in ((0, 1.0), (2, 0.25), (99, 0.0)):
        experts = Experts.of_steps(len(order), geometric=False)
        experts = replace(experts, prompt_stretches=stretches, prior_share=share)
        a, b = weigh(experts, reading), weigh(experts, turned)
        assert a.total == pytest.approx(b.total, abs=1e-9) or (a.total == b.total == -math.inf)
        assert [a.weights[m] for m in order] == pytest.approx(b.weights, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(EVERYTHING, min_size=3, max_size=3), max_size=8))
def test_the_mixture_is_the_mean_of_the_experts_probabilities_of_the_whole_text(events) -> None:
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    evidence = torch.tensor(events, dtype=torch.float64).reshape(-1, 3).T
    _, values = posteriors(prior, evidence)
    whole = float((prior + evidence.sum(1)).logsumexp(0)) if evidence.shape[1] else 0.0
    total = math.fsum(values.tolist())
    assert total == pytest.approx(whole, abs=1e-9) or (total == whole == -math.inf)


def test_a_member_that_abstains_leaves_its_weight_to_the_others() -> None:
    experts = Experts.of_steps(3, geometric=False)
    weights = experts.among(torch.tensor([[True, False, True]]))[0]
    assert torch.equal(weights[:, 1], torch.zeros(len(experts), dtype=torch.float64))
    torch.testing.assert_close(weights.sum(1), torch.ones(len(experts), dtype=torch.float64))
    alone = experts.weights.tolist().index([0.0, 1.0, 0.0])
    assert weights[alone].tolist() == [0.5, 0.0, 0.5]


def test_one_member_is_the_member() -> None:
    reading = StretchReading(
        torch.tensor([[[-1.0, -2.5]]]).double(), torch.ones(1, 2, dtype=torch.bool), torch.tensor([True])
    )
    for experts in (Experts.of_steps(1, geometric=False), Experts.static(torch.tensor([1.0]))):
        score = weigh(experts, reading)
        assert score.total == pytest.approx(-3.5) and score.greedy


def test_weights_learn_who_is_right() -> None:
    logp = torch.tensor([[[-1.0] * 20, [-4.0] * 20]]).double()
    reading = StretchReading(logp, torch.zeros(2, 20, dtype=torch.bool), torch.tensor([True, True]))
    score = weigh(Experts.of_steps(2, geometric=False), reading)
    assert score.weights[0] > 0.85
    first, last = score.logp[0], score.logp[-1]
    assert last > first and list(itertools.accumulate(score.logp))[-1] == pytest.approx(score.total)


def test_a_prompt_that_some_member_finds_impossible_teaches_no_nonsense() -> None:
    """Evidence of minus infinity in one stretch leaves the later ones what they are."""
    logp = torch.tensor([[-1.0, -math.inf, -2.0], [-1.5, -0.5, -3.0]], dtype=torch.float64)  # [M, S]
    experts = replace(Experts.of_stretches(2), prompt_stretches=2, prior_share=0.25)
    losses = []
    for row in logp.tolist():
        powers = tuple((value, 0.85 * value) for value in row)
        losses.append(PromptLoss(-sum(row), 3, 6, each=tuple((value, 2) for value in row), at_powers=powers))
    by_power = torch.stack([logp, 0.85 * logp])[experts.places_of_powers()]
    expected = experts.begun(torch.logsumexp(experts.weights.log()[:, :, None] + by_power, dim=1))
    found = after_prompt(experts, losses)
    assert not found.isnan().any() and float(found.exp().sum()) == pytest.approx(1)
    torch.testing.assert_close(found, expected)
