"""Recipes of ensembles: ensemble files that also name tasks and published scores.

``--model_args pretrained=RECIPE.yaml`` takes them as they are; what they say beside the ensemble is for people and for
``lm-eval-deepen inspect``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from lm_eval_deepen.config.files import ensemble_file, read_ensemble_file
from lm_eval_deepen.config.keys import given
from lm_eval_deepen.config.recipes import RecipeKeys, read_recipe
from lm_eval_deepen.config.yaml_files import parse_json, refuse_repeated
from lm_eval_deepen.errors import ConfigError, Problems, blamed, did_you_mean

if TYPE_CHECKING:
    from lm_eval_deepen.config import EnsembleConfig


class EnsembleRecipe(RecipeKeys):
    """A recipe that was read."""

    name: str = Field(description="The file's name, or what was given inline.")
    arguments: Any = Field(description="The ensemble alone, as `--model_args` takes it.")

    @cached_property
    def config(self) -> EnsembleConfig:
        """The ensemble, checked; ConfigError where it cannot be honoured."""
        from lm_eval_deepen.harness.model import configure

        return configure(dict(self.arguments))

    def configure(self, elsewhere: Mapping[str, str] | None = None) -> EnsembleConfig:
        """Return the ensemble, checked; `elsewhere` names the place of a member instead of the recipe's."""
        config = self.config
        if not elsewhere:
            return config
        names = [member.name for member in config.members]
        for name in elsewhere:
            if name not in names:
                raise ConfigError(f"--member {name}: unknown.{did_you_mean(name, names)} Members: {', '.join(names)}")
        placed = [member.replace(pretrained=elsewhere.get(member.name, member.pretrained)) for member in config.members]
        return config.replace(members=tuple(placed))


def parse_ensemble(text: str) -> dict[str, Any]:
    """Return model arguments from a file name, a JSON object or ``key=value,...``."""
    if text.lstrip().startswith("{"):
        return parse_json(text, "the ensemble")
    if "=" in text and not os.path.isfile(text):
        from lm_eval.utils import simple_parse_args_string

        refuse_repeated(text, "the ensemble")
        return simple_parse_args_string(text)
    return {"pretrained": text}


def find_recipe(text: str) -> EnsembleRecipe:
    """Return the recipe of a file, of a shipped recipe's name, or of what ``--model_args`` takes."""
    arguments = parse_ensemble(text)
    file = ensemble_file(arguments.get("pretrained"))
    if file is None:
        return EnsembleRecipe(name=text, arguments=arguments)
    recipe = load_recipe(file)
    inline = {key: value for key, value in arguments.items() if key != "pretrained"}
    return recipe.replace(arguments={"pretrained": str(file), **inline}) if inline else recipe


def load_recipe(path: Path) -> EnsembleRecipe:
    """Read a recipe; everything it says is checked, nothing is loaded."""
    from lm_eval_deepen.harness.model import catalogue

    raw, arguments, problems = given(read_recipe(path, "ensemble")), read_ensemble_file(path), Problems()
    for key in [key for key in arguments if key not in catalogue().keys()]:
        problems.errors.append(catalogue().unknown(key, RecipeKeys.names()))
        del arguments[key]
    said = RecipeKeys()
    with problems.collected():
        own = {key: value for key, value in raw.items() if key in RecipeKeys.names()}
        said = RecipeKeys(**own | ({"harness": {}} if own.get("harness") == [] else {}))
    recipe = EnsembleRecipe(name=path.name, arguments=arguments, **dict(said))
    with problems.collected():
        recipe.configure()
    with blamed(str(path)):
        problems.refuse()
    return recipe
