"""Configuration: keys, methods, options, profiles and batch sizes."""

from __future__ import annotations

import math

import pytest
from config_helpers import PAIR, catalogue, parse, refuse, registry

from lm_eval_deepen.config import Options, parse_config
from lm_eval_deepen.errors import ConfigError

# ---- keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("weigths", "weights"),
        ("learning_rat", "learning_rate"),
        ("dtyp", "dtype"),
        ("thresh", "threshold"),
        ("attn_implementatio", "attn_implementation"),
        ("hf_kwarg", "hf_kwargs"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(key, nearest):
    refuse(f"unknown key '{key}'. Did you mean '{nearest}'.*Correct it, or .*hf_kwargs", PAIR, **{key: 1})


B = {"pretrained": "B"}
REFUSED = {
    # keys that nobody has, and keys in the wrong place
    "unknown key 'version'": {**PAIR, "version": "1"},
    r"unknown key 'zzzzzz'\. Correct it": {**PAIR, "zzzzzz": 1},
    "unknown key 7": {**PAIR, 7: 1},
    r"members\[1\] \(B\): unknown key 'wieght'. Did you mean 'weight'": {"members": ["A", {**B, "wieght": 1}]},
    r"temperature=2 belongs inside a member: members: \[\{pretrained: ..., temperature": {**PAIR, "temperature": 2},
    "name='x' belongs inside a member": {**PAIR, "name": "x"},
    "weight=1 belongs inside a member": {"pretrained": "A", "weight": 1},
    r"members\[0\] \(B\): batch_size belongs beside members": {"members": [{**B, "batch_size": 4}]},
    r"members\[0\] \(B\): method belongs beside members": {"members": [{**B, "method": "gac"}]},
    "steps is an option of method 'deepen'; give it beside members": {"members": [{**B, "steps": 4}]},
    # methods, and options of another one
    "method 'depen' is unknown. Did you mean 'deepen'. Methods: deepen, gac": {**PAIR, "method": "depen"},
    "method 'zzz' is unknown. Methods: deepen, gac": {**PAIR, "method": "zzz"},
    r"method \['gac'\] is unknown": {**PAIR, "method": ["gac"]},
    "threshold is an option of method gac, not of 'deepen', which has: inverse, .*remove threshold or": {
        **PAIR, "threshold": 0.5,
    },
    "inverse is an option of method deepen, not of 'gac', which has: threshold, steps": {
        **PAIR, "method": "gac", "inverse": "em",
    },
    # options beside a profile
    "compat=reference sets support='full', but support=32 is given; remove support": {
        **PAIR, "compat": "reference", "support": 32,
    },
    "compat=reference sets inverse='adamw', but inverse='em' is given": {
        **PAIR, "compat": "reference", "inverse": "em",
    },
    "compat 'refrence' is unknown to method 'deepen'. Did you mean 'reference'. Profiles: reference": {
        **PAIR, "compat": "refrence",
    },
    "compat 'reference' is unknown to method 'gac'. It has none: remove compat": {
        **PAIR, "compat": "reference", "method": "gac",
    },
}  # fmt: skip


@pytest.mark.parametrize("match", REFUSED)
def test_what_cannot_be_honoured_says_why(match):
    refuse(match, REFUSED[match])


# ---- methods and options


def test_a_method_has_options_of_its_own():
    assert parse(PAIR, method="gac", threshold=0.5).options_dict() == {"threshold": 0.5, "steps": 1}


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("steps", 5.0, 5),
        ("steps", "5", 5),
        ("learning_rate", 1, 1.0),
        ("learning_rate", "1e-3", 0.001),
        ("support", "full", "full"),
        ("support", 32, 32),
        ("support", 32.0, 32),
        ("max_anchors", 100, 100),
        ("end_anchor", False, False),
        ("label", "b", "b"),
        ("inverse", "adamw", "adamw"),
    ],
)
def test_option_values_take_the_annotated_type(key, value, wanted):
    got = parse(PAIR, **{key: value}).options_dict()[key]
    assert got == wanted and type(got) is type(wanted)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("steps", 5.5, "steps must be a whole number of at least 1; got 5.5"),
        ("steps", "many", "steps must be a whole number of at least 1; got 'many'"),
        ("steps", True, "steps must be a whole number of at least 1; got True"),
        ("steps", 0, "steps must be a whole number of at least 1; got 0"),
        ("learning_rate", "fast", "learning_rate must be a number; got 'fast'"),
        ("learning_rate", math.nan, "learning_rate must be a finite number; got nan"),
        ("learning_rate", math.inf, "learning_rate must be a finite number; got inf"),
        ("support", "ful", "support must be a whole number or 'full'; got 'ful'. Did you mean 'full'"),
        ("max_anchors", "x", "max_anchors must be a whole number; got 'x'"),
        ("end_anchor", 1, "end_anchor must be true or false; got 1"),
        ("end_anchor", "yes", "end_anchor must be true or false; got 'yes'"),
        ("label", 3, "label must be text; got 3"),
        ("inverse", "adam", "inverse must be 'em' or 'adamw'; got 'adam'. Did you mean 'adamw'"),
        ("seed", "x", "seed must be a whole number of at least 0; got 'x'"),
        ("compat", 1, "compat must be text; got 1"),
        ("matrix_dir", 1, "matrix_dir must be the path of a folder; got 1"),
    ],
)
def test_wrong_option_values(key, value, match):
    refuse(match, PAIR, **{key: value})


def test_a_method_without_default_needs_the_option():
    class Needy(Options):
        table: str

    with pytest.raises(ConfigError, match="method 'needy' needs the option 'table'; give table=..."):
        parse_config({"pretrained": "A", "method": "needy"}, catalogue(method=registry("method", needy=Needy)))


def test_a_method_may_not_take_our_names_and_is_a_class_of_options():
    class Clash(Options):
        seed: int = 1

    with pytest.raises(TypeError, match="'deepen': options \\['seed'\\] are keys of the ensemble"):
        parse_config({"pretrained": "A"}, catalogue(method=registry("method", deepen=Clash)))
    with pytest.raises(TypeError, match="method 'odd': its class must derive from lm_eval_deepen.config.Options"):
        registry("method", odd=dict)


# ---- compat


def test_compat_expands():
    config = parse(PAIR, compat="reference", steps=3)
    assert config.compat == "reference"
    assert config.options_dict() == {
        "inverse": "adamw",
        "learning_rate": 0.15,
        "steps": 3,
        "support": "full",
        "max_anchors": None,
        "end_anchor": False,
        "label": "a",
    }
    assert parse(PAIR, compat="reference", inverse="adamw", steps=3) == config


# ---- batch size


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(4, 4), ("4", 4), (4.0, 4), ("auto", "auto"), ("auto:4", "auto:4"), ("auto:2.5", "auto:2.5")],
)
def test_batch_size(value, wanted):
    assert parse(PAIR, batch_size=value).batch_size == wanted


def test_bad_batch_size():
    for value in (0, -1, "many", "auto:", 1.5, True):
        refuse("batch_size must be .*, auto or auto:N; got", PAIR, batch_size=value)
    refuse("max_batch_size must be a whole number of at least 1; got 0", PAIR, max_batch_size=0)
    refuse("max_batch_size must be a whole number", PAIR, max_batch_size="auto")
