"""Options are said in one place: the list, the page in docs and error messages come from the fields themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dropped_in import dropped_in

from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.cli import methods
from lm_eval_deepen.config import MemberConfig, Options
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.fusion import METHODS
from lm_eval_deepen.fusion.deepen import Deepen
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.solvers import SOLVERS

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_all_options_is_up_to_date() -> None:
    """Not so? ``lm-eval-deepen methods --markdown > docs/options.md`` writes it anew."""
    assert (ROOT / "docs" / "options.md").read_text("utf-8") == methods.markdown() + "\n"


def test_every_key_has_a_meaning_of_one_sentence() -> None:
    for section in methods.all_sections():
        for name, facts in section.options():
            assert facts["type"] and len(facts["about"]) > 5, (section.name, name)
            assert facts["about"][0].isupper() or facts["about"][0] == "`", (section.name, name)
            assert facts["about"].endswith((".", ")")), (section.name, name)


def test_the_defaults_that_are_said_are_those_that_hold() -> None:
    said = {name: facts["default"] for name, facts in methods.catalogue()["method"]["deepen"]["options"].items()}
    searching = {name: entry.options() for name, entry in SOLVERS.items() if entry.options.names()}
    assert {str(solver.steps) for solver in searching.values()} == {said["steps"]}
    rates = {name: solver.learning_rate for name, solver in searching.items() if hasattr(solver, "learning_rate")}
    assert said["learning_rate"] == ", ".join(f"{rate} of {name}" for name, rate in rates.items())
    spec, rule = Deepen(rows="embedding").matrix_spec(), Deepen(rows="embedding").support_rule()
    assert (spec.normalization, spec.temperature, spec.top_m) == (
        said["normalization"], float(said["relative_temperature"]), int(said["top_m"])
    )  # fmt: skip
    assert rule is not None and said["support"].endswith(f"else {rule.first}") and said["max_truncated"] == "0.1"
    assert said["inverse"] == f"{Deepen().solver} where rows come from bytes, else {Deepen(rows='embedding').solver}"


def test_all_is_more_and_says_what_options_mean(capsys) -> None:
    assert cli.main(["methods"]) == 0
    short = capsys.readouterr().out
    assert cli.main(["methods", "--all"]) == 0
    long = capsys.readouterr().out
    assert "member:" not in short and "are divided" not in short and len(long) > 2 * len(short)
    for words in ("rows: 'canonical', 'prefix', 'embedding' or 'exact' (default canonical)", "steps: a whole number of "
                  "at least 1 (default 5)", "logits are divided by it before fusion.", "inverse:"):  # fmt: skip
        assert words in long
    assert cli.main(["methods", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["method"]["gac"]["options"]["threshold"]
    assert facts["type"] == "a number above 0 and up to 1" and facts["default"] == "every step is fused"


def test_an_option_is_added_in_one_file(tmp_path, capsys) -> None:
    """Of a method, here a copy of `gac` with one line more: it is known wherever options are."""
    code = (ROOT / "lm_eval_deepen" / "fusion" / "gac.py").read_text("utf-8").replace('@fusion("gac"', '@fusion("gac2"')
    line = '    sharpness: int = Field(3, ge=1, le=9, description="How sharp it is.")\n\n    threshold: '
    assert code.count("    threshold: ") == 1
    (tmp_path / "gac2.py").write_text(code.replace("    threshold: ", line, 1))
    file = tmp_path / "ensemble.yaml"
    file.write_text("kind: ensemble\nmembers: [a, b]\nmethod: gac2\nsharpness: 4\n")
    with dropped_in(METHODS, tmp_path):
        config = configure({"pretrained": str(file)})
        assert config.options.sharpness == config.to_dict()["sharpness"] == config.options_dict()["sharpness"] == 4
        assert configure(config.to_dict()) == config
        assert config.fingerprint() != configure({"pretrained": str(file), "sharpness": 5}).fingerprint()
        for value, told in ((10, "sharpness must be a whole number from 1 to 9; got 10"), ("x", "got 'x'")):
            with pytest.raises(ConfigError, match=told):
                configure({"pretrained": str(file), "sharpness": value})
        with pytest.raises(ConfigError, match="Did you mean 'sharpness'"):
            configure({"pretrained": str(file), "sharpnes": 1})
        with pytest.raises(ConfigError, match="sharpness is an option of method gac2, not of 'gac'"):
            configure({"pretrained": str(file), "method": "gac"})
        assert cli.main(["methods", "--all"]) == 0
        assert (
            "sharpness: a whole number from 1 to 9 (default 3)\n          How sharp it is." in capsys.readouterr().out
        )
        assert "| `sharpness` | a whole number from 1 to 9 | 3 | How sharp it is. |" in methods.markdown()
    assert "gac2" not in METHODS


def test_options_are_frozen_and_equal_by_value() -> None:
    assert Deepen() == Deepen() != Deepen(support=3) and hash(Deepen()) == hash(Deepen())
    assert issubclass(Deepen, Options)
    with pytest.raises(ValueError, match="frozen"):
        Deepen().steps = 3
    member = MemberConfig(name="a", pretrained="a")
    assert member.replace(weight=0.5) != member and member.replace(weight=1.0) == member
