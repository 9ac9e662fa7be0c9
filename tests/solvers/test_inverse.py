"""Both inverse solvers against slow references: torch's own AdamW with autograd, and a loop for em."""

from __future__ import annotations

import pytest
import torch

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.fusion.deepen import Deepen
from lm_eval_deepen.relative.matrix import DenseMatrix, SparseMatrix
from lm_eval_deepen.solvers import SOLVERS
from lm_eval_deepen.solvers.adamw import gradient, schedule
from lm_eval_deepen.solvers.trust import within

NEG_INF = float("-inf")
SEARCHING = sorted(set(SOLVERS) - {"exact"})


def solved(name: str, *given, **options):
    return SOLVERS[name].options(**options).solve(*given)


def problem(seed: int = 0, batch: int = 6, pieces: int = 80, anchors: int = 30, sharpness: float = 3.0):
    """A matrix, starting log-probabilities and a target that mixes them with another distribution."""
    g = torch.Generator().manual_seed(seed)
    matrix = DenseMatrix(torch.softmax(sharpness * torch.randn(pieces, anchors, generator=g), dim=1))
    logp0 = torch.log_softmax(2 * torch.randn(batch, pieces, generator=g), dim=1)
    other = torch.softmax(2 * torch.randn(batch, pieces, generator=g), dim=1)
    return matrix, logp0, 0.5 * (logp0.exp() + other) @ matrix.relative


def autograd_loss(logits, r, relative):
    """Sum over rows of the element-mean KL divergence, written as the published code has it."""
    log_q = (torch.softmax(logits, dim=-1) @ relative).log()
    losses = torch.nn.functional.kl_div(log_q, r, reduction="none")  # "mean" of one row warns, and means this
    return losses.mean(dim=1).sum()


def autograd_search(logits, r, relative, steps: int, learning_rate: float):
    logits = logits.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([logits], lr=learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=learning_rate / 4)
    for _ in range(steps):
        optimizer.zero_grad()
        autograd_loss(logits, r, relative).backward()
        optimizer.step()
        scheduler.step()
    return torch.log_softmax(logits.detach(), dim=-1)


def test_the_closed_form_gradient_is_autograds() -> None:
    matrix, logp0, r = problem()
    logits = logp0.clone().requires_grad_(True)
    autograd_loss(logits, r, matrix.relative).backward()
    torch.testing.assert_close(gradient(logp0, r, matrix.full()), logits.grad, atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 5, 10, 25])
def test_the_schedule_is_torchs(steps: int) -> None:
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0.075)
    for step in range(steps):
        assert schedule(0.3, step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("steps", "learning_rate"), [(1, 0.15), (5, 0.15), (12, 0.5)])
def test_adamw_is_torchs_with_autograd(steps: int, learning_rate: float) -> None:
    matrix, logp0, r = problem(1)
    expected = autograd_search(logp0 + 3.0, r, matrix.relative, steps, learning_rate)  # logits: any constant per row
    got = solved("adamw", logp0, r, matrix.full(), steps=steps, learning_rate=learning_rate)
    torch.testing.assert_close(got.logp, expected, atol=1e-4, rtol=0)


def test_adamw_divides_by_all_anchors_when_rows_are_sparse() -> None:
    matrix, logp0, r = problem(2)
    values, indices = matrix.relative.topk(5, dim=1)
    sparse = SparseMatrix(values, indices, matrix.shape[1], torch.zeros(80))
    dense = DenseMatrix(torch.zeros_like(matrix.relative).scatter_(1, indices, values))
    r = logp0.exp().roll(1, 0) @ dense.relative
    a = solved("adamw", logp0, r, sparse.full(), steps=5, learning_rate=0.15)
    b = solved("adamw", logp0, r, dense.full(), steps=5, learning_rate=0.15)
    torch.testing.assert_close(a.logp, b.logp, atol=1e-4, rtol=0)


def test_em_is_its_plain_loop_and_decreases_the_divergence_monotonically() -> None:
    matrix, logp0, r = problem(3)
    p, last = logp0.exp().double(), torch.full((len(r),), float("inf"), dtype=torch.float64)
    relative, target = matrix.relative.double(), r.double()
    for steps in range(1, 30):
        p = p * ((target / (p @ relative)) @ relative.T)
        divergence = (target * (target / (p @ relative)).log()).sum(1)
        assert (divergence <= last + 1e-12).all()
        last = divergence
        if steps in (1, 2, 8, 29):
            got = solved("em", logp0, r, matrix.full(), steps=steps)
            torch.testing.assert_close(got.logp, p.log().float(), atol=2e-4, rtol=0)
            torch.testing.assert_close(got.stats["residual_kl"], divergence.float(), atol=1e-5, rtol=1e-3)


