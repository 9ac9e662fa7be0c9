"""The recipe of a leaderboard: members, rows and tasks, checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from lm_eval_deepen.build import BuildRecipe
from lm_eval_deepen.build.texts import TaskSource, task_folders
from lm_eval_deepen.config import FrozenDict, Keys, MemberConfig, Names, Shown
from lm_eval_deepen.config.files import beside
from lm_eval_deepen.config.frozen import thaw
from lm_eval_deepen.config.keys import given
from lm_eval_deepen.config.recipes import LARGEST_SEED
from lm_eval_deepen.config.recipes import read_recipe as read_keys
from lm_eval_deepen.config.schema import QUOTE
from lm_eval_deepen.errors import ConfigError, Problems, blamed, did_you_mean
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.harness.tasks import Asking, TaskSpec
from lm_eval_deepen.leaderboard.builds import Builds, name_of, take_build, take_rows
from lm_eval_deepen.leaderboard.controls import with_controls
from lm_eval_deepen.leaderboard.published import PublishedTable, check_published
from lm_eval_deepen.leaderboard.rows import Grid, Row, built_row, expand, member_row
from lm_eval_deepen.results.files import DEVELOPMENT
from lm_eval_deepen.results.statistics.paired import MOST_RESAMPLES

# What else lies in a leaderboard's folder, beside those of its rows.
OURS = ("built", DEVELOPMENT, "data", "documents.html", *(f"leaderboard.{end}" for end in ("md", "json", "html")))
_BESIDE = ("revision", "subfolder", "variant", "gguf_file", "peft", "delta", "tokenizer")  # what else a member is
DEFAULT_SEEDS = (0, 1234, 1234, 1234)  # of `lm_eval run`: random, numpy, torch, few-shots


def _seeds(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(value) not in (1, 4) or not all(0 <= seed <= LARGEST_SEED for seed in value):
        raise ValueError(value)
    return value if len(value) == 4 else value * 4


class ListedMember(Keys, extra="allow"):
    """What a leaderboard reads of a listed member; the other keys are those of a member of any ensemble."""

    name: Annotated[str | None, Shown("non-empty text", remedy=QUOTE)] = None
    pretrained: Annotated[str | None, Shown("a hub name or a path, as text", remedy=QUOTE)] = None
    build: Any = None
    tasks: Annotated[Names | None, Shown("a list with at least one task's name")] = Field(None, min_length=1)


class LeaderboardKeys(Asking):
    """Keys of a leaderboard. Those from `limit` to `gen_kwargs` hold for all of its tasks."""

    title: str | None = Field(None, description="The heading of the table.")
    source: str = Field("", description="Where the table was published.")
    note: str = Field("", description="Other remarks.")
    expected: Annotated[tuple[PublishedTable, ...], Shown("a list with one entry for each published table")] = Field(
        (), description="Published scores. The table shows them beside the measured scores."
    )
    members: Annotated[tuple[ListedMember, ...], Shown("a list with at least one entry")] = Field(
        description="The models. Each is a name, or a mapping with `pretrained` or `build`, and has a row of its "
        "own. `tasks` limits a member to these columns.",
    )
    common: FrozenDict = Field(FrozenDict(), description="Keys of an ensemble that hold for all rows.")
    rows: Annotated[list[dict[str, Any]] | None, Shown("a list of mappings")] = Field(
        None,
        description="The rows. Each has the keys of an ensemble with the names of its members, or names an "
        "`ensemble` file, or a model to `build`. `by_task` gives keys that differ on a task; such a row has only "
        "the columns named there. `dev_scores: measured` weights by scores that are measured on every task's "
        "development split, and `router: measured` (for `weighting: knn`) routes by them.",
    )
    grid: Grid | None = Field(None, description="Rows for every combination of some choices.")
    tasks: Annotated[tuple[TaskSpec, ...], Shown("a list with at least one entry")] = Field(
        description="The columns. Each is the name of a task, or a mapping with `task`."
    )
    include_path: Names = Field((), description="Folders with more task configurations.")
    metadata: FrozenDict = Field(FrozenDict(), description="Metadata for the tasks, as `--metadata` of `lm_eval run`.")
    seed: Annotated[
        tuple[int, ...],
        AfterValidator(_seeds),
        Shown(f"one number from 0 to {LARGEST_SEED}, or four: random, numpy, torch, few-shots"),
    ] = Field(DEFAULT_SEEDS, description="The seeds of an evaluation.")
    alpha: float = Field(0.05, gt=0, lt=1, description="The level of significance.")
    power: Annotated[float | None, Shown(default="not shown")] = Field(
        None,
        gt=0,
        lt=1,
        description="A chance of detection. With it, the table shows for every row the smallest difference that "
        "these documents detect with this chance, and the number of documents that would detect the measured "
        "difference.",
    )
    resamples: Annotated[int | None, Shown(default="the usual number")] = Field(
        None, ge=1, le=MOST_RESAMPLES, description="The number of resamples of the permutation test."
    )

    @field_validator("members", "tasks", mode="before")
    @classmethod
    def _listed(cls, entries: Any, info: ValidationInfo) -> Any:
        """Return a list's names as mappings, too."""
        if not isinstance(entries, list) or not entries:
            raise ValueError(entries)
        tasks = info.field_name == "tasks"
        key, what = ("task", "a task's name") if tasks else ("pretrained", "a model's name")
        wanted = f"{what}, or a mapping with {key}{'' if tasks else ' or build'}"
        for i, entry in enumerate(entries):
            if not isinstance(entry, (str, Mapping)):
                at = f"{info.field_name}[{i}]"
                raise ConfigError(f"{at} must be {wanted}; got {entry!r}", key=at, code="value")
        return [{key: entry} if isinstance(entry, str) else entry for entry in entries]


