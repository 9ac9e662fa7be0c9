"""The options of `deepen`: each bad value is named, and ``compat: reference`` is a valid set."""

from __future__ import annotations

import pytest
from tensor_worlds import vocabulary

from lm_eval_deepen.config import parse_config
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.fusion.deepen import Deepen
from lm_eval_deepen.harness.model import catalogue
from lm_eval_deepen.relative.rows_from_embeddings import MatrixSpec
from lm_eval_deepen.relative.support import TopRule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inverse": "adam"}, "inverse must be 'adamw', 'em', 'exact' or 'mirror'; got 'adam'. Did you mean 'adamw'"),
        ({"normalization": "cosines"}, "normalization must be .*; got 'cosines'. Did you mean 'cosine'"),
        ({"learning_rate": 0.1}, "learning_rate does not belong to inverse 'exact', got 0.1"),
        ({"rows": "embedding", "learning_rate": 0.1}, "learning_rate does not belong to inverse 'em', got 0.1"),
        ({"inverse": "exact", "rows": "embedding"}, "inverse 'exact' needs one-hot rows, got rows 'embedding'"),
        ({"normalization": "cosine"}, "normalization is of rows from embeddings, got 'cosine' with rows 'canonical'"),
        ({"rows": "prefix", "top_m": 8}, "top_m is of rows from embeddings, got 8 with rows 'prefix'"),
        ({"embeddings": "output"}, "embeddings is of rows from embeddings, got 'output' with rows 'canonical'"),
        ({"rows": "exact", "embeddings": "head"}, "embeddings must be 'input' or 'output'; got 'head'"),
        ({"rows": "canon"}, "rows must be .*; got 'canon'. Did you mean 'canonical'"),
        ({"average": "geo"}, "average must be 'linear', 'geometric', .*; got 'geo'. Did you mean 'geometric'"),
        ({"average": 0}, "average 0 is the geometric average"),
        ({"average": [0.0, -1.0]}, r"average needs an exponent above 0, got \[0.0, -1.0\]"),
        ({"trust_region": 0}, "trust_region must be a number above 0; got 0"),
        ({"row_entropy": -1.0}, "row_entropy must be a number above 0; got -1.0"),
        (
            {"inverse": "adamw", "learning_rate": -0.1},
            "learning_rate must be a number of at least 0; got -0.1",
        ),
        ({"inverse": "adamw", "learning_rate": float("nan")}, "learning_rate must be"),
        ({"steps": 0}, "steps must be a whole number of at least 1; got 0"),
        ({"steps": 2.5}, "steps must be"),
        ({"top_m": -1}, "top_m must be a whole number of at least 0"),
        ({"max_anchors": 8}, "max_anchors 8 is less than min_anchors 16"),
        ({"support": 0}, "support must be 'full', a whole number of at least 1 or a share between 0 and 1; got 0"),
        ({"support": 1.0}, "support must be 'full', .* got 1.0"),
        ({"support": 12.5}, "support must be 'full', .* got 12.5"),
        ({"support": 12, "max_support": 9}, "max_support is for a support given as a share, .* got max_support 9 with"),
        ({"support": 0.9, "max_support": 0}, "max_support must be a whole number of at least 1; got 0"),
        ({"support": 0.9, "max_truncated": 0}, "max_truncated must be a number above 0 and up to 1; got 0"),
        ({"support": 0.9, "max_truncated": 1.5}, "max_truncated must be a number above 0 and up to 1; got 1.5"),
        ({"max_truncated": 0.1}, "max_truncated is for a truncated support, got 0.1 with a full one"),
        ({"support": "all"}, "support must be 'full'"),
        ({"support": True}, "support must be 'full'"),
        ({"eos": "both"}, "eos must be 'anchor' or 'reference'; got 'both'"),
        ({"relative_temperature": 0}, "relative_temperature must be a number above 0; got 0"),
        ({"anchor_seed": -1}, "anchor_seed must be a whole number"),
        ({"anchor_seed": 3}, "anchor_seed chooses a subset of the anchors, got 3 without max_anchors"),
        ({"rows": "exact", "row_entropy": 1, "relative_temperature": 9}, "relative_temperature 9.0 has no effect"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Deepen(**options)


def test_weights_beside_the_exponents_of_a_product_are_refused() -> None:
    """They would have no effect; a weight of 0 leaves a member out."""
    product = {"members": "A+B+C", "average": "1+0.5+-0.3"}
    for keys in (
        {"weights": "0.5+0.3+0.2"},
        {"weighting": "confidence"},
        {"weighting": "adaptive", "dev_scores": "1+2+1"},
    ):
        (key, *_) = keys
        with pytest.raises(
            ConfigError, match=rf"^{key} has no effect beside average=\[1.0, 0.5, -0.3\], .*; remove {key}"
        ):
            parse_config(product | keys, catalogue())
    for keys in ({}, {"weights": "0.5+0.5+0"}, {"average": -0.3, "weights": "0.5+0.3+0.2"}):
        parse_config(product | keys, catalogue())
    votes = parse_config(product | {"weights": "0.5+0.3+0.2", "pooling": "vote", "with_fused": True}, catalogue())
    assert votes.weights == (0.5, 0.3, 0.2)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"average": "1+1+-0.5"}, "average has 3 exponents for 2 members"),
        ({"weighting": "bayes", "prior": "1+2"}, "prior has 2 values for 13 experts"),
        ({"weighting": "bayes", "prior": "1+2", "averages": "linear"}, "prior has 2 values for 5 experts"),
        ({"weighting": "bayes", "prior": "1+2", "method": "mixture"}, "prior has 2 values for 10 experts"),
        ({"weighting": "bayes", "prior": "1+2", "method": "gac"}, "prior has 2 values for 5 experts"),
        ({"weighting": "adaptive", "dev_scores": "1+2+1"}, "dev_scores has 3 values for 2 members"),
        ({"weights": "1+2+1"}, "weights"),
    ],
)
def test_lists_of_another_length_than_the_members_are_errors_of_the_configuration(keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"members": "A+B", **keys}, catalogue())


