"""Configuration: ensemble files, what overrides them, and bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from config_helpers import parse, refuse, write
from lm_eval.utils import simple_parse_args_string

from lm_eval_deepen.config.files import read_ensemble_file
from lm_eval_deepen.errors import ConfigError


def test_paths_in_a_file_resolve_beside_it(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "models" / "a").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    file = tmp_path / "recipes" / "pair.yml"
    file.write_text(
        "pretrained: models/a\nmembers: [models/a, {pretrained: ../b, tokenizer: models/a}, org/hub-name]\n"
    )
    monkeypatch.chdir(tmp_path)
    config = parse(pretrained="recipes/pair.yml")
    assert [m.pretrained for m in config.members] == ["recipes/models/a", "b", "org/hub-name"]
    assert config.members[1].loading_dict() == {"tokenizer": "recipes/models/a"}
    monkeypatch.chdir(tmp_path / "recipes")
    assert [m.pretrained for m in parse(pretrained="pair.yml").members] == [
        "models/a",
        "../b",
        "org/hub-name",
    ]
    file.write_text("members: models/a + ../b\n")
    assert [m.pretrained for m in parse(pretrained=str(file)).members] == [
        str(tmp_path / "recipes" / "models" / "a"),
        str(tmp_path / "b"),
    ]


def test_a_router_is_found_beside_the_file_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "router.jsonl").write_text('{"prompt": "a", "scores": [1, 0]}\n')
    (tmp_path / "recipes" / "pair.yml").write_text("members: [org/a, org/b]\nweighting: knn\nrouter: router.jsonl\n")
    monkeypatch.chdir(tmp_path)
    assert read_ensemble_file(Path("recipes/pair.yml"))["router"] == "recipes/router.jsonl"


def test_keys_beside_a_file_override_it(tmp_path):
    file = write(
        tmp_path / "pair.yaml",
        "members: [{pretrained: A, weight: 0.9, dtype: float16}, {pretrained: B, weight: 0.1}]\n"
        "method: deepen\nsteps: 3\ndtype: float32\n",
    )
    assert parse(pretrained=str(file)).weights == (0.9, 0.1)
    config = parse(simple_parse_args_string(f"pretrained={file},weights=0.5+0.5,steps=4,dtype=bfloat16"))
    assert config.weights == (0.5, 0.5)
    assert config.options.steps == 4
    assert [m.loading["dtype"] for m in config.members] == ["float16", "bfloat16"]
    assert parse(pretrained=str(file), method="gac").method == "gac"
    other = parse(pretrained=str(file), members="C+D")
    assert [(m.pretrained, m.weight) for m in other.members] == [("C", 0.5), ("D", 0.5)]


def test_a_folder_named_like_a_file_is_a_model(tmp_path):
    (tmp_path / "model.yaml").mkdir()
    assert parse(pretrained=str(tmp_path / "model.yaml")).members[0].name == "model.yaml"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("members: [A, B\n", "not valid YAML.*line 2.*correct it"),
        ("", "must hold the keys of a recipe, of kind ensemble; got NoneType"),
        ("- A\n- B\n", "must hold the keys of a recipe, of kind ensemble; got list"),
        ("kind: [ensemble]\nmembers: [A, B]\n", r"kind \['ensemble'\] is unknown"),
        ("pretrained: other.yaml\n", "pretrained=other.yaml is an ensemble file too"),
        (
            "members: [A, other.yaml]\n",
            r"members\[1\] .*: pretrained=other.yaml is an ensemble file; a member is one",
        ),
        ("members: [A, B]\nmetod: deepen\n", "unknown key 'metod'. Did you mean 'method'"),
        ("members: [A, B]\nweights: [1]\n", "weights has 1 values for 2 members"),
        ("method: deepen\n", "no member"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, match):
    file = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError, match=f"(?s)bad.yaml.*{match}"):
        parse(pretrained=str(file))


def test_what_no_file_system_can_name_is_no_file(tmp_path):
    inline = json.dumps({"members": ["A", "B"], "matrix_dir": "x" * 300})
    refuse("is not the first of members", pretrained=inline, members=["A", "B"])
    path = tmp_path / "ensemble.yaml"
    path.write_text(json.dumps({"members": ["A", inline]}))
    refuse("key 'nothing'", pretrained=str(path), nothing=1)


def test_a_missing_file_is_named(tmp_path):
    refuse(r"none\.yaml: no such file \(looked in .*path recipes", pretrained="none.yaml")
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    refuse("x.yaml is not valid YAML", pretrained=str(binary))