@dataclass(frozen=True)
class LeaderboardRecipe:
    """A leaderboard as it was asked for."""

    source: str  # the file, for messages
    title: str  # heading of the table
    members: tuple[MemberConfig, ...]  # each is loaded once, and is a row of its own
    rows: tuple[Row, ...]  # the members alone, then the ensembles
    tasks: tuple[TaskSpec, ...]  # columns
    include_path: tuple[str, ...] = ()  # folders with task configurations
    metadata: Mapping[str, Any] = field(default_factory=dict)  # handed to the tasks
    seeds: tuple[int, ...] = DEFAULT_SEEDS  # of random, numpy, torch and few-shots
    alpha: float = 0.05  # level of significance
    power: float | None = None  # chance of detection of what the table says that rows need; None where it says nothing
    resamples: int | None = None  # of the permutation test; None for the usual number
    notes: tuple[str, ...] = ()  # combinations of the grid that mean nothing, and why
    builds: Builds = field(default_factory=Builds)  # models that are built before they are evaluated
    expected: tuple[PublishedTable, ...] = ()  # published tables

    @property
    def alone(self) -> tuple[Row, ...]:
        """The rows of the members alone."""
        return self.rows[: len(self.members)]


def read_recipe(
    path: Path, elsewhere: Mapping[str, str] | None = None, metadata: Mapping[str, Any] | None = None
) -> LeaderboardRecipe:
    """Read a recipe; every row is configured, nothing is loaded.

    Args:
        path: the YAML file.
        elsewhere: what is loaded for a member instead of what the recipe says, by name: a folder, a hub name.
        metadata: what tasks are told over what the recipe says.

    Raises:
        ConfigError: everything that cannot be honoured: by file, and by row or task where it is about one.
    """
    raw = given(read_keys(path, "leaderboard"))
    with blamed(str(path)):
        return parse_recipe(raw, path, elsewhere or {}, metadata or {})


def parse_recipe(
    raw: Mapping[str, Any], path: Path, elsewhere: Mapping[str, str], metadata: Mapping[str, Any]
) -> LeaderboardRecipe:
    """Return the recipe that the keys of a file spell, as `read_recipe`; relative paths are read beside `path`."""
    keys = LeaderboardKeys.read(raw)
    told = {**thaw(keys.metadata), **metadata}
    source = TaskSource(task_folders(keys.include_path, path.parent), json.dumps(told, sort_keys=True))
    names, problems = [spec.task for spec in keys.tasks], Problems()
    with problems.collected():
        tasks = _tasks(keys)
    with problems.collected():
        members, rows, builds, notes = _rows(keys, path.parent, elsewhere, source, names)
    problems.refuse()
    check_published(keys.expected, names, rows)
    return LeaderboardRecipe(
        source=str(path),
        title=keys.title or f"Leaderboard of {' and '.join(member.name for member in members)}",
        members=members,
        rows=tuple(rows),
        tasks=tuple(tasks),
        include_path=source.include_path,
        metadata=told,
        seeds=keys.seed,
        alpha=keys.alpha,
        power=keys.power,
        resamples=keys.resamples,
        notes=tuple(dict.fromkeys(notes)),
        builds=builds,
        expected=keys.expected,
    )


