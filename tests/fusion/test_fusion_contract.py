"""What every step-level fusion method must keep, whatever it computes: a case per registered method and vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from dropped_in import dropped_in
from harness import deepen
from tensor_worlds import renormalised, rows, trio

from lm_eval_deepen.config import Options
from lm_eval_deepen.engine.ensemble import view
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.fusion import METHODS as REGISTRY
from lm_eval_deepen.fusion.base import Fuser, MemberView
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

METHODS = dict(REGISTRY)
FAMILIES = ("bytelevel", "metaspace", "padded")
# Adam divides each gradient by its own size, so the published search turns rounding into more than rounding.
VARIANTS = [(name, {}, 2e-6) for name in METHODS]
if "deepen" in METHODS:
    VARIANTS += [
        ("deepen", {"average": "geometric"}, 2e-6),
        *[("deepen", {"average": average}, 2e-5) for average in (0.5, "min", "max", "consistent")],
        ("deepen", {"average": (1.5, 0.5, 0.7)}, 2e-5),
        ("deepen", {"rows": "prefix", "support": 20}, 2e-6),
        ("deepen", {"rows": "embedding", "support": 20}, 2e-6),
        ("deepen", {"rows": "embedding", "support": "full", "top_m": 0}, 2e-6),
        ("deepen", {"average": "consistent", "rows": "exact", "support": 10, "max_truncated": 1}, 2e-6),
        ("deepen", {"rows": "exact", "inverse": "mirror", "average": "geometric", "row_entropy": 1.0}, 1e-5),
        ("deepen", {"rows": "exact", "trust_region": 0.01, "normalization": "decorrelated"}, 1e-5),
        ("deepen", {"rows": "embedding", "inverse": "adamw"}, 1e-3),
        ("deepen", METHODS["deepen"].options.COMPAT["reference"], 1e-3),
    ]
if "eva" in METHODS:
    VARIANTS += [("eva", {"filter_top": 3}, 2e-6), ("eva", {"similarity_floor": 0.6}, 2e-6)]
# Synthetic members in every variant; the tokenizers of the pico ensemble, each once the main one, in the defaults.
CASES = [("synthetic", *variant) for variant in VARIANTS]
CASES += [(family, *variant) for family in FAMILIES for variant in VARIANTS if not variant[1]]
IDS = ["-".join([world, name, *(f"{k}={v}" for k, v in list(o.items())[:2])]) for world, name, o, _ in CASES]


@dataclass(frozen=True)
class Case:
    """A fuser, its members and the tolerance of its rounding."""

    fuser: Fuser
    members: list[MemberView]
    tolerance: float

    @property
    def main(self) -> ByteVocab:
        return self.members[0].vocabulary

    def rows(self, count: int, **options) -> list[torch.Tensor]:
        return rows(self.members, count, **options)


def pico_views(pico: dict[str, Path]) -> dict[str, MemberView]:
    """The pico members as fusion methods see them, with their tokenizers."""
    return {name: view(deepen(pico[name]).ensemble.main) for name in FAMILIES}


def make_case(parameters: tuple, store: MatrixStore, views: dict[str, MemberView]) -> Case:
    world, name, options, tolerance = parameters
    at = FAMILIES.index(world) if world in FAMILIES else 0
    members = [views[family] for family in FAMILIES[at:] + FAMILIES[:at]] if world in FAMILIES else trio()
    return Case(METHODS[name].options(**options).build(members, store), members, tolerance)


@pytest.fixture(scope="module")
def views(pico) -> dict[str, MemberView]:
    return pico_views(pico)


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def case(request, store: MatrixStore, views: dict[str, MemberView]) -> Case:
    return make_case(request.param, store, views)


def step(case: Case, logp: Sequence[torch.Tensor], weights: torch.Tensor):
    """What a run uses: the fused row, or the main member's where the method skips."""
    fused = case.fuser.fuse(logp, weights)
    own = torch.full_like(fused.logp, float("-inf"))
    own[:, : len(case.main)] = logp[0]
    return torch.where(case.fuser.skip(logp, weights)[:, None], own, fused.logp), fused


