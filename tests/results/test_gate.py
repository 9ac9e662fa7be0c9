"""`lm-eval-deepen gate` on runs of the harness: exit statuses, files written, every error."""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from run_files import DATE, ROOT, doctored, edited, evaluate_dummy, gate, synthesised, wrong

from lm_eval_deepen.cli import gate as gate_tool

CHOICE, SHORT = "deepen_demo_choice", "deepen_demo_short"
DEMO = ROOT / "task_configs"


@pytest.fixture(scope="session")
def baseline(tmp_path_factory):
    """The shipped demo tasks, 96 questions and 48 short answers, by the harness's dummy model."""
    return evaluate_dummy(tmp_path_factory.mktemp("gate") / "baseline", [CHOICE, SHORT], DEMO)


@pytest.fixture(autouse=True)
def no_summary(monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


# The three verdicts ------------------------------------------------------------------------------------


def test_two_identical_runs_pass(baseline, tmp_path, capsys):
    again = evaluate_dummy(tmp_path / "again", [CHOICE, SHORT], DEMO)
    assert gate(baseline, again) == 0
    told = capsys.readouterr().out
    assert told.startswith("PASS: none of 3 tests finds again worse than baseline")
    assert "detectable drop" in told and "alpha 0.05 over all 3 by Holm; minimal effect 0." in told


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_twenty_right_answers_made_wrong_fail(baseline, tmp_path, capsys, metric):
    candidate = doctored(baseline, tmp_path / "candidate", CHOICE, wrong(20, metric))
    assert gate(baseline, candidate, "--json", tmp_path / "out.json") == 1
    told = capsys.readouterr().out
    assert told.startswith(f"REGRESSED: {CHOICE} {metric} -0.2083")
    # Only the samples were doctored: the results file beside them still says otherwise.
    assert f"{CHOICE} in" in told and "the samples count" in told
    outcome = json.loads((tmp_path / "out.json").read_text())
    assert (outcome["status"], outcome["exit_status"]) == ("regressed", 1)
    assert (outcome["alpha"], outcome["min_effect"]) == (0.05, 0)
    [hit] = [test for test in outcome["tests"] if test["regressed"]]
    assert (hit["worse"], hit["better"], hit["p"], hit["documents"]) == (20, 0, 2.0**-20, 96)
    assert hit["p_holm"] == 3 * 2.0**-20 and hit["interval_95"][1] < 0 < hit["detectable_drop"]


def test_a_run_with_another_few_shot_setting_is_not_comparable(baseline, tmp_path, capsys):
    candidate = evaluate_dummy(tmp_path / "candidate", [CHOICE, SHORT], DEMO, num_fewshot=1)
    assert gate(baseline, candidate, "--json", tmp_path / "out.json") == 3
    told = capsys.readouterr().out
    assert told.startswith("NOT COMPARABLE")
    assert f"- {CHOICE}: number of few-shots: 3 -> 1" in told
    assert f"- {CHOICE}: other prompts for 96 of 96 documents" in told
    outcome = json.loads((tmp_path / "out.json").read_text())
    assert (outcome["status"], outcome["exit_status"], outcome["tests"]) == ("not comparable", 3, [])
    assert f"{SHORT}: number of few-shots: 5 -> 1" in outcome["reasons"]


def test_a_run_with_another_limit_or_few_shot_seed_is_not_comparable(baseline, tmp_path, capsys):
    assert gate(baseline, evaluate_dummy(tmp_path / "a", [CHOICE, SHORT], DEMO, limit=10)) == 3
    told = capsys.readouterr().out
    assert f"{CHOICE}: limit: null -> 10" in told and "10 in common, 86 of the baseline alone" in told
    assert gate(baseline, evaluate_dummy(tmp_path / "b", [CHOICE, SHORT], DEMO, fewshot_random_seed=7)) == 3
    assert "few-shot seed: 1234 -> 7" in capsys.readouterr().out


def test_a_task_or_metric_that_vanished_is_not_comparable(tmp_path, capsys):
    a = synthesised(tmp_path / "a", {"t": {"acc": [1.0] * 9, "f": [1.0] * 9}, "u": {"acc": [1.0]}})
    assert gate(a, synthesised(tmp_path / "b", {"t": {"acc": [1.0] * 9, "f": [1.0] * 9}})) == 3
    assert "u: b has no samples of it" in capsys.readouterr().out
    c = edited(a, tmp_path / "c", lambda results: results["results"]["t"].pop("f,none"))
    assert gate(a, c) == 3
    assert "has no f,none" in capsys.readouterr().out


def test_a_metric_given_for_fewer_documents_is_not_comparable(tmp_path, capsys):
    a = synthesised(tmp_path / "a", {"t": {"acc": [1.0] * 9}})
    b = doctored(a, tmp_path / "b", "t", lambda records: records[0].pop("acc"))
    assert gate(a, b) == 3
    assert "t: acc is given for 9 and 8 documents" in capsys.readouterr().out
    c = doctored(a, tmp_path / "c", "t", lambda records: records[1].pop("acc"))
    assert gate(b, c) == 3
    assert "t: acc is given for 8 documents each, 7 of them the same" in capsys.readouterr().out


# What is tested, and how -------------------------------------------------------------------------------


def test_alpha_minimal_effect_metric_and_tasks_narrow_the_verdict(baseline, tmp_path, capsys):
    candidate = doctored(baseline, tmp_path / "c", CHOICE, wrong(6))
    assert gate(baseline, candidate, "--metric", "acc", "--tasks", CHOICE) == 1  # 1/64
    assert gate(baseline, candidate, "--metric", "acc", "--tasks", CHOICE, "--alpha", "0.015") == 0
    assert gate(baseline, candidate, "--metric", "acc", "--tasks", CHOICE, "--min-effect", "0.1") == 0
    assert "minimal effect 0.1: smaller observed drops do not count." in capsys.readouterr().out
    assert gate(baseline, candidate, "--metric", "acc,none", "acc_norm") == 1
    assert gate(baseline, candidate, "--metric", "acc_norm", "exact_match") == 0


def test_lower_is_better_and_real_valued(tmp_path, capsys):
    generator = np.random.default_rng(0)
    losses = generator.gamma(3, size=60)
    words = generator.integers(5, 40, size=60)
    values = [[-float(x * w), int(w)] for x, w in zip(losses, words, strict=True)]
    ways = {"higher_is_better": {"ppl": False}, "aggregations": {"ppl": "weighted_perplexity"}}
    a = synthesised(tmp_path / "a", {"t": {"ppl": values}}, **ways)
    worse = [[x * 1.05, w] for x, w in values]
    assert gate(a, synthesised(tmp_path / "b", {"t": {"ppl": worse}}, **ways)) == 1
    assert "REGRESSED: t ppl +" in capsys.readouterr().out
    assert gate(synthesised(tmp_path / "b", {"t": {"ppl": worse}}, **ways), a) == 0
    assert "paired permutation test" in capsys.readouterr().out


def test_metrics_that_cannot_be_tested_are_noted_or_refused_when_asked_for(tmp_path, capsys):
    tasks = {"t": {"acc": [1.0] * 9, "bleu": [["a", "b"]] * 9}}
    a = synthesised(tmp_path / "a", tasks, aggregations={"bleu": "bleu"})
    assert gate(a, a) == 0
    assert "not tested: t in" in capsys.readouterr().out
    assert gate(a, a, "--metric", "bleu") == 3
    assert "bleu is aggregated by 'bleu'" in capsys.readouterr().out
    only = synthesised(tmp_path / "only", {"t": {"bleu": [["a", "b"]] * 9}}, aggregations={"bleu": "bleu"})
    assert gate(only, only) == 3
    assert "no metric of the chosen tasks can be tested" in capsys.readouterr().out


def test_a_metric_without_a_direction_is_not_tested(tmp_path, capsys):
    a = synthesised(tmp_path / "a", {"t": {"acc": [1.0] * 9, "odd": [1.0] * 9}})
    a = edited(a, tmp_path / "b", lambda results: results["higher_is_better"]["t"].pop("odd"))
    assert gate(a, a) == 0
    assert "it is unknown which way odd is good" in capsys.readouterr().out
    assert gate(a, a, "--metric", "odd") == 3


# Output ------------------------------------------------------------------------------------------------


def test_the_step_summary_is_appended_as_markdown(baseline, tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    candidate = doctored(baseline, tmp_path / "c", CHOICE, wrong(20))
    assert gate(baseline, candidate) == 1
    told = summary.read_text()
    assert told.startswith("before\n### lm-eval-deepen gate\n\n**REGRESSED: ")
    assert f"| {CHOICE} | acc | 96 |" in told and "| REGRESSED |" in told
    assert gate(baseline, baseline, "--summary", tmp_path / "other.md") == 0
    assert "**PASS" in (tmp_path / "other.md").read_text() and summary.read_text() == told


def test_a_refusal_is_summarised_too(baseline, tmp_path):
    candidate = edited(baseline, tmp_path / "c", lambda results: results["versions"].update({CHOICE: 2.0}))
    assert gate(baseline, candidate, "--summary", tmp_path / "s.md") == 3
    assert "**NOT COMPARABLE: 1 reason(s)**\n- deepen_demo_choice: task version" in (tmp_path / "s.md").read_text()


# Wrong usage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong_one", [["--alpha", "0"], ["--alpha", "1.5"], ["--min-effect", "-1"], ["--power", "x"], ["--seed", "-1"]]
)
def test_impossible_numbers_are_wrong_usage(baseline, capsys, wrong_one):
    with pytest.raises(SystemExit) as stop:
        gate(baseline, baseline, *wrong_one)
    assert stop.value.code == 2
    assert f"argument {wrong_one[0]}" in capsys.readouterr().err


def test_unreadable_and_ambiguous_folders_exit_2(baseline, tmp_path, capsys):
    assert gate(baseline, tmp_path / "nowhere") == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(baseline, bare)
    for path in bare.rglob("samples_*"):
        path.unlink()
    assert gate(baseline, bare) == 2
    assert "results without samples" in capsys.readouterr().err
    for name in "ab":
        synthesised(tmp_path / "two" / name, {"t": {"acc": [1.0]}})
    assert gate(tmp_path / "two", baseline) == 2
    assert "holds the results of 2 models; give one of them" in capsys.readouterr().err
    broken = synthesised(tmp_path / "broken", {"t": {"acc": [1.0]}})
    (broken / f"samples_t_{DATE}.jsonl").write_text('{"doc')
    assert gate(broken, broken) == 2
    assert ".jsonl:1: not a line of JSON" in capsys.readouterr().err


def test_unknown_tasks_and_metrics_exit_2_with_the_nearest(baseline, capsys):
    assert gate(baseline, baseline, "--tasks", "deepen_demo_chioce") == 2
    assert f"Did you mean '{CHOICE}'?" in capsys.readouterr().err
    assert gate(baseline, baseline, "--metric", "acc_nrom") == 2
    assert "Did you mean 'acc_norm'?" in capsys.readouterr().err


# Rates, documentation ----------------------------------------------------------------------------------


def test_the_measured_rates_keep_the_level_and_find_large_drops(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(1)
    base = generator.random(200) < 0.6
    other = np.where(generator.random(200) < 0.2, ~base, base)
    losses = generator.gamma(3, size=200)
    ways = {"higher_is_better": {"loss": False}}
    for name, right, loss in (("a", base, losses), ("b", other, losses + generator.normal(0, 0.3, size=200))):
        synthesised(tmp_path / name, {"t": {"acc": right * 1.0, "loss": loss.tolist()}}, **ways)
    script = str(ROOT / "benchmarks" / "gate_rates.py")
    options = "--repetitions 400 --detections 40 --resamples 100 --answers 1 40 --factors 0.2".split()
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "a"), str(tmp_path / "b"), *options])
    runpy.run_path(script, run_name="__main__")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report["false alarms"]) == {"all tests together", "t acc alone", "t loss alone"}
    for found in report["false alarms"].values():
        assert 0 < found["rate"] <= 0.05 + 3 * 0.011
    acc, loss = report["columns"]
    assert acc["detection"]["runs that differ"]["40.0"]["rate"] == 1
    assert acc["detection"]["runs that differ"]["1.0"]["rate"] < 0.3
    assert acc["detection"]["identical runs"]["1.0"]["rate"] == 0
    assert loss["detection"]["runs that differ"]["0.2"]["rate"] == 1


