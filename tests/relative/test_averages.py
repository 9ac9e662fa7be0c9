"""Averages beside the linear and the geometric one: where they meet. Their formulas are tested with the methods."""

from __future__ import annotations

import math

import naive_fusion
import pytest
import torch

from lm_eval_deepen.relative.average import consistent, geometric, linear, power_mean, product
from lm_eval_deepen.relative.support import Split


def drawn(rows=6, members=3, anchors=40):
    """Return relative vectors [M, B, A], weights [B, M], and masses of text and end."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.softmax(3 * torch.randn(members, rows, anchors, generator=generator), dim=2)
    share = torch.softmax(torch.randn(rows, members, generator=generator), dim=1)
    share[0] = torch.tensor([0.4, 0.6, 0.0])
    text = torch.sigmoid(torch.randn(rows, members, generator=generator))
    nothing = torch.zeros(rows, members)
    parts = Split.__new__(Split)
    values = {"log_text": text.log(), "log_end": (1 - text).log(), "valid": nothing == 0, "log_kept": nothing}
    for name, value in values.items():
        object.__setattr__(parts, name, value)
    return vectors, share, parts


def both(average, other):
    vectors, share, parts = drawn()
    found = [
        f(v[0], list(v[1:]), share, parts, with_end=True) for f, v in ((average, vectors.clone()), (other, vectors))
    ]
    return [torch.cat([one.r.log(), one.log_text[:, None], one.log_end[:, None]], 1) for one in found]


def test_power_1_is_the_linear_average():
    a, b = both(lambda *x, **k: power_mean(*x, **k, power=1.0), linear)
    torch.testing.assert_close(a, b)


def test_a_product_whose_exponents_are_the_weights_is_the_geometric_average():
    vectors, _, parts = drawn()
    share = torch.tensor([0.5, 0.3, 0.2]).expand(6, 3)
    args = (share, parts)
    a = product(vectors[0], list(vectors[1:]), *args, with_end=True, exponents=(0.5, 0.3, 0.2))
    b = geometric(vectors[0].clone(), list(vectors[1:].clone()), *args, with_end=True)
    for name in ("r", "log_text", "log_end"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("power", [-40.0, 40.0])
def test_large_powers_near_the_ends(power):
    """For equal values of the weights the mean tends to the smallest and the largest value."""
    ends = torch.tensor(power).sign() * torch.inf
    a, b = both(
        lambda *x, **k: power_mean(*x, **k, power=power), lambda *x, **k: power_mean(*x, **k, power=float(ends))
    )
    torch.testing.assert_close(a, b, atol=0.2, rtol=0)


@pytest.mark.parametrize("power", [1e-3, -1e-3, 1e-6, 1e-9, -1e-12])
def test_a_power_near_0_is_nearly_the_geometric_average(power):
    """With as much text of all members, since a power mean's weights are those of the members' text."""
    vectors, share, parts = drawn()
    object.__setattr__(parts, "log_text", torch.full((6, 3), 0.5).log())
    a = power_mean(vectors[0], list(vectors[1:]), share, parts, with_end=True, power=power)
    b = geometric(vectors[0].clone(), list(vectors[1:].clone()), share, parts, with_end=True)
    torch.testing.assert_close(a.r.log(), b.r.log(), atol=1e-5 + 30 * abs(power), rtol=0)


@pytest.mark.parametrize("power", [-0.99, -0.3, 0.3, 0.99])
def test_powers_near_0_are_the_formula(power):
    vectors, share, parts = drawn()
    found = power_mean(vectors[0], list(vectors[1:]), share, parts, with_end=True, power=power)
    blend = (share * parts.log_text.exp()).double()
    blend /= blend.sum(1, keepdim=True)
    expected = torch.einsum("bm,mba->ba", blend, vectors.double() ** power) ** (1 / power)
    torch.testing.assert_close(found.r.double(), expected / expected.sum(1, keepdim=True), atol=1e-6, rtol=1e-5)


def test_what_an_amateur_alone_finds_unlikely_is_no_text():
    """As where the expert abstains: the row is left to the main member."""
    vectors, share, parts = drawn()
    found = product(vectors[0], list(vectors[1:]), share, parts, with_end=True, exponents=(-0.5, -0.5, 1.0))
    assert found.usable.tolist() == [False, True, True, True, True, True]


def test_a_certain_member_whose_probability_is_rounded_above_1_has_no_negative_weight():
    vectors, share, parts = drawn()
    vectors[1:] = torch.nn.functional.one_hot(torch.tensor([3, 5]), 40)[:, None, :].float()
    vectors[0] = vectors[1]
    expected = consistent(vectors[0], list(vectors[1:]), share, parts, with_end=True).r
    found = consistent(vectors[0] * (1 + 2e-7), list(vectors[1:] * (1 + 2e-7)), share, parts, with_end=True).r
    assert (expected >= 0).all()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_absent_amateur_excludes_nothing():
    """In a batch as alone."""
    vectors, share, parts = drawn()
    exponents = (1.0, 0.5, -0.5)
    found = product(vectors[0], list(vectors[1:]), share, parts, with_end=True, exponents=exponents)
    alone = (vectors[0, 0].log() + 0.5 * vectors[1, 0].log()).softmax(0)
    torch.testing.assert_close(found.r[0], alone)
    assert (found.r[1:] < 1e-9).any(1).all()  # where it is there, it does


@pytest.mark.parametrize(
    "average", ["min", "max", -3.0, -0.99, -0.3, 0.2, 0.5, 1.0, 3.0, (0.5, 0.3, 0.2), (1.0, 1.0, 2.0),
                (1.0, 0.5, -0.5), (2.0, -0.5, -1.0)]
)  # fmt: skip
def test_what_a_member_finds_very_unlikely_is_as_unlikely_as_it_says(average):
    """Down to 200 nats, where fp32 has 0, against a slow reference of the same vectors, and of the true ones."""
    generator = torch.Generator().manual_seed(1)
    logs = torch.log_softmax(-200 * torch.rand(3, 8, 60, generator=generator, dtype=torch.float64) ** 2, dim=2)
    logs[1:, :4] = logs[:1, :4] + 3 * torch.randn(2, 4, 60, generator=generator, dtype=torch.float64)  # they agree
    logs = torch.log_softmax(logs, dim=2)
    vectors = logs.exp().float()
    assert bool((vectors == 0).any()) and bool((logs.amax(0) < -110).any())
    _, share, parts = drawn(8)
    share[0] = torch.tensor([0.2, 0.5, 0.3])
    args = (vectors[0].clone(), list(vectors[1:].clone()), share, parts)
    if isinstance(average, tuple):
        found = product(*args, with_end=True, exponents=average).r
    else:
        power = {"min": -math.inf, "max": math.inf}.get(average, average)
        found = power_mean(*args, with_end=True, power=power).r
    for given, exact in ((vectors.double(), True), (logs.exp(), False)):
        for b in range(8):
            rows = given[:, b].tolist()
            if isinstance(average, tuple):
                least = [1e-12 if e < 0 else 2.0**-149 for e in average]
                held = [dict(enumerate(max(q, low) for q in row)) for row, low in zip(rows, least, strict=True)]
                expected = list(naive_fusion.pooled_product(held, average).values())
            else:
                blend = [
                    w * math.exp(own) for w, own in zip(share[b].tolist(), parts.log_text[b].tolist(), strict=True)
                ]
                blend = [w / sum(blend) for w in blend]
                columns = ([max(q, 2.0**-149 if exact else 0) for q in column] for column in zip(*rows, strict=True))
                expected = [naive_fusion.power_mean(column, blend, power) for column in columns]
            expected = torch.tensor(expected, dtype=torch.float64)
            expected /= expected.sum()
            torch.testing.assert_close(found[b].double(), expected, atol=1e-6, rtol=1e-4)
            if exact:
                seen = expected > 1e-30
                torch.testing.assert_close(found[b, seen].double().log(), expected[seen].log(), atol=2e-4, rtol=0)
