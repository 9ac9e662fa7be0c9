"""DeePEn-Adapt in a leaderboard: weights from the members' scores on the development split of each task.

Rows with ``dev_scores: measured`` are weighed before anything is evaluated on a test split: every member of theirs is
evaluated alone on the task's validation split, cell by cell as any other row, in a folder of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lm_eval_deepen.config import EnsembleConfig
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.tasks import LoadedTask, load_tasks
from lm_eval_deepen.leaderboard.cells import Cell
from lm_eval_deepen.leaderboard.execution import Key, Plan, Say, execute, plan
from lm_eval_deepen.leaderboard.recipe import LeaderboardRecipe
from lm_eval_deepen.leaderboard.rows import Row
from lm_eval_deepen.leaderboard.tuned import Tuned, kept_digits
from lm_eval_deepen.results.aggregation import to_number
from lm_eval_deepen.results.files import DEVELOPMENT, Run
from lm_eval_deepen.results.pairing import wanted_columns
from lm_eval_deepen.storage import read_text, write_text
from lm_eval_deepen.weighting.knn import Knn


def development_plan(
    recipe: LeaderboardRecipe, out: Path, redo: bool = False, built: Path | None = None
) -> Plan | None:
    """Return what is to be measured on development splits; None where no row asks for it.

    Raises:
        ConfigError: a task without a development split, or a column that is a development split already.
        ResultError: a cell is of another evaluation.
    """
    wanted: dict[str, dict[str, None]] = {}
    for row in recipe.rows:
        if row.adapts:
            for member in row.members:
                wanted.setdefault(member, {}).update(dict.fromkeys(row.tasks))
    if not wanted:
        return None
    names = {task for tasks in wanted.values() for task in tasks}
    for spec in recipe.tasks:
        if spec.task in names and spec.split == "validation":
            raise ConfigError(
                f"task {spec.task!r}: dev_scores: measured looks at its development split, which is what the recipe "
                "evaluates; remove split: validation"
            )
    rows = [replace(row, tasks=tuple(wanted[row.name])) for row in recipe.alone if row.name in wanted]
    specs = tuple(spec.replace(split="validation") for spec in recipe.tasks if spec.task in names)
    members = tuple(member for member in recipe.members if member.name in wanted)
    asked = replace(recipe, members=members, rows=tuple(rows), tasks=specs, expected=())
    tasks = load_tasks(specs, recipe.include_path, recipe.metadata)
    return plan(asked, tasks, out / DEVELOPMENT, redo, built or out / "built")


def adapted(
    recipe: LeaderboardRecipe,
    out: Path,
    device: str | None,
    say: Say,
    redo: bool = False,
    built: Path | None = None,
    when_zero: Literal["refuse", "equal"] = "refuse",
) -> LeaderboardRecipe:
    """Return the recipe with the weights of the rows that ask for measured ones; what is missing is measured.

    Where all members of a row score 0, which is no proportion, that is an error, or weights stay equal and it is said.

    Raises:
        ConfigError: scores that give no proportion, or of which lower is better.
        ResultError: a member has no score on a development split.
    """
    todo = development_plan(recipe, out, redo, built)
    if todo is None:
        return recipe
    if todo.missing:
        say(f"measuring {len(todo.missing)} scores on development splits, for weights")
    cells = execute(todo, device, say)
    for (name, column), reason in todo.failed.items():
        raise ConfigError(f"member {name!r} has no score on the development split of {column!r}: {reason}")
    by_name = {task.name: task for task in todo.tasks}
    rows = []
    for row in recipe.rows:
        if row.adapts:
            task = by_name[row.tasks[0]]
            if row.routes is None:
                config = _weighed(row, task, cells, when_zero, say)
            else:
                config = _routed(row, row.routes, task, cells, out / DEVELOPMENT)
            documents = frozenset(kept_digits(digest) for hashes in task.documents.values() for digest in hashes)
            tuned = Tuned(f"the development split of {task.name}", documents)
            row = replace(row, config=config, tuned=tuned, adapts=False, routes=None)
        rows.append(row)
    return replace(recipe, rows=tuple(rows))


def _routed(
    row: Row, options: Mapping[str, Any], task: LoadedTask, cells: Mapping[Key, Cell], folder: Path
) -> EnsembleConfig:
    """Return a row's ensemble whose router knows the development split's prompts and every member's scores on them."""
    lines = []
    for leaf in task.leaves:
        runs = [cells[member, task.name].runs()[leaf] for member in row.members]
        (_, metric, flt), *_ = wanted_columns([Run(row.members[0], folder, {leaf: runs[0]})], [leaf], task.spec.metric)
        sign = -1.0 if runs[0].results["higher_is_better"][leaf].get(metric) is False else 1.0
        tables = [run.samples.under(flt) for run in runs]
        records = [json.loads(one) for one in read_text(Path(runs[0].samples.source)).split("\n") if one.strip()]
        prompts = {record["doc_id"]: record["arguments"]["gen_args_0"]["arg_0"] for record in records}
        for key, sample in tables[0].items():
            scores = [score for table in tables if (score := to_number(table[key].values.get(metric))) is not None]
            if len(scores) < len(tables):
                raise ConfigError(f"row {row.name!r}: {metric} has no score of every document; name another metric")
            example = {"prompt": prompts[sample.doc_id], "scores": [sign * score for score in scores]}
            lines.append(json.dumps(example, ensure_ascii=False) + "\n")
    path = folder / f"router-{row.slug}.jsonl"
    write_text(path, "".join(lines))
    return row.config.replace(weighting_options=Knn(router=str(path.resolve()), **options))


def _weighed(
    row: Row, task: LoadedTask, cells: Mapping[Key, Cell], when_zero: Literal["refuse", "equal"], say: Say
) -> EnsembleConfig:
    """Return a row's ensemble with w_m = s_m / sum of s, as ``weighting: adaptive`` has it."""
    scores = [_score(cells[member, task.name], member, task) for member in row.members]
    if not any(scores) and when_zero == "equal":
        say(f"row {row.name!r}: all members score 0 on the development split; its weights are equal")
        scores = [1.0] * len(scores)
    if not any(scores):
        raise ConfigError(
            f"row {row.name!r}: all members score 0 on the development split of {task.name!r}, which is no proportion. "
            "Give it more documents (limit), or weights"
        )
    total = sum(scores)
    members = [m.replace(weight=score / total) for m, score in zip(row.config.members, scores, strict=True)]
    return row.config.replace(members=tuple(members))


def _score(cell: Cell, member: str, task: LoadedTask) -> float:
    """Return a member's score, the mean over a group's tasks."""
    runs = cell.runs()
    (_, metric, flt), *_ = wanted_columns([Run(member, cell.mark.parent, runs)], list(task.leaves), task.spec.metric)
    scores = []
    for name in task.leaves:
        values = runs[name].results
        if values["higher_is_better"][name].get(metric) is False:
            raise ConfigError(
                f"task {task.name!r}: of {metric} lower is better, and weights are in proportion to scores of which "
                "higher is better; name another metric"
            )
        said = values["results"][name].get(f"{metric},{flt}")
        if (score := to_number(said)) is None or score < 0:
            raise ConfigError(
                f"task {name!r}: {metric} of member {member!r} is {said} on the development split, and weights "
                "are in proportion to scores of at least 0; name another metric"
            )
        scores.append(score)
    return sum(scores) / len(scores)