def test_em_has_p0_as_a_fixed_point_and_adamw_has_not() -> None:
    matrix, logp0, _ = problem(4)
    r = logp0.exp() @ matrix.relative
    torch.testing.assert_close(solved("em", logp0, r, matrix.full(), steps=20).logp, logp0, atol=1e-5, rtol=0)
    drift = (solved("adamw", logp0, r, matrix.full(), steps=5, learning_rate=0.15).logp - logp0).abs().max()
    assert drift > 1e-2


def test_em_recovers_a_distribution_that_explains_r() -> None:
    matrix, logp0, _ = problem(5, pieces=12)
    truth = torch.softmax(torch.randn(6, 12, generator=torch.Generator().manual_seed(1)), dim=1)
    got = solved("em", logp0, truth @ matrix.relative, matrix.full(), steps=3000)
    torch.testing.assert_close(got.logp.exp(), truth, atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", SEARCHING)
def test_excluded_pieces_stay_excluded_without_nan(name: str) -> None:
    matrix, logp0, r = problem(6)
    logp0[:, ::3] = NEG_INF
    logp0[0, 1:] = NEG_INF  # all on one piece
    logp0[0, 0] = 0.0
    got = solved(name, torch.log_softmax(logp0, dim=1), r, matrix.full())
    assert torch.equal(got.logp == NEG_INF, logp0 == NEG_INF)
    torch.testing.assert_close(got.logp.exp().sum(1), torch.ones(6), atol=1e-5, rtol=0)
    assert not got.logp.isnan().any() and all(value.isfinite().all() for value in got.stats.values())


@pytest.mark.parametrize("name", SEARCHING)
def test_mass_that_no_piece_reaches_is_counted(name: str) -> None:
    relative = torch.zeros(4, 6)
    relative[:, :3] = torch.softmax(torch.arange(12.0).reshape(4, 3).sin(), dim=1)
    r = torch.tensor([[0.2, 0.2, 0.2, 0.4, 0.0, 0.0]])
    logp0 = torch.log_softmax(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), dim=1)
    got = solved(name, logp0, r, DenseMatrix(relative).full())
    torch.testing.assert_close(got.stats["lost_mass"], torch.tensor([0.4]))
    assert got.logp.isfinite().all() and got.stats["residual_kl"].isfinite().all()


@pytest.mark.parametrize("name", SEARCHING)
def test_an_anchor_whose_only_piece_nearly_underflows_gives_no_nan(name: str) -> None:
    matrix, logp0, r = problem(9)
    relative = matrix.relative.clone()
    relative[:, 0] = 0.0
    relative[5] = torch.eye(30)[0]
    logp0[:, 5] = -95.0  # a probability below fp32's smallest normal number, but not 0
    r[:, 0] = 0.5
    got = solved(name, torch.log_softmax(logp0, 1), r / r.sum(1, keepdim=True), DenseMatrix(relative).full())
    assert got.logp.isfinite().all() and all(value.isfinite().all() for value in got.stats.values())


def test_em_keeps_pieces_too_small_for_fp32_finite() -> None:
    matrix, logp0, r = problem(7)
    logp0[:, 5] = -400.0
    relative = matrix.relative.clone()
    relative[:, 0] = 0.0
    relative[5] = 0.0
    relative[5, 0] = 1.0  # the only piece on this anchor, and its probability underflows
    matrix, logp0 = DenseMatrix(relative), torch.log_softmax(logp0, dim=1)
    got = solved("em", logp0, logp0.exp() @ matrix.relative, matrix.full(), steps=10)
    torch.testing.assert_close(got.logp[:, 5], logp0[:, 5], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", SEARCHING)
def test_rows_do_not_depend_on_their_batch_and_no_gradient_leaks(name: str) -> None:
    matrix, logp0, r = problem(8)
    solver, logp0 = SOLVERS[name].options(), logp0.requires_grad_(True)
    whole = solver.solve(logp0, r, matrix.full())
    assert not whole.logp.requires_grad
    for i in range(len(r)):
        one = solver.solve(logp0[i : i + 1], r[i : i + 1], matrix.full())
        torch.testing.assert_close(one.logp[0], whole.logp[i], atol=1e-4 if name == "adamw" else 5e-6, rtol=0)


def test_rows_of_a_large_vocabulary_are_normalised_to_fp32() -> None:
    logits = torch.full((1, 262_144), -9.0)
    logits[0, 7] = 3.0
    matrix = DenseMatrix(torch.ones(262_144, 1))
    got = solved("em", torch.log_softmax(logits, dim=1), torch.ones(1, 1), matrix.full(), steps=1)
    assert got.logp.double().exp().sum().item() == pytest.approx(1.0, abs=3e-6)


def test_an_unknown_solver_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="inverse must be .*; got 'adam'. Did you mean 'adamw'"):
        Deepen(inverse="adam")


