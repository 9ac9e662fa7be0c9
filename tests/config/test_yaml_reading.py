"""What every reader of configurations refuses: by file and line, and at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from lm_eval_deepen.build.recipe import read_build
from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.config import yaml_files as yaml_reading
from lm_eval_deepen.config.yaml_files import parse_json, parse_yaml, read_yaml
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.ensemble_recipe import load_recipe
from lm_eval_deepen.harness.model import DeepenLM, configure
from lm_eval_deepen.leaderboard.recipe import read_recipe

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{of}'] * 9)}]\n" for of, name in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "a key twice": ("weights: [1]\nb: 2\nweights: [2]", "line 3, column 1: the key 'weights' is given twice.*line 1"),
    "a key twice inside": ("a:\n  - {b: 1, 'b': 2}", "line 2.*'b' is given twice"),
    "keys that are equal": ("1: a\n1.0: b", "line 2.*given twice"),
    "merges twice": ("<<: {a: 1}\n<<: {b: 1}", "line 2.*'<<' is given twice"),
    "a recursive list": ("a: &a [*a]", r"line 1: \*a contains itself"),
    "a recursive mapping": ("x: 1\na: &a\n  b: *a", r"line 3: \*a contains itself"),
    "a recursive merge": ("<<: &a {<<: *a}", r"\*a contains itself"),
    "an anchor bomb": (BOMB, r"line 5: the aliases \(\*d\) stand for more than 10000 values"),
    "lists in lists": ("x: " + "[" * 100_000, "line 1: lists or mappings nested more than 50 deep"),
    "a large comment": ("# " + "x" * 10_000_000, "more than 1000000 bytes"),
    "a list as a key": ("? [1]\n: 2", "line 1.*a key is a list or a mapping"),
    "an unknown tag": ("a: !!python/object/apply:os.system [ls]", "line 1.*could not determine a constructor"),
    "two documents": ("a: 1\n---\nb: 1", "line 2.*expected a single document"),
    "a date": ("a: 2026-01-01", "line 1.*YAML reads this as a date; put it in quotes"),
    "no date": ("a: 2026-13-41", "line 1.*YAML reads this as a date; put it in quotes"),
    "a set": ("a: !!set {b}", "line 1.*YAML reads this as a set"),
    "no number": ("b: 1\na: 0b_", "line 2, column 4: this is no int"),
    "a number of 5000 digits": ("a: " + "9" * 5000, "line 1.*this is no int"),
    "no truth value": ("a: !!bool x", "line 1.*this is no bool"),
    "a NUL": ("a: \0", "position 3"),
    "half a pair": ("a: \ud800", "surrogates|position 3"),
    "an open list": ("a: [1\n", "line 2"),
    "an unknown alias": ("a: *b", "line 1.*undefined alias"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("base", ["CSafeLoader", "SafeLoader"])
def test_what_is_ambiguous_or_takes_for_ever_is_refused_at_once(kind, base, monkeypatch):
    if not hasattr(yaml, base):
        pytest.skip("PyYAML without its parser in C")
    monkeypatch.setattr(yaml_reading, "_Base", getattr(yaml, base))
    monkeypatch.setattr(yaml_reading, "_Loader", type("Loader", (yaml_reading._Strict, getattr(yaml, base)), {}))
    text, message = REFUSED[kind]
    began = time.process_time()
    with pytest.raises(ConfigError, match=message) as found:
        parse_yaml(text, "x.yaml")
    assert time.process_time() - began < 5 and str(found.value).startswith("x.yaml") and "\n" not in str(found.value)


def test_what_is_plain_is_read():
    text = "\ufeffbase: &b {a: 1, c: x}\nother:\n  <<: *b\n  a: 2\n1: 1e-5\nd: [*b, *b, .nan, ~, yes]\n"
    found = parse_yaml(text, "x.yaml")
    assert found["other"] == {"a": 2, "c": "x"} and found[1] == "1e-5" and found["d"][:2] == [found["base"]] * 2
    assert parse_yaml("", "x.yaml") is None
    assert parse_json('{"a": [1, 2.5, null], "b": {"a": "x"}}', "x") == {"a": [1, 2.5, None], "b": {"a": "x"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "x has the key 'a' twice"),
        ('{"a": {"b": 1, "b": 1}}', "x has the key 'b' twice"),
        ('{"a": NaN}', "x holds NaN, which is no finite number"),
        ("[-Infinity]", "x holds -Infinity"),
        ("[1e999]", "x holds 1e999"),
        ('{"a":\n ', "x is not JSON: .* at line 2"),
        ("[" * 100_000, "x is not JSON that can be read"),
        ("9" * 5000, "x is not JSON that can be read"),
        ('"' + "x" * 2_000_000 + '"', "x has more than 1000000 bytes"),
    ],
)
def test_json_of_a_configuration_is_as_strict(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_json(text, "x")


READERS = {
    "ensemble": lambda path: configure({"pretrained": str(path)}),
    "recipe": load_recipe,
    "build": read_build,
    "leaderboard": read_recipe,
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_is_this_one(reader, tmp_path):
    path = tmp_path / "x.yaml"
    for content, message in (
        (b"weights: [1]\nweights: [2]\n", "line 2.*'weights' is given twice"),
        (BOMB.encode(), "stand for more than 10000 values"),
        (b"# " + b"x" * 10_000_000, "more than 1000000 bytes"),
        (b"a: 1\nb: \xff\n", "x.yaml:2: byte 0xff is not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            READERS[reader](path)


def test_nothing_else_in_the_package_parses_yaml():
    package = Path(yaml_reading.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "yaml.load" in (text := path.read_text("utf-8")) or "yaml.safe_load" in text or "yaml.full_load" in text
    }
    assert found == {"yaml_files.py"}


def test_json_in_a_file_is_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{\n\t"a": "\\/\\ud83d\\ude00",\n\t"b": 1e3}')  # which YAML does not read
    assert read_yaml(path) == {"a": "/\N{GRINNING FACE}", "b": 1000.0}
    path.write_text("a: [b, 1]")  # as before
    assert read_yaml(path) == {"a": ["b", 1]}
    refused = {'{"a": 1, "a": 2}': "'a' twice", '{"a": NaN}': "holds NaN", '{"a": ': "not valid YAML: line 2"}
    for content, message in refused.items():
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_yaml(path)


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ConfigError, match="the file cannot be read .Is a directory.; give the path"):
        read_yaml(tmp_path, "the file")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "a\0b")
    if Path("/dev/zero").exists():
        with pytest.raises(ConfigError, match="/dev/zero has more than 1000000 bytes"):
            read_yaml(Path("/dev/zero"))


def test_configurations_on_the_command_line_are_read_alike(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("merge_method: linear\nmodels: []\n")
    assert cli.main(["make", str(recipe), str(tmp_path / "o"), "--set", "models=&a [*a]"]) == 2
    assert "--set models: line 1: *a contains itself" in capsys.readouterr().err
    assert cli.main(["leaderboard", str(recipe), "--metadata", '{"a": 1, "a": 2}']) == 2
    assert "--metadata has the key 'a' twice" in capsys.readouterr().err
    assert cli.main(["build", '{"pretrained": "x", "weights": [NaN]}']) == 2
    assert "holds NaN" in capsys.readouterr().err
    assert cli.main(["build", "pretrained=x,method=gac,method=eva"]) == 2
    assert "the ensemble has the key 'method' twice" in capsys.readouterr().err
    assert cli.main(["make", str(recipe), str(tmp_path / "o"), "--set", "seed=1", "seed=2"]) == 2
    assert "--set has 'seed' twice ('1' and '2')" in capsys.readouterr().err
    for command in (["inspect", "x"], ["leaderboard", str(recipe)], ["make", str(recipe), str(tmp_path / "o")]):
        assert cli.main([*command, "--member", "a=b", "a=c"]) == 2
        assert "--member has 'a' twice ('b' and 'c')" in capsys.readouterr().err
    for text in ('{"pretrained": "x", "method": "gac", "method": "eva"}', "pretrained=x,method=gac,method=eva"):
        with pytest.raises(ConfigError, match="--model_args has the key 'method' twice"):
            DeepenLM.create_from_arg_string(text)


@pytest.mark.parametrize("number", ["nan", "inf", "-1", "0", "x", "1.5"])
def test_numbers_on_the_command_line(number, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("members: [a]\n")
    for command in (
        ["leaderboard", str(recipe), "--limit"], ["bpb", "x", "--limit"], ["tune", "x", "--limit"], ["demo", "--limit"],
        ["inspect", "x", "--memory"], ["inspect", "x", "--batch-size"], ["inspect", "x", "--bandwidth"],
        ["tune", "x", "--num-fewshot"], ["tune", "x", "--weight-step"], ["tune", "x", "--learning-rates"],
        ["gate", "--baseline", "a", "--candidate", "b", "--alpha"], ["compare", "a", "b", "--alpha"],
    ):  # fmt: skip
        if (number == "1.5" and command[-1] in FRACTIONS) or (number == "0" and command[-1] == "--num-fewshot"):
            continue
        try:
            status = cli.main([*command, number])
        except SystemExit as stop:  # what the argument parser refuses by itself
            status = stop.code
        assert status == 2 and command[-1] in capsys.readouterr().err


FRACTIONS = ("--memory", "--bandwidth", "--weight-step", "--learning-rates")
