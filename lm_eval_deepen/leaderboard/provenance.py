"""Where a leaderboard's numbers come from: dates, versions, models, few-shots, limits, seeds, fingerprints."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lm_eval_deepen import __version__
from lm_eval_deepen.harness.tasks import TaskSpec
from lm_eval_deepen.leaderboard.recipe import LeaderboardRecipe

PROGRAM = "lm-eval-deepen"
VERSIONS = ("lm_eval_deepen", "lm_eval", "transformers", "torch")


def provenance(recipe: LeaderboardRecipe, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return facts by name, from the recipe and the harness's results files of the finished cells."""
    dates = sorted(evaluation["date"] for evaluation in evaluations if isinstance(evaluation.get("date"), (int, float)))
    days = [datetime.fromtimestamp(date, timezone.utc).strftime("%Y-%m-%d") for date in dates]
    few_shots = {task: shots for one in evaluations for task, shots in (one.get("n-shot") or {}).items()}
    told = {
        "evaluated": " to ".join(dict.fromkeys([*days[:1], *days[-1:]])),
        "command": shlex.join([PROGRAM, *sys.argv[1:]]) if Path(sys.argv[0]).name == PROGRAM else "",
        "versions": ", ".join(filter(None, (_known(evaluations, name) for name in VERSIONS))),
        "models": "; ".join(_models(evaluations)),
        "few-shots": ", ".join(f"{task} {shots}" for task, shots in few_shots.items()),
        "limits": _limits(recipe.tasks),
        "seeds": ", ".join(map(str, recipe.seeds)),
        "fingerprints": "; ".join(dict.fromkeys(f"{row.group} {row.config.fingerprint()[:12]}" for row in recipe.rows)),
    }
    return {name: text for name, text in told.items() if text}


def versions() -> dict[str, str]:
    """Return what a cell's results say of the programs that made it, under the harness's keys."""
    ours, *others = VERSIONS  # ours may run from a checkout that is not installed
    known = {ours: __version__, **{name: importlib.metadata.version(name) for name in others}}
    return {f"{name}_version": version for name, version in known.items()}


def _limits(tasks: Sequence[TaskSpec]) -> str:
    """Return how many documents of which tasks were evaluated."""
    named: dict[str, list[str]] = {}
    for task in tasks:
        if task.limit is not None:
            size = f"{int(task.limit)} documents" if task.limit >= 1 else f"{100 * task.limit:g} %"
            named.setdefault(size, []).append(task.task)
    left = len(tasks) - sum(map(len, named.values()))
    if not left and len(named) == 1:
        return f"{next(iter(named))} of each task"
    told = [f"{size} of {', '.join(names)}" for size, names in named.items()]
    return "; ".join([*told, *([f"all documents{' of the others' if told else ''}"] if left else [])])


def _known(evaluations: Sequence[Mapping[str, Any]], name: str) -> str:
    """Return a program and its version, or versions; nothing where no cell tells."""
    seen = dict.fromkeys(str(one[f"{name}_version"]) for one in evaluations if f"{name}_version" in one)
    return f"{name} {' and '.join(seen)}" if seen else ""


def _models(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    models: dict[str, None] = {}
    for evaluation in evaluations:
        ensemble = (evaluation.get("config") or {}).get("deepen") or {}
        for member in ensemble.get("members") or ():
            place, dtype = str(member.get("pretrained")), member.get("dtype")
            if (digest := (member.get("files") or {}).get(place)) and Path(place).is_absolute():
                where = f"{Path(place).name} (files {digest[:12]}, {dtype})"  # where it lies tells others nothing
            else:
                where = f"{place} (revision {member.get('revision')}, {dtype})"
            models[f"{member.get('name')}: {where}"] = None
    return list(models)
