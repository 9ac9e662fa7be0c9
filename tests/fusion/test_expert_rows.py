"""Rows under several static ensembles: the fast path of `deepen` against one fusion per expert."""

from __future__ import annotations

import pytest
import torch
from tensor_worlds import rows, trio

from lm_eval_deepen.fusion._deepen_experts import OneHotExperts
from lm_eval_deepen.fusion._expert_rows import FusedByEach
from lm_eval_deepen.fusion.deepen import Deepen
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.weighting.experts import Experts

MEMBERS = trio()
PRESENT = torch.tensor([[True, True, True], [True, False, True], [True, True, False], [True, False, False]] * 6)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A fuser, log-probabilities of 24 rows, and the experts with their weights [24, K, 3]."""
    fuser = Deepen().build(MEMBERS, MatrixStore(tmp_path_factory.mktemp("matrices"), progress=False))
    experts = Experts.of_steps(3, geometric=True)
    logp = rows(MEMBERS, 24)
    logp[1][5] = -torch.inf  # a member that is certain of its end of text
    logp[1][5, 1] = 0.0
    logp[0][6] = -torch.inf  # and the main member
    logp[0][6, 1] = 0.0
    return fuser, logp, experts, experts.among(PRESENT)


def slow(fuser, logp, experts, weights):
    return FusedByEach([fuser.pooled_as(*kind) for kind in experts.kinds()], logp, weights)


def test_every_expert_gives_each_token_what_its_own_fusion_gives(made):
    fuser, logp, experts, weights = made
    fast, naive = fuser.experts(logp, weights, experts), slow(*made)
    assert isinstance(fast, OneHotExperts)
    size = len(MEMBERS[0].vocabulary)
    row, token = torch.meshgrid(torch.arange(24), torch.arange(size), indexing="ij")
    got, expected = (found.at(row.flatten(), token.flatten()) for found in (fast, naive))
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


def test_the_mixture_is_the_posterior_mean_of_the_experts(made):
    fuser, logp, experts, weights = made
    posterior = torch.log_softmax(torch.randn(24, len(experts), generator=torch.Generator().manual_seed(3)), dim=1)
    got = fuser.experts(logp, weights, experts).mixed(posterior.double())
    expected = slow(*made).mixed(posterior.double())
    torch.testing.assert_close(got.logp, expected.logp, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(got.stats["end_mass"], expected.stats["end_mass"], atol=1e-5, rtol=1e-4)