def test_the_documented_workflow_and_commands_are_those_there_are():
    text = (ROOT / "docs" / "ci.md").read_text("utf-8")
    [example] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    given = yaml.safe_load(example)["jobs"]["gate"]["with"]
    workflow = yaml.safe_load((ROOT / ".github/workflows/gate.yml").read_text("utf-8"))
    inputs = workflow[True]["workflow_call"]["inputs"]  # YAML reads `on` as a truth value
    assert given.keys() <= inputs.keys() and {k for k, v in inputs.items() if v.get("required")} <= given.keys()
    action = yaml.safe_load((ROOT / ".github/actions/gate/action.yml").read_text("utf-8"))
    [step] = [one for one in workflow["jobs"]["gate"]["steps"] if one.get("uses", "").endswith("actions/gate")]
    assert step["with"].keys() <= action["inputs"].keys()
    assert {k for k, v in action["inputs"].items() if v.get("required")} <= step["with"].keys()
    assert "${{" not in "".join(one.get("run", "") for one in action["runs"]["steps"])  # inputs are no shell code
    assert (ROOT / "constraints.txt").is_file() and '-c "$root/constraints.txt" "$root"' in str(action["runs"]["steps"])
    parser = argparse.ArgumentParser()
    gate_tool.add_arguments(parser)
    [command] = re.findall(
        r"^    lm-eval-deepen (gate --baseline eval/baseline .*max-detectable.*)$", text, re.MULTILINE
    )
    assert parser.parse_args(shlex.split(command)[1:]).max_detectable == 0.12
    assert (
        parser.parse_args(["--baseline", "a", "--candidate", "b", *shlex.split(given["gate-arguments"])]).alpha == 0.05
    )
    for status, exit_status in gate_tool.EXIT.items():
        assert re.search(rf"^\| {exit_status} \| {status}", text, re.MULTILINE)


