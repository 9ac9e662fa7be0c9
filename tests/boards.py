"""What tests of leaderboards do alike: write a recipe, plan it, measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lm_eval_deepen.harness.tasks import load_tasks
from lm_eval_deepen.leaderboard.cells import Cell
from lm_eval_deepen.leaderboard.execution import Key, Plan, execute, plan
from lm_eval_deepen.leaderboard.recipe import read_recipe
from lm_eval_deepen.leaderboard.table import Table, measure


def write_recipe(folder: Path, raw: dict[str, Any]) -> Path:
    """Write a recipe but for the keys without a value."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in raw.items() if value is not None}))
    return path


def planned(path: Path, out: Path, redo: bool = False) -> Plan:
    recipe = read_recipe(path)
    return plan(recipe, load_tasks(recipe.tasks, recipe.include_path, recipe.metadata), out, redo)


def executed(path: Path, out: Path, redo: bool = False) -> tuple[Plan, dict[Key, Cell]]:
    todo = planned(path, out, redo)
    return todo, execute(todo, "cpu", lambda text: None)


def measured(path: Path, out: Path, redo: bool = False) -> Table:
    return measure(*executed(path, out, redo))
