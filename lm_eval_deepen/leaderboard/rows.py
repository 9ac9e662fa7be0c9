"""Rows of a leaderboard: explicit ones, and the product of orders, methods, weightings and poolings."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from pydantic import Field

from lm_eval_deepen.config import EnsembleConfig, Keys, MemberConfig, Shown
from lm_eval_deepen.config.ensemble import PLACEMENT_KEYS
from lm_eval_deepen.config.files import beside
from lm_eval_deepen.config.keys import given
from lm_eval_deepen.errors import ConfigError, Problems, blamed, did_you_mean
from lm_eval_deepen.fusion import METHODS
from lm_eval_deepen.harness.model import catalogue, configure
from lm_eval_deepen.leaderboard.builds import BuiltRow
from lm_eval_deepen.leaderboard.tuned import Tuned, read_tuned
from lm_eval_deepen.pooling import POOLINGS
from lm_eval_deepen.weighting import WEIGHTINGS

MEASURED = "measured"  # of `dev_scores`: the leaderboard measures them first
LONGEST_NAME = 180  # bytes of a folder's: a file system takes 255, of which temporary ones beside it take some
_BY_MEMBER = ("weights", "dev_scores")  # lists in the order of the members; a mapping by name fits every order

Members = Mapping[str, MemberConfig]  # by name
_Point = str | dict[str, Any] | None
_Axis = Annotated[Literal["all"] | Annotated[list[_Point], MinLen(1)], Shown("a list with at least one entry, or all")]


class Grid(Keys):
    """Rows for every combination of orders, methods, weightings and poolings."""

    orders: Annotated[
        Annotated[list[str | list[str]], MinLen(1)] | None,
        Shown("a list of lists of members, the main one first", "every member first once"),
    ] = Field(None, description="Orders of the members.")
    methods: Annotated[_Axis, Shown(default="deepen")] = Field(
        [{}], description="Fusion methods. Each is a name, or a mapping with options."
    )
    weightings: Annotated[_Axis, Shown(default="the default of every method")] = Field(
        [{}], description="Weightings. Each is a name, or a mapping with options; `none` gives equal weights."
    )
    poolings: Annotated[_Axis, Shown(default="none")] = Field(
        ["none"], description="Poolings. Each is a name, or a mapping with options; `none` fuses steps."
    )


@dataclass(frozen=True)
class Row:
    """One line of the leaderboard."""

    name: str  # unique
    config: EnsembleConfig  # what is evaluated
    members: tuple[str, ...]  # names of the loaded members, the main one first; one name for a member alone
    tuned: Tuned | None = None  # what a tuned ensemble file says of the documents it was fitted on, or None
    # the row of the table that it is a part of: one of several seeds, or one task's; None for a row of its own
    repeats: str | None = None
    tasks: tuple[str, ...] = ()  # the only columns that it has; empty for all
    # whether its weights depend on the members' scores on the development split of its task, which are measured first
    # (see `development`); until then the members count alike
    adapts: bool = False
    routes: Mapping[str, Any] | None = None  # options of ``weighting: knn``, where these scores are its router's

    def has(self, task: str) -> bool:
        """Return whether a column is one of the row's."""
        return not self.tasks or task in self.tasks

    def __post_init__(self) -> None:
        """Refuse what a row cannot do: its cells share forward passes, and none of them writes beside them."""
        if self.config.trace is not None:
            raise ConfigError(
                f"row {self.name!r} has trace={str(self.config.trace).lower()}, which a leaderboard does not write; "
                "remove trace, and evaluate that ensemble with lm_eval run",
                key="trace",
                code="conflict",
            )

    @property
    def group(self) -> str:
        """The name of its row in the table."""
        return self.repeats or self.name

    @property
    def slug(self) -> str:
        """The name as a folder; of one that is too long for a folder its beginning, and a digest."""
        slug = re.sub(r"[^\w.+=,-]+", "_", self.name).strip("_.") or "row"
        if len(slug.encode()) <= LONGEST_NAME:
            return slug
        return (
            f"{slug.encode()[:LONGEST_NAME].decode(errors='ignore')}-{hashlib.sha256(slug.encode()).hexdigest()[:12]}"
        )

    @property
    def alone(self) -> bool:
        """Whether it is a member alone, or a built model."""
        return len(self.members) == 1


