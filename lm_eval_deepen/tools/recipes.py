"""Recipes of ensembles: ensemble files that also say on what they are evaluated, and which scores were published.

``--model_args pretrained=RECIPE.yaml`` takes them as they are; what they say beside the ensemble is for people and for
``lm-eval-deepen inspect``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator
from typing_extensions import Self

from lm_eval_deepen.config import FrozenDict, Keys, Names, Shown
from lm_eval_deepen.config.errors import unknown_key
from lm_eval_deepen.config.loading import (
    RECIPE_KEYS,
    REMEDY,
    ensemble_file,
    given,
    read_ensemble_file,
)
from lm_eval_deepen.config.recipes import Asked, read_recipe
from lm_eval_deepen.errors import ConfigError, Problems, blamed, did_you_mean

if TYPE_CHECKING:
    from lm_eval_deepen.config import EnsembleConfig


class Expected(Keys):
    """A score that was published for an ensemble."""

    task: str = Field(description="Which of the recipe's tasks.")
    score: float | None = Field(
        None, description="As published, in per cent unless `metric` says otherwise; none where no source gives it."
    )
    table: str | None = Field(None, description="Where the publication has it.")
    read_in: str | None = Field(None, description="The source the score was read in; needed with a score.")
    note: str | None = Field(None, description="What else to know; needed without a score.")
    metric: str = Field("exact_match", description="What was measured.")

    @model_validator(mode="after")
    def _says_why(self) -> Self:
        if self.score is not None and not self.read_in:
            raise ConfigError("a score needs read_in, the source it was read in", key="read_in", code="missing")
        if self.score is None and not self.note:
            raise ConfigError("without a score, a note must say why", key="note", code="missing")
        return self


class Harness(Asked):
    """Options of ``lm_eval run`` that belong to a recipe."""

    gen_kwargs: Annotated[FrozenDict | str | None, Shown("a mapping, or key=value,...")] = Field(
        None, description="Generation arguments over the tasks' own."
    )

    def given(self) -> dict[str, Any]:
        """Return what is given, as ``simple_evaluate`` takes it."""
        return {key: value for key, value in self.to_dict().items() if key in self.model_fields_set}


class RecipeKeys(Keys):
    """What a recipe says beside its ensemble, for people and for ``inspect``, without effect on an evaluation."""

    title: str = Field("", description="One line.")
    task: Names = Field((), description="Tasks or groups of tasks that it is evaluated on.")
    harness: Harness = Field(Harness(), description="Options of `lm_eval run` that belong to it.")
    expected: Annotated[tuple[Expected, ...], Shown("a list with one entry for each published score")] = Field(
        (), description="Published scores."
    )
    source: str = Field("", description="Where the ensemble is from.")
    note: str = Field("", description="What else to know.")

    @model_validator(mode="after")
    def _expects_its_tasks(self) -> Self:
        for i, entry in enumerate(self.expected):
            if entry.task not in self.task:
                raise ConfigError(
                    f"expected[{i}]: task must be one of the recipe's ({', '.join(self.task)}); got {entry.task!r}",
                    key=f"expected[{i}].task", code="value",
                )  # fmt: skip
        return self


class Recipe(RecipeKeys):
    """A recipe that was read."""

    name: str = Field(description="The file's name, or what was given inline.")
    arguments: Any = Field(description="The ensemble alone, as `--model_args` takes it.")

    @cached_property
    def config(self) -> EnsembleConfig:
        """The ensemble, checked; ConfigError where it cannot be honoured."""
        from lm_eval_deepen.host import configure

        return configure(dict(self.arguments))

    def configure(self, elsewhere: Mapping[str, str] | None = None) -> EnsembleConfig:
        """Return the ensemble, checked.

        Args:
            elsewhere: what stands for a member instead of what the recipe names: name -> folder or hub name.

        Raises:
            ConfigError: an argument that cannot be honoured, or a name in `elsewhere` that no member has.
        """
        config = self.config
        if not elsewhere:
            return config
        names = [member.name for member in config.members]
        for name in elsewhere:
            if name not in names:
                raise ConfigError(f"--member {name}: unknown.{did_you_mean(name, names)} Members: {', '.join(names)}")
        placed = [member.replace(pretrained=elsewhere.get(member.name, member.pretrained)) for member in config.members]
        return config.replace(members=tuple(placed))


def find_recipe(text: str) -> Recipe:
    """Return the recipe of a file, of a shipped recipe's name, or of what ``--model_args`` takes.

    Raises:
        ConfigError: none of these, or a recipe that says something unknown.
    """
    from lm_eval_deepen.tools.build import parse_ensemble

    arguments = parse_ensemble(text)
    file = ensemble_file(arguments.get("pretrained"))
    if file is None:
        return Recipe(name=text, arguments=arguments)
    recipe = load_recipe(file)
    inline = {key: value for key, value in arguments.items() if key != "pretrained"}
    return recipe.replace(arguments={"pretrained": str(file), **inline}) if inline else recipe


def load_recipe(path: Path) -> Recipe:
    """Read a recipe; everything it says is checked, nothing is loaded.

    Raises:
        ConfigError: naming the file, and every key that cannot be honoured.
    """
    from lm_eval_deepen.host import catalogue

    raw, arguments, problems = given(read_recipe(path, "ensemble")), read_ensemble_file(path), Problems()
    for key in arguments.keys() - catalogue().keys():
        problems.found.append(unknown_key(key, catalogue().keys() | RECIPE_KEYS, REMEDY))
        del arguments[key]
    said = RecipeKeys()
    with problems.collected():
        own = {key: value for key, value in raw.items() if key in RecipeKeys.names()}
        said = RecipeKeys(**own | ({"harness": {}} if own.get("harness") == [] else {}))
    recipe = Recipe(name=path.name, arguments=arguments, **dict(said))
    with problems.collected():
        recipe.configure()
    with blamed(str(path)):
        problems.refuse()
    return recipe
