"""Commands feel alike: one example each, one table of statuses, commas in task names, two lines at a run's end."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import deepen, requests
from run_files import synthesised

from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.cli.arguments import Names, Parser
from lm_eval_deepen.cli.ending import FAULT, INTERRUPTED, UNUSABLE
from lm_eval_deepen.config.recipes import shipped_recipes
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
        if name == "reproduce":
            assert words[0] in shipped_recipes()


TABLES = {"demo", "bpb", "build", "cache", "compare", "gate", "inspect", "leaderboard", "methods", "reproduce", "tune"}


def test_every_command_that_prints_a_table_gives_it_as_json(pico: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    """The other three, which take minutes or have results to show, are asked in the tests of their own."""
    for name in cli.COMMANDS.keys() - {"run"}:
        parser = Parser(prog=name)
        importlib.import_module(cli.COMMANDS[name][0]).add_arguments(parser)
        assert ("--json" in parser.format_help()) == (parser.get_default("facts") is None and name in TABLES)
    for name in ("a", "b"):
        synthesised(tmp_path / name, {"t": {"acc": [1.0, 0.0, 1.0]}})
    (tmp_path / "text.txt").write_text("one fox\n\ntwo dogs\n\nthree")
    pair = [{"pretrained": str(pico[name])} for name in ("bytelevel", "metaspace")]
    spelt = json.dumps({"pretrained": pair[0]["pretrained"], "members": pair, "matrix_dir": str(tmp_path)})
    a, b, text, tuned = (str(tmp_path / name) for name in ("a", "b", "text.txt", "tuned.yaml"))
    asked = [
        (["methods"], "method"), (["inspect", spelt, "--no-tasks"], "members"), (["build", spelt], "files"),
        (["bpb", spelt, "--text", text], "systems"), (["tune", spelt, "--text", text, "--output", tuned], "evidence"),
        (["compare", a, b], "rows"), (["gate", "--baseline", a, "--candidate", b], "exit_status"),
    ]  # fmt: skip
    for argv, key in asked:
        status = cli.main([*argv, "--json"])
        assert status == 0 and json.loads(capsys.readouterr().out).get(key) is not None, argv
    place = tmp_path / "new" / "gate.json"
    assert cli.main(["gate", "--baseline", a, "--candidate", b, "--json", str(place)]) == 0
    assert capsys.readouterr().out.startswith("PASS") and json.loads(place.read_text())["exit_status"] == 0
    told = ["methods", "--markdown"]
    for argv in (["compare", a, b, "--format", "md"], ["leaderboard", "x", "--format", "html"], told):
        assert cli.main([*argv, "--json"]) == 2 and argv[-1] in capsys.readouterr().err
    for name in ("leaderboard", "reproduce"):
        assert cli.main([name, "deepen_nq_2", "--dry-run", "--json"]) == 2
        assert "--dry-run" in capsys.readouterr().err


def test_a_shell_is_offered_the_options_of_the_command_that_is_typed(monkeypatch: Any) -> None:
    asked: list[argparse.ArgumentParser] = []

    def autocomplete(parser: argparse.ArgumentParser) -> None:
        asked.append(parser)
        raise SystemExit(0)

    monkeypatch.setitem(sys.modules, "argcomplete", SimpleNamespace(autocomplete=autocomplete))
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setenv("COMP_LINE", "lm-eval-deepen gate --ba")
    with pytest.raises(SystemExit, match="0"):
        cli.main([])
    (commands,) = (action for action in asked[0]._actions if isinstance(action, argparse._SubParsersAction))
    assert commands.choices.keys() == cli.COMMANDS.keys() and "--baseline" in commands.choices["gate"].format_usage()


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
    monkeypatch.delattr("sys.last_value", raising=False)  # of another test
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


def test_the_cache_is_listed_and_cleared(monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    """Models go where they are named alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def asked(*words: str) -> dict[str, int]:
        assert cli.main(["cache", *words, "--json"]) == 0
        kinds = json.loads(capsys.readouterr().out)["kinds"]
        return {kind: facts["bytes"] for kind, facts in kinds.items() if facts["entries"]}

    assert asked() == asked("--clear") == {}
    for name, size in {"models/demo/w": 10, "matrices/m": 2_000_000, "texts/a": 300, "texts/b": 400}.items():
        (path := tmp_path / "lm_eval_deepen" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    assert cli.main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert "texts" in shown and "2 MB" in shown and "of at most 50 GB" in shown and "tokenizers" not in shown
    assert asked() == {"models": 10, "matrices": 2_000_000, "texts": 700}
    assert asked("--keep", "1MB") == asked("--clear", "matrices") == {"models": 10, "texts": 700}
    assert asked("--clear") == asked("--keep", "0") == {"models": 10}
    assert asked("--clear", "models,texts") == {}
    for words, message in (
        (["--clear", "modles"], r"takes matrices, .*Did you mean 'models'"), (["--keep", "lots"], "must be a size"),
        (["--clear", "--keep", "1GB"], "not allowed with"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            cli.main(["cache", *words])
        assert re.search(message, capsys.readouterr().err)
