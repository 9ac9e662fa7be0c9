"""The options of `deepen`: each bad value is named, and ``compat: reference`` is a valid set."""

from __future__ import annotations

import pytest

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.fusion.deepen import Deepen
from lm_eval_deepen.relative.build import MatrixSpec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inverse": "adam"}, "inverse: unknown value 'adam'. Did you mean 'adamw'"),
        ({"normalization": "cosines"}, "normalization: unknown value 'cosines'. Did you mean 'cosine'"),
        ({"learning_rate": 0.1}, "learning_rate: inverse 'exact' takes none, got 0.1"),
        ({"support": 8, "learning_rate": 0.1}, "learning_rate: inverse 'em' takes none, got 0.1"),
        ({"inverse": "exact", "rows": "embedding"}, "inverse 'exact' needs one-hot rows .*got rows 'embedding"),
        ({"inverse": "exact", "support": 8}, "inverse 'exact' needs one-hot rows and a full support, got .*support 8"),
        ({"normalization": "cosine"}, "normalization is of rows from embeddings, got 'cosine' with rows 'canonical'"),
        ({"rows": "prefix", "top_m": 8}, "top_m is of rows from embeddings, got 8 with rows 'prefix'"),
        ({"rows": "canon"}, "rows: unknown value 'canon'. Did you mean 'canonical'"),
        ({"average": "geo"}, "average must be linear or geometric, got 'geo'. Did you mean 'geometric'"),
        ({"trust_region": 0}, "trust_region must be a positive number of nats, got 0"),
        ({"row_entropy": -1.0}, "row_entropy must be a positive number of nats, got -1.0"),
        (
            {"inverse": "adamw", "learning_rate": -0.1},
            "learning_rate must be a number of at least 0, got -0.1",
        ),
        ({"inverse": "adamw", "learning_rate": float("nan")}, "learning_rate must be"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be"),
        ({"top_m": -1}, "top_m must be a whole number of at least 0"),
        ({"max_anchors": 8}, "max_anchors 8 is less than min_anchors 16"),
        ({"support": 0}, "support must be 'full' or a whole number of at least 1, got 0"),
        ({"support": "all"}, "support must be 'full'"),
        ({"support": True}, "support must be 'full'"),
        ({"eos": "both"}, "eos must be 'anchor' or 'reference', got 'both'"),
        ({"relative_temperature": 0}, "relative_temperature must be a positive number, got 0"),
        ({"anchor_seed": -1}, "anchor_seed must be a whole number"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Deepen(**options)


def test_compat_reference_is_a_valid_set_of_options() -> None:
    method = Deepen(**Deepen.COMPAT["reference"])
    assert method.matrix_spec() == MatrixSpec("reference", 100.0, 0, "all")
