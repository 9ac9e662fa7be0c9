"""``lm-eval-deepen demo``: two small models alone and as an ensemble, evaluated by ``lm_eval`` itself."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_deepen._startup import registration
from lm_eval_deepen.build.demo_models import GEMMA3, SMOLLM2, prepare
from lm_eval_deepen.cli.arguments import Names, add_device, add_json, adder, count
from lm_eval_deepen.cli.paths import data_folder
from lm_eval_deepen.harness.once import said_once
from lm_eval_deepen.results.tables import aligned
from lm_eval_deepen.results.trace_page import shown
from lm_eval_deepen.storage import make_folder, write_json, write_text

HELP = (
    "Evaluate SmolLM2-135M-Instruct and Gemma-3-270M alone and as an ensemble"
    " (`--model deepen`) in both orders, and print the results side by side."
)
READING = (
    "± is one standard error over a task's items: a difference below about two of them says nothing.\n"
    "It is left out where all items came out alike: the sample standard deviation is then 0, the error is not.\n"
    "A+B: an ensemble with A as its main member. alone: an ensemble of one, which gives what `--model hf` gives,\n"
    "sooner (the tests compare them); `--hf` runs the single models with `--model hf` itself.\n"
    "wall: from loading to results; an ensemble's first run also builds its matrices."
)
BATCH_SIZE = 8
TASKS = ["deepen_demo"]


@dataclass(frozen=True)
class System:
    """One line of the table: a model class of the harness and its arguments."""

    label: str
    slug: str
    model: str
    model_args: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's own arguments."""
    add = adder(parser)
    add("--limit N", "evaluate the first N items of each task only", type=count)
    add("--output DIR", "folder for the result files (%(default)s)", type=Path, default=Path("results/demo"))
    add("--tasks TASK ...", "tasks of lm_eval (default: deepen_demo)", action=Names, default=TASKS)
    add("--hf", "run the single models with `--model hf` itself")
    add("--redo", "convert the models again, although the cache has them")
    add_json(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Prepare the models, evaluate every system, print the table."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub client is imported, which reads it once
    make_folder(args.output)
    smollm2, gemma3 = (prepare(model, args.redo) for model in (SMOLLM2, GEMMA3))
    registration.register()
    from lm_eval.tasks import TaskManager

    # One for all systems, and without the harness's thousands of task files where none is asked for: reading
    # them takes longer than loading a model.
    task_manager = TaskManager(include_path=str(data_folder("tasks")), include_defaults=args.tasks != TASKS)
    rows = []
    plan = systems(smollm2, gemma3, "hf" if args.hf else "deepen")
    page = args.output / "view.html"
    folders = [args.output / "documents" / f"{system.slug}-{system.model}" for system in plan]
    with said_once():
        for number, (system, folder) in enumerate(zip(plan, folders, strict=True), 1):
            print(f"\n[{number}/{len(plan)}] {system.label}", file=sys.stderr, flush=True)
            rows.append(evaluate(system, args, task_manager, folder))
    viewed = shown(folders, names=[system.label for system in plan], traced=False)
    write_text(page, viewed.html("The demo: who decided each token"))
    systems_found = [{"system": row.system, "seconds": row.seconds, "scores": row.measured} for row in rows]
    args.facts = {"systems": systems_found, "page": str(page)}
    print(f"\n{side_by_side(rows)}\n\n{READING}\nResult files: {args.output}\nTheir documents, token by token: {page}")
    return 0


def systems(smollm2: Path, gemma3: Path, model: str) -> list[System]:
    """Return what is compared: each one alone, by the model class `model`, then both orders of the pair."""
    folders = {"SmolLM2-135M": str(smollm2), "Gemma-3-270M": str(gemma3)}
    shared = {"dtype": "float32", **({} if model == "hf" else {"trace": True})}
    plan = [
        System(f"{name} ({'hf' if model == 'hf' else 'alone'})", name, model, {"pretrained": folder, **shared})
        for name, folder in folders.items()
    ]
    for order in (list(folders), list(folders)[::-1]):
        members = [{"pretrained": folders[name]} for name in order]
        model_args = {**members[0], "members": members, "dtype": "float32", "trace": True}
        plan.append(System("+".join(order), "+".join(order), "deepen", model_args))
    return plan


@dataclass(frozen=True)
class Result:
    """What one system reached: its scores by task and metric, the wall time of its run, the harness's own figures."""

    system: str
    scores: Mapping[tuple[str, str], str]
    seconds: float
    measured: Mapping[str, Any] = field(default_factory=dict)


def evaluate(system: System, args: argparse.Namespace, task_manager: Any, folder: Path) -> Result:
    """Evaluate one system with ``lm_eval.simple_evaluate``; write its result file, and its documents into a folder."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import handle_non_serializable

    tracker = EvaluationTracker(output_path=str(folder))
    start = time.perf_counter()
    results = simple_evaluate(
        model=system.model,
        model_args=system.model_args,
        tasks=list(args.tasks),
        batch_size=BATCH_SIZE,
        # Without one, `hf` of 0.4.13 takes cuda for granted when it is called from Python.
        device=args.device or ("cuda:0" if torch.cuda.is_available() else "cpu"),
        limit=args.limit,
        log_samples=True,
        evaluation_tracker=tracker,
        task_manager=task_manager,
    )
    seconds = time.perf_counter() - start
    samples = results.pop("samples")
    gc.collect()  # the models of this system, before the next one is loaded
    plain = json.loads(json.dumps(results, default=handle_non_serializable))
    write_json(args.output / f"{system.slug}.json", plain)
    tracker.save_results_aggregated(results=results, samples=samples)
    for task in samples:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    return Result(system.label, scores(results), seconds, results["results"])


def scores(results: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """Return every metric of the tasks (not groups) of one ``simple_evaluate`` result, as ``0.512 ± 0.050``.

    Keys of the harness are ``metric,filter`` and ``metric_stderr,filter``; the filter ``none`` is not shown. An error
    of 0 is not shown either: all items came out alike, which bounds nothing.
    """
    shown = {}
    for task in results["configs"]:
        values = results["results"][task]
        for key, value in values.items():
            metric, comma, flt = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{flt}")
            error = f" ± {stderr:.3f}" if isinstance(stderr, (int, float)) and stderr else ""
            shown[task, metric if flt == "none" else f"{metric} ({flt})"] = f"{value:.3f}{error}"
    return shown


def side_by_side(rows: Sequence[Result]) -> str:
    """Return one line per system, one column per task and metric (``-``: not measured), the wall time last."""
    columns = list(dict.fromkeys(column for row in rows for column in row.scores))
    lines = [
        ["", *(task for task, _ in columns), "wall"],
        ["system", *(metric for _, metric in columns), "seconds"],
        *([row.system, *(row.scores.get(column, "-") for column in columns), f"{row.seconds:.1f}"] for row in rows),
    ]
    return aligned(lines, heads=2)
