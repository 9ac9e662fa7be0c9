"""``provenance.json``: the record of how a model was built, in its folder."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

import lm_eval_deepen
from lm_eval_deepen.build.recipe import BuildRecipe
from lm_eval_deepen.build.texts import TASK
from lm_eval_deepen.build.weights import snapshot_of, weights_sha256
from lm_eval_deepen.errors import ConfigError, StorageError, refused
from lm_eval_deepen.storage import read_json

FILE = "provenance.json"
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "mergekit")
LINEAGE = "trained"  # weights -> tokens: every training that the weights descend from
TASKS = "trained_on_tasks"  # tasks whose training or validation splits were in it


class Bits(TypedDict, total=False):
    """What is checked of bits per byte."""

    value: float


class Record(TypedDict, total=False):
    """What is checked of a provenance; others write it too, with less in it and more."""

    method: str
    identity: str
    weights_sha256: str
    seed: int
    models: dict[str, Any]
    trained: dict[str, int]
    trained_on_tasks: list[str]
    bits_per_byte: Bits


_RECORD = TypeAdapter(Record)


class DamagedError(ConfigError):
    """A built model that is not what was built: ``--redo`` builds it again."""


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """Return what a built model says of itself, DamagedError if that cannot be; None where a folder says nothing."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        _RECORD.validate_python(record := read_json(path), strict=True)
    except (StorageError, ValidationError) as error:
        why = refused(error) if isinstance(error, ValidationError) else error
        raise DamagedError(f"{path} is damaged ({why}); build the model again with --redo") from error
    return dict(record)


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the provenance of a model that was built to its end, whose weights are those that were built.

    Raises:
        DamagedError: something of it is gone or was changed since.
    """
    record = read_provenance(folder)
    if record is None:
        return None
    if missing := [key for key in Record.__annotations__ if key not in record]:
        raise DamagedError(f"{folder / FILE} is damaged (it has no {missing[0]}); build the model again with --redo")
    try:
        weights = weights_sha256(folder)
    except (ConfigError, OSError) as error:
        raise DamagedError(f"{folder}: its weights are gone ({error}); build the model again with --redo") from error
    if weights != record["weights_sha256"]:
        raise DamagedError(
            f"{folder}: its weights are damaged, or others: sha256 {weights[:12]}, {record['weights_sha256'][:12]} was "
            "built; build the model again with --redo"
        )
    return record


def provenance(
    recipe: BuildRecipe, identity: str, folder: Path, members: Mapping[str, str], made: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is written down of a model that was just built, beside what its builder says: `made`."""
    weights = weights_sha256(folder)
    places = recipe.places(members)
    tokens = int(made.get("tokens_trained", 0))
    trained: dict[str, int] = {weights: tokens} if tokens else {}
    for place in places.values():
        trained = {**lineage(place), **trained}
    tasks = {name.removeprefix(TASK) for name in recipe.texts if name.startswith(TASK)}
    tasks |= {task for place in places.values() for task in tasks_of(place)}
    return {
        **{key: value for key, value in made.items() if key != "recipe"},
        **({"settings": made["recipe"]} if "recipe" in made else {}),  # with what the recipe leaves to defaults
        "method": recipe.method,
        "recipe": dict(recipe.content),
        "recipe_sha256": recipe.sha256,
        "identity": identity,
        "seed": recipe.seed,
        "models": {name: described(name, place) for name, place in places.items()},
        "weights_sha256": weights,
        "tokens_trained": tokens,
        LINEAGE: trained,
        TASKS: sorted(tasks),
        "versions": {**made.get("versions", {}), **versions()},
    }


def described(name: str, place: str) -> dict[str, str]:
    """Return what tells a source model from others: its weights, or its commit on the hub."""
    if Path(place).is_dir():
        return {"weights_sha256": weights_sha256(Path(place))}
    model, folder = {"pretrained": place}, snapshot_of(place)
    if folder is not None:
        model["revision"] = folder.name
        with contextlib.suppress(ConfigError):  # the builder may keep its weights elsewhere
            model["weights_sha256"] = weights_sha256(folder)
    return model


def lineage(place: str) -> dict[str, int]:
    """Return weights -> tokens of every training that a model descends from, as far as its folder says."""
    return dict((read_provenance(Path(place)) or {}).get(LINEAGE, {}))


def tasks_of(place: str) -> list[str]:
    """Return the tasks that a model, or what it was made from, was trained on, as far as its folder says."""
    return list((read_provenance(Path(place)) or {}).get(TASKS, ()))


def versions() -> dict[str, str]:
    """Return the versions of what builds models, of those packages that are installed."""
    known = {"lm_eval_deepen": lm_eval_deepen.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            known[name] = metadata.version(name)
    return known