def test_a_solver_gets_the_options_it_takes_and_its_own_defaults() -> None:
    assert Deepen().build_solver().to_dict() == {}
    built = Deepen(inverse="mirror", steps=3).build_solver()
    assert (built.NAME, built.steps, built.learning_rate) == ("mirror", 3, 1.7)
    assert Deepen(rows="embedding", steps=7, inverse="em").build_solver().to_dict() == {"steps": 7}


def test_exact_is_what_em_converges_to_on_one_hot_rows() -> None:
    g = torch.Generator().manual_seed(9)
    sparse = SparseMatrix(torch.ones(80, 1), torch.randint(30, (80, 1), generator=g), 30, torch.zeros(80))
    op, logp0 = sparse.full(), torch.log_softmax(2 * torch.randn(6, 80, generator=g), dim=1)
    logp0[:, ::7] = NEG_INF
    logp0 = torch.log_softmax(logp0, dim=1)
    r = torch.softmax(torch.randn(6, 30, generator=g), dim=1)  # some of it where no piece is
    got, searched = solved("exact", logp0, r, op), solved("em", logp0, r, op, steps=20)
    torch.testing.assert_close(got.logp, searched.logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.stats["lost_mass"], searched.stats["lost_mass"], atol=1e-6, rtol=0)
    assert got.stats["lost_mass"].max() > 0 and searched.stats["residual_kl"].max() < 1e-6
    torch.testing.assert_close(solved("em", logp0, r, op, steps=1).logp, searched.logp, atol=1e-5, rtol=0)


def test_mirror_with_steps_of_one_is_em_and_longer_ones_reach_further() -> None:
    matrix, logp0, r = problem(8, sharpness=1.5)
    op = matrix.full()
    one = solved("mirror", logp0, r, op, steps=7, learning_rate=1.0)
    torch.testing.assert_close(one.logp, solved("em", logp0, r, op, steps=7).logp, atol=1e-5, rtol=0)
    far = solved("mirror", logp0, r, op, steps=7, learning_rate=1.7)
    assert (far.stats["residual_kl"] < one.stats["residual_kl"]).all()
    fixed = solved("mirror", logp0, logp0.exp() @ matrix.relative, op, steps=7, learning_rate=1.7)
    torch.testing.assert_close(fixed.logp, logp0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("radius", [1e-3, 0.05, 0.5])
def test_the_trust_region_is_left_by_nobody_and_used_to_its_edge(radius: float) -> None:
    g = torch.Generator().manual_seed(2)
    logp0, logp = (torch.log_softmax(3 * torch.randn(6, 50, generator=g), dim=1) for _ in range(2))
    logp0[:, :5] = logp[:, :5] = NEG_INF
    logp0, logp = torch.log_softmax(logp0, dim=1), torch.log_softmax(logp, dim=1)
    got, held_back = within(logp0, logp, radius)
    divergence = torch.where(got > NEG_INF, got.exp() * (got - logp0), 0.0).sum(1)
    assert (divergence <= radius * 1.001).all() and (divergence > radius * 0.9).all()
    assert ((held_back > 0) & (held_back < 1)).all()
    torch.testing.assert_close(got.exp().sum(1), torch.ones(6), atol=1e-5, rtol=0)


def test_a_wide_trust_region_changes_nothing() -> None:
    _, logp0, _ = problem(3)
    logp = torch.log_softmax(logp0 * 1.1, dim=1)
    got, held_back = within(logp0, logp, 10.0)
    assert torch.equal(got, logp) and torch.equal(held_back, torch.zeros(6))
