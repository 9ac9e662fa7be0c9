"""Published tables run again: any recipe as a leaderboard, and what is measured beside what was published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_deepen.config.files import read_ensemble_file
from lm_eval_deepen.config.keys import given
from lm_eval_deepen.config.recipes import read_recipe
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.ensemble_recipe import load_recipe
from lm_eval_deepen.harness.model import catalogue
from lm_eval_deepen.harness.tasks import generation_arguments
from lm_eval_deepen.leaderboard.published import AGREES, DISTANCE, PUBLISHED, Verdict, distance, verdict
from lm_eval_deepen.leaderboard.table import Table
from lm_eval_deepen.results.report import number
from lm_eval_deepen.results.tables import aligned, literal, markdown_table, printable

ENSEMBLE = "ensemble"  # the name of an ensemble recipe's row
_ALIKE = ("batch_size", "chat_fallback", "hf_kwargs")  # keys of an ensemble that its members alone need, too


def leaderboard_keys(path: Path) -> dict[str, Any]:
    """Return the keys of a leaderboard: a leaderboard's own, or those of an ensemble beside its members alone.

    Raises:
        ConfigError: a recipe of another kind, or one that says no task.
    """
    raw = given(read_recipe(path, "leaderboard", "ensemble"))
    if raw.keys() & {"tasks", "grid", "rows"}:
        return raw
    recipe, keys = load_recipe(path), read_ensemble_file(path)
    if not recipe.task:
        raise ConfigError(f"{path}: the recipe says no task; add `task`", key="task")
    names = [member.name for member in recipe.configure().members]
    listed = keys.pop("members", [keys.get("pretrained")])  # without members, the main one alone
    members = [
        {**({"pretrained": one} if isinstance(one, str) else one), "name": name}
        for one, name in zip(listed, names, strict=True)
    ]
    weights = [member.pop("weight", None) for member in members]
    keys.pop("pretrained", None)
    if all(weight is not None for weight in weights):
        keys["weights"] = weights
    alike = {key: keys.pop(key) for key in list(keys) if key in {*_ALIKE, *catalogue().loading_keys}}
    tables = [
        {
            "table": entry.table or recipe.title or path.stem,
            "read_in": entry.read_in,
            "metric": entry.metric,
            "scores": {entry.task: {ENSEMBLE: entry.score}},
        }
        for entry in recipe.expected
        if entry.score is not None
    ]
    metrics: dict[str, dict[str, None]] = {}
    for entry in recipe.expected:
        metrics.setdefault(entry.task, {})[entry.metric] = None
    asked = recipe.harness.given()
    if "gen_kwargs" in asked:
        asked["gen_kwargs"] = generation_arguments(asked["gen_kwargs"])
    return {
        "title": recipe.title or path.stem,
        "members": members,
        "common": alike,
        "rows": [{"name": ENSEMBLE, "members": names, **keys}],
        "tasks": [{"task": task, **({"metric": [*metrics[task]]} if task in metrics else {})} for task in recipe.task],
        "expected": tables,
        **asked,
    }


@dataclass(frozen=True)
class Reproduced:
    """One score beside the published one."""

    row: str  # the system
    column: str  # task and metric
    published: float | None  # as published, in the metric's unit; None where it was not
    measured: float  # the score here
    stderr: float | None  # its standard error, over documents
    distance: float | None  # measured less published, in standard errors; None where these are not known

    @property
    def verdict(self) -> Verdict | None:
        """Whether they agree within two standard errors; None without a published score."""
        return None if self.published is None else verdict(self.distance)


def reproduced(table: Table) -> list[Reproduced]:
    """Return every measured score with the published one, where there is one."""
    rows = [
        Reproduced(row.system, row.column, row.extra.get(PUBLISHED), row.score, row.stderr, row.extra.get(DISTANCE))
        for row in table.rows
    ]
    for one in table.reported:
        away = None if one.published is None else distance(one.score, one.stderr, 0, one.published)
        rows.append(Reproduced(one.system, one.column, one.published, one.score, one.stderr, away))
    return rows


def to_dict(table: Table, stands_in: bool) -> dict[str, Any]:
    """Return the comparison as JSON data."""
    entries = [{**vars(one), "verdict": one.verdict} for one in reproduced(table)]
    return {"title": table.recipe.title, "miniature": stands_in, "agrees_within": AGREES, "rows": entries}


def rendered(table: Table, stands_in: bool, markdown: bool = False) -> str:
    """Return published, measured, difference and verdict of every score, in the metric's unit."""
    lines = [["system", "task", "published", "measured", "difference", "in SE", "verdict"]]
    for one in reproduced(table):
        known = "-" if one.published is None else number(one.published)
        apart = "-" if one.published is None else f"{one.measured - one.published:+.4f}"
        away = "-" if one.distance is None else f"{one.distance:+.1f}"
        lines.append([one.row, one.column, known, number(one.measured), apart, away, one.verdict or "-"])
    told = [
        f"verdict: a measured score agrees with the published one within {AGREES:g} standard errors over documents."
    ]
    if stands_in:
        told.append("Miniature: other models and few documents, so that differences and verdicts mean nothing.")
    title = table.recipe.title
    if markdown:
        return "\n\n".join([f"### {literal(title)}", markdown_table(lines), *told])
    return "\n\n".join([printable(title), aligned(lines, left=2), "\n".join(told)])


def summary(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return how many scores agree, in a sentence."""
    counts = {word: sum(entry["verdict"] == word for entry in entries) for word in ("agrees", "differs")}
    known = sum(entry["published"] is not None for entry in entries)
    return f"Of {known} published scores {counts['agrees']} agree, {counts['differs']} differ."
