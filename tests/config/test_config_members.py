"""Configuration: members, their names, weights and loading arguments."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from config_helpers import PAIR, catalogue, parse, refuse

from lm_eval_deepen.config import parse_config
from lm_eval_deepen.errors import ConfigError

# ---- loading arguments


def test_loading_arguments_beside_members_are_defaults():
    config = parse(
        members=["A", {"pretrained": "B", "dtype": "bfloat16", "hf_kwargs": {"x": 1}}],
        dtype="float32",
        device="cpu",
        hf_kwargs={"x": 0, "y": [1, {"z": None}]},
        attn_implementation="eager",
    )
    first, second = config.members
    assert first.loading_dict() == {"dtype": "float32", "device": "cpu", "attn_implementation": "eager"}
    assert second.loading_dict() == {"dtype": "bfloat16", "device": "cpu", "attn_implementation": "eager"}
    assert first.hf_kwargs_dict() == {"x": 0, "y": [1, {"z": None}]}
    assert second.hf_kwargs_dict() == {"x": 1, "y": [1, {"z": None}]}


def test_checkpoints_of_one_model_take_pretrained_from_beside_members():
    config = parse(pretrained="org/A", members=[{"revision": "step1"}, {"revision": "step2"}, {}])
    assert [member.name for member in config.members] == ["A@step1", "A@step2", "A"]
    assert {member.pretrained for member in config.members} == {"org/A"}


def test_nested_values_pass_through():
    arguments = {"reasoning_effort": "low", "tools": ["a", {"b": 1}]}
    config = parse(pretrained="org/A", chat_template_args=arguments)
    assert config.members[0].loading_dict() == {"chat_template_args": arguments}
    hash(config)


def test_a_torch_dtype_is_its_name():
    torch = pytest.importorskip("torch")
    named, given = parse(PAIR, dtype="float32"), parse(PAIR, dtype=torch.float32)
    assert named == given and named.fingerprint() == given.fingerprint()


def test_other_objects_are_refused():
    refuse("members.0. .org/A.: tokenizer: .*object.*give text", {"pretrained": "org/A"}, tokenizer=object())
    for odd in ({"a": {1: 2}}, {1: 2}, {1: 2, "a": 3}):
        refuse("hf_kwargs: .*not text; quote it", PAIR, hf_kwargs=odd)
    refuse("evidence: key 1 of .* is not text; quote it", PAIR, evidence={1: 2, "a": 3})


ONE_MODELS = {
    "tokenizer": "org/T",
    "prefix_token_id": 2,
    "peft": "org/adapter",
    "delta": "org/delta",
    "revision": "v2",
    "code_revision": "v2",
}


@pytest.mark.parametrize("key", ONE_MODELS)
def test_an_argument_of_one_model_is_not_shared_by_others(key):
    """It would load for all of them, and be wrong for some."""
    value = ONE_MODELS[key]
    remedy = rf"{key}=.*beside members would be given to org/A and org/B.*inside the member.*pretrained: org/A, {key}:"
    refuse(remedy, PAIR, **{key: value})
    refuse(remedy, {"pretrained": "org/A", "members": "org/A+org/B"}, **{key: value})
    for members in (["org/A"], [{"dtype": "float32"}, {"dtype": "float16"}], ["org/A", {"pretrained": "org/A/"}]):
        for i, member in enumerate(members):  # one model, however often: it is its own
            members[i] = {"name": f"m{i}", "pretrained": "org/A"} | (member if isinstance(member, dict) else {})
        config = parse({"pretrained": "org/A", "members": members}, **{key: value})
        assert all(member.loading_dict()[key] == value for member in config.members)
    own = {"pretrained": "org/B", key: ONE_MODELS["peft"] if isinstance(value, str) else 3}
    first, second = parse({"pretrained": "org/A", "members": ["org/A", own]}, **{key: value}).members
    assert (first.loading_dict()[key], second.loading_dict()[key]) == (value, own[key])


@pytest.mark.parametrize(
    "shared",
    [{"revision": "main"}, {"gguf_file": "model.gguf"}, {"add_bos_token": True}, {"max_length": 64}]
    + [{"chat_template_args": {"enable_thinking": False}}, {"trust_remote_code": True}, {"variant": "fp16"}],
    ids=str,
)
def test_how_and_where_from_models_are_loaded_is_shared(shared):
    """A name within a model's folder, too: where a model lacks it, loading fails and names the member."""
    assert all(member.loading_dict().items() >= shared.items() for member in parse(PAIR, **shared).members)


def test_a_loaded_model_is_refused_in_a_line():
    class Model:
        def __repr__(self):
            return "layer\n" * 200

    for raw in ({"pretrained": Model()}, {**PAIR, "pretrained": Model()}, {**PAIR, "members": ["org/A", Model()]}):
        with pytest.raises(ConfigError, match="pretrained.*an object of type Model") as caught:
            parse(raw)
        assert "layer" not in str(caught.value)
    refuse("save_pretrained, and give the folder", {"pretrained": "org/A", "members": [{"pretrained": Model()}]})


