"""Ensemble files: keys given elsewhere go over theirs, and relative paths are found beside the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_eval_deepen.config.catalogue import PATH_KEYS
from lm_eval_deepen.config.keys import given
from lm_eval_deepen.config.recipes import SUFFIXES, RecipeKeys, find_recipe_file, read_recipe
from lm_eval_deepen.errors import ConfigError


def ensemble_file(value: Any) -> Path | None:
    """Return the file of an ensemble that `pretrained` names; None where it names a model."""
    if not isinstance(value, str):
        return None
    try:
        return find_recipe_file(value)
    except ConfigError as error:
        raise error.beneath("pretrained") from None


def read_ensemble_file(path: Path) -> dict[str, Any]:
    """Return the keys of an ensemble file; model folders and routers beside it are made reachable from here."""
    raw = read_recipe(path, "ensemble")
    keys = given(beside({key: value for key, value in raw.items() if key not in RecipeKeys.names()}, path.parent))
    main = keys.get("pretrained")
    if isinstance(main, str) and Path(main).suffix in SUFFIXES and not os.path.isdir(main):
        raise ConfigError(
            f"{path}: pretrained={main} is an ensemble file too; name the main model there", key="pretrained"
        )
    members = keys.get("members")
    if isinstance(members, str):
        keys["members"] = members = [part.strip() for part in members.split("+")]
    if isinstance(members, (list, tuple)):
        keys["members"] = [beside(member, path.parent) for member in members]
    return keys


def merge_file(path: Path, inline: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of an ensemble file, overridden by the keys given beside `pretrained`."""
    keys = read_ensemble_file(path)
    if "members" in inline:
        keys.pop("pretrained", None)
    members = keys.get("members")
    if "weights" in inline and isinstance(members, list):
        keys["members"] = [
            {key: value for key, value in member.items() if key != "weight"} if isinstance(member, Mapping) else member
            for member in members
        ]
    return keys | {key: value for key, value in inline.items() if key != "pretrained"}


def beside(member: Any, folder: Path) -> Any:
    """Return a member (or a file's top level) whose relative paths reach what is beside the file."""
    if isinstance(member, str):
        return beside({"pretrained": member}, folder)["pretrained"]
    if not isinstance(member, Mapping):
        return member
    resolved = dict(member)
    for key in (*PATH_KEYS, "router"):
        value = member.get(key)
        is_there = os.path.isfile if key == "router" else os.path.exists  # `measured` is no folder of that name
        if isinstance(value, str) and value and not os.path.isabs(value) and is_there(folder / value):
            resolved[key] = os.path.normpath(folder / value)
    return resolved
