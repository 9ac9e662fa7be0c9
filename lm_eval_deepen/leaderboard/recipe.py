"""The recipe of a leaderboard: members, rows and tasks, checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lm_eval_deepen.building import BuildRecipe
from lm_eval_deepen.building.texts import TaskSource, task_folders
from lm_eval_deepen.config import EnsembleConfig, MemberConfig
from lm_eval_deepen.config_options import MAX_SEED, coerce, whole_number
from lm_eval_deepen.config_parse import beside, member_names
from lm_eval_deepen.errors import ConfigError, did_you_mean
from lm_eval_deepen.host import configure
from lm_eval_deepen.leaderboard.builds import Builds, take_members, take_rows
from lm_eval_deepen.leaderboard.controls import with_controls
from lm_eval_deepen.leaderboard.rows import Row, built_row, expand, member_row
from lm_eval_deepen.statistics.paired import MOST_RESAMPLES
from lm_eval_deepen.yaml_reading import read_yaml

DEFAULT_SEEDS = (0, 1234, 1234, 1234)  # of `lm_eval run`: random, numpy, torch, few-shots
_RECIPE_KEYS = frozenset("title members common rows grid tasks include_path metadata seed alpha resamples".split())


@dataclass(frozen=True)
class TaskSpec:
    """What is asked of one task, or group of tasks, in the words of ``lm_eval run``.

    Attributes:
        task: its name.
        limit: the first so many documents, or that share of them where it is below 1.
        num_fewshot: few-shots instead of the task's own number.
        metric: metrics that are shown, as ``acc`` or ``exact_match,strict-match``; all where empty.
        apply_chat_template: whether prompts are rendered by every member's own chat template.
        system_instruction: put before every prompt.
        fewshot_as_multiturn: whether few-shots are turns of the conversation.
        gen_kwargs: generation arguments over the task's own.
        split: ``validation`` evaluates the development split where the task also has a test split.
    """

    task: str
    limit: int | float | None = None
    num_fewshot: int | None = None
    metric: tuple[str, ...] = ()
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = False
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    split: str | None = None


_TASK_KEYS = frozenset(f.name for f in fields(TaskSpec))
_SHARED_KEYS = _TASK_KEYS - {"task", "split"}  # may stand beside `tasks`, for all of them


@dataclass(frozen=True)
class Recipe:
    """A leaderboard as it was asked for.

    Attributes:
        source: the file, for messages.
        title: heading of the table.
        members: each is loaded once, and is a row of its own.
        rows: the members alone, then the ensembles.
        tasks: columns.
        include_path: folders with task configurations.
        metadata: handed to the tasks.
        seeds: of random, numpy, torch and few-shots.
        alpha: level of significance.
        resamples: of the permutation test; None for the usual number.
        notes: combinations of the grid that mean nothing, and why.
        builds: models that are built before they are evaluated.
    """

    source: str
    title: str
    members: tuple[MemberConfig, ...]
    rows: tuple[Row, ...]
    tasks: tuple[TaskSpec, ...]
    include_path: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, int, int, int] = DEFAULT_SEEDS
    alpha: float = 0.05
    resamples: int | None = None
    notes: tuple[str, ...] = ()
    builds: Builds = field(default_factory=Builds)

    @property
    def alone(self) -> tuple[Row, ...]:
        """The rows of the members alone."""
        return self.rows[: len(self.members)]


def read_recipe(
    path: Path, elsewhere: Mapping[str, str] | None = None, metadata: Mapping[str, Any] | None = None
) -> Recipe:
    """Read a recipe; every row is configured, nothing is loaded.

    Args:
        path: the YAML file.
        elsewhere: what is loaded for a member instead of what the recipe says, by name: a folder, a hub name.
        metadata: what tasks are told over what the recipe says.

    Raises:
        ConfigError: whatever cannot be honoured: by file, and by row or task where it is about one.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such recipe (looked in {path.absolute().parent}); give the path of a YAML file")
    raw = read_yaml(path)
    try:
        if metadata and isinstance(raw, Mapping):
            raw = {**raw, "metadata": {**_mapping(raw.get("metadata"), "metadata"), **metadata}}
        return parse_recipe(raw, path, elsewhere)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_recipe(raw: Any, path: Path, elsewhere: Mapping[str, str] | None = None) -> Recipe:
    """Return the recipe that parsed YAML spells; relative paths are read beside `path`.

    Raises:
        ConfigError: as `read_recipe`.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"a recipe holds members, rows or grid, and tasks; got {type(raw).__name__}")
    known = _RECIPE_KEYS | _SHARED_KEYS
    _check_keys(raw, known, "", "Keys of ensembles that hold for every row go into common")
    folder = path.parent
    common = {"self_check": False, **_mapping(raw.get("common"), "common")}  # the members are measured beside
    for key in ("pretrained", "members", "name", "weight"):
        if key in common:
            raise ConfigError(f"common holds {key}, which is a member's own; common is what all rows have alike")
    built: dict[str, BuildRecipe] = {}
    listed = take_members(_listed(raw.get("members"), "members"), folder, built)
    by_name = _named([_member(entry, folder, i) for i, entry in enumerate(listed)], dict(elsewhere or {}))
    built = {name: recipe for name, recipe in built.items() if name not in (elsewhere or {})}
    built_rows, others = take_rows(raw.get("rows"), folder, built)
    notes: list[str] = []
    controls, added = with_controls(built, built_rows, notes)
    built_rows += added
    places = {name: entry["pretrained"] for name, entry in by_name.items() if name not in built}
    include_path = task_folders(raw.get("include_path"), folder)
    metadata = _mapping(raw.get("metadata"), "metadata")
    source = TaskSource(include_path, json.dumps(metadata, sort_keys=True))
    built = {name: replace(one, tasks=one.tasks.under(source)) for name, one in built.items()}
    builds = Builds(built, places, source, controls)
    _configure(list(by_name.values()), common, "members")
    alone = [member_row(name, entry, common) for name, entry in by_name.items()]
    rows = alone + [built_row(row, builds.pretrained(row.name), common) for row in built_rows]
    if raw.get("grid") is not None or others or not built_rows:
        rows += expand(others, raw.get("grid"), by_name, common, folder, notes)
    builds.needed(built)
    _check_names(rows)
    shared = {key: raw[key] for key in _SHARED_KEYS & raw.keys()}
    tasks = [_task(entry, shared, i) for i, entry in enumerate(_listed(raw.get("tasks"), "tasks"))]
    _check_tasks(tasks)
    return Recipe(
        source=str(path),
        title=coerce(raw.get("title", f"Leaderboard of {' and '.join(by_name)}"), str, "title"),
        members=tuple(row.config.members[0] for row in alone),
        rows=tuple(rows),
        tasks=tuple(tasks),
        include_path=include_path,
        metadata=metadata,
        seeds=_seeds(raw.get("seed")),
        alpha=_share(raw.get("alpha", 0.05)),
        resamples=_resamples(raw.get("resamples")),
        notes=tuple(dict.fromkeys(notes)),
        builds=builds,
    )


def _check_keys(raw: Mapping[str, Any], known: frozenset[str], where: str, hint: str = "") -> None:
    for key in raw:
        if key not in known:
            near = did_you_mean(str(key), sorted(known))
            raise ConfigError(f"{where}unknown key {key!r}.{near} Keys: {', '.join(sorted(known))}. {hint}".rstrip())


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, (Mapping, type(None))):
        raise ConfigError(f"{key} must be a mapping; got {value!r}")
    return dict(value or {})


def _listed(value: Any, key: str) -> Sequence[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{key} must be a list with at least one entry; got {value!r}")
    return value


def _member(entry: Any, folder: Path, i: int) -> dict[str, Any]:
    """Return a member's keys; relative paths of model folders are read beside the recipe."""
    found = {"pretrained": entry} if isinstance(entry, str) else entry
    if not isinstance(found, Mapping) or not isinstance(found.get("pretrained"), str):
        raise ConfigError(f"members[{i}] must be a model's name, or a mapping with pretrained or build; got {entry!r}")
    if "weight" in found:
        raise ConfigError(f"members[{i}] ({found['pretrained']}): a weight belongs to a row, as weights")
    return beside(found, folder)


