"""Result folders for tests: written by the harness itself with its dummy model, doctored, or synthesised."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from lm_eval_deepen.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
DATE = "2026-01-02T03-04-05.000006"


def gate(baseline: Path, candidate: Path, *arguments: Any) -> int:
    """Run ``lm-eval-deepen gate`` and return its exit status."""
    return cli.main(["gate", "--baseline", str(baseline), "--candidate", str(candidate), *map(str, arguments)])


def local_tasks(folder: Path) -> Path:
    """Write the conformance suite's tiny tasks of every output type."""
    spec = importlib.util.spec_from_file_location("local_tasks_here", ROOT / "tests/conformance/local_tasks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_tasks(folder)


def evaluate_dummy(output: Path, tasks: Sequence[str], include: Path, seed: int = 0, **kwargs: Any) -> Path:
    """Let the harness evaluate its dummy model and write its files; return the output folder."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tracker = EvaluationTracker(output_path=str(output))
    found = lm_eval.simple_evaluate(
        model="dummy",
        model_args={"pretrained": "dummy"},
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(include), include_defaults=False),
        bootstrap_iters=0,
        evaluation_tracker=tracker,
        random_seed=seed,
        **kwargs,
    )
    samples = found.pop("samples", None)
    tracker.save_results_aggregated(results=found, samples=samples)
    for task in samples or ():
        tracker.save_results_samples(task_name=task, samples=samples[task])
    return output


def doctored(source: Path, target: Path, task: str, edit: Callable[[list[dict[str, Any]]], None]) -> Path:
    """Copy a result folder and edit the samples of one task in place."""
    shutil.copytree(source, target)
    [path] = target.rglob(f"samples_{task}_*.jsonl")
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    edit(records)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return target


def edited(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a result folder and edit its results file."""
    shutil.copytree(source, target)
    [path] = target.rglob("results_*.json")
    results = json.loads(path.read_text("utf-8"))
    edit(results)
    path.write_text(json.dumps(results), "utf-8")
    return target


def wrong(count: int, metric: str = "acc", flt: str = "none") -> Callable[[list[dict[str, Any]]], None]:
    """Return an edit that makes the first right answers wrong."""

    def edit(records: list[dict[str, Any]]) -> None:
        right = [record for record in records if record["filter"] == flt and record[metric] == 1]
        assert len(right) >= count
        for record in right[:count]:
            record[metric] = 0.0

    return edit


def synthesised(
    folder: Path,
    tasks: Mapping[str, Mapping[str, Sequence[Any]]],
    higher_is_better: Mapping[str, bool] | None = None,
    aggregations: Mapping[str, str] | None = None,
    date: str = DATE,
    config: Mapping[str, Any] | None = None,
    reported: float | None = None,
) -> Path:
    """Write a run in the harness's format: per task and metric, one value per document."""
    ways = dict(higher_is_better or {})
    how = dict(aggregations or {})
    names = {task: list(metrics) for task, metrics in tasks.items()}
    counts = {task: len(next(iter(metrics.values()))) for task, metrics in tasks.items()}
    results = {
        "results": {
            task: {
                "alias": task,
                **{f"{m},none": _mean(values) if reported is None else reported for m, values in metrics.items()},
            }
            for task, metrics in tasks.items()
        },
        "group_subtasks": {},
        "configs": {
            task: {
                "task": task,
                "output_type": "multiple_choice",
                "metric_list": [{"metric": m, "aggregation": how.get(m, "mean")} for m in metrics],
            }
            for task, metrics in names.items()
        },
        "versions": dict.fromkeys(tasks, 1.0),
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {task: {m: ways.get(m, True) for m in metrics} for task, metrics in names.items()},
        "n-samples": {task: dict.fromkeys(("original", "effective"), count) for task, count in counts.items()},
        "config": {
            "model": "hf",
            "model_args": {"pretrained": "m"},
            "limit": None,
            "fewshot_seed": 1,
            **(config or {}),
        },  # fmt: skip
        "lm_eval_version": "0.4.13",
        "model_name": folder.name,
        "chat_template_sha": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"results_{date}.json").write_text(json.dumps(results), "utf-8")
    for task, metrics in tasks.items():
        lines = []
        for i, values in enumerate(zip(*metrics.values(), strict=True)):
            lines.append(json.dumps(record(i, dict(zip(metrics, values, strict=True)), task)) + "\n")
        (folder / f"samples_{task}_{date}.jsonl").write_text("".join(lines), "utf-8")
    return folder


def record(doc_id: int, values: Mapping[str, Any], task: str = "t", flt: str = "none", doc: str | None = None) -> dict:
    """Return one sample as the harness writes it."""

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    content = f"{task} {doc_id}" if doc is None else doc
    return {
        "doc_id": doc_id,
        "doc": {"text": content},
        "target": "0",
        "filter": flt,
        "metrics": list(values),
        "doc_hash": digest(content),
        "prompt_hash": digest(f"prompt {content}"),
        "target_hash": digest(f"target {content}"),
        **copy.deepcopy(dict(values)),
    }


def _mean(values: Sequence[Any]) -> float:
    numbers = [value for value in values if isinstance(value, (int, float))]
    return sum(numbers) / len(numbers) if numbers else 0.0