def member_row(member: MemberConfig, common: Mapping[str, Any]) -> Row:
    """Return the row of a member alone, an ensemble of one: what ``--model hf`` gives."""
    return Row(member.name, _configured(member.name, [member], common, {}), (member.name,))


def built_row(built: BuiltRow, pretrained: str, common: Mapping[str, Any]) -> Row:
    """Return the row of a model that is built from others."""
    keys = {**common, "members": [{"name": built.name, "pretrained": pretrained}]}
    with blamed(f"row {built.name!r}"):
        row = Row(built.name, configure(keys, common), (built.name,))
    return replace(row, repeats=built.group if built.group != built.name else None)


def expand(
    listed: Sequence[Mapping[str, Any]],
    grid: Grid | None,
    members: Members,
    common: Mapping[str, Any],
    folder: Path,
    notes: list[str],
    tasks: Sequence[str] = (),
) -> list[Row]:
    """Return the ensembles: those of the grid, then those listed, together where the order of members is the same.

    Relative paths are read in `folder`. Combinations that are skipped are added to `notes`.

    Raises:
        ConfigError: options that cannot be honoured, by the row's name.
    """
    rows = [] if grid is None else _grid_rows(grid, members, common, folder, notes)
    problems = Problems()
    for i, spec in enumerate(listed):
        with problems.collected():
            rows += _listed_rows(spec, f"rows[{i}]", members, common, folder, tasks)
    problems.refuse()
    if not rows:
        raise ConfigError("no ensemble: give rows, grid, or both; members alone are rows anyway", key="rows")
    orders = list(dict.fromkeys(row.members for row in rows))
    return sorted(rows, key=lambda row: orders.index(row.members))


def _listed_rows(
    spec: Mapping[str, Any], at: str, members: Members, common: Mapping[str, Any], folder: Path, tasks: Sequence[str]
) -> list[Row]:
    """Return a listed row, or one for each task where `by_task` says how they differ, or weights are measured."""
    keys = given(beside(spec, folder))
    name = keys.pop("name", None)
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise ConfigError(f"{at}: name must be non-empty text; got {name!r}", key=f"{at}.name", code="value")
    by_task = keys.pop("by_task", None)
    if by_task is None and MEASURED not in (keys.get("dev_scores"), keys.get("router")):
        return [_listed_row(name, keys, at, members, common, folder)]
    if by_task is None:
        by_task = {task: {} for task in tasks}
    if not isinstance(by_task, Mapping) or not by_task:
        raise ConfigError(
            f"{at}: by_task must be a mapping, of a task's name to the keys that differ there; got {by_task!r}",
            key=f"{at}.by_task",
        )
    if name is None:
        order = _order(keys.get("members", list(members)), members, at)
        name = _grid_name(order, _parts({key: value for key, value in keys.items() if key != "members"}))
    rows = []
    for task, own in by_task.items():
        if tasks and task not in tasks:
            raise ConfigError(
                f"row {name!r}: by_task names {task!r}, which is no task of the recipe."
                f"{did_you_mean(str(task), tasks)} Tasks: {', '.join(tasks)}",
                key=f"{at}.by_task",
            )
        if not isinstance(own or {}, Mapping):
            raise ConfigError(f"row {name!r}: by_task: {task} must be a mapping; got {own!r}", key=f"{at}.by_task")
        merged = {**keys, **given(beside(own or {}, folder))}
        key = next((key for key in ("dev_scores", "router") if merged.get(key) == MEASURED), None)
        routes: dict[str, Any] | None = None
        if key is not None:
            weighting = "adaptive" if key == "dev_scores" else "knn"
            if merged.pop("weighting", None) != weighting:
                raise ConfigError(
                    f"row {name!r}: {key} belong to weighting: {weighting}; give both, or neither", key=key
                )
            del merged[key]
            if weighting == "knn":
                routes = {"nearest": merged.pop("nearest")} if "nearest" in merged else {}
            count = len(_order(merged.get("members", list(members)), members, at))
            merged["weights"] = [1 / count] * count  # given ones: else those of some methods learn
        row = _listed_row(f"{name} [{task}]", merged, at, members, common, folder)
        rows.append(replace(row, repeats=name, tasks=(str(task),), adapts=key is not None, routes=routes))
    return rows


