"""Every value of every kind of recipe that cannot be is refused: by key, with the value, before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from sibling_models import merge_of

from lm_eval_deepen.build.recipe import read_build
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.ensemble_recipe import load_recipe
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.leaderboard.recipe import read_recipe

NAN, INF = math.nan, math.inf
NO_NUMBER: tuple[Any, ...] = (NAN, INF, -INF, True, "x", [], {}, [1], {"a": 1})
NO_COUNT = (*NO_NUMBER, -1, 1.5, -0.5)
NO_SEED = (*(value for value in NO_COUNT if value not in ([1],)), [0, 1, 2], [0, 0, 0, -1], 2**40)


def flat(value: Any) -> Any:
    """Return what of a value is looked for in a message: lists, and nothing, are spelt in several ways."""
    return "" if isinstance(value, (list, dict, type(None))) else value


def written(tmp_path: Path, raw: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def refused(read, path: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as found:
        read(path)
    told = str(found.value)
    assert "\n" not in told and str(path) in told and key in told, told
    shown = repr(value) if not isinstance(value, (list, dict)) else ""
    assert shown in told or str(value) in told, told


# Merges: mergekit takes almost anything for a number -----------------------------------------------

MERGE_NUMBERS = {
    "linear": ["weight"],
    "slerp": ["t"],
    "task_arithmetic": ["weight", "lambda"],
    "ties": ["weight", "density"],
    "dare_ties": ["weight", "density"],
    "dare_linear": ["weight", "lambda"],
}
FILTERED = [{"filter": "mlp", "value": NAN}]


@pytest.mark.parametrize(("method", "key"), [(method, key) for method, keys in MERGE_NUMBERS.items() for key in keys])
def test_numbers_of_a_merge(method, key, tmp_path):
    for value in (NAN, INF, -INF, True, "x", None, [], [0.5, NAN], [0.5, "x"], {"a": 1}, FILTERED):
        raw = merge_of(method, ["org/a"] if method == "slerp" else ["org/a", "org/b"])
        usual = {} if method == "slerp" else raw["models"][0]["parameters"]
        for scope in [raw] if method == "slerp" else [raw, *raw["models"]]:
            before = scope.get("parameters")
            scope["parameters"] = {**usual, key: value}
            refused(read_build, written(tmp_path, raw), key, flat(value))
            scope["parameters"] = before
            if before is None:
                del scope["parameters"]


@pytest.mark.parametrize(
    "value", [0.5, "0.5", 1, [0.1, 0.9], [{"filter": "mlp", "value": 0.5}, {"value": 0.3}], "5e-1"]
)
def test_numbers_of_a_merge_that_are_some(value, tmp_path):
    raw = merge_of("linear", ["org/a", "org/b"], base=None, weight=value)
    assert read_build(written(tmp_path, raw)).method == "linear"


@pytest.mark.parametrize("key", ["normalize", "rescale", "int8_mask"])
def test_switches_of_a_merge(key, tmp_path):
    raw = merge_of("ties", ["org/a", "org/b"])
    for value in (NAN, "x", 3, 0.5, [NAN], {}):
        raw["parameters"] = {key: value}
        refused(read_build, written(tmp_path, raw), key, flat(value))
    for value in (True, False, "true"):
        raw["parameters"] = {key: value}
        assert read_build(written(tmp_path, raw)).method == "ties"


@pytest.mark.parametrize("value", NO_SEED)
def test_the_seed_of_a_recipe(value, tmp_path):
    raw = merge_of("linear", ["org/a", "org/b"], base=None)
    refused(read_build, written(tmp_path, {**raw, "seed": value}), "seed", value)


def test_other_numbers_of_a_merge(tmp_path):
    slices = [{"sources": [{"model": "org/a", "layer_range": [0, NAN]}]}]
    raw = {"merge_method": "linear", "slices": slices}
    refused(read_build, written(tmp_path, raw), "slices[0].sources[0].layer_range[1]", NAN)


# Trainings -------------------------------------------------------------------------------------------

TRAINING = {
    **dict.fromkeys("train_tokens batch_size context_length checkpoint_steps top_k".split(), (*NO_COUNT, 0, "1.5")),
    **dict.fromkeys("learning_rate warmup weight_decay clm_weight held_out".split(), (*NO_NUMBER, -0.1, 1e9)),
    "seed": NO_SEED,
    "shard": (*NO_NUMBER, [0, 0], [2, 2], [-1, 2], [0.5, 2], [NAN, 2], [True, 2], [0, 1, 2]),
}


@pytest.mark.parametrize("key", TRAINING)
def test_numbers_of_a_training(key, tmp_path):
    raw = {"method": "fusellm", "target": "a", "sources": ["b"], "models": {"a": "org/a", "b": "org/b"}}
    for value in TRAINING[key]:
        refused(read_build, written(tmp_path, {**raw, key: value}), key, value)


@pytest.mark.parametrize("key", "target sources text models fusion alignment tail store device title".split())
def test_other_values_of_a_training(key, tmp_path):
    raw = {"method": "fusellm", "target": "a", "sources": ["b"], "models": {"a": "org/a", "b": "org/b"}}
    for value in (3, NAN, True, [3], {"a": 3}, [[]]):
        refused(read_build, written(tmp_path, {**raw, key: value}), key, flat(value))


# Leaderboards ----------------------------------------------------------------------------------------

BOARD = {
    "members": [{"name": "a", "pretrained": "org/a"}, {"name": "b", "pretrained": "org/b"}],
    "rows": [{"method": "gac"}],
    "tasks": ["t"],
}
IN_A_BOARD = {
    "seed": NO_SEED,
    "alpha": (*NO_NUMBER, 0, 1, -0.1, 1.5),
    "resamples": (*NO_COUNT, 0),
    "include_path": (3, NAN, True, [3], {"a": 1}),
    "metadata": (3, NAN, "x", [1]),
    "title": (3, NAN, True, ["x"], {}),
    "tasks": (3, "t", [], [3], [{"limit": 3}], [["t"]], [{"task": 3}]),
    "members": (3, "a", [], [3], [[]], [{"name": "a"}]),
    "rows": (3, "x", [3], ["x"], [[]]),
    "grid": (3, "x", [1], {"methods": 3}, {"orders": 3}, {"orders": [3]}, {"weightings": [3]}),
    "common": (3, "x", [1]),
}
OF_A_TASK = {
    "num_fewshot": NO_COUNT,
    "limit": (*NO_NUMBER, -1, 0, 1.5, -0.5),
    "metric": (3, NAN, True, {}, {"a": 1}, [3], [["acc"]], [None], ""),
    "gen_kwargs": (3, "a=1", [1], True),
    "system_instruction": (3, NAN, True, ["x"], {}),
    "apply_chat_template": (3, NAN, ["x"], {}),
    "fewshot_as_multiturn": (3, NAN, "x", ["x"], {}),
}
COMMON = {
    "max_length": (*NO_COUNT, 0),
    "seed": tuple(value for value in NO_SEED if value != 2**40),
    "batch_size": (NAN, INF, -1, 0, 1.5, True, [], {}, "x"),
}


@pytest.mark.parametrize("key", IN_A_BOARD)
def test_values_of_a_leaderboard(key, tmp_path):
    for value in IN_A_BOARD[key]:
        refused(read_recipe, written(tmp_path, {**BOARD, key: value}), key, flat(value))


@pytest.mark.parametrize("key", OF_A_TASK)
def test_values_of_a_leaderboards_tasks(key, tmp_path):
    for value in OF_A_TASK[key]:
        refused(read_recipe, written(tmp_path, {**BOARD, "tasks": [{"task": "t", key: value}]}), key, flat(value))
        refused(read_recipe, written(tmp_path, {**BOARD, key: value}), key, flat(value))


@pytest.mark.parametrize("key", COMMON)
def test_numbers_of_an_ensemble(key, tmp_path):
    for value in COMMON[key]:
        refused(read_recipe, written(tmp_path, {**BOARD, "common": {key: value}}), key, flat(value))
        with pytest.raises(ConfigError) as found:
            configure({"pretrained": "org/a", "members": ["org/a", "org/b"], "method": "gac", key: value})
        assert key in str(found.value)


# Recipes of single evaluations ------------------------------------------------------------------------

OF_A_RECIPE = {
    "num_fewshot": NO_COUNT,
    "limit": (*NO_NUMBER, -1, 0, 1.5),
    "apply_chat_template": (3, NAN, ["x"], {}),
    "fewshot_as_multiturn": (3, NAN, "x", ["x"], {}),
    "gen_kwargs": (3, NAN, True, [1]),
}


@pytest.mark.parametrize("key", OF_A_RECIPE)
def test_values_of_a_recipes_harness(key, tmp_path):
    for value in OF_A_RECIPE[key]:
        raw = {"members": ["org/a", "org/b"], "method": "gac", "task": "t", "harness": {key: value}}
        refused(load_recipe, written(tmp_path, raw), key, flat(value))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("title", (3, NAN, True, ["x"], {})), ("source", (3, ["x"], {})), ("note", (3, ["x"], {})),
        ("task", (3, NAN, [3], {"a": 1}, [[]])), ("harness", (3, "x", ["x"])),
        ("expected", (3, "x", [3], ["x"], [{"task": 3}])),
        ("expected", tuple([{"task": "t", "score": score, "read_in": "x"}] for score in NO_NUMBER)),
    ],
)  # fmt: skip
def test_other_values_of_a_recipe(key, values, tmp_path):
    for value in values:
        raw = {"members": ["org/a", "org/b"], "method": "gac", "task": "t", key: value}
        refused(load_recipe, written(tmp_path, raw), key, flat(value))
