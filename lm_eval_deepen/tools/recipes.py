"""Recipes: ensemble files that also say on what they are evaluated, and which scores were published.

A recipe is an ensemble file, so ``--model_args pretrained=RECIPE.yaml`` takes it as it is; the keys of
`config_parse.RECIPE_KEYS` are for people and for ``lm-eval-deepen inspect``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_deepen.config_options import coerce, option_names, whole_number
from lm_eval_deepen.config_parse import (
    FROM_PRETRAINED_KEYS,
    MEMBER_KEYS,
    RECIPE_KEYS,
    is_ensemble_file,
    merge_file,
    read_ensemble_file,
    unknown_key,
)
from lm_eval_deepen.errors import ConfigError, did_you_mean
from lm_eval_deepen.tools.paths import data_folder
from lm_eval_deepen.yaml_reading import read_yaml

if TYPE_CHECKING:
    from lm_eval_deepen.config import EnsembleConfig

HARNESS_KEYS = frozenset({"apply_chat_template", "fewshot_as_multiturn", "num_fewshot", "limit", "gen_kwargs"})
OTHER_RECIPES = ("leaderboard", "merge_", "clm_", "fusellm_")  # what their files begin with


@dataclass(frozen=True)
class Expected:
    """A score that was published for an ensemble.

    Attributes:
        task: which of the recipe's tasks.
        score: as published, in per cent unless `metric` says otherwise; None where no source that was read gives it.
        table: where the publication has it.
        read_in: the source the score was read in; needed with a score.
        note: what else to know; needed without a score.
        metric: what was measured.
    """

    task: str
    score: float | None = None
    table: str | None = None
    read_in: str | None = None
    note: str | None = None
    metric: str = "exact_match"


@dataclass(frozen=True)
class Recipe:
    """An ensemble, what it is evaluated on, and what is known of it.

    Attributes:
        name: of the file, or what was given inline.
        arguments: the ensemble alone, as ``--model_args`` takes it.
        title: one line.
        tasks: tasks or groups of tasks.
        harness: options of ``lm_eval run`` that belong to it.
        expected: published scores.
        source: where the ensemble is from.
        note: what else to know.
    """

    name: str
    arguments: Mapping[str, Any]
    title: str = ""
    tasks: tuple[str, ...] = ()
    harness: Mapping[str, Any] = field(default_factory=dict)
    expected: tuple[Expected, ...] = ()
    source: str = ""
    note: str = ""

    def configure(self, elsewhere: Mapping[str, str] | None = None) -> EnsembleConfig:
        """Return the ensemble, checked.

        Args:
            elsewhere: what stands for a member instead of what the recipe names: name -> folder or hub name.

        Raises:
            ConfigError: an argument that cannot be honoured, or a name in `elsewhere` that no member has.
        """
        from lm_eval_deepen.host import configure

        config = configure(dict(self.arguments))
        if not elsewhere:
            return config
        names = [member.name for member in config.members]
        for name in elsewhere:
            if name not in names:
                raise ConfigError(f"--member {name}: unknown.{did_you_mean(name, names)} Members: {', '.join(names)}")
        placed = [replace(m, pretrained=elsewhere.get(m.name, m.pretrained)) for m in config.members]
        return replace(config, members=tuple(placed))


def recipe_files() -> list[Path]:
    """Return the shipped recipes of ensembles, sorted; leaderboards and built models have recipes of their own."""
    folder = data_folder("recipes")
    return sorted(path for path in folder.glob("*.yaml") if not path.name.startswith(OTHER_RECIPES))


def find_recipe(text: str) -> Recipe:
    """Return the recipe of a file, of a shipped recipe's name, or of what ``--model_args`` takes.

    Raises:
        ConfigError: none of these, or a recipe that says something unknown.
    """
    if text.lstrip().startswith("{") or "=" in text:
        from lm_eval_deepen.tools.build import parse_ensemble

        arguments = parse_ensemble(text)
        inner = arguments.pop("pretrained", None)
        if not isinstance(inner, str) or not is_ensemble_file(inner):
            return Recipe(text, arguments if inner is None else {"pretrained": inner, **arguments})
        recipe = load_recipe(Path(inner).expanduser())
        return replace(recipe, arguments=merge_file(inner, arguments))
    if is_ensemble_file(text) and Path(text).expanduser().is_file():
        return load_recipe(Path(text).expanduser())
    shipped = {path.stem: path for path in recipe_files()}
    name = text.removesuffix(".yaml")
    if name in shipped:
        return load_recipe(shipped[name])
    if is_ensemble_file(text):
        raise ConfigError(
            f"recipe {text}: no such file (looked in {Path(text).expanduser().absolute().parent}), nor a shipped "
            f"recipe.{did_you_mean(name, shipped)} `lm-eval-deepen path recipes` prints where these are."
        )
    return Recipe(text, {"pretrained": text})


def load_recipe(path: Path) -> Recipe:
    """Read a recipe; everything it says is checked, nothing is loaded.

    Raises:
        ConfigError: naming the file, the key and the nearest one that is known.
    """
    arguments = read_ensemble_file(str(path))
    raw = read_yaml(path)
    where = f"recipe {path}: "
    for key in raw:
        if key not in RECIPE_KEYS and key not in ensemble_keys():
            raise ConfigError(unknown_key(key, ensemble_keys() | RECIPE_KEYS, where))
    try:
        tasks = _texts(raw.get("task"), "task")
        recipe = Recipe(
            name=path.name,
            arguments=arguments,
            title=_text(raw, "title"),
            tasks=tasks,
            harness=_harness(raw.get("harness")),
            expected=tuple(_expected(entry, i, tasks) for i, entry in enumerate(_listed(raw.get("expected")))),
            source=_text(raw, "source"),
            note=_text(raw, "note"),
        )
        recipe.configure()
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from error
    return recipe


def ensemble_keys() -> frozenset[str]:
    """Return every key that an ensemble file may have."""
    from lm_eval_deepen import pooling, weighting
    from lm_eval_deepen.config import ENSEMBLE_KEYS
    from lm_eval_deepen.fusion import option_classes
    from lm_eval_deepen.member.member import loading_keys

    seams = (option_classes(), weighting.option_classes(), pooling.option_classes())
    options = {name for seam in seams for cls in seam.values() for name in option_names(cls)}
    return ENSEMBLE_KEYS | MEMBER_KEYS | loading_keys() | frozenset(FROM_PRETRAINED_KEYS) | options


def _text(raw: Mapping[str, Any], key: str) -> str:
    value = raw.get(key)
    return "" if value is None else coerce(value, str, key).strip()


def _harness(value: Any) -> dict[str, Any]:
    """Return what ``lm_eval run`` is told beside the model and the tasks."""
    found = _keys(value or {}, HARNESS_KEYS, "harness")
    hints: dict[str, Any] = {"apply_chat_template": bool | str, "fewshot_as_multiturn": bool, "limit": int | float}
    for key, hint in hints.items():
        if found.get(key) is not None:
            coerce(found[key], hint, f"harness: {key}")
    if found.get("num_fewshot") is not None:
        whole_number(found["num_fewshot"], "harness: num_fewshot")
    limit = found.get("limit")
    if limit is not None and (float(limit) <= 0 or (float(limit) > 1 and float(limit) % 1)):
        raise ConfigError(f"harness: limit must be a number of documents, or a share below 1; got {limit!r}")
    if not isinstance(found.get("gen_kwargs"), (str, Mapping, type(None))):
        raise ConfigError(f"harness: gen_kwargs must be a mapping, or key=value,...; got {found['gen_kwargs']!r}")
    return found


def _texts(value: Any, key: str) -> tuple[str, ...]:
    listed = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(item, str) and item for item in listed):
        raise ConfigError(f"{key} must be a name or a list of names; got {value!r}")
    return tuple(listed)


def _listed(value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, type(None))):
        raise ConfigError(f"expected must be a list with one entry for each published score; got {value!r}")
    return value or []


def _keys(value: Any, known: frozenset[str], where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping; got {value!r}")
    for key in value:
        if key not in known:
            near = did_you_mean(str(key), sorted(known))
            raise ConfigError(f"{where}: unknown key {key!r}.{near} Keys: {', '.join(sorted(known))}")
    return dict(value)


def _expected(entry: Any, i: int, tasks: Sequence[str]) -> Expected:
    where = f"expected[{i}]"
    values = _keys(entry, frozenset(f.name for f in fields(Expected)), where)
    given = {key: value for key, value in values.items() if value is not None}
    if given.get("task") not in tasks:
        raise ConfigError(f"{where}: task must be one of the recipe's ({', '.join(tasks)}); got {given.get('task')!r}")
    for key, value in given.items():
        given[key] = coerce(value, float if key == "score" else str, f"{where}.{key}")
    found = Expected(**given)
    if found.score is not None and not found.read_in:
        raise ConfigError(f"{where}: a score needs read_in, the source it was read in")
    if found.score is None and not found.note:
        raise ConfigError(f"{where}: without a score, a note must say why")
    return found