WEIGHTS = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.6, 0.0], [0.2, 0.0, 0.8], [1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1]])


def test_it_satisfies_the_protocol(case: Case) -> None:
    fuser = case.fuser
    assert isinstance(fuser, Fuser)
    out, main = fuser.out_vocab, case.main
    assert out.pieces[: len(main)] == main.pieces
    assert (out.control, out.unused, out.eos) == (main.control, main.unused, main.eos)
    added = out.pieces[len(main) :]
    assert all(added) and len(set(added)) == len(added) and not set(added) & set(main.ids_of)


def test_rows_are_normalised_and_finite_or_excluded(case: Case) -> None:
    fuser = case.fuser
    logp = case.rows(5)
    fused = fuser.fuse(logp, WEIGHTS)
    assert fused.logp.shape == (5, len(fuser.out_vocab)) and fused.logp.dtype == torch.float32
    assert not fused.logp.isnan().any() and not fused.logp.isposinf().any()
    torch.testing.assert_close(fused.logp.double().exp().sum(1), torch.ones(5).double(), atol=1e-5, rtol=0)
    for name, value in fused.stats.items():
        assert value.shape == (5,) and value.is_floating_point() and value.isfinite().all(), name


def test_unused_ids_never_win_and_every_text_piece_has_a_score(case: Case) -> None:
    fuser = case.fuser
    logp = case.rows(5)
    logp[0][:, sorted(case.main.unused)] += 30.0
    logp[0] = torch.log_softmax(logp[0], dim=1)
    fused = fuser.fuse(logp, WEIGHTS).logp
    assert (fused[:, sorted(case.main.unused)] == float("-inf")).all()
    text = [i for i, piece in enumerate(case.main.pieces) if piece]
    assert fused[:, text].isfinite().all()


def test_a_batch_is_its_rows_one_by_one_in_any_order(case: Case) -> None:
    fuser, tolerance = case.fuser, case.tolerance
    logp = case.rows(5)
    whole, stats = fuser.fuse(logp, WEIGHTS).logp, fuser.fuse(logp, WEIGHTS).stats
    skip = fuser.skip(logp, WEIGHTS)
    for i in (4, 0, 2, 1, 3):
        one = fuser.fuse([x[i : i + 1] for x in logp], WEIGHTS[i : i + 1])
        torch.testing.assert_close(one.logp[0], whole[i], atol=tolerance, rtol=tolerance)
        assert fuser.skip([x[i : i + 1] for x in logp], WEIGHTS[i : i + 1])[0] == skip[i]
        for name, value in one.stats.items():
            torch.testing.assert_close(value[0], stats[name][i], atol=max(1e-5, tolerance), rtol=1e-3)


def test_two_calls_agree_exactly_and_inputs_are_left_alone(case: Case) -> None:
    fuser = case.fuser
    logp = case.rows(5)
    before = [x.clone() for x in logp]
    first, second = fuser.fuse(logp, WEIGHTS), fuser.fuse(logp, WEIGHTS)
    assert torch.equal(first.logp, second.logp)
    assert all(torch.equal(a, b) for a, b in zip(before, logp, strict=True))


def test_no_gradient_leaks(case: Case) -> None:
    fuser = case.fuser
    logp = [x.requires_grad_(True) for x in case.rows(2)]
    fused = fuser.fuse(logp, WEIGHTS[:2])
    assert not fused.logp.requires_grad
    assert not any(value.requires_grad for value in fused.stats.values())


def test_all_weight_on_the_main_member_is_the_main_member(case: Case) -> None:
    logp = case.rows(4)
    logp[0] = renormalised(logp[0], case.main)
    weights = torch.tensor([[1.0, 0.0, 0.0]]).expand(4, -1)
    result, _ = step(case, logp, weights)
    own = result[:, : len(case.main)].exp()
    torch.testing.assert_close(own, logp[0].exp(), atol=1e-5, rtol=0)


FILLERS = [0.0, -1e30, 3e4]