def _listed_row(
    name: str | None, keys: dict[str, Any], at: str, members: Members, common: Mapping[str, Any], folder: Path
) -> Row:
    """Return the row of an ensemble's keys, or of its file, whose members must be members of the recipe."""
    if "ensemble" not in keys:
        order = _order(keys.pop("members", list(members)), members, at)
        return row_of(name or _grid_name(order, _parts(keys)), order, keys, members, common)
    name = name or Path(str(keys["ensemble"])).stem
    path = folder / Path(str(keys["ensemble"])).expanduser()
    others = {key: value for key, value in keys.items() if key != "ensemble"}
    with blamed(f"row {name!r}"):
        config = configure({"self_check": common["self_check"], **others, "pretrained": str(path)})
    order = []
    for member in config.members:
        same = next((other.name for other in members.values() if _loads(other) == _loads(member)), None)
        if same is None:
            raise ConfigError(
                f"row {name!r}: {path} has the member {member.pretrained}, loaded with {dict(member.loading)}, and no "
                "member of the recipe is that, loaded so: it belongs to another ensemble"
                f".{did_you_mean(member.pretrained, [other.pretrained for other in members.values()])}"
            )
        order.append(same)
    return Row(name, config, tuple(order), read_tuned(path, config))


def row_of(
    name: str, order: Sequence[str], keys: Mapping[str, Any], members: Members, common: Mapping[str, Any]
) -> Row:
    """Return a row from the keys of an ensemble and the names of its members, the main one first."""
    own = {key: _by_member(name, key, value, order) for key, value in keys.items()}
    return Row(name, _configured(name, [members[member] for member in order], common, own), tuple(order))


def _loads(member: MemberConfig) -> tuple[Any, ...]:
    """Return what decides what a member computes."""
    place = Path(member.pretrained).expanduser()
    loading = {key: value for key, value in member.loading.items() if key not in PLACEMENT_KEYS}
    pretrained = str(place.resolve()) if place.exists() else member.pretrained
    return pretrained, loading, member.hf_kwargs_dict(), member.temperature


def _grid_rows(grid: Grid, members: Members, common: Mapping[str, Any], folder: Path, notes: list[str]) -> list[Row]:
    orders = _orders(grid.orders, members)
    methods = _axis(grid.methods, "method", METHODS)
    weightings = [beside(point, folder) for point in _axis(grid.weightings, "weighting", ("all",))]
    poolings = _axis(grid.poolings, "pooling", POOLINGS)
    rows: dict[tuple, Row] = {}
    named: dict[tuple, dict[str, Any]] = {}
    for order, pooled, weighting, method in itertools.product(orders, poolings, weightings, methods):
        parts = [method, weighting, pooled]
        if "pooling" in pooled and not pooled.get("with_fused"):
            parts = [weighting, pooled]
        keys = {key: value for part in parts for key, value in part.items() if key != "name"}
        name = _grid_name(order, parts)
        if "pooling" in pooled and _changing(name, weighting, order):
            name, weigher = pooled["pooling"], weighting["weighting"]
            notes.append(f"{name} is not combined with weighting {weigher}, which weighs fused steps")
            continue
        if named.setdefault((order, name), keys) != keys:
            raise ConfigError(f"grid: two combinations have the name {name!r}; give one of them another `name`")
        if (order, name) not in rows:
            rows[order, name] = row_of(name, order, keys, members, common)
    return list(rows.values())


