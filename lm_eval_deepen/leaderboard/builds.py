"""Models that a leaderboard builds from others: merges and distillations, as members or as rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from lm_eval_deepen.build.architecture import IncompatibleError
from lm_eval_deepen.build.merge import check_inputs
from lm_eval_deepen.build.merge_config import require
from lm_eval_deepen.build.provenance import lineage, read_provenance, tasks_of
from lm_eval_deepen.build.publish import build
from lm_eval_deepen.build.recipe import BuildRecipe, parse_build, read_build
from lm_eval_deepen.build.texts import ANYWHERE, TASK, TaskSource, task_hashes
from lm_eval_deepen.config import Keys, Shown
from lm_eval_deepen.config.recipes import LARGEST_SEED
from lm_eval_deepen.errors import ConfigError, blamed
from lm_eval_deepen.leaderboard.tuned import refuse_overlap

if TYPE_CHECKING:
    from lm_eval_deepen.harness.tasks import LoadedTask
    from lm_eval_deepen.member import Member

PREFIX = "built:"  # of `pretrained`, where a model is yet to be built
SEEDS = (0, 1, 2)  # of rows that draw at random


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds) or not seeds or min(seeds) < 0 or max(seeds) > LARGEST_SEED:
        raise ValueError(seeds)
    return seeds


class BuiltRowKeys(Keys):
    """Keys of a row that is built. Keys of the model go into `build`, loading arguments into `common`."""

    build: Annotated[Any, Shown("a recipe's file, a mapping with `recipe` and the keys that differ, or a recipe")] = (
        Field(description="How the model is made.")
    )
    name: str | None = Field(None, description="The row's name; by default that of the recipe's file.")
    seeds: Annotated[
        Annotated[tuple[int, ...], AfterValidator(_different)] | None,
        Shown(f"different whole numbers from 0 to {LARGEST_SEED}", "0, 1 and 2 where something is drawn at random"),
    ] = Field(
        None, description="The seeds with which the model is built, one evaluation for each. The table has their mean."
    )


@dataclass(frozen=True)
class BuiltRow:
    """A row of a built model."""

    name: str  # of the row; of one of several seeds, with the seed
    group: str  # the row of the table, which is the mean over seeds
    recipe: BuildRecipe  # how the model is built


@dataclass(frozen=True, eq=False)
class Builds:
    """What a leaderboard builds."""

    recipes: Mapping[str, BuildRecipe] = field(default_factory=dict)  # by the name of the member or row
    places: Mapping[str, str] = field(default_factory=dict)  # where the other members are, by name
    tasks: TaskSource = ANYWHERE  # where the leaderboard's tasks are; recipes may have further ones
    # the row that is the control of a distilled one, by the names that the table has
    controls: Mapping[str, str] = field(default_factory=dict)
    _identities: dict[str, str] = field(default_factory=dict)

    def pretrained(self, name: str) -> str:
        """Return what stands for a model until it is built: the same wherever the leaderboard is kept."""
        return f"{PREFIX}{self.recipes[name].sha256[:16]}"

    def needed(self, names: Iterable[str]) -> list[str]:
        """Return the built models among `names`, after those that they are made from; ConfigError for a ring."""
        order: list[str] = []

        def visit(name: str, path: tuple[str, ...]) -> None:
            if name in path:
                ring = " <- ".join([*path, name])
                raise ConfigError(f"built models are made from each other: {ring}; break the ring")
            if name not in self.recipes or name in order:
                return
            for source in self.recipes[name].models:
                visit(source, (*path, name))
            order.append(name)

        for name in names:
            visit(name, ())
        return order

    def identity(self, name: str) -> str:
        """Return the digest of what decides a built model's weights, before it is built."""
        for each in self.needed([name]):
            if each not in self._identities:
                recipe = self.recipes[each]
                unbuilt = {other: self.pretrained(other) for other in self.recipes}
                self._identities[each] = recipe.identity({**self.places, **unbuilt}, self._identities)
        return self._identities[name]

    def incompatible(self, names: Iterable[str]) -> str | None:
        """Return why one of these models cannot be merged; None where all can, or are none of ours."""
        for name in self.needed(names):
            recipe = self.recipes[name]
            if recipe.is_merge:
                try:
                    check_inputs(recipe, {each: self._origin(each, recipe) for each in recipe.models})
                except IncompatibleError as error:
                    return str(error)
        return None

    def make(
        self,
        names: Iterable[str],
        folder: Path,
        say: Callable[[str], None],
        mend: bool = False,
        device: str | None = None,
    ) -> dict[str, Path]:
        """Build what is missing among `names` and what they are made from, or damaged; return the folders.

        With `mend`, what is damaged is built again, which is an error else. On `device` trains whose recipe names none;
        of several GPUs on the first. What another process is building is waited for.

        Raises:
            DeepenError: a model that cannot be built, by its name; what is built is kept.
        """
        order = self.needed(names)
        for name in order:
            if self.recipes[name].is_merge:
                with blamed(self.recipes[name].source):
                    require()  # before hours of training
        places: dict[str, Path] = {}
        for name in order:
            identity = self.identity(name)
            out = self.folder(name, folder)
            members = {**self.places, **{built: str(place) for built, place in places.items()}}
            recipe = self.recipes[name]
            if device and not recipe.is_merge and recipe.content.get("device") is None:
                recipe = replace(recipe, content={**recipe.content, "device": re.sub(r":\d+$", ":0", device)})
            with blamed(repr(name)):
                build(recipe, out, members, identity=identity, mend=mend, wait=True, say=say)
            places[name] = out
        return places

    def folder(self, name: str, root: Path) -> Path:
        """Return where a built model is kept below a folder."""
        slug = re.sub(r"[^\w.+=-]+", "_", name).strip("_.") or "model"
        return root / f"{slug}-{self.identity(name)[:12]}"

    def trained_on(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return the tasks on whose documents models were trained, or what they are made from, by model."""
        trained: dict[str, list[str]] = {}
        built = self.needed(names)
        for name in dict.fromkeys([*names, *built, *(each for one in built for each in self.recipes[one].models)]):
            if name in self.recipes:
                tasks = [text.removeprefix(TASK) for text in self.recipes[name].texts if text.startswith(TASK)]
            else:
                tasks = tasks_of(self.places.get(name, name))
            trained |= {name: tasks} if tasks else {}
        return trained

    def _origin(self, name: str, recipe: BuildRecipe) -> str:
        """Return the place of a model with the architecture of `name`."""
        while name in self.recipes:
            recipe = self.recipes[name]
            name = recipe.architecture_of
        return recipe.place(name, self.places)


def take_build(value: Any, folder: Path, where: str) -> BuildRecipe:
    """Return the recipe that a `build` names: a file, a mapping with `recipe` and changes, or a recipe itself."""
    file = value.get("recipe") if isinstance(value, Mapping) else value
    if isinstance(file, str):
        changes = {key: item for key, item in value.items() if key != "recipe"} if isinstance(value, Mapping) else {}
        with blamed(where):
            return read_build(file, changes, folder)
    if isinstance(value, Mapping) and "recipe" not in value:
        return parse_build(value, where, folder)
    raise ConfigError(
        f"{where}: build must be a recipe's file, a mapping with `recipe` and the keys that differ, or a recipe; got "
        f"{value!r}"
    )


def name_of(name: str | None, value: Any, where: str) -> str:
    """Return the name of a built member or row, which is by default that of the recipe's file."""
    file = value.get("recipe") if isinstance(value, Mapping) else value
    name = name or (Path(file).stem if isinstance(file, str) else "")
    if not name.strip():
        raise ConfigError(f"{where}: what is built from a recipe in place needs a name; got {value!r}")
    return name


def built_rows(spec: Mapping[str, Any], folder: Path, where: str) -> list[BuiltRow]:
    """Return the rows of a built model, one for each seed; ConfigError for too few of them."""
    with blamed(where):
        keys = BuiltRowKeys.read(spec)
    group, recipe = name_of(keys.name, keys.build, where), take_build(keys.build, folder, where)
    seeds: Sequence[int] = keys.seeds or (SEEDS if recipe.is_random else (recipe.seed,))
    if recipe.is_random and len(seeds) < len(SEEDS):
        raise ConfigError(
            f"row {group!r}: {recipe.method} draws at random, and one draw says little: give at least {len(SEEDS)} "
            f"seeds; got {list(seeds)}"
        )
    if recipe.is_merge and not recipe.is_random and len(seeds) > 1:
        raise ConfigError(
            f"row {group!r}: {recipe.method} draws nothing, so that all seeds give one model; leave seeds out"
        )
    if len(seeds) == 1:
        return [BuiltRow(group, group, replace(recipe, seed=seeds[0]))]
    return [BuiltRow(f"{group}, seed {seed}", group, replace(recipe, seed=seed)) for seed in seeds]


def refuse_trained(builds: Builds, names: Iterable[str], task: LoadedTask) -> None:
    """Raise ConfigError for a row on documents that one of its models was trained on."""
    for name, trained in builds.trained_on(names).items():
        for other in trained:
            for leaf, hashes in task.documents.items():
                own = task_hashes(other, builds.recipes[name].tasks if name in builds.recipes else builds.tasks)
                refuse_overlap(f"model {name!r}, trained on {TASK}{other},", own, leaf, hashes)


def facts_of(members: Sequence[Member]) -> dict[str, Any]:
    """Return what a row's models are: parameters of all of them, and the trainings known of them."""
    trained: dict[str, int] = {}
    said: dict[str, Any] = {}
    for member in members:
        place = member.config.pretrained
        trained |= lineage(place)
        if provenance := read_provenance(Path(place)):
            said[member.name] = provenance
    tensors = {id(tensor): tensor for member in members for tensor in member.lm.model.parameters()}
    count = sum(tensor.numel() for tensor in tensors.values())  # of members that share a model, once
    return {"parameters": count, "training_tokens": sum(trained.values()), "models": len(members), "built": said}


def take_rows(
    listed: Iterable[Mapping[str, Any]], folder: Path, recipes: dict[str, BuildRecipe]
) -> tuple[list[BuiltRow], list[Mapping[str, Any]]]:
    """Return the rows that are built, and the other ones; recipes are added by name."""
    rows: list[BuiltRow] = []
    others = []
    for i, spec in enumerate(listed):
        if "build" not in spec:
            others.append(spec)
            continue
        groups = {row.group for row in rows}
        for row in built_rows(spec, folder, f"rows[{i}]"):
            if row.name in recipes or row.group in groups:
                raise ConfigError(f"rows[{i}]: two models are built by the name {row.group!r}; give one another")
            recipes[row.name] = row.recipe
            rows.append(row)
    return rows, others
