"""The control of a distilled model: the same training on the text alone, always a row beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from lm_eval_deepen.build.distill.recipe import FUSELLM_KEYS, DistillRecipe
from lm_eval_deepen.build.recipe import BuildRecipe
from lm_eval_deepen.leaderboard.builds import BuiltRow

DISTILLED, CONTROL = "fusellm", "clm"


def with_controls(
    recipes: dict[str, BuildRecipe], rows: Sequence[BuiltRow], notes: list[str]
) -> tuple[dict[str, str], list[BuiltRow]]:
    """Return the controls of distilled models, by the names of rows in the table, and the rows to add for them.

    Continued training on a text gains most of what distilling on it gains over the base, so that a distilled model
    says little without its control. Added rows are noted in `notes`, and their recipes added to `recipes`.
    """
    groups: dict[str, list[str]] = {}
    of_row = {row.name: row.group for row in rows}
    for name in recipes:
        groups.setdefault(of_row.get(name, name), []).append(name)
    controls: dict[str, str] = {}
    added: list[BuiltRow] = []
    for group, names in list(groups.items()):
        if recipes[names[0]].method != DISTILLED:
            continue
        wanted = {name: control_of(recipes[name]) for name in names}
        same = _trainings(wanted.values())
        plain = {other: [recipes[name] for name in own] for other, own in groups.items()}
        control = next((other for other, own in plain.items() if _trainings(own) == same), None)
        if control is None:
            control = f"{group}, control"
            notes.append(f"{control}: added to the rows, the training of {group} on its text alone (method: clm)")
            for name, recipe in wanted.items():
                seed = name.removeprefix(group)  # ", seed 1"
                recipes[control + seed] = recipe
                added.append(BuiltRow(control + seed, control, recipe))
            groups[control] = [control + name.removeprefix(group) for name in names]
        controls[group] = control
    return controls, added


def control_of(recipe: BuildRecipe) -> BuildRecipe:
    """Return the recipe of the same training without sources."""
    content = {key: value for key, value in recipe.content.items() if key not in FUSELLM_KEYS}
    return replace(recipe, content={**content, "method": CONTROL}, title=f"The control of {recipe.title}", note="")


def _trainings(recipes: Iterable[BuildRecipe]) -> list[str]:
    """Return what decides some trainings on text alone, in one order; nothing of other builds."""
    return sorted(repr(_training(recipe)) for recipe in recipes if recipe.method == CONTROL)


def _training(recipe: BuildRecipe) -> dict[str, Any]:
    """Return what decides a training, defaults spelt out."""
    config = DistillRecipe.read({**recipe.content, "seed": recipe.seed})
    place = recipe.content.get("models", {}).get(config.target, config.target)
    return {**config.identity(), "target": place, "text": [str(recipe.folder / text) for text in recipe.texts]}
