"""Commands feel alike: one example each, one table of statuses, commas in task names, two lines at a run's end."""

from __future__ import annotations

import argparse
import importlib
import shlex
from pathlib import Path
from typing import Any

import pytest
from harness import deepen, requests

from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.cli.arguments import Names, Parser
from lm_eval_deepen.cli.ending import FAULT, INTERRUPTED, UNUSABLE
from lm_eval_deepen.harness import closing

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text("utf-8")


def test_every_command_has_an_example_that_it_takes() -> None:
    assert cli.EXAMPLES.keys() == cli.COMMANDS.keys()
    for name, example in cli.EXAMPLES.items():
        assert f"| `lm-eval-deepen {example}` | {cli.COMMANDS[name][1]} |" in PAGE
        command, *words = shlex.split(example)
        assert command == name
        if name != "run":
            parser = Parser(prog=name)
            importlib.import_module(cli.COMMANDS[name][0]).add_arguments(parser)
            parser.parse_args(words)


def test_help_ends_with_the_example(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.main(["gate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith(f"Example: lm-eval-deepen {cli.EXAMPLES['gate']}")


def test_statuses_stand_in_one_table() -> None:
    from lm_eval_deepen.cli.gate import EXIT

    for status in {0, *EXIT.values(), UNUSABLE, FAULT, INTERRUPTED}:
        assert f"\n| {status} | " in PAGE


@pytest.mark.parametrize("given", [["a,b", "c"], ["a", "b", "c"], ["a,b,c"], ["a, b,", "c"]])
def test_commas_and_spaces_separate_tasks(given: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--tasks", nargs="+", action=Names)
    assert parser.parse_args(["--tasks", *given]).tasks == ["a", "b", "c"]
    with pytest.raises(argparse.ArgumentError, match="names nothing"):
        parser.parse_args(["--tasks", ","])


def test_two_lines_sum_the_ensemble_up(pico: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    model = deepen(pico["bytelevel"], pico["metaspace"])
    assert closing.summary(model) == []
    model.loglikelihood(requests("loglikelihood", ("The dog", " walked away")), disable_tqdm=True)
    counts = model.ensemble.counters.summary()
    did, where = closing.summary(model)
    share = f"{counts['argmax_differs_from_main']:.1%} of {counts['steps_fused']} steps"
    assert did.startswith("ensemble m0 + m1: ") and share in did and did.endswith("; no warning.")
    assert where == "no results were kept: --output_path and --log_samples keep them."
    model.results_in, model.findings = tmp_path, {"warnings": [{"code": "W1"}, {"code": "W2"}]}
    did, where = closing.summary(model)
    assert did.endswith("2 warnings (W1, W2).") and where == f"results: {tmp_path}"
    capsys.readouterr()
    closing.tell(model)
    assert capsys.readouterr().err == f"{did}\n{where}\n"
    monkeypatch.setattr("sys.last_value", RuntimeError(), raising=False)
    closing.tell(model)  # a run that failed has its error as the last line
    assert capsys.readouterr().err == ""
    traced = deepen(pico["bytelevel"], trace=True, trace_dir=str(tmp_path / "t"))
    traced.loglikelihood(requests("loglikelihood", ("The dog", " walked")), disable_tqdm=True)
    did, where = closing.summary(traced)
    assert "steps were left to the main member" in did
    assert where == f"traces: {tmp_path / 't'}; look at them with: lm-eval-deepen view {tmp_path / 't'}"
    pooled = deepen(pico["bytelevel"], pico["metaspace"], pooling="vote")
    pooled.generate_until(requests("generate_until", ("The", {"max_gen_toks": 2, "until": []})), disable_tqdm=True)
    assert "the answers to 1 requests were combined" in closing.summary(pooled)[0]
