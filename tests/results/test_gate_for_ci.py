"""What a check tells a CI system: too few documents, JUnit XML, annotations, each change of an ensemble once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from run_files import edited, gate, synthesised


@pytest.fixture(autouse=True)
def no_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_STEP_SUMMARY", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A baseline of 40 documents, a candidate with two other answers, one that is worse."""
    values = [1.0, 0.0, 1.0, 1.0] * 10
    base = synthesised(tmp_path / "base", {"t": {"acc": values}})
    near = synthesised(tmp_path / "near", {"t": {"acc": [0.0, 1.0, *values[2:]]}})
    worse = synthesised(tmp_path / "worse", {"t": {"acc": [0.0] * 40}})
    return base, near, worse


def test_a_run_too_small_to_see_a_drop_is_no_pass(runs: tuple[Path, Path, Path], tmp_path: Path, capsys: Any) -> None:
    base, near, worse = runs
    assert gate(base, near, "--json", tmp_path / "a.json") == 0
    [test] = json.loads((tmp_path / "a.json").read_text())["tests"]
    seen = test["detectable_drop"]
    assert 0.1 < seen < 0.4
    assert gate(base, near, "--max-detectable", seen) == 0
    capsys.readouterr()
    assert gate(base, near, "--max-detectable", 0.05, "--json", tmp_path / "b.json") == 3
    told = capsys.readouterr().out
    assert told.startswith("TOO SMALL: 1 of 1 tests could not see the drop that has to be seen")
    assert f"t acc: the detectable drop is {seen:.4f} with 40 documents, above 0.05; evaluate more documents" in told
    outcome = json.loads((tmp_path / "b.json").read_text())
    assert (outcome["status"], outcome["exit_status"], len(outcome["reasons"])) == ("too small", 3, 1)
    assert gate(base, worse, "--max-detectable", 0.05) == 1  # what is seen is seen
    with pytest.raises(SystemExit) as ended:
        gate(base, near, "--max-detectable", 0)
    assert ended.value.code == 2


def test_real_values_that_are_alike_are_blind_only_where_there_are_too_few(tmp_path: Path, capsys: Any) -> None:
    for count, status in ((40, 0), (4, 3)):
        runs = [synthesised(tmp_path / f"{name}{count}", {"t": {"f": [0.5, 0.25] * (count // 2)}}) for name in "ab"]
        assert gate(*runs, "--max-detectable", 0.1) == status
    assert "the detectable drop is unknown with 4 documents" in capsys.readouterr().out


def test_junit_has_a_case_for_each_metric(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, near, worse = runs
    path = tmp_path / "gate.xml"
    assert gate(base, near, "--junit", path) == 0
    suite = ElementTree.parse(path).getroot()
    assert suite.attrib == {"name": "lm-eval-deepen gate", "tests": "1", "failures": "0", "errors": "0"}
    assert [(case.get("classname"), case.get("name"), len(case)) for case in suite] == [("t", "acc", 0)]
    assert gate(base, worse, "--junit", path) == 1
    [case] = ElementTree.parse(path).getroot()
    assert case[0].tag == "failure" and "-0.7500, p (Holm) <0.0001" in case[0].get("message", "")
    assert gate(base, near, "--junit", path, "--max-detectable", "0.01") == 3
    suite = ElementTree.parse(path).getroot()
    assert suite.get("errors") == "1" and suite[1][0].tag == "error" and "detectable drop" in str(suite[1][0].text)
    values = {'t<&"': {'m<&"\x00\x1b': [1.0, 0.0] * 9}}
    assert gate(synthesised(tmp_path / "c", values), synthesised(tmp_path / "d", values), "--junit", path) == 0
    [case] = ElementTree.parse(path).getroot()
    assert str(case.get("name")).startswith('m<&"')


def test_annotations_on_github_alone(runs: tuple[Path, Path, Path], capsys: Any, monkeypatch: Any) -> None:
    base, _, worse = runs
    assert gate(base, worse) == 1 and "::error" not in capsys.readouterr().out
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert gate(base, worse) == 1
    assert "\n::error title=t acc regressed::-0.7500\n" in capsys.readouterr().out
    assert gate(base, base) == 0 and "::error" not in capsys.readouterr().out
    other = edited(base, base.parent / "other", lambda results: results["versions"].update(t="2,\n::warning::x%"))
    assert gate(base, other) == 3
    [line] = [line for line in capsys.readouterr().out.split("\n") if line.startswith("::error")]
    assert line.startswith("::error title=not comparable::t: task version") and "x%25" in line


def test_each_change_of_an_ensemble_is_named_once_and_nothing_else(tmp_path: Path, capsys: Any) -> None:
    def ensemble(name: str, mark: str, **facts: Any) -> Path:
        config = {"model": "deepen", "deepen": {"fingerprint": mark * 64, **facts}}
        return synthesised(tmp_path / name, {task: {"acc": [1.0, 0.0] * 9} for task in "tuv"}, config=config)

    a = ensemble("a", "0", method="deepen", options={"anchor_seed": 0, "average": "linear"})
    b = ensemble("b", "1", method="gac", options={"threshold": 0.5, "average": "geometric"})
    assert gate(a, b) == 3
    told = capsys.readouterr().out
    assert told.startswith("NOT COMPARABLE: 1 reason(s)") and told.count("fingerprint") == 1
    assert (
        '  - t, u, v: ensemble fingerprint: 000000000000 -> 111111111111 (method: "deepen" -> "gac"; average: ' in told
    )
    assert "anchor_seed" not in told and "threshold" not in told
    assert gate(a, b, "--allow-config-change") == 0
    assert "ensemble fingerprint: 000000000000 -> 111111111111 (method" in capsys.readouterr().out
