"""``lm-eval-deepen reproduce RECIPE``: a published table, run again cell by cell, beside what was published."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_deepen.cli.arguments import add_table, adder, count, pairs
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.storage import write_json, write_text

if TYPE_CHECKING:
    from lm_eval_deepen.leaderboard.recipe import LeaderboardRecipe
    from lm_eval_deepen.preflight.report import Report

HELP = (
    "Run the table of a recipe: an ensemble and its members alone, or a leaderboard. The command checks tokenizers, "
    "memory, data and revisions, says what the table needs, evaluates it cell by cell, and prints published score, "
    "measured score, difference and verdict. Finished cells are kept, as by `leaderboard`. --miniature runs the "
    "same rows and columns with small models and a few documents."
)
DATA = "LM_EVAL_DEEPEN_DATA"
JSON, MARKDOWN = "reproduction.json", "reproduction.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    add = adder(parser)
    parser.add_argument("recipe", help="a YAML file of kind ensemble or leaderboard, or the name of a shipped one")
    add_table(parser)
    add("--miniature", "use small models and few documents, synthetic ones where there is no sample")
    add("--models MODEL ...", "models of a miniature; its members get them in turn (default: the demo's)")
    add("--limit N", "evaluate only the first N documents of every task (miniature: 4)", type=count)
    add("--dry-run", "check, say what is needed, and evaluate nothing")
    add("--no-check", "leave out the check of tokenizers, memory and data")


def run(args: argparse.Namespace) -> int:
    """Check, evaluate what is missing, and print the comparison."""
    if args.models and not args.miniature:
        raise ConfigError("--models are those of a miniature; add --miniature, or replace a member with --member")
    if args.dry_run and args.json:
        raise ConfigError("--dry-run has no table for --json; give one of them")
    recipe, out = asked(args)
    with _data_folder(recipe):
        from lm_eval_deepen.cli.leaderboard import evaluated, refuse_failed, say
        from lm_eval_deepen.leaderboard import reproduction

        report = None if args.no_check else checked(recipe, args.device)
        print("\n".join(needs(recipe, report)) + "\n")
        if report is not None and report.problems:
            args.facts = {"problems": [str(problem) for problem in report.problems]}
            numbered = [f"  {n}. {problem}" for n, problem in enumerate(report.problems, 1)]
            print("\n".join(["cannot run it here:", *numbered, "--no-check runs it all the same"]))
            return 1
        if args.dry_run:
            return 0
        todo, table = evaluated(recipe, out, args.device, args.redo, when_zero="equal" if args.miniature else "refuse")
        args.facts = data = reproduction.to_dict(table, args.miniature)
        write_json(out / JSON, data)
        write_text(out / MARKDOWN, reproduction.rendered(table, args.miniature, markdown=True) + "\n")
        print(reproduction.rendered(table, args.miniature))
        if not args.miniature:
            print(reproduction.summary(data["rows"]))
        say(f"cells, {JSON}, {MARKDOWN}, leaderboard.md: {out}")
        refuse_failed(todo)
        return 0


@contextlib.contextmanager
def _data_folder(recipe: LeaderboardRecipe) -> Iterator[None]:
    """Let groups of tasks, which look at the variable alone, find a miniature's data."""
    before = os.environ.get(DATA)
    if folder := recipe.metadata.get("data_dir"):
        os.environ[DATA] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(DATA, None)
        os.environ |= {} if before is None else {DATA: before}


def asked(args: argparse.Namespace) -> tuple[LeaderboardRecipe, Path]:
    """Return the recipe as a leaderboard with what the command line changes, and where its results go."""
    from lm_eval_deepen.config.recipes import recipe_file
    from lm_eval_deepen.errors import blamed
    from lm_eval_deepen.leaderboard import miniature
    from lm_eval_deepen.leaderboard.recipe import parse_recipe
    from lm_eval_deepen.leaderboard.reproduction import leaderboard_keys

    path = recipe_file(args.recipe)
    raw, told = leaderboard_keys(path), {}
    out = args.out or Path("results") / (path.stem + ("-miniature" if args.miniature else ""))
    if args.miniature:
        with blamed(str(path)):
            parse_recipe(raw, path, {}, {})  # says what is wrong with the recipe itself
        raw = miniature.miniature(raw, args.models or small_models(), args.limit or 4)
        given = os.environ.get(DATA)
        made = miniature.sample_data(out / "data", Path(given).expanduser() if given else None)
        print(f"synthetic documents, which say nothing: {', '.join(made) or 'none'} (samples come from {DATA})\n")
        told = {"data_dir": str((out / "data").resolve())}
    with blamed(str(path)):
        recipe = parse_recipe(raw, path, pairs(args.member, "--member", "NAME=WHERE"), told)
    if args.limit is not None:
        recipe = dataclasses.replace(recipe, tasks=tuple(spec.replace(limit=args.limit) for spec in recipe.tasks))
    return recipe, out


def small_models() -> list[str]:
    """Return a miniature's models: the demo's, from their packages where these are installed, else from the hub."""
    from lm_eval_deepen.build.demo_models import DEMO_MODELS, is_available, prepare
    from lm_eval_deepen.leaderboard.miniature import MODELS

    return [
        str(prepare(model)) if is_available(model) else name for model, name in zip(DEMO_MODELS, MODELS, strict=True)
    ]


def checked(recipe: LeaderboardRecipe, device: str | None) -> Report | None:
    """Return the pre-flight report on all members together, with the options of the largest ensemble.

    None where all members are yet to be built.
    """
    from lm_eval_deepen.harness.ensemble_recipe import EnsembleRecipe
    from lm_eval_deepen.preflight.cost import Machine
    from lm_eval_deepen.preflight.report import Plan, report_on

    largest = max(recipe.rows, key=lambda row: len(row.members))
    members = [member for member in recipe.members if member.name not in recipe.builds.recipes]
    if not members:
        return None
    first = [member for name in largest.members for member in members if member.name == name]
    ordered = [*first, *(member for member in members if member not in first)]
    config = largest.config.replace(members=tuple(one.replace(weight=1 / len(ordered)) for one in ordered))
    asked = EnsembleRecipe(
        name=recipe.source, title=recipe.title, task=tuple(spec.task for spec in recipe.tasks), arguments={}
    )
    tasks = not recipe.metadata  # a miniature's data are its own
    return report_on(asked, config, Plan(device, None, None, tasks, Machine(2000e9, 150e12)))


def needs(recipe: LeaderboardRecipe, report: Report | None) -> list[str]:
    """Return what a table needs, in lines: models and revisions, cells; memory and hours where they were checked."""
    from lm_eval_deepen.preflight.text import memory

    cells = [(row, spec) for row in recipe.rows for spec in recipe.tasks if row.has(spec.task)]
    told = [f"{recipe.title}: {len(recipe.rows)} rows, {len(recipe.tasks)} tasks, {len(cells)} cells"]
    for member in recipe.members:
        revision = member.loading_dict().get("revision")
        told.append(
            f"  {member.name}: {member.pretrained}, " + (f"revision {revision}" if revision else "its newest revision")
        )
    if report is None:
        return told
    told.append(memory(report))
    if report.hours is not None and report.members:
        passes = sum(len(row.members) for row, _ in cells) / (len(report.members) * len(recipe.tasks))
        told.append(
            f"at most about {report.hours * passes:,.1f} hours at one A100's bandwidth, without loading and fusing"
        )
    told += [f"note: {note}" for note in report.notes]
    return [line for line in told if line]
