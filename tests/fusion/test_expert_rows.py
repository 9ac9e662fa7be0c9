"""Rows under several static ensembles: the fast path of `deepen` against one fusion per expert."""

from __future__ import annotations

import pytest
import torch
from tensor_worlds import rows, trio

from lm_eval_deepen.fusion._deepen_experts import OneHotExperts
from lm_eval_deepen.fusion._expert_rows import FusedByEach, SomeLeft
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


def half(rows, vocab):
    rows[torch.rand(rows.shape, generator=torch.Generator().manual_seed(5)) < 0.5] = -torch.inf


def no_end(rows, vocab):
    rows[:, list(vocab.eos)] = -torch.inf


def one_end(rows, vocab):
    rows[:, vocab.eos[0]] = -torch.inf


def sharp(rows, vocab):
    """No piece of one member is one of another; what underflows is no infinity."""
    rows.copy_(torch.log_softmax(60 * rows, dim=1))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)], ids=["one end", "two ends"])
@pytest.mark.parametrize("extreme", [half, no_end, one_end, sharp])
def test_what_a_member_excludes_is_excluded_alike(extreme, order, tmp_path):
    members = [MEMBERS[m] for m in order]
    fuser = Deepen().build(members, MatrixStore(tmp_path, progress=False))
    experts, logp = Experts.of_steps(3, geometric=True), rows(members, 20)
    for own, member in zip(logp, members, strict=True):
        extreme(own, member.vocabulary)
    weights = experts.among(torch.ones(20, 3, dtype=torch.bool))
    posterior = torch.log_softmax(torch.arange(20.0)[:, None] * torch.linspace(-1, 1, len(experts)), dim=1).double()
    place = torch.meshgrid(torch.arange(20), torch.arange(logp[0].shape[1]), indexing="ij")
    expected, shape = None, (20, -1, len(experts))
    for found in (fuser.experts(logp, weights, experts), slow(fuser, logp, experts, weights)):
        each = found.at(place[0].flatten(), place[1].flatten()).reshape(shape)
        for got in (found.mixed(posterior).logp.double(), torch.logsumexp(each + posterior[:, None], dim=2)):
            torch.testing.assert_close(got.exp().sum(1), torch.ones(20).double(), atol=1e-4, rtol=0)
            expected = got if expected is None else expected
            likely = torch.where(expected > -30, expected, -torch.inf)
            torch.testing.assert_close(torch.where(got > -30, got, -torch.inf), likely, atol=2e-3, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tokens_may_be_on_another_device_than_rows(made):
    fuser, logp, experts, weights = made
    row, token = torch.arange(24), torch.arange(24) + 3
    expected = fuser.experts(logp, weights, experts).at(row, token)
    there = [own.cuda() for own in logp]
    fused = fuser.experts(there, weights.cuda(), experts)
    none = SomeLeft(there[0], logp[0].shape[1], torch.zeros(24, dtype=torch.bool).cuda(), fused, len(experts))
    for found in (fused, none):
        torch.testing.assert_close(found.at(row, token).cpu(), expected, atol=2e-4, rtol=1e-4)


def only(*roles):
    """Return what leaves one member nothing but its pieces of these roles, without any: no text."""

    def leave(rows, vocab):
        unused = sorted(vocab.unused)[:1]
        ids = {"end": sorted(set(vocab.eos)), "control": sorted(vocab.control - set(vocab.eos)), "unused": unused}
        kept = [token for role in roles for token in ids[role]]
        out = torch.full_like(rows, -torch.inf)
        out[:, kept] = rows[:, kept]
        rows.copy_(torch.log_softmax(out, dim=1) if kept else out)

    return leave


NOTHING_BUT = [("end",), ("control",), ("end", "control"), ("unused",)]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0)], ids=["one end", "two ends", "pair"])
@pytest.mark.parametrize("roles", NOTHING_BUT, ids="+".join)
def test_a_member_without_text_is_fused_as_by_each_expert_alone(roles, order, tmp_path):
    """Each row leaves text to another set of members."""
    members = [MEMBERS[m] for m in order]
    fuser = Deepen().build(members, MatrixStore(tmp_path, progress=False))
    experts, logp = Experts.of_steps(len(order), geometric=True), rows(members, 2 ** len(order))
    for m, member in enumerate(members):
        if roles == ("unused",) and not (m and member.vocabulary.unused):
            continue
        lacks = torch.tensor([bool(n >> m & 1) for n in range(len(logp[0]))])
        own = logp[m][lacks]
        only(*roles)(own, member.vocabulary)
        logp[m][lacks] = own
    weights = experts.among(torch.ones(len(logp[0]), len(order), dtype=torch.bool))
    posterior = torch.log_softmax(torch.randn(len(weights), len(experts)), dim=1).double()
    fast, naive = fuser.experts(logp, weights, experts), slow(fuser, logp, experts, weights)
    row, token = torch.meshgrid(torch.arange(len(weights)), torch.arange(logp[0].shape[1]), indexing="ij")
    got, expected = (found.at(row.flatten(), token.flatten()).exp() for found in (fast, naive))
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    got, expected = fast.mixed(posterior), naive.mixed(posterior)
    torch.testing.assert_close(got.logp.exp(), expected.logp.exp(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(got.stats["end_mass"], expected.stats["end_mass"], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(got.logp.exp().sum(1), torch.ones(len(weights)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("depth", [60, 95, 110, 150])
def test_what_underflows_in_every_member_is_as_unlikely_as_they_say(depth, tmp_path):
    """By the geometric average, by experts in both ways, and beside a third member that abstains."""
    fuser = Deepen().build(MEMBERS, MatrixStore(tmp_path, progress=False))
    experts, logp = Experts.of_steps(3, geometric=True), rows(MEMBERS, 1)
    shared = [own for own in MEMBERS[0].vocabulary.pieces if own and all(own in m.vocabulary.pieces for m in MEMBERS)]
    for own, member in zip(logp, MEMBERS, strict=True):
        own[0, [piece.startswith(shared[3]) for piece in member.vocabulary.pieces]] = -depth
    logp = [torch.log_softmax(own, dim=1) for own in logp]
    token = MEMBERS[0].vocabulary.pieces.index(shared[3])
    said = [own[0, member.vocabulary.pieces.index(shared[3])] for own, member in zip(logp, MEMBERS, strict=True)]
    found = []
    for present in ([True, True, True], [True, True, False]):
        weights = experts.among(torch.tensor([present]))
        for by in (fuser.experts(logp, weights, experts), slow(fuser, logp, experts, weights)):
            each = by.at(torch.tensor([0]), torch.tensor([token]))[0]
            found += each[experts.geometric & (experts.power == 1)].tolist()
            if depth > 88:  # else experts that are less sure give more, as they should
                found.append(float(by.mixed(experts.log_prior[None]).logp[0, token]))
        share = torch.tensor([present]) / sum(present)
        found.append(float(fuser.pooled_as(True, 1.0).fuse(logp, share).logp[0, token]))
    assert min(said) - 1 < min(found) and max(found) < max(said) + 1


@pytest.mark.parametrize("average", ["min", "max", -1.5, 0.5, 3.0, [0.4, 0.4, 0.2], [1.0, -0.3, -0.3]])
@pytest.mark.parametrize("depth", [40, 60, 95, 150])
def test_what_all_members_find_very_unlikely_is_so_by_every_average(depth, average, tmp_path):
    fuser, logp = Deepen(average=average).build(MEMBERS, MatrixStore(tmp_path, progress=False)), rows(MEMBERS, 1)
    shared = [own for own in MEMBERS[0].vocabulary.pieces if own and all(own in m.vocabulary.pieces for m in MEMBERS)]
    for own, member in zip(logp, MEMBERS, strict=True):
        own[0, [piece.startswith(shared[3]) for piece in member.vocabulary.pieces]] = -depth
    logp = [torch.log_softmax(own, dim=1) for own in logp]
    said = [own[0, member.vocabulary.pieces.index(shared[3])] for own, member in zip(logp, MEMBERS, strict=True)]
    found = fuser.fuse(logp, torch.full((1, 3), 1 / 3)).logp
    assert min(said) - 3 < found[0, MEMBERS[0].vocabulary.pieces.index(shared[3])] < max(said) + 3
    torch.testing.assert_close(found.exp().sum(1), torch.ones(1), atol=1e-5, rtol=0)