@pytest.mark.parametrize("filler", FILLERS)
def test_a_member_that_sits_out_is_ignored(case: Case, filler: float) -> None:
    fuser = case.fuser
    logp = case.rows(5)
    other = [logp[0], logp[1].clone(), logp[2].clone()]
    other[2][1], other[1][2] = filler, filler  # their weights are 0 there
    assert torch.equal(fuser.fuse(logp, WEIGHTS).logp, fuser.fuse(other, WEIGHTS).logp)
    assert torch.equal(fuser.skip(logp, WEIGHTS), fuser.skip(other, WEIGHTS))


def test_where_nobody_has_text_the_row_is_the_main_members(case: Case) -> None:
    logp = case.rows(5)
    for m, own in enumerate(case.members):
        kept = sorted(own.vocabulary.control - set(own.vocabulary.eos))
        logp[m][1] = torch.full_like(logp[m][1], -torch.inf).index_fill(0, torch.tensor(kept), -math.log(len(kept)))
    fused = case.fuser.fuse(logp, WEIGHTS)
    if getattr(getattr(case.fuser, "options", None), "eos", "anchor") == "anchor":  # else control pieces are ordinary
        torch.testing.assert_close(fused.logp[1, : len(case.main)].exp(), logp[0][1].exp(), atol=1e-6, rtol=0)
    assert all(value.isfinite().all() for value in fused.stats.values())


def test_the_others_matter(case: Case) -> None:
    a, b = case.rows(5), case.rows(5, seed=8)
    changed = (step(case, a, WEIGHTS)[0] - step(case, [a[0], b[1], b[2]], WEIGHTS)[0]).nan_to_num(0.0)
    assert (changed.abs().amax(1) > 1e-3).any()


def test_members_that_all_want_to_stop_stop(case: Case) -> None:
    logp = case.rows(4)
    for member, own in zip(case.members, logp, strict=True):
        eos = sorted(set(member.vocabulary.eos))
        own[:, eos] = 12.0 + torch.arange(len(eos))
    logp = [torch.log_softmax(own, dim=1) for own in logp]
    result, _ = step(case, logp, WEIGHTS[[0, 0, 3, 4]])
    assert (result[:, sorted(set(case.main.eos))].exp().sum(1) > 0.99).all()


def test_methods_are_frozen_options_with_a_paper_and_a_meaning_for_each() -> None:
    assert "deepen" in METHODS
    for name, entry in METHODS.items():
        assert issubclass(entry.options, Options) and entry.options.model_config["frozen"], name
        assert entry.paper and entry.options.__doc__, name
        assert all(field.description for field in entry.options.model_fields.values()), name


GOOD = """
from lm_eval_deepen.config import Options
from lm_eval_deepen.fusion.base import fusion

@fusion("dropped", paper="none")
class Dropped(Options):
    option: int = 1
"""


def test_a_new_file_is_a_new_method(tmp_path: Path) -> None:
    (tmp_path / "dropped.py").write_text(GOOD)
    (tmp_path / "_helper.py").write_text("raise RuntimeError('helpers are not imported')")
    with dropped_in(REGISTRY, tmp_path):
        assert set(REGISTRY) == {*METHODS, "dropped"}
        assert REGISTRY["dropped"].options().option == 1
    assert set(REGISTRY) == set(METHODS)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_package", r"dropped\.py in .* cannot be imported \(ModuleNotFoundError: .*no_such"),
        ("def broken(:", r"dropped\.py in .* cannot be imported \(SyntaxError"),
        ("x = 1", r"dropped\.py in .* registers no method. Decorate"),
        (GOOD.replace("(Options)", ""), r"dropped\.py in .*'dropped': its class must derive from .*Options"),
        (GOOD.replace('"dropped"', '"deepen"'), r"dropped\.py in .*'deepen' is defined twice"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, code: str, message: str) -> None:
    (tmp_path / "dropped.py").write_text(code)
    with dropped_in(REGISTRY, tmp_path), pytest.raises(ConfigError, match=message):
        len(REGISTRY)