@pytest.mark.parametrize(("lost", "most", "status"), [(0, "", 0), (20, "", 1), (0, "0.001", 3)])
def test_the_action_s_gate_runs_as_it_is_written(baseline, tmp_path, lost, most, status):
    action = yaml.safe_load((ROOT / ".github/actions/gate/action.yml").read_text("utf-8"))
    [step] = [one for one in action["runs"]["steps"] if one.get("id") == "gate"]
    doctored(baseline, tmp_path / "eval" / "candidate", CHOICE, wrong(lost))
    own = {
        "BASELINE": str(baseline),
        "MAX_DETECTABLE": most,
        "GATE_ARGUMENTS": f"--tasks {CHOICE} --alpha 0.05",
        "OUT": "eval",
    }
    assert own.keys() == step["env"].keys()
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "lm-eval-deepen"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m lm_eval_deepen.cli.main "$@"\n')
    command.chmod(0o755)
    env = {
        **os.environ,
        **own,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "GITHUB_OUTPUT": str(tmp_path / "out"),
    }
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]  # as GitHub runs `shell: bash`
    found = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == status, found.stderr
    assert (tmp_path / "out").read_text() == f"status={status}\n"
    assert json.loads((tmp_path / "eval/gate.json").read_text())["exit_status"] == status
    assert (tmp_path / "eval/gate.xml").read_text().startswith("<?xml")
