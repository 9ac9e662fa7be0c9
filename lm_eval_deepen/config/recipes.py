"""Recipes: YAML files that a command works through. Each says its ``kind``, and has a name where it ships with us."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

import lm_eval_deepen
from lm_eval_deepen.config.describe import Names, Shown
from lm_eval_deepen.config.errors import bad_value
from lm_eval_deepen.config.frozen import FrozenDict
from lm_eval_deepen.config.keys import Keys
from lm_eval_deepen.config.yaml_files import read_yaml
from lm_eval_deepen.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

FOLDERS = {"tasks": "task_configs", "recipes": "matrices"}
SUFFIXES = (".yaml", ".yml", ".json")
KINDS = {  # -> who takes it
    "ensemble": "`--model_args pretrained=FILE`, `lm-eval-deepen inspect`, bpb, tune and build take it",
    "leaderboard": "`lm-eval-deepen leaderboard` takes it",
    "merge": "`lm-eval-deepen make` takes it",
    "distill": "`lm-eval-deepen make` takes it",
}
# Names of recipes whose ensembles were not those that were published -> what to take instead.
GONE = {
    **{f"deepen_mmlu_{n}": f"deepen_one_by_one_mmlu_{n}" for n in (3, 5, 6, 7)},
    **{f"deepen_nq_{n}": f"deepen_one_by_one_nq_{n}" for n in (3, 5, 6, 7)},
    **{f"deepen_piqa_{n}": f"deepen_one_by_one_piqa_{n}" for n in (3, 5, 6, 7, 8, 9)},
    **{f"deepen_{name}_{n}": f"deepen_one_by_one_{name}_7" for name in ("mmlu", "nq") for n in (8, 9)},
    "deepen_llama2_13b_nllb": "deepen_llama2_13b_nllb_en_de",
}
LARGEST_SEED = 2**32 - 1  # that numpy takes
_NEAR = 0.8  # of a shipped name: what is more alike is a misspelt recipe, and no model


def _limit(value: int | float | None) -> int | float | None:
    if value is not None and (value <= 0 or value > 1 and value % 1):
        raise ValueError(value)
    return value


class Asked(Keys):
    """How tasks are asked, in the words of ``lm_eval run``."""

    limit: Annotated[
        int | float | None, AfterValidator(_limit), Shown("a number of documents, or a share below 1", "all")
    ] = Field(None, description="The number of first documents, or their share.")
    num_fewshot: Annotated[int | None, Shown(default="the task's own number")] = Field(
        None, ge=0, description="The number of few-shots."
    )
    apply_chat_template: bool | str = Field(
        False, description="Whether every member's own chat template renders the prompts."
    )
    fewshot_as_multiturn: bool = Field(False, description="Whether few-shots are turns of the conversation.")


class Expected(Keys):
    """One published score of an ensemble."""

    task: str = Field(description="One of the recipe's tasks.")
    score: float | None = Field(
        None, description="As published, in per cent unless `metric` says otherwise; empty if no source gives it."
    )
    table: str | None = Field(None, description="The table or figure of the publication.")
    read_in: str | None = Field(None, description="The source in which the score was read; needed with a score.")
    note: str | None = Field(None, description="Other remarks; needed without a score.")
    metric: str = Field("exact_match", description="The metric of the score.")

    @model_validator(mode="after")
    def _says_why(self) -> Self:
        if self.score is not None and not self.read_in:
            raise ConfigError("a score needs read_in, the source it was read in", key="read_in", code="missing")
        if self.score is None and not self.note:
            raise ConfigError("without a score, a note must say why", key="note", code="missing")
        return self


class Harness(Asked):
    """Options of ``lm_eval run`` that the ensemble needs."""

    gen_kwargs: Annotated[FrozenDict | str | None, Shown("a mapping, or key=value,...")] = Field(
        None, description="Generation arguments that replace those of the tasks."
    )

    def given(self) -> dict[str, Any]:
        """Return what is given, as ``simple_evaluate`` takes it."""
        return {key: value for key, value in self.to_dict().items() if key in self.model_fields_set}


class RecipeKeys(Keys):
    """Keys that inform people and ``inspect``. They have no effect on an evaluation."""

    title: str = Field("", description="One line.")
    task: Names = Field((), description="The tasks or groups of tasks on which the ensemble is evaluated.")
    harness: Harness = Field(Harness(), description="Options of `lm_eval run` that the ensemble needs.")
    expected: Annotated[tuple[Expected, ...], Shown("a list with one entry for each published score")] = Field(
        (), description="Published scores."
    )
    source: str = Field("", description="The origin of the ensemble.")
    note: str = Field("", description="Other remarks.")

    @model_validator(mode="after")
    def _expects_its_tasks(self) -> Self:
        for i, entry in enumerate(self.expected):
            if entry.task not in self.task:
                tasks = ", ".join(self.task)
                raise bad_value(
                    f"expected[{i}].task",
                    f"expected[{i}]: task must be one of the recipe's ({tasks}); got {entry.task!r}",
                )
        return self


def data_folder(what: str) -> Path:
    """Return the folder of ``"tasks"`` or ``"recipes"``, in a wheel as in a checkout."""
    if what not in FOLDERS:
        known = ", ".join(FOLDERS)
        raise ConfigError(f"path {what!r}: expected one of {known}.{did_you_mean(what, FOLDERS)}")
    package = Path(lm_eval_deepen.__file__).resolve().parent
    places = [package / "_data" / FOLDERS[what], package.parent / FOLDERS[what]]
    for place in places:
        if place.is_dir():
            return place
    tried = " or ".join(map(str, places))
    raise ConfigError(
        f"path {what!r}: found neither {tried}; the installation is incomplete,"
        " reinstall with: pip install --force-reinstall --no-deps lm_eval_deepen"
    )


@cache
def shipped_recipes(kind: str | None = None) -> dict[str, Path]:
    """Return the recipes that ship with us by name: those of a kind, or all."""
    paths = {path.stem: path for path in sorted(data_folder("recipes").glob("*.yaml"))}
    return {name: path for name, path in paths.items() if kind is None or read_yaml(path).get("kind") == kind}


def find_recipe_file(text: str, folder: Path | None = None) -> Path | None:
    """Return the file of a recipe: a path, read in `folder`, or the name of a shipped one with or without its suffix.

    Returns:
        The file; None for what is no recipe's name: a model's folder, or its name on the hub.
    """
    place = (folder or Path()) / Path(text).expanduser()
    suffix = Path(text).suffix.lower() in SUFFIXES
    if os.path.isdir(place) or (os.path.isfile(place) and suffix):  # False of what no file system can name
        return None if os.path.isdir(place) else place
    shipped, name = shipped_recipes(), text.removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    if name in GONE:
        raise ConfigError(
            f"{text}: no shipped recipe has this name any more, since no publication has its ensemble. "
            f"Use {GONE[name]!r}; `lm-eval-deepen path recipes` prints where recipes are",
            code="unknown_name",
        )
    near = difflib.get_close_matches(name, shipped, n=1, cutoff=_NEAR)
    family = re.match(r"(deepen|leaderboard|merge|clm|fusellm|instruct)_", text)
    if suffix:
        beside = [path.name for path in place.parent.glob(f"*{place.suffix}")]
        raise ConfigError(
            f"{text}: no such file (looked in {place.absolute().parent}), and no shipped recipe."
            f"{did_you_mean(place.name, beside) or did_you_mean(name, shipped)} `lm-eval-deepen path recipes` prints "
            "where these are",
            code="unknown_name",
        )
    if "/" not in text and (near or family):
        raise ConfigError(
            f"{text!r} is no shipped recipe, and no folder here.{did_you_mean(name, shipped)} `lm-eval-deepen path "
            "recipes` prints where recipes are; a model is a folder, or ORGANISATION/NAME on the hub",
            code="unknown_name",
        )
    return None


def recipe_file(text: str, folder: Path | None = None) -> Path:
    """Return the file of a recipe; arguments and errors as `find_recipe_file`, and what is none is an error, too."""
    path = find_recipe_file(text, folder)
    if path is None:
        near = did_you_mean(text, shipped_recipes())
        raise ConfigError(
            f"{text}: no such recipe (looked in {(folder or Path()).absolute()}).{near} Give the path of a YAML file, "
            "or the name of a shipped recipe",
            code="unknown_name",
        )
    return path


def read_recipe(path: Path, *wanted: str) -> dict[str, Any]:
    """Return the keys of a recipe of a kind that the caller takes, its kind left out.

    Raises:
        ConfigError: it cannot be read, holds no keys, or is of another kind, which names the command that takes it.
    """
    raw = read_yaml(path)
    if not isinstance(raw, Mapping):
        raise ConfigError(
            f"{path} must hold the keys of a recipe, of kind {' or '.join(wanted)}; got {type(raw).__name__}"
        )
    kind = raw.get("kind") or _looks_like(raw) or wanted[0]
    if not isinstance(kind, str) or kind not in KINDS:
        near = did_you_mean(str(kind), KINDS)
        raise ConfigError(f"{path}: kind {kind!r} is unknown.{near} Kinds: {', '.join(KINDS)}", key="kind")
    if kind not in wanted:
        raise ConfigError(
            f"{path} is a recipe of kind {kind}: {KINDS[kind]}. Here a recipe of kind {' or '.join(wanted)} is needed",
            key="kind", code="wrong_kind",
        )  # fmt: skip
    if "kind" not in raw:
        _warn_once(path, kind)
    return {key: value for key, value in raw.items() if key != "kind"}


def _looks_like(raw: Mapping[str, Any]) -> str | None:
    """Return the kind of a recipe that does not say it; None where nothing gives it away."""
    if "merge_method" in raw:
        return "merge"
    if raw.get("method") in ("clm", "fusellm"):
        return "distill"
    if raw.keys() & {"tasks", "grid"} or isinstance(raw.get("rows"), list):
        return "leaderboard"
    return "ensemble" if raw.keys() & {"pretrained", "method", "weights", "weighting", "pooling", "expected"} else None


@cache
def _warn_once(path: Path, kind: str) -> None:
    log.warning("%s does not say what it is: add `kind: %s` to it", path, kind)
