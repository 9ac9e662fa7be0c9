"""The benchmarks behind docs/reproduce.md: our texts are the published procedure's; the runs are what they say."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import published_loop  # noqa: E402
import reproduce_runs  # noqa: E402

from lm_eval_deepen.leaderboard.recipe import read_recipe  # noqa: E402

QUESTIONS = ("how many days are there", "what is the capital of France", "who walked", "where is Sofia", "what is 10")


@pytest.fixture
def nq(tmp_path: Path) -> Path:
    shots = [{"question": "where is Rome", "answer": "Italy"}, {"question": "what is 3 + 4", "answer": "7"}]
    tests = [{"question": question, "answer": ["x"]} for question in QUESTIONS]
    for name, rows in (("fewshot", shots), ("test", tests)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


# --- the published procedure, one token after the other


@pytest.mark.parametrize("names", [("bytelevel", "metaspace"), ("metaspace", "bytelevel")], ids="+".join)
def test_our_greedy_texts_are_those_of_the_published_loop(nq: Path, pico: dict[str, Path], names: Any) -> None:
    """They part only where random models write half a character, which no text can hand over."""
    arguments = ["--data", str(nq), "--anchors", "60", "--max-new", "6", "--matrix-dir", str(nq), "--batch-size", "2"]
    models = ["--models", *(str(pico[name]) for name in names)]
    found = published_loop.main([*arguments, *models])
    assert found["questions"] == len(QUESTIONS) and found["steps"] >= len(QUESTIONS)
    assert found["same_tokens"] + len(found["different"]) == len(QUESTIONS) and found["same_tokens"]
    assert not any(one["same_member_inputs"] for one in found["different"]), found["different"]
    assert not found["different"] or names[0] == "bytelevel"


def test_a_difference_is_described_by_the_step_where_texts_part(pico: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico["bytelevel"])
    a, b, c = 69, 70, 71
    theirs = published_loop.Text([a, b], "x", [[[1], [2]], [[1, a], [2, 3]]], [(a, b, 2.0), (b, c, 1e-6)])
    mine = published_loop.Text([a, c], "y", [[[1], [2]], [[1, a], [2, 3]]])
    found = published_loop.difference(mine, theirs, tokenizer)
    assert found is not None
    assert (found["step"], found["margin"]) == (1, 1e-6)
    assert found["ours_is_their_second"] and found["same_member_inputs"] and not found["same_text"]
    assert published_loop.difference(theirs, theirs, tokenizer) is None
    shorter = published_loop.difference(published_loop.Text([a], "x", mine.inputs), theirs, tokenizer)
    assert shorter is not None and shorter["step"] == 1 and shorter["ours"] == tokenizer.decode([0])


# --- the runs


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    for subject in ("anatomy", "virology", "world_religions"):
        (tmp_path / "mmlu" / subject).mkdir(parents=True)
    return argparse.Namespace(data=tmp_path, limit=50, dev_limit=20, batch_size=8, fit="keep")


@pytest.mark.parametrize("task", reproduce_runs.TASKS)
def test_every_benchmark_has_a_leaderboard_of_both_orders_and_both_weightings(
    tmp_path: Path, args: argparse.Namespace, task: str
) -> None:
    path = tmp_path / "leaderboard.yaml"
    path.write_text(yaml.safe_dump(reproduce_runs.recipe(task, {"SmolLM2": 0.3, "Gemma3": 0.1}, args)))
    recipe = read_recipe(path)
    ensembles = [row for row in recipe.rows if not row.alone]
    assert [(row.members[0], row.config.weights) for row in ensembles] == [
        ("SmolLM2", (0.5, 0.5)),
        ("SmolLM2", pytest.approx((0.75, 0.25))),
        ("Gemma3", (0.5, 0.5)),
        ("Gemma3", pytest.approx((0.25, 0.75))),
    ]
    (spec,) = recipe.tasks
    assert spec.limit == (17 if task == "mmlu" else 50)  # of each subject
    assert dict(spec.gen_kwargs) == ({"max_gen_toks": 256} if task == "gsm8k" else {})
    nobody = reproduce_runs.recipe(task, {"SmolLM2": 0.0, "Gemma3": 0.0}, args)
    assert [row["name"] for row in nobody["rows"]] == ["SmolLM2+Gemma3, uniform", "Gemma3+SmolLM2, uniform"]


def test_the_benchmarks_are_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    group = yaml.safe_load((ROOT / "task_configs" / "deepen_paper" / "deepen_paper.yaml").read_text())["task"]
    assert {f"deepen_{name}" for name in reproduce_runs.TASKS} == set(group)


def line(system: str, score: float, **keys: Any) -> dict[str, Any]:
    row = {"system": system, "documents": 50, "score": score, "stderr": 0.05, "comparison": None, "seconds": 1.5}
    return {**row, "low": score - 0.1, "high": score + 0.1, **keys}


def test_the_table_shows_scores_differences_weights_and_cost(args: argparse.Namespace) -> None:
    compared = {"difference": -0.04, "low": -0.1, "high": 0.02}
    rows = [line("SmolLM2", 0.3), line("Gemma3", 0.26, comparison=compared)]
    text = reproduce_runs.table([{"task": "nq", "dev_scores": {"SmolLM2": 0.3, "Gemma3": 0.1}, "rows": rows}], args)
    assert "| SmolLM2 | 30.0 [20.0, 40.0] (reference) |" in text
    assert "| Gemma3 | 26.0 [16.0, 36.0] (-4.0: -10.0 to +2.0) |" in text
    assert "| SmolLM2+Gemma3, adaptive | none |" in text
    assert "nq 30.0 / 10.0, weights 0.75 / 0.25" in text and "at most 20 documents" in text
    assert "| nq | 1.50 | 1.50 |" in text and "256 tokens" not in text


def test_subjects_count_by_their_documents_and_systems_are_paired(tmp_path: Path) -> None:
    scores = {"SmolLM2": ([1, 0], [0]), "Gemma3": ([1, 1], [0]), "Gemma3+SmolLM2, uniform": ([1, 1], [1])}
    for system, subjects in scores.items():
        folder = tmp_path / system
        folder.mkdir()
        names = {}
        for name, own in zip("ab", subjects, strict=True):
            rows = [{"doc_id": n, "exact_match": score} for n, score in enumerate(own)]
            names[name] = f"samples_{name}.jsonl"
            (folder / names[name]).write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
        cell = {"row": system, "samples": names, "documents": 3, "cost": {"seconds": 6.0}}
        (folder / "deepen_mmlu.cell.json").write_text(json.dumps(cell))
    found = {row["system"]: row for row in reproduce_runs.rows_of(tmp_path)}
    assert {name: row["score"] for name, row in found.items()} == {
        "SmolLM2": pytest.approx(1 / 3), "Gemma3": pytest.approx(2 / 3), "Gemma3+SmolLM2, uniform": 1.0,
    }  # fmt: skip
    assert found["Gemma3"]["comparison"] is None  # the best member
    assert found["SmolLM2"]["comparison"]["difference"] == pytest.approx(-1 / 3)
    ensemble = found["Gemma3+SmolLM2, uniform"]  # 3 of 3
    assert 0 < ensemble["low"] < ensemble["high"] == 1.0
    assert found["SmolLM2"]["stderr"] == pytest.approx(1 / 3)  # sqrt of (2/9 * 3/2) / 3
    assert found["SmolLM2"]["seconds"] == 2.0 and found["SmolLM2"]["documents"] == 3
