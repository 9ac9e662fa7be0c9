"""What a built model says of itself: ``provenance.json`` in its folder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval_deepen
from lm_eval_deepen.building.recipe import BuildRecipe
from lm_eval_deepen.building.texts import TASK
from lm_eval_deepen.building.weights import snapshot_of, weights_sha256
from lm_eval_deepen.errors import ConfigError

FILE = "provenance.json"
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "mergekit")
LINEAGE = "trained"  # weights -> tokens: every training that the weights descend from
TASKS = "trained_on_tasks"  # tasks whose training or validation splits were in it


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """Return what a built model says of itself; None where a folder says nothing.

    Raises:
        ConfigError: it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); build the model again with --redo") from error
    return found


def provenance(
    recipe: BuildRecipe, identity: str, folder: Path, members: Mapping[str, str], found: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is written down of a model that was just built.

    Args:
        recipe: what was built.
        identity: digest of what decides its weights.
        folder: where it is.
        members: name -> place of the models it was made from.
        found: what the builder says, which is kept.
    """
    weights = weights_sha256(folder)
    places = recipe.places(members)
    tokens = int(found.get("tokens_trained", 0))
    trained: dict[str, int] = {weights: tokens} if tokens else {}
    for place in places.values():
        trained = {**lineage(place), **trained}
    tasks = {name.removeprefix(TASK) for name in recipe.texts if name.startswith(TASK)}
    tasks |= {task for place in places.values() for task in tasks_of(place)}
    return {
        **{key: value for key, value in found.items() if key != "recipe"},
        **({"settings": found["recipe"]} if "recipe" in found else {}),  # with what the recipe leaves to defaults
        "method": recipe.method,
        "recipe": dict(recipe.content),
        "recipe_sha256": recipe.sha256,
        "identity": identity,
        "seed": recipe.seed,
        "models": {name: _named(name, place) for name, place in places.items()},
        "weights_sha256": weights,
        "tokens_trained": tokens,
        LINEAGE: trained,
        TASKS: sorted(tasks),
        "versions": {**found.get("versions", {}), **versions()},
    }


def _named(name: str, place: str) -> dict[str, str]:
    if Path(place).is_dir():
        return {"weights_sha256": weights_sha256(Path(place))}
    found, folder = {"pretrained": place}, snapshot_of(place)
    if folder is not None:
        found["revision"] = folder.name
        with contextlib.suppress(ConfigError):  # the builder may keep its weights elsewhere
            found["weights_sha256"] = weights_sha256(folder)
    return found


def lineage(place: str) -> dict[str, int]:
    """Return weights -> tokens of every training that a model descends from, as far as its folder says."""
    said = read_provenance(Path(place)) if Path(place).is_dir() else None
    return {} if said is None else {str(key): int(value) for key, value in said.get(LINEAGE, {}).items()}


def tasks_of(place: str) -> list[str]:
    """Return the tasks that a model, or what it was made from, was trained on, as far as its folder says."""
    said = read_provenance(Path(place)) if Path(place).is_dir() else None
    return [] if said is None else list(map(str, said.get(TASKS, ())))


def versions() -> dict[str, str]:
    """Return the versions of what builds models, of those packages that are installed."""
    found = {"lm_eval_deepen": lm_eval_deepen.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_provenance(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``provenance.json`` into a model's folder."""
    partial = folder / f".{FILE}.{os.getpid()}"
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    os.replace(partial, folder / FILE)