def _named(entries: Sequence[dict[str, Any]], elsewhere: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the members' keys by name, and where they are loaded from elsewhere, from there."""
    names = member_names(entries)
    for name in elsewhere:
        if name not in names:
            raise ConfigError(f"--member {name}: unknown.{did_you_mean(name, names)} Members: {', '.join(names)}")
    return {
        name: {**entry, "name": name, "pretrained": elsewhere.get(name, entry["pretrained"])}
        for name, entry in zip(names, entries, strict=True)
    }


def _configure(entries: Sequence[Mapping[str, Any]], common: Mapping[str, Any], where: str) -> EnsembleConfig:
    try:
        return configure({**common, "pretrained": entries[0]["pretrained"], "members": list(entries)})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _task(entry: Any, shared: Mapping[str, Any], i: int) -> TaskSpec:
    given = {"task": entry} if isinstance(entry, str) else entry
    if not isinstance(given, Mapping) or not isinstance(given.get("task"), str):
        raise ConfigError(f"tasks[{i}] must be a task's name, or a mapping with task; got {entry!r}")
    where = f"task {given['task']!r}: "
    _check_keys(given, _TASK_KEYS, where)
    values = {key: value for key, value in {**shared, **given}.items() if value is not None}
    hints = {"num_fewshot": int, "limit": int | float, "system_instruction": str, "apply_chat_template": bool | str}
    hints |= {"fewshot_as_multiturn": bool, "split": str}
    try:
        for key, hint in hints.items():
            if key in values:
                values[key] = coerce(values[key], hint, key)
        if "num_fewshot" in values:
            whole_number(values["num_fewshot"], "num_fewshot")
        values["metric"] = _metrics(values.get("metric", []))
        values["gen_kwargs"] = _mapping(values.get("gen_kwargs"), "gen_kwargs")
        spec = TaskSpec(**values)
        if spec.limit is not None and (spec.limit <= 0 or (spec.limit > 1 and spec.limit % 1)):
            raise ConfigError(f"limit must be a number of documents, or a share below 1; got {spec.limit!r}")
        if spec.split not in (None, "test", "validation"):
            raise ConfigError(f"split must be test or validation; got {spec.split!r}")
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error
    return spec


def _metrics(value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(name, str) and name for name in listed):
        raise ConfigError(f"metric must be a metric or a list of metrics, as acc or exact_match,none; got {value!r}")
    return tuple(listed)


def _check_tasks(tasks: Sequence[TaskSpec]) -> None:
    names = [spec.task for spec in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"task {name!r} is listed twice; a row has one cell for each task")


def _check_names(rows: Sequence[Row]) -> None:
    seen: dict[str, Row] = {}
    for row in rows:
        other = seen.setdefault(row.slug.casefold(), row)
        if other is not row:
            raise ConfigError(
                f"rows {other.name!r} and {row.name!r} have one name, or the same folder ({row.slug}); "
                "give one of them a `name` of its own"
            )
    for row in rows:
        if row.group != row.name and any(row.group == other.name for other in rows):
            raise ConfigError(f"two rows have the name {row.group!r}; give one of them a `name` of its own")


def _seeds(value: Any) -> tuple[int, int, int, int]:
    if value is None:
        return DEFAULT_SEEDS
    listed = list(value) if isinstance(value, (list, tuple)) else [value] * 4
    if len(listed) != 4:
        raise ConfigError(f"seed must be one number, or four: random, numpy, torch, few-shots; got {value!r}")
    a, b, c, d = (whole_number(seed, "seed", 0, MAX_SEED) for seed in listed)
    return a, b, c, d


def _share(value: Any) -> float:
    found = coerce(value, float, "alpha")
    if not 0 < found < 1:
        raise ConfigError(f"alpha must lie between 0 and 1; got {value!r}")
    return found


def _resamples(value: Any) -> int | None:
    return None if value is None else whole_number(value, "resamples", 1, MOST_RESAMPLES)