@pytest.mark.parametrize("keys", [{}, {"averages": "linear"}, {"method": "mixture"}, {"method": "gac"}])
def test_a_prior_with_a_number_for_each_expert_is_taken(keys: dict) -> None:
    count = 13 if not keys else 10 if keys == {"method": "mixture"} else 5
    config = parse_config({"members": "A+B", "weighting": "bayes", "prior": [1.0] * count, **keys}, catalogue())
    assert len(config.weighting_options.prior) == count


def test_what_does_not_fit_the_members_is_named_before_anything_is_built() -> None:
    vocabularies, names = [vocabulary(9, tag="a"), vocabulary(5, tag="b")], ["A", "B"]  # 60 anchors
    with pytest.raises(ConfigError, match="row_entropy 4.1 is no less than flat rows have, 4.09 nats with 60 anchors"):
        Deepen(rows="embedding", row_entropy=4.1).check(vocabularies, names)
    assert len(Deepen(rows="embedding", row_entropy=4.0).check(vocabularies, names)) == 60


def test_what_contradicts_a_profile_is_told_in_the_order_of_the_profile() -> None:
    given = {"support": 32, "top_m": 64, "steps": 7, "inverse": "em", "average": "geometric", "rows": "canonical"}
    with pytest.raises(ConfigError) as caught:
        Deepen.parse(given, "reference")
    assert [problem.key for problem in caught.value.problems] == [
        "rows",
        "average",
        "inverse",
        "steps",
        "top_m",
        "support",
    ]


def test_compat_reference_is_a_valid_set_of_options() -> None:
    method = Deepen(**Deepen.COMPAT["reference"])
    assert method.matrix_spec() == MatrixSpec("reference", 100.0, 0, "all")


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({}, None),
        ({"support": "full"}, None),
        ({"support": 64}, TopRule(64, None, 0.1)),
        ({"support": 64.0}, TopRule(64, None, 0.1)),
        ({"rows": "embedding"}, TopRule(512, None, 0.1)),
        ({"support": 0.999}, TopRule(None, 0.999, 0.1)),
        ({"support": "0.999", "max_support": "512", "max_truncated": "1e-2"}, TopRule(512, 0.999, 0.01)),
        ({"support": "64", "max_truncated": 1}, TopRule(64, None, 1.0)),
    ],
)
def test_a_support_is_everything_a_number_or_a_share(given: dict, rule: TopRule | None) -> None:
    """As YAML and the command line give it."""
    built = Deepen.parse(given)
    assert built.support_rule() == rule
    assert built.solver == ("em" if "rows" in given else "exact")
