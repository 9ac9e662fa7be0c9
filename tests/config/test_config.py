"""Configuration: four spellings of one ensemble, its fingerprint and its JSON form."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import yaml
from config_helpers import PAIR, parse, write
from lm_eval.utils import simple_parse_args_string

from lm_eval_deepen.config import EnsembleConfig, FrozenDict

# ---- four spellings, one config


def spellings(tmp_path) -> dict[str, EnsembleConfig]:
    options = "method=deepen,steps=7,learning_rate=1e-3,dtype=float32,seed=3"
    inline = f"pretrained=org/A,members=org/A+org/B,weights=0.6+0.4,{options}"
    nested = {
        "pretrained": "org/A",
        "members": [{"pretrained": "org/A", "weight": 0.6}, {"weight": 0.4, "pretrained": "org/B"}],
        "method": "deepen",
        "learning_rate": 0.001,
        "steps": 7,
        "dtype": "float32",
        "seed": 3,
    }
    own_dtype = copy.deepcopy(nested)
    del own_dtype["dtype"], own_dtype["pretrained"], own_dtype["method"]
    for member in own_dtype["members"]:
        member["dtype"] = "float32"
    file = tmp_path / "ensemble.yaml"
    file.write_text(yaml.safe_dump(nested).replace("0.001", "1e-3"))  # YAML reads 1e-3 as text
    run = yaml.safe_load(yaml.safe_dump({"model": "deepen", "model_args": nested}))
    return {
        "inline": parse(simple_parse_args_string(inline)),
        "json": parse(json.loads(json.dumps(nested))),
        "json, reordered": parse(dict(reversed(nested.items()))),
        "json, weights list": parse({**nested, "members": ["org/A", "org/B"], "weights": [0.6, 0.4]}),
        "json, own keys": parse(own_dtype),
        "file": parse(simple_parse_args_string(f"pretrained={file}")),
        "file, JSON": parse(pretrained=str(write(tmp_path / "e.json", json.dumps(nested)))),
        "yaml": parse(run["model_args"]),
    }


def test_spellings_give_equal_configs_and_fingerprints(tmp_path):
    configs = spellings(tmp_path)
    first = configs["inline"]
    for name, config in configs.items():
        assert config == first, name
        assert hash(config) == hash(first), name
        assert config.fingerprint() == first.fingerprint(), name
    assert [member.pretrained for member in first.members] == ["org/A", "org/B"]
    assert first.weights == (0.6, 0.4)
    assert first.options_dict() == {
        "inverse": "em",
        "learning_rate": 0.001,
        "steps": 7,
        "support": 64,
        "max_anchors": None,
        "end_anchor": True,
        "label": "a",
    }
    assert first.members[1].loading_dict() == {"dtype": "float32"}
    assert first.seed == 3


def test_the_command_line_reader_gives_the_same_config():
    reader = pytest.importorskip("lm_eval._cli.utils").key_val_to_dict
    for text in (
        "pretrained=org/A,members=org/A+org/B,weights=0.6+0.4,method=deepen,steps=7,learning_rate=1e-3",
        "pretrained=org/A,members=org/A+org/B,weights=1+0,support=full,end_anchor=false,seed=12,dtype=None",
        "members=org/A,weights=1,seed=10,batch_size=auto:4,device=cpu",
    ):
        assert parse(reader(text)) == parse(simple_parse_args_string(text))
    assert parse(reader("pretrained=org/A,members=org/A+org/B,weights=[1,0]")).weights == (1.0, 0.0)


def test_one_member_from_pretrained_alone():
    config = parse(pretrained="org/A", dtype="float32")
    assert [(m.name, m.pretrained, m.weight) for m in config.members] == [("A", "org/A", 1.0)]
    assert (
        config == parse(members="org/A", dtype="float32") == parse(members=[{"pretrained": "org/A"}], dtype="float32")
    )
    assert config.members[0].loading_dict() == {"dtype": "float32"}
    assert parse(pretrained="org/A", weights=1).weights == (1.0,)


def test_defaults():
    config = parse(PAIR)
    assert (config.method, config.seed, config.compat, config.matrix_dir) == ("deepen", 0, None, None)
    assert (config.batch_size, config.max_batch_size) == (1, 64)
    assert {member.temperature for member in config.members} == {1.0}
    assert config.weights == (0.5, 0.5)


def test_none_counts_as_not_given():
    plain = parse(PAIR)
    assert parse(PAIR, weights=None, method=None, compat=None, dtype=None, batch_size=None) == plain
    assert parse(members=[{"pretrained": "org/A", "weight": None, "dtype": None}, "org/B"]) == plain


def test_the_input_is_not_modified():
    raw = {
        "members": [{"pretrained": "A", "hf_kwargs": {"x": [1]}}, {"pretrained": "B"}],
        "hf_kwargs": {"y": 2},
    }
    before = copy.deepcopy(raw)
    parse(raw)
    assert raw == before


# ---- fingerprint and JSON form

BASE = {
    "members": [{"pretrained": "org/A", "weight": 0.6}, {"pretrained": "org/B", "weight": 0.4}],
    "dtype": "float32",
}


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 8},
        {"max_batch_size": 8},
        {"matrix_dir": "matrices"},
        {"device": "cpu"},
        {"device_map": "auto"},
        {"parallelize": True},
        {"token": "secret"},
        {"cache_dir": "x"},
        {"learning_rate": 0.15},
        {"method": "deepen"},
        {"seed": 0},
        {
            "members": [
                {"pretrained": "org/A", "weight": 0.6, "name": "x", "temperature": 1},
                {"pretrained": "org/B", "weight": 0.4},
            ]
        },
    ],
)
def test_the_fingerprint_ignores_what_changes_no_result(change):
    assert parse(BASE, **change).fingerprint() == parse(BASE).fingerprint()


def test_the_fingerprint_covers_what_influences_results():
    first, second = BASE["members"]
    changed = [
        parse(BASE),
        parse(BASE, members=[second, first]),
        parse(BASE, members=[first, {**second, "pretrained": "org/C"}]),
        parse(BASE, members=[{**first, "weight": 0.59}, {**second, "weight": 0.41}]),
        parse(BASE, members=[first, {**second, "temperature": 2}]),
        parse(BASE, members=[first, {**second, "revision": "step1"}]),
        parse(BASE, members=[first, {**second, "hf_kwargs": {"x": 1}}]),
        parse(BASE, dtype="bfloat16"),
        parse(BASE, max_length=128),
        parse(BASE, chat_template_args={"a": 1}),
        parse(BASE, seed=1),
        parse(BASE, steps=6),
        parse(BASE, method="gac"),
        parse(BASE, compat="reference"),
    ]
    prints = [config.fingerprint() for config in changed]
    assert len(set(prints)) == len(prints)
    assert all(len(text) == 64 and int(text, 16) >= 0 for text in prints)


def test_the_fingerprint_is_the_same_in_another_process(tmp_path):
    file = write(tmp_path / "e.yaml", yaml.safe_dump({**BASE, "hf_kwargs": {"b": 1, "a": [2, {"d": 0, "c": 1}]}}))
    code = (
        "import sys; from lm_eval_deepen.config import Catalogue, Options, Registry, parse_config\n"
        "methods = Registry('method')\n"
        "@methods.register('deepen')\n"
        "class Method(Options):\n"
        "    steps: int = 5\n"
        "catalogue = Catalogue(frozenset({'dtype'}), {'method': methods})\n"
        "print(parse_config({'pretrained': sys.argv[1]}, catalogue).fingerprint())\n"
        "assert not {'torch', 'transformers', 'lm_eval'} & set(sys.modules)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code, str(file)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(path for path in sys.path if path)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(prints) == 1 and len(prints.pop().strip()) == 64


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"compat": "reference"},
        {"method": "gac", "threshold": 0.25},
        {"batch_size": "auto:4", "matrix_dir": "x", "seed": 5, "device": "cpu"},
        {
            "members": ["A", "B", "C"],
            "weights": [0.33333, 0.33333, 0.33333],
            "hf_kwargs": {"x": [1, {"y": None}]},
        },
        {"chat_template_args": {"a": [1, 2]}},
    ],
)
def test_to_dict_is_a_spelling_of_the_config(keys):
    config = parse({**BASE, **keys})
    shown = json.loads(json.dumps(config.to_dict()))
    again = parse(shown)
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    assert again.to_dict() == config.to_dict()


def test_access_tokens_are_not_shown():
    config = parse(
        members=[
            {"pretrained": "A", "token": "hf_secret"},
            {"pretrained": "B", "hf_kwargs": {"use_auth_token": "hf_secret"}},
        ]
    )
    assert config.members[0].loading_dict() == {"token": "hf_secret"}
    assert "hf_secret" not in json.dumps(config.to_dict())


def test_configs_are_frozen_hashable_and_picklable():
    config = parse(BASE, chat_template_args={"a": [1]})
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        config.options.steps = 3
    again = pickle.loads(pickle.dumps(config))
    assert again == config and hash(again) == hash(config)
    changed = config.replace(batch_size=8)
    assert changed != config and changed.fingerprint() == config.fingerprint()
    plain = config.members[0].loading_dict()
    plain["chat_template_args"]["a"].append(2)
    assert config.members[0].loading_dict()["chat_template_args"] == {"a": [1]}
    assert repr(FrozenDict({"b": 1, "a": [2]})) == "FrozenDict({'a': (2,), 'b': 1})"
    assert FrozenDict() == {} and len(FrozenDict({"a": 1})) == 1
