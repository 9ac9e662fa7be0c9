"""``lm-eval-deepen methods``: what an ensemble can be made of, and what every option means."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_deepen.cli.arguments import add_json, adder
from lm_eval_deepen.results.tables import markdown_table

if TYPE_CHECKING:
    from lm_eval_deepen.config import Keys, Registry

HELP = "List the values of the keys method, weighting and pooling of an ensemble, and the options of each."
WIDTH = 110
HEAD = """\
# Options

This page lists all keys of ensembles and recipes. `lm-eval-deepen methods --markdown` writes it.

Give the keys of an ensemble inline (`--model_args pretrained=A,members=A+B,rows=prefix`), as JSON, or in a YAML file
(`--model_args pretrained=ensemble.yaml`), all at one level. A member also takes every loading argument of `--model hf`
(`dtype`, `revision`, `device`, `parallelize`, `peft`, `gguf_file`, `trust_remote_code`, ...). Beside `members`, such an
argument holds for all members. A key that is unknown, or that has no effect beside the others, is an error.
"""


@dataclass(frozen=True)
class Section:
    """Keys that belong together."""

    kind: str  # what they belong to, as ``method`` or ``ensemble``
    name: str  # which of the kind; empty where there is one
    about: str  # one line
    paper: str  # where it is from, ``none`` for nowhere
    keys: type[Keys]  # the class that holds them

    def options(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the facts of every option by its name."""
        from lm_eval_deepen.config.describe import allowed, choices, default
        from lm_eval_deepen.config.schema import Composition
        from lm_eval_deepen.harness.model import catalogue

        named = catalogue().kinds if self.keys is Composition else {}
        for name, field in self.keys.model_fields.items():
            yield (
                name,
                {
                    "type": " or ".join(named[name]) if name in named else allowed(field),
                    "choices": list(named[name]) if name in named else choices(field),
                    "required": field.is_required(),
                    "default": default(field),
                    "about": field.description or "",
                },
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes; its help ends with the list itself."""
    add = adder(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = listing().replace("%", "%%")
    add("--all", "list all keys of ensembles, members and recipes, with their meaning")
    add_json(parser)
    add("--markdown", "print everything as the page docs/options.md")


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    args.facts = catalogue()
    print(markdown() if args.markdown else listing(everything=args.all))
    return 0


def chosen() -> list[Section]:
    """Return the methods, weightings and poolings."""
    from lm_eval_deepen.fusion import METHODS
    from lm_eval_deepen.pooling import POOLINGS
    from lm_eval_deepen.weighting import WEIGHTINGS

    return [section for registry in (METHODS, WEIGHTINGS, POOLINGS) for section in _of(registry)]


def all_sections() -> list[Section]:
    """Return all keys that a person can give anywhere, those of ensembles first."""
    from lm_eval_deepen.build.distill import DistillRecipe
    from lm_eval_deepen.build.recipe import BuildKeys
    from lm_eval_deepen.config.recipes import Expected, Harness, RecipeKeys
    from lm_eval_deepen.config.schema import Composition, LoadingKeys, MemberKeys, Settings
    from lm_eval_deepen.harness.tasks import TaskSpec
    from lm_eval_deepen.leaderboard.builds import BuiltRowKeys
    from lm_eval_deepen.leaderboard.published import PublishedTable
    from lm_eval_deepen.leaderboard.recipe import LeaderboardKeys
    from lm_eval_deepen.leaderboard.rows import Grid
    from lm_eval_deepen.solvers import SOLVERS

    def plain(kind: str, name: str, keys: type[Keys]) -> Section:
        return Section(kind, name, (inspect.getdoc(keys) or "").splitlines()[0], "none", keys)

    return [
        plain("ensemble", "what it is made of", Composition),
        plain("ensemble", "settings", Settings),
        plain("member", "", MemberKeys),
        plain("member", "loading arguments that are checked", LoadingKeys),
        *chosen(),
        *_of(SOLVERS),
        plain("recipe of kind ensemble", "", RecipeKeys),
        plain("recipe of kind ensemble", "an entry of expected", Expected),
        plain("recipe of kind ensemble", "harness", Harness),
        plain("recipe of kind leaderboard", "", LeaderboardKeys),
        plain("recipe of kind leaderboard", "an entry of tasks", TaskSpec),
        plain("recipe of kind leaderboard", "an entry of expected", PublishedTable),
        plain("recipe of kind leaderboard", "grid", Grid),
        plain("recipe of kind leaderboard", "an entry of rows that is built", BuiltRowKeys),
        plain("recipe of kind merge or distill", "", BuildKeys),
        plain("recipe of kind distill", "", DistillRecipe),
    ]


def _of(registry: Registry) -> Iterator[Section]:
    for name, entry in registry.items():
        module = inspect.getmodule(entry.options)
        about = (inspect.getdoc(module) or inspect.getdoc(entry.options) or "").splitlines() or [""]
        yield Section(registry.kind, name, about[0], entry.paper, entry.options)


def catalogue() -> dict[str, dict[str, Any]]:
    """Return, by kind and name: paper, what it is, and the facts of every option."""
    kinds: dict[str, dict[str, Any]] = {}
    for section in all_sections():
        facts = {"paper": section.paper, "about": section.about, "options": dict(section.options())}
        kinds.setdefault(section.kind, {})[section.name] = facts
    return kinds


def listing(everything: bool = False) -> str:
    """Return methods, weightings and poolings with their options as text; with `everything`, all keys and meanings."""
    lines: list[str] = []
    kind = ""
    for section in all_sections() if everything else chosen():
        lines += [f"{section.kind}:"] if section.kind != kind else []
        kind = section.kind
        source = "" if section.paper == "none" else f" [{section.paper}]"
        lines.append(f"  {section.name}: {section.about}{source}" if section.name else f"  {section.about}")
        for option, facts in section.options():
            default = f" ({_default(facts)})" if _default(facts) else ""
            lines.append(f"      {option}: {facts['type']}{default}")
            if everything:
                lines += textwrap.wrap(facts["about"], WIDTH, initial_indent=" " * 10, subsequent_indent=" " * 10)
    return "\n".join(lines)


def _default(facts: dict[str, Any]) -> str:
    if facts["required"]:
        return "required"
    return f"default {facts['default']}" if facts["default"] else ""


def markdown() -> str:
    """Return all keys as a page."""
    parts = [HEAD]
    kind = ""
    for section in all_sections():
        if section.kind != kind:
            parts.append(f"## {section.kind[0].upper()}{section.kind[1:]}\n")
            kind = section.kind
        source = "" if section.paper == "none" else f" ({section.paper})"
        if section.name:
            named = section.kind in ("method", "weighting", "pooling", "inverse")
            parts.append(f"### {f'`{section.name}`' if named else section.name[0].upper() + section.name[1:]}\n")
        parts.append(f"{section.about}{source}\n")
        rows = [
            [f"`{name}`", facts["type"], _default(facts).removeprefix("default "), facts["about"]]
            for name, facts in section.options()
        ]
        if rows:
            table = markdown_table([["key", "values", "default", "meaning"], *rows], left=4, code=True)
            parts.append(f"{table}\n")
    return "\n".join(parts).rstrip()