def _axis(points: Sequence[_Point], axis: str, every: Iterable[str]) -> list[dict[str, Any]]:
    """Return the points of an axis as keys of an ensemble; ``all`` stands for every one that is installed."""
    listed = ["all"] if points == "all" else points
    return [_point(value, axis) for point in listed for value in (every if point == "all" else [point])]


def _point(value: _Point, axis: str) -> dict[str, Any]:
    if value is None or value == "none":
        return {"weighting": "uniform", "name": ""} if axis == "weighting" else {}
    return {axis: value} if isinstance(value, str) else value


def _orders(value: Sequence[str | list[str]] | None, members: Members) -> list[tuple[str, ...]]:
    """Return the orders of members; by default every member is the main one once, the others as listed."""
    if value is None:
        return [(main, *(name for name in members if name != main)) for main in members]
    orders = [tuple(_order(order, members, "grid: orders")) for order in value]
    for order in orders:
        if len(order) < 2:
            raise ConfigError(f"grid: orders: {'+'.join(order)} is a member alone, which is a row anyway")
    return orders


def _order(value: Any, members: Members, where: str) -> list[str]:
    names = [name.strip() for name in value.split("+")] if isinstance(value, str) else value
    if not isinstance(names, list):
        raise ConfigError(f"{where}: members must be a list of names, the main one first; got {value!r}")
    for name in names:
        if not isinstance(name, str) or name not in members:
            near = did_you_mean(str(name), members)
            raise ConfigError(f"{where}: member {name!r} is unknown.{near} Members: {', '.join(members)}")
    return names


def _by_member(row: str, key: str, value: Any, order: Sequence[str]) -> Any:
    if key not in _BY_MEMBER or not isinstance(value, Mapping):
        return value
    if set(value) != set(order):
        raise ConfigError(f"row {row!r}: {key} names {', '.join(map(str, value))}, and its members are {order}")
    return [value[name] for name in order]


def _changing(row: str, weighting: Mapping[str, Any], order: Sequence[str]) -> bool:
    """Tell whether a weighting changes the weights while a run goes on."""
    if "weighting" not in weighting:
        return False
    with blamed(f"row {row!r}"):
        options = WEIGHTINGS.choose(weighting["weighting"]).options
        own = {key: _by_member(row, key, weighting[key], order) for key in options.names() if key in weighting}
        return options.parse(own).build() is not None


def _parts(keys: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a listed row's keys as a grid has them: its method with all options, its weighting, its pooling."""
    choices = [{axis: keys[axis]} for axis in ("weighting", "pooling") if axis in keys]
    return [{key: value for key, value in keys.items() if key not in ("weighting", "pooling")}, *choices]


def _grid_name(order: Sequence[str], parts: Sequence[Mapping[str, Any]]) -> str:
    labels = [_label(part, axis) for part in parts for axis in ("method", "weighting", "pooling") if axis in part]
    labels += [_label(part, None) for part in parts if part and not {"method", "weighting", "pooling"} & part.keys()]
    return " ".join(["+".join(order), *filter(None, labels)])


def _label(keys: Mapping[str, Any], axis: str | None) -> str:
    """Return an ensemble's keys for a name: ``deepen(inverse=adamw)``."""
    if "name" in keys:
        return str(keys["name"])
    others = [f"{key}={_shown(value)}" for key, value in keys.items() if key != axis]
    if axis is None:
        return ", ".join(others)
    return f"{keys[axis]}({', '.join(others)})" if others else str(keys[axis])


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "/".join(f"{name}:{item}" for name, item in value.items())
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _configured(
    name: str, members: Sequence[MemberConfig], common: Mapping[str, Any], own: Mapping[str, Any]
) -> EnsembleConfig:
    """Return the configuration of a row around members that are configured already."""
    loading = catalogue().loading_keys | {"hf_kwargs"}  # of `common`: the members have them
    alike = {key: value for key, value in common.items() if key not in loading}
    with blamed(f"row {name!r}"):
        return configure({**alike, **own, "members": list(members)}, alike.keys() - own.keys())
