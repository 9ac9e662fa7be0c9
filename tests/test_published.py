"""A recipe of a published ensemble has its members, their order, task, direction and figure, with its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import published
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from lm_eval_deepen.config.recipes import GONE, recipe_file, shipped_recipes
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.recipes import find_recipe, load_recipe

TASKS = Path(__file__).resolve().parents[1] / "task_configs" / "deepen_paper"
SHORT = {"MMLU": "mmlu", "ARC-C": "arc", "GSM8K": "gsm8k", "PIQA": "piqa", "TriviaQA": "triviaqa", "NQ": "nq"}


def ensembles() -> dict[str, tuple[list[str], dict[str, float], str]]:
    """Return what every recipe should be: members, scores by task, the picture."""
    found: dict[str, tuple[list[str], dict[str, float], str]] = {}
    for at, (column, task) in enumerate(published.COLUMNS.items()):
        for size, members in ((2, published.TOP_2), (4, published.TOP_4)):
            score = published.MAIN[f"Top-{size} DeePEn-Avg"][at]
            found[f"deepen_{SHORT[column]}_{size}"] = (members[column], {task: score}, published.MAIN_PICTURE)
    for column, series in published.ONE_BY_ONE.items():
        for size in range(2, len(series) + 1):
            members = [name for name, _ in series[:size]]
            scores = {published.COLUMNS[column]: series[size - 1][1]}
            found[f"deepen_one_by_one_{SHORT[column]}_{size}"] = (members, scores, published.ONE_BY_ONE_PICTURE)
    scores = dict(zip(("deepen_gsm8k", "deepen_piqa"), published.DENSE_SPARSE["DeePEn"], strict=True))
    pair = ["LLaMA2-70B", "Mixtral-8x7B"]
    found["deepen_llama2_70b_mixtral"] = (pair, scores, published.DENSE_SPARSE_PICTURE)
    for at, (direction, (task, *_)) in enumerate(published.DIRECTIONS.items()):
        name = f"deepen_llama2_13b_nllb_{direction.lower().replace('-', '_')}"
        scores = {task: published.TRANSLATOR["DeePEn"][at]}
        found[name] = (["LLaMA2-13B", "NLLB-600M"], scores, published.TRANSLATOR_PICTURE)
    return found


def test_there_is_a_recipe_of_every_published_ensemble_and_of_no_other() -> None:
    assert {name for name in shipped_recipes("ensemble") if name.startswith("deepen_")} == set(ensembles())


@pytest.mark.parametrize("name", ensembles())
def test_a_recipe_is_the_published_ensemble(name: str) -> None:
    members, scores, picture = ensembles()[name]
    recipe = find_recipe(name)
    config = recipe.configure()
    assert [member.pretrained for member in config.members] == [published.MODELS[member] for member in members]
    assert config.weights == pytest.approx([1 / len(members)] * len(members), abs=1e-5)
    assert recipe.task == tuple(scores)
    assert {entry.task: entry.score for entry in recipe.expected} == scores and len(recipe.expected) == len(scores)
    assert all(picture in str(entry.read_in) for entry in recipe.expected)
    adapted = "DeePEn-Adapt" in str(recipe.expected[0].table)
    assert adapted == name.startswith("deepen_one_by_one")


@pytest.mark.parametrize("direction", published.DIRECTIONS)
def test_a_translators_recipe_has_the_direction_of_its_task(direction: str) -> None:
    task, read, written, source, target = published.DIRECTIONS[direction]
    name = f"deepen_llama2_13b_nllb_{direction.lower().replace('-', '_')}"
    recipe = find_recipe(name)
    translator = recipe.configure().members[1]
    assert (translator.source_language, translator.target_language) == (source, target)
    assert translator.source_pattern == rf"{read}: (.*)\n{written}:"
    config: dict[str, Any] = load_yaml(TASKS / f"{task}.yaml")
    assert config["dataset_kwargs"] == {"source": source, "target": target}
    assert config["doc_to_text"] == f"{read}: {{{{source}}}}\n{written}:"
    assert direction in str(recipe.expected[0].table) and recipe.expected[0].metric == "bleu"


def test_every_score_of_every_shipped_recipe_names_its_picture_or_text() -> None:
    for path in shipped_recipes("ensemble").values():
        for entry in load_recipe(path).expected:
            assert entry.score is None or (entry.read_in and entry.table), path.name


@pytest.mark.parametrize("name", GONE)
def test_a_recipe_that_went_names_the_one_to_take(name: str) -> None:
    assert name not in shipped_recipes() and GONE[name] in shipped_recipes()
    for given in (name, f"{name}.yaml"):
        for find in (find_recipe, recipe_file):
            with pytest.raises(ConfigError, match=f"{given}: no shipped recipe has this name .*Take '{GONE[name]}'"):
                find(given)