def test_every_key_of_the_harness_loader_is_accepted():
    from inspect import signature

    from lm_eval.models.huggingface import HFLM

    keys = set(signature(HFLM.__init__).parameters)
    for key in keys - {"self", "kwargs", "pretrained", "batch_size", "max_batch_size"}:
        value = {"max_length": 9, "backend": "causal", "chat_template_args": {"x": 1}}.get(key, "x")
        config = parse_config({"pretrained": "org/A", key: value}, catalogue(keys))
        assert config.members[0].loading_dict() == {key: value}
    for key in ("self", "kwargs"):
        with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
            parse_config({"pretrained": "org/A", key: "x"}, catalogue(keys))


def test_hf_kwargs_passes_anything_but_arguments_of_their_own():
    config = parse(pretrained="org/A", hf_kwargs={"anything_at_all": 1})
    assert config.members[0].hf_kwargs_dict() == {"anything_at_all": 1}
    refuse("hf_kwargs holds 'dtype', an argument of its own; give dtype beside", PAIR, hf_kwargs={"dtype": "x"})
    refuse("hf_kwargs holds 'token'", PAIR, hf_kwargs={"token": "x"}, token="y")
    refuse("hf_kwargs must be a mapping; got 'x=1'", PAIR, hf_kwargs="x=1")
    refuse("hf_kwargs must be a mapping", members=[{"pretrained": "A", "hf_kwargs": [1]}])


# ---- members


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ({}, r"no member: give pretrained=MODEL"),
        ({"method": "deepen"}, "no member"),
        ({"pretrained": None}, "no member"),
        ({"members": []}, "members is empty: name at least one model"),
        ({"pretrained": "A", "members": []}, "members is empty"),
        ({"members": ""}, "members is empty"),
        ({"members": "A++B"}, r"members\[1\] .*: pretrained must be a hub name or a path, as text; got ''"),
        ({"members": "A+"}, r"members\[1\] .*: pretrained must be"),
        ({"members": {"A": {}}}, "members must be a list of models, or A.B inline; got dict"),
        ({"members": 3}, "members must be a list of models"),
        ({"members": ["A", 135]}, r"members\[1\] must be a model's name, as text, or a mapping.*got 135"),
        ({"members": ["A", None]}, r"members\[1\] must be"),
        ({"members": [{"weight": 1}]}, r"members\[0\]: pretrained is missing; it must be a hub name or a path"),
        ({"pretrained": 7}, r"pretrained must be .*as text; got 7 \(quote it"),
        ({"pretrained": "B", "members": ["A", "B"]}, r"pretrained=B is not the first of members \(A\)"),
        ({"pretrained": "A", "members": ["B"]}, "the main member comes first in members"),
    ],
)
def test_members_that_cannot_be_read(raw, match):
    refuse(match, raw)


def test_pretrained_may_differ_by_a_trailing_slash(tmp_path):
    config = parse(pretrained=f"{tmp_path}/", members=[str(tmp_path), "org/B"])
    assert config.members[0].name == tmp_path.name
    assert parse(pretrained=f"{tmp_path}/").members[0].name == tmp_path.name


