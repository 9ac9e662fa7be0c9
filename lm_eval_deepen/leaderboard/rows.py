"""Rows of a leaderboard: explicit ones, and the product of orders, methods, weightings and poolings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval_deepen import fusion, pooling
from lm_eval_deepen.config import EnsembleConfig, MemberConfig
from lm_eval_deepen.config_types import PLACEMENT_KEYS
from lm_eval_deepen.errors import ConfigError, did_you_mean
from lm_eval_deepen.host import configure
from lm_eval_deepen.leaderboard.builds import BuiltRow
from lm_eval_deepen.leaderboard.tuned import Tuned, read_tuned

GRID_KEYS = ("orders", "methods", "weightings", "poolings")
_BY_MEMBER = ("weights", "dev_scores")  # lists in the order of the members; a mapping by name fits every order

Members = Mapping[str, Mapping[str, Any]]  # name -> keys of the member


@dataclass(frozen=True)
class Row:
    """One line of the leaderboard.

    Attributes:
        name: unique.
        config: what is evaluated.
        members: names of the loaded members, the main one first; one name for a member alone.
        tuned: what a tuned ensemble file says of the documents it was fitted on, or None.
        repeats: the row of the table that it is one of several seeds of; None for a row of its own.
    """

    name: str
    config: EnsembleConfig
    members: tuple[str, ...]
    tuned: Tuned | None = None
    repeats: str | None = None

    @property
    def group(self) -> str:
        """The name of its row in the table."""
        return self.repeats or self.name

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return re.sub(r"[^\w.+=,-]+", "_", self.name).strip("_.") or "row"

    @property
    def alone(self) -> bool:
        """Whether it is a member alone, or a built model."""
        return len(self.members) == 1


def member_row(name: str, entry: Mapping[str, Any], common: Mapping[str, Any]) -> Row:
    """Return the row of a member alone, an ensemble of one: what ``--model hf`` gives."""
    return Row(name, _configured(name, {**common, "pretrained": entry["pretrained"], "members": [entry]}), (name,))


def built_row(built: BuiltRow, pretrained: str, common: Mapping[str, Any]) -> Row:
    """Return the row of a model that is built from others."""
    row = member_row(built.name, {"name": built.name, "pretrained": pretrained}, common)
    return replace(row, repeats=built.group if built.group != built.name else None)


def expand(
    listed: Any, grid: Any, members: Members, common: Mapping[str, Any], folder: Path, notes: list[str]
) -> list[Row]:
    """Return the ensembles: those of the grid, then those listed, together where the order of members is the same.

    Args:
        listed: the recipe's `rows`.
        grid: the recipe's `grid`.
        members: every member's keys.
        common: keys that all rows have alike.
        folder: where relative paths of ensemble files are read.
        notes: told combinations that mean nothing are added here.

    Raises:
        ConfigError: an option that cannot be honoured, by the row's name.
    """
    if not isinstance(listed or [], list):
        raise ConfigError(f"rows must be a list of mappings; got {listed!r}")
    rows = [] if grid is None else _grid_rows(grid, members, common, notes)
    rows += [_listed_row(spec, i, members, common, folder) for i, spec in enumerate(listed or [])]
    if not rows:
        raise ConfigError("no ensemble: give rows, grid, or both; members alone are rows anyway")
    orders = list(dict.fromkeys(row.members for row in rows))
    return sorted(rows, key=lambda row: orders.index(row.members))


def _listed_row(spec: Any, i: int, members: Members, common: Mapping[str, Any], folder: Path) -> Row:
    if not isinstance(spec, Mapping):
        raise ConfigError(f"rows[{i}] must be a mapping with method, members, ...; got {spec!r}")
    keys = {key: value for key, value in spec.items() if value is not None}
    name = keys.pop("name", None)
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise ConfigError(f"rows[{i}]: name must be non-empty text; got {name!r}")
    if "ensemble" in keys:
        return _file_row(name or f"{Path(str(keys['ensemble'])).stem}", keys, members, common, folder)
    order = _order(keys.pop("members", list(members)), members, f"rows[{i}]")
    return row_of(name or _grid_name(order, _parts(keys)), order, keys, members, common)


def row_of(
    name: str, order: Sequence[str], keys: Mapping[str, Any], members: Members, common: Mapping[str, Any]
) -> Row:
    """Return a row from the keys of an ensemble and the names of its members, the main one first."""
    merged = {**common, **{key: _by_member(name, key, value, order) for key, value in keys.items()}}
    entries = [members[member] for member in order]
    merged |= {"pretrained": entries[0]["pretrained"], "members": entries}
    config = _configured(name, merged)
    plain = _configured(name, {**common, "pretrained": entries[0]["pretrained"], "members": entries})
    for member, usual in zip(config.members, plain.members, strict=True):
        if replace(member, weight=usual.weight) != usual:
            raise ConfigError(
                f"row {name!r}: member {member.name!r} would be loaded in another way than in other rows; loading "
                "arguments belong to members or common, for members are loaded once"
            )
    return Row(name, config, tuple(order))


def _file_row(name: str, keys: Mapping[str, Any], members: Members, common: Mapping[str, Any], folder: Path) -> Row:
    """Return the row of an ensemble file, whose members must be members of the recipe."""
    path = folder / Path(str(keys["ensemble"])).expanduser()
    others = {key: value for key, value in keys.items() if key != "ensemble"}
    config = _configured(name, {"self_check": common["self_check"], **others, "pretrained": str(path)})
    known = _configured(name, {**common, "pretrained": None, "members": list(members.values())}).members
    order = []
    for member in config.members:
        found = next((other.name for other in known if _loads(other) == _loads(member)), None)
        if found is None:
            raise ConfigError(
                f"row {name!r}: {path} has the member {member.pretrained}, loaded with {dict(member.loading)}, and no "
                "member of the recipe is that, loaded so: it belongs to another ensemble"
                f".{did_you_mean(member.pretrained, [other.pretrained for other in known])}"
            )
        order.append(found)
    return Row(name, config, tuple(order), read_tuned(path, config))


def _loads(member: MemberConfig) -> tuple[Any, ...]:
    """Return what decides what a member computes."""
    place = Path(member.pretrained).expanduser()
    loading = {key: value for key, value in member.loading.items() if key not in PLACEMENT_KEYS}
    pretrained = str(place.resolve()) if place.exists() else member.pretrained
    return pretrained, loading, member.hf_kwargs_dict(), member.temperature


def _grid_rows(grid: Any, members: Members, common: Mapping[str, Any], notes: list[str]) -> list[Row]:
    if not isinstance(grid, Mapping):
        raise ConfigError(f"grid must be a mapping with {', '.join(GRID_KEYS)}; got {grid!r}")
    for key in grid:
        if key not in GRID_KEYS:
            raise ConfigError(f"grid: unknown key {key!r}.{did_you_mean(str(key), GRID_KEYS)} Keys: {GRID_KEYS}")
    orders = _orders(grid.get("orders"), members)
    methods = [_entry(value, "method") for value in _axis(grid, "methods", [{}])]
    weightings = [_entry(value, "weighting") for value in _axis(grid, "weightings", [{}])]
    poolings = [_entry(value, "pooling") for value in _axis(grid, "poolings", ["none"])]
    rows: dict[tuple, Row] = {}
    for order, pooled, weighting, method in itertools.product(orders, poolings, weightings, methods):
        parts = [method, weighting, pooled]
        if "pooling" in pooled and not pooled.get("with_fused"):
            parts = [weighting, pooled]
        keys = {key: value for part in parts for key, value in part.items() if key != "name"}
        name = _grid_name(order, parts)
        if "pooling" in pooled and _changing(name, order, weighting, members, common):
            name, weigher = pooled["pooling"], weighting["weighting"]
            notes.append(f"{name} is not combined with weighting {weigher}, which weighs fused steps")
            continue
        rows.setdefault((order, name), row_of(name, order, keys, members, common))
    return list(rows.values())


def _axis(grid: Mapping[str, Any], key: str, default: list[Any]) -> list[Any]:
    """Return the points of an axis; ``all`` stands for every method, or pooling, that is installed."""
    found = grid.get(key, default)
    found = [found] if found == "all" else found
    if not isinstance(found, list) or not found:
        raise ConfigError(f"grid: {key} must be a list with at least one entry, or all; got {found!r}")
    every = {"methods": list(fusion.methods()), "poolings": list(pooling.poolings())}.get(key, ["all"])
    return [point for value in found for point in (every if value == "all" else [value])]


def _entry(value: Any, seam: str) -> dict[str, Any]:
    """Return one point of an axis as keys of an ensemble: a name, or a mapping with options; none is nothing."""
    if value is None or value == "none":
        return {}
    found = {seam: value} if isinstance(value, str) else value
    if not isinstance(found, Mapping):
        raise ConfigError(f"grid: a {seam} is a name, or a mapping with its options; got {value!r}")
    return dict(found)


def _orders(value: Any, members: Members) -> list[tuple[str, ...]]:
    """Return the orders of members; by default every member is the main one once, the others as listed."""
    if value is None:
        return [(main, *(name for name in members if name != main)) for main in members]
    if not isinstance(value, list) or not value:
        raise ConfigError(f"grid: orders must be a list of lists of members, the main one first; got {value!r}")
    found = [tuple(_order(order, members, "grid: orders")) for order in value]
    for order in found:
        if len(order) < 2:
            raise ConfigError(f"grid: orders: {'+'.join(order)} is a member alone, which is a row anyway")
    return found


def _order(value: Any, members: Members, where: str) -> list[str]:
    names = [name.strip() for name in value.split("+")] if isinstance(value, str) else value
    if not isinstance(names, list):
        raise ConfigError(f"{where}: members must be a list of names, the main one first; got {value!r}")
    for name in names:
        if name not in members:
            near = did_you_mean(str(name), members)
            raise ConfigError(f"{where}: member {name!r} is unknown.{near} Members: {', '.join(members)}")
    return names


def _by_member(row: str, key: str, value: Any, order: Sequence[str]) -> Any:
    if key not in _BY_MEMBER or not isinstance(value, Mapping):
        return value
    if set(value) != set(order):
        raise ConfigError(f"row {row!r}: {key} names {', '.join(map(str, value))}, and its members are {order}")
    return [value[name] for name in order]


def _changing(
    name: str, order: Sequence[str], weighting: Mapping[str, Any], members: Members, common: Mapping[str, Any]
) -> bool:
    keys = {key: value for key, value in weighting.items() if key != "name"}
    return row_of(name, order, keys, members, common).config.weights_change


def _parts(keys: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a listed row's keys as a grid has them: its method with all options, its weighting, its pooling."""
    seams = [{seam: keys[seam]} for seam in ("weighting", "pooling") if seam in keys]
    return [{key: value for key, value in keys.items() if key not in ("weighting", "pooling")}, *seams]


def _grid_name(order: Sequence[str], parts: Sequence[Mapping[str, Any]]) -> str:
    labels = [_label(part, seam) for part in parts for seam in ("method", "weighting", "pooling") if seam in part]
    labels += [_label(part, None) for part in parts if part and not {"method", "weighting", "pooling"} & part.keys()]
    return " ".join(["+".join(order), *labels])


def _label(keys: Mapping[str, Any], seam: str | None) -> str:
    """Return an ensemble's keys for a name: ``deepen(inverse=adamw)``."""
    if "name" in keys:
        return str(keys["name"])
    others = [f"{key}={_shown(value)}" for key, value in keys.items() if key != seam]
    if seam is None:
        return ", ".join(others)
    return f"{keys[seam]}({', '.join(others)})" if others else str(keys[seam])


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "/".join(f"{name}:{item}" for name, item in value.items())
    return "/".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _configured(name: str, keys: Mapping[str, Any]) -> EnsembleConfig:
    try:
        return configure(dict(keys))
    except ConfigError as error:
        raise ConfigError(f"row {name!r}: {error}") from error
