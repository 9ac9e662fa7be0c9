"""``lm-eval-deepen leaderboard RECIPE``: members, ensembles, methods and weightings on tasks of one's choice."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lm_eval_deepen.cli.arguments import add_table, adder, limit, pairs
from lm_eval_deepen.config.yaml_files import parse_json
from lm_eval_deepen.errors import ConfigError, ResultError
from lm_eval_deepen.storage import check_place, write_text

if TYPE_CHECKING:
    from lm_eval_deepen.leaderboard.execution import Plan
    from lm_eval_deepen.leaderboard.recipe import LeaderboardRecipe
    from lm_eval_deepen.leaderboard.table import Table

HELP = (
    "Evaluate the rows of a recipe (members alone, ensembles in every order, methods, weightings, poolings) on its "
    "tasks, cell by cell, and print one table with paired differences to the best single member, corrected over the "
    "table. Finished cells are kept, and rows of the same members share their forward passes."
)
FORMATS = ("text", "md", "json", "html")
FILES = {"md": "leaderboard.md", "json": "leaderboard.json", "html": "leaderboard.html"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    add = adder(parser)
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    add_table(parser)
    add("--format", "format of what is printed (default: %(default)s)", choices=FORMATS, default="text")
    add("--limit N", "evaluate only the first N documents of every task, for a trial", type=limit)
    add("--metadata JSON", "a JSON object for the tasks; its keys replace those of the recipe's metadata")
    add("--built DIR", "folder for the models that the recipe builds (default: OUT/built)", type=Path)
    add("--ray ADDRESS", "evaluate on a Ray cluster: auto, HOST:PORT, or local for several processes on this machine")
    add("--into FILE", "write the table into this file, between its markers", type=Path)
    add("--dry-run", "check the recipe, and list its rows and what is to be evaluated")


def run(args: argparse.Namespace) -> int:
    """Evaluate what is missing, then print and write the table."""
    from lm_eval_deepen.leaderboard import table as leaderboard_table

    if args.dry_run and args.json:
        raise ConfigError("--dry-run lists what is to do, and has no table for --json; give one of them")
    recipe = adjusted(args)
    if args.into is not None:
        leaderboard_table.check_markers(args.into)
        check_place(args.into)
    out = args.out or Path("results") / Path(args.recipe).stem
    if args.dry_run:
        print(_listing(recipe, out, args))
        return 0
    todo, table = evaluated(recipe, out, args.device, args.redo, args.built, ray=args.ray)
    args.facts = leaderboard_table.to_dict(table)
    print(leaderboard_table.rendered(table, args.format))
    if args.into is not None:
        leaderboard_table.write_into(args.into, leaderboard_table.rendered(table, "md"))
    say(f"cells, {', '.join(FILES.values())}: {out}")
    refuse_failed(todo)
    return 0


def evaluated(
    recipe: LeaderboardRecipe,
    out: Path,
    device: str | None,
    redo: bool = False,
    built: Path | None = None,
    when_zero: Literal["refuse", "equal"] = "refuse",
    ray: str | None = None,
) -> tuple[Plan, Table]:
    """Evaluate what is missing of a recipe and write its tables to `out`; return what was done, and the table.

    Development scores for measured weights are evaluated here in any case; `ray` is a cluster's address for the rest.
    """
    from lm_eval_deepen.harness.tasks import load_tasks
    from lm_eval_deepen.leaderboard import table as leaderboard_table
    from lm_eval_deepen.leaderboard.development import adapted
    from lm_eval_deepen.leaderboard.execution import execute, plan
    from lm_eval_deepen.member.devices import default_device

    here = device or default_device()
    tasks = load_tasks(recipe.tasks, recipe.include_path, recipe.metadata)
    recipe = adapted(recipe, out, here, say, redo, built, when_zero)
    todo = plan(recipe, tasks, out, redo, built)
    if ray is None:
        cells = execute(todo, here, say)
    else:
        from lm_eval_deepen.leaderboard.cluster import execute_on_ray

        cells = execute_on_ray(todo, ray, device, say)
    table = leaderboard_table.measure(todo, cells)
    for kind, name in FILES.items():
        write_text(out / name, leaderboard_table.rendered(table, kind) + "\n")
    write_text(out / leaderboard_table.DOCUMENTS, leaderboard_table.documents(todo, cells))
    return todo, table


def refuse_failed(todo: Plan) -> None:
    """Raise ResultError where a cell has no results."""
    if todo.failed:
        listed = [f"row {row!r}, task {task!r}: {reason}" for (row, task), reason in todo.failed.items()]
        count = "1 cell has" if len(listed) == 1 else f"{len(listed)} cells have"
        raise ResultError("\n".join([f"{count} no results; all others are finished.", *listed]))


def _listing(recipe: LeaderboardRecipe, out: Path, args: argparse.Namespace) -> str:
    """Return what there is to do, of rows with measured weights only once these are there."""
    from lm_eval_deepen.harness.tasks import load_tasks
    from lm_eval_deepen.leaderboard import table as leaderboard_table
    from lm_eval_deepen.leaderboard.development import adapted, development_plan
    from lm_eval_deepen.leaderboard.execution import plan

    tasks = load_tasks(recipe.tasks, recipe.include_path, recipe.metadata)
    first = development_plan(recipe, out, args.redo, args.built)
    if first is None or not first.missing:
        recipe = adapted(recipe, out, None, say, args.redo, args.built)
        return leaderboard_table.listing(plan(recipe, tasks, out, args.redo, args.built))
    others = dataclasses.replace(recipe, rows=tuple(row for row in recipe.rows if not row.adapts))
    waiting = dict.fromkeys(row.group for row in recipe.rows if row.adapts)
    told = [
        f"first, {len(first.missing)} scores on development splits, for the weights of {', '.join(waiting)}",
        leaderboard_table.listing(plan(others, tasks, out, args.redo, args.built)),
    ]
    return "\n\n".join(told)


def adjusted(args: argparse.Namespace) -> LeaderboardRecipe:
    """Return the recipe with what the command line changes."""
    from lm_eval_deepen.config.recipes import recipe_file
    from lm_eval_deepen.leaderboard.recipe import read_recipe

    members = pairs(args.member, "--member", "NAME=WHERE")
    given: Any = {} if args.metadata is None else parse_json(args.metadata, "--metadata")
    if not isinstance(given, dict):
        raise ConfigError(f"--metadata must be a JSON object; got {args.metadata}")
    recipe = read_recipe(recipe_file(args.recipe), members, given)
    if args.limit is not None:
        tasks = tuple(spec.replace(limit=args.limit) for spec in recipe.tasks)
        recipe = dataclasses.replace(recipe, tasks=tasks)
    return recipe


def say(text: str) -> None:
    """Tell the user how far it is."""
    print(text, file=sys.stderr, flush=True)