def _rows(
    keys: LeaderboardKeys, folder: Path, elsewhere: Mapping[str, str], source: TaskSource, tasks: Sequence[str]
) -> tuple[tuple[MemberConfig, ...], list[Row], Builds, list[str]]:
    """Return the members, all rows, what is built for them, and notes on combinations that mean nothing."""
    common = {"self_check": False, **beside(keys.common, folder)}  # the members are measured beside
    for key in ("pretrained", "members", "name", "weight"):
        if key in common:
            raise ConfigError(
                f"common holds {key}, which is a member's own; common is what all rows have alike", key="common"
            )
    built: dict[str, BuildRecipe] = {}
    entries = [_member(entry, f"members[{i}]", folder, built, tasks) for i, entry in enumerate(keys.members)]
    configured = configure({**common, "members": entries}, common).members
    names = [member.name for member in configured]
    for name in elsewhere:
        if name not in names:
            raise ConfigError(f"--member {name}: unknown.{did_you_mean(name, names)} Members: {', '.join(names)}")
    members = tuple(one.replace(pretrained=elsewhere.get(one.name, one.pretrained)) for one in configured)
    built = {name: recipe for name, recipe in built.items() if name not in elsewhere}
    built_rows, others = take_rows(keys.rows or (), folder, built)
    notes: list[str] = []
    controls, added = with_controls(built, built_rows, notes)
    built_rows += added
    places = {member.name: member.pretrained for member in members if member.name not in built}
    built = {name: replace(one, tasks=one.tasks.under(source)) for name, one in built.items()}
    _check_sources(built, members)
    builds = Builds(built, places, source, controls)
    listed = zip(members, keys.members, strict=True)
    rows = [replace(member_row(member, common), tasks=entry.tasks or ()) for member, entry in listed]
    rows += [built_row(row, builds.pretrained(row.name), common) for row in built_rows]
    if keys.grid is not None or others or not built_rows:
        by_name = {member.name: member for member in members}
        rows += expand(others, keys.grid, by_name, common, folder, notes, tasks)
    builds.needed(built)
    _check_names(rows)
    return members, rows, builds, notes


def _check_sources(built: Mapping[str, BuildRecipe], members: Sequence[MemberConfig]) -> None:
    """Refuse to build from a member of which `pretrained` is not all: builds read that folder as it is."""
    for name, recipe in built.items():
        for member in (one for one in members if one.name in recipe.models):
            given = {**member.loading_dict(), **member.hf_kwargs_dict()}
            if key := next((key for key in _BESIDE if given.get(key) not in (None, "", "main")), None):
                raise ConfigError(
                    f"{name!r} is built from member {member.name!r}, which has {key}: {given[key]}, and a build reads "
                    f"{member.pretrained} as it is. Save that model to a folder, and give it as pretrained"
                )


def _member(
    entry: ListedMember, at: str, folder: Path, recipes: dict[str, BuildRecipe], tasks: Sequence[str]
) -> dict[str, Any]:
    """Return a member's keys, relative paths read beside the recipe; how one is built is added by its name."""
    keys = given({"name": entry.name, "pretrained": entry.pretrained, **(entry.model_extra or {})})
    if (entry.pretrained is None) == (entry.build is None):
        got = given({**keys, "build": entry.build})
        raise ConfigError(f"{at} must have pretrained or build, and not both; got {got!r}", key=at)
    if "weight" in keys:
        name = entry.name or entry.pretrained
        raise ConfigError(f"{at} ({name}): a weight belongs to a row, as weights", key=f"{at}.weight")
    for name in entry.tasks or ():
        if name not in tasks:
            near = did_you_mean(name, tasks)
            raise ConfigError(f"{at}: tasks: {name!r} is no task of the recipe.{near} Tasks: {', '.join(tasks)}")
    if entry.build is not None:
        name = name_of(entry.name, entry.build, at)
        recipes[name] = recipe = take_build(entry.build, folder, f"member {name!r}")
        if recipe.is_random:
            raise ConfigError(
                f"member {name!r}: {recipe.method} draws at random, and one draw says little; make it a row, with seeds"
            )
        keys |= {"name": name, "pretrained": Builds(recipes).pretrained(name)}
    return dict(beside(keys, folder))


def _tasks(keys: LeaderboardKeys) -> list[TaskSpec]:
    """Return the columns; what is said of all of them holds where a column says nothing else."""
    shared = {key: getattr(keys, key) for key in keys.model_fields_set & {*Asking.names()}}
    specs = [
        spec.replace(**{key: value for key, value in shared.items() if key not in spec.model_fields_set})
        for spec in keys.tasks
    ]
    seen: dict[str, TaskSpec] = {}
    for spec in specs:
        if (other := seen.setdefault(spec.slug.casefold(), spec)) is not spec:
            if other.task == spec.task:
                raise ConfigError(f"task {spec.task!r} is listed twice; a row has one cell for each task")
            raise ConfigError(f"tasks {other.task!r} and {spec.task!r} would have the same files; leave one out")
    return specs


def _check_names(rows: Sequence[Row]) -> None:
    seen: dict[str, Row] = {}
    for row in rows:
        if row.slug.casefold() in OURS:
            raise ConfigError(
                f"row {row.name!r} has the name of something else in the leaderboard's folder; give it another `name`"
            )
        other = seen.setdefault(row.slug.casefold(), row)
        if other is not row:
            raise ConfigError(
                f"rows {other.name!r} and {row.name!r} have one name, or the same folder ({row.slug}); "
                "give one of them a `name` of its own"
            )
    for row in rows:
        # seeds and tasks are of a row each
        if row.group != row.name and any(
            row.group == other.name or (row.group == other.group and bool(row.tasks) != bool(other.tasks))
            for other in rows
        ):
            raise ConfigError(f"two rows have the name {row.group!r}; give one of them a `name` of its own")