def test_a_missing_model_path_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "none"), "./none", "../none/at/all", "~/none-at-all"):
        refuse(
            r"members\[0\] .*: pretrained=.*none.* does not exist \(looked from .*correct the path",
            pretrained=path,
        )
    refuse(
        r"members\[1\] \(B\): tokenizer=./none does not exist",
        members=["A", {"pretrained": "B", "tokenizer": "./none"}],
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    assert parse(pretrained="~/here").members[0].pretrained == str(tmp_path / "here")
    config = parse(pretrained="~/here", matrix_dir="~/matrices", trace=True, trace_dir="~/traces")
    assert (config.matrix_dir, config.trace_dir) == (str(tmp_path / "matrices"), str(tmp_path / "traces"))
    refuse("matrix_dir must be the path of a folder; got ''", pretrained="~/here", matrix_dir="")
    assert parse(pretrained=".").members[0].name == tmp_path.name
    assert parse(pretrained=tmp_path / "here").members[0].pretrained == str(tmp_path / "here")


# ---- names


def test_names():
    config = parse(
        members=[
            "org/A",
            {"pretrained": "org/A", "revision": "v2"},
            {"pretrained": "org/A", "name": "again"},
            {"pretrained": "org/B", "revision": "main"},
        ]
    )
    assert [member.name for member in config.members] == ["A", "A@v2", "again", "B"]


@pytest.mark.parametrize(
    "members",
    [
        ["org/A", "org/A"],
        ["org/A", "other/A"],
        [{"pretrained": "A", "name": "A"}, {"pretrained": "B", "name": "A"}],
        [{"pretrained": "A", "revision": "main"}, "A"],
    ],
)
def test_two_members_of_one_name(members):
    refuse(r"members\[0\] and members\[1\] are both named 'A'; give each a `name`", members=members)


@pytest.mark.parametrize("name", [3, "", " ", ["A"]])
def test_bad_names(name):
    refuse(r"members\[0\] \(A\): name must be non-empty text; got", members=[{"pretrained": "A", "name": name}])


# ---- weights and temperatures


def test_ten_times_a_tenth_is_accepted():
    names = [f"M{i}" for i in range(10)]
    config = parse(members=names, weights=[0.1] * 10)
    assert config.weights == (0.1,) * 10
    assert config.fingerprint() == parse(members=names).fingerprint()


def test_all_weight_on_one_member_is_not_uniform():
    config = parse(PAIR, weights="1+0")
    assert config.weights == (1.0, 0.0)
    assert config.fingerprint() != parse(PAIR).fingerprint()


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ("0.6+0.4", (0.6, 0.4)),
        (" 0.6 + 0.4 ", (0.6, 0.4)),
        ("1e+0+0", (1.0, 0.0)),
        ("5e-1+.5", (0.5, 0.5)),
        ([1, 0], (1.0, 0.0)),
        (("0.5", 0.5), (0.5, 0.5)),
        ([0.33333, 0.66666], (0.33333 / 0.99999, 0.66666 / 0.99999)),
        ([0.5001, 0.5], (0.5001 / 1.0001, 0.5 / 1.0001)),
    ],
)
def test_weights_within_tolerance_are_normalised(weights, wanted):
    config = parse(PAIR, weights=weights)
    assert config.weights == pytest.approx(wanted, abs=1e-15)
    assert abs(math.fsum(config.weights) - 1) < 1e-15


def test_paths_of_members_are_as_good_as_texts():
    """`pretrained` takes them, too."""
    members = [Path("org/A"), Path("org/B")]
    assert parse(members=members, pretrained=members[0]) == parse(members=["org/A", "org/B"])


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ([1.0], "weights has 1 values for 2 members; give one per member"),
        (1, "weights has 1 values for 2 members"),
        ("0.2+0.3+0.5", "weights has 3 values for 2 members"),
        ([], "weights has 0 values for 2 members"),
        ("0.5,0.5", r"weights must be a list of numbers, or 0.6\+0.4 inline; got '0.5,0.5'"),
        ({"A": 0.5, "B": 0.5}, "weights must be a list of numbers.*got {'A': 0.5"),
        (np.array([0.5, 0.5]), "weights must be a list of numbers.*got an object of type ndarray"),
        ([0.5, math.nan], r"weights\[1\] must be a finite number, 0 or more; got nan"),
        ("nan+0.5", r"weights\[0\] must be a finite number, 0 or more; got 'nan'"),
        ([math.inf, 0.5], r"weights\[0\] must be a finite number, 0 or more; got inf"),
        ([-0.5, 1.5], r"weights\[0\] must be a finite number, 0 or more; got -0.5"),
        ([True, False], r"weights\[0\] must be a finite number.*got True"),
        ([None, 1], r"weights\[0\] must be a finite number.*got None"),
        ("0.5+x", r"weights\[1\] must be a finite number.*got 'x'"),
        ([0, 0], "weights are all zero; give at least one member a positive weight"),
        ([1e308, 1e308], "the sum of the weights is infinite; give smaller numbers"),
        ([0.5, 0.6], r"weights sum to 1.1, not to 1 \(within 0.0001\); 0.454545\+0.545455 would"),
        ([3, 1], r"weights sum to 4.*0.75\+0.25 would"),
        ([0.5, 0.4998], "weights sum to 0.9998"),
    ],
)
def test_bad_weights(weights, match):
    refuse(match, PAIR, weights=weights)
    if isinstance(weights, list) and len(weights) == 2 and None not in weights:
        members = [{"pretrained": name, "weight": w} for name, w in zip("AB", weights, strict=True)]
        own = match if "must be" not in match else r"members\[.\] \(.\): weight must be a .*number of at least 0; got"
        refuse(own, members=members)


def test_weights_are_all_or_none_and_in_one_place():
    half = [{"pretrained": "A", "weight": 0.5}, {"pretrained": "B"}, "C"]
    refuse(r"weight is missing for members\[1\], members\[2\]; give every member a weight, or none", members=half)
    refuse("weights and a member's own weight are both given; keep one", members=half, weights=[0.2, 0.3, 0.5])


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "warm", True])
def test_bad_temperature(value):
    refuse(
        r"members\[0\] \(A\): temperature must be a .*number above 0; got",
        members=[{"pretrained": "A", "temperature": value}],
    )


def test_temperature():
    config = parse(members=[{"pretrained": "A", "temperature": 2}, "B"])
    assert [member.temperature for member in config.members] == [2.0, 1.0]
