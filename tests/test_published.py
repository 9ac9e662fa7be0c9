"""A recipe of a published ensemble has its members, their order, task, direction and figure, with its source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import published
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from lm_eval_deepen.config.recipes import GONE, recipe_file, shipped_recipes
from lm_eval_deepen.config.recipes import read_recipe as read_build
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.ensemble_recipe import find_recipe, load_recipe
from lm_eval_deepen.leaderboard.recipe import read_recipe

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
    for path in shipped_recipes("leaderboard").values():
        for table in read_recipe(path).expected:
            assert re.search(r"picture figures/|arXiv \d{4}\.\d{5}", table.read_in) and table.table, path.name


@pytest.mark.parametrize("name", GONE)
def test_a_recipe_that_went_names_the_one_to_take(name: str) -> None:
    assert name not in shipped_recipes() and GONE[name] in shipped_recipes()
    for given in (name, f"{name}.yaml"):
        for find in (find_recipe, recipe_file):
            with pytest.raises(ConfigError, match=f"{given}: no shipped recipe has this name .*'{GONE[name]}'"):
                find(given)


# --- leaderboards


def named(row: str) -> str:
    """Return the name of a published row in our table: LLM-Blender's texts are ranked without its trained model."""
    return f"{row}, no trained ranker" if "LLM-Blender" in row else row


def published_rows(name: str) -> tuple[dict[str, dict[str, float]], str]:
    """Return the scores of a table by row and task, and its picture."""
    columns = list(published.COLUMNS.values())
    if name == "paper_main_table":
        rows = {named(row): dict(zip(columns, scores, strict=True)) for row, scores in published.MAIN.items()}
        return {row: {t: s for t, s in scores.items() if s is not None} for row, scores in rows.items()}, (
            published.MAIN_PICTURE
        )
    if name == "paper_members_one_by_one":
        found: dict[str, dict[str, float]] = {}
        for column, series in published.ONE_BY_ONE.items():
            task = published.COLUMNS[column]
            found.setdefault(series[0][0], {})[task] = series[0][1]
            for size in range(2, len(series) + 1):
                found.setdefault(f"{size} members", {})[task] = series[size - 1][1]
        for (member, column), score in published.ONE_BY_ONE_ALONE.items():
            found.setdefault(member, {})[published.COLUMNS[column]] = score
        return found, published.ONE_BY_ONE_PICTURE
    if name == "paper_dense_sparse":
        tasks = ("deepen_gsm8k", "deepen_piqa")
        rows = {row: dict(zip(tasks, scores, strict=True)) for row, scores in published.DENSE_SPARSE.items()}
        return rows, published.DENSE_SPARSE_PICTURE
    found = {}
    for at, (direction, (task, *_)) in enumerate(published.DIRECTIONS.items()):
        for row, scores in published.TRANSLATOR.items():
            found.setdefault(f"{row} {direction}" if row.startswith("NLLB") else row, {})[task] = scores[at]
    return found, published.TRANSLATOR_PICTURE


PAPER = ("paper_main_table", "paper_members_one_by_one", "paper_dense_sparse", "paper_translator")


@pytest.mark.parametrize("name", PAPER)
def test_a_table_has_every_published_score_and_no_other(name: str) -> None:
    recipe = read_recipe(recipe_file(name))
    rows, picture = published_rows(name)
    found: dict[str, dict[str, float]] = {}
    for table in recipe.expected:
        assert picture in table.read_in
        for task, scores in table.scores.items():
            for row, score in scores.items():
                found.setdefault(row, {})[task] = score
    assert found == rows
    hub = [member.pretrained for member in recipe.members]
    assert set(hub) <= set(published.MODELS.values())
    for member in recipe.members:
        assert member.pretrained == published.MODELS[member.name.partition(" ")[0]]


@pytest.mark.parametrize("column", published.COLUMNS)
def test_the_main_tables_rows_have_the_members_of_their_benchmark(column: str) -> None:
    task = published.COLUMNS[column]
    recipe = read_recipe(recipe_file("paper_main_table"))
    rows = {row.group: row for row in recipe.rows if row.repeats and row.has(task)}
    for name, row in rows.items():
        wanted = published.TOP_2 if name.startswith("Top-2") else published.TOP_4
        assert list(row.members) == wanted[column], name
        assert row.adapts == ("Adapt" in name)
        if "DeePEn" in name or "LLM-Blender" in name:
            assert row.config.compat == "reference" and row.config.method == "deepen"
            rate = 0.5 if column == "GSM8K" and name.startswith("Top-2") else 0.15
            assert row.config.options.learning_rate == rate
        pooling = {"Top-4 Voting": "vote", "Top-4 MBR": "mbr"}.get(name, "rerank" if "LLM-Blender" in name else None)
        if name == "Top-4 DeePEn-Adapt + Voting/MBR":
            pooling = "mbr" if column in ("TriviaQA", "NQ") else "vote"
            assert row.config.fuses_steps
        assert row.config.pooling == pooling
        if "MinED" in name:
            assert row.config.method == "mined"
    assert set(rows) == {
        named(name) for name, scores in published.MAIN.items()
        if "Top" in name and scores[list(published.COLUMNS).index(column)] is not None
    }  # fmt: skip


def test_the_series_adds_the_members_of_the_figure() -> None:
    recipe = read_recipe(recipe_file("paper_members_one_by_one"))
    found = {(row.repeats, row.tasks[0]): (list(row.members), row.adapts) for row in recipe.rows if row.repeats}
    assert found == {
        (f"{size} members", published.COLUMNS[column]): ([name for name, _ in series[:size]], True)
        for column, series in published.ONE_BY_ONE.items()
        for size in range(2, len(series) + 1)
    }


def test_the_translators_table_pairs_each_direction_with_its_translator() -> None:
    recipe = read_recipe(recipe_file("paper_translator"))
    by_name = {member.name: member for member in recipe.members}
    for direction, (task, read, written, source, target) in published.DIRECTIONS.items():
        [row] = [row for row in recipe.rows if row.repeats == "DeePEn" and row.has(task)]
        translator = by_name[row.members[1]]
        assert row.members == ("LLaMA2-13B", f"NLLB-600M {direction}")
        assert translator.source_pattern == rf"{read}: (.*)\n{written}:"
        assert (translator.source_language, translator.target_language) == (source, target)
        [alone] = [row for row in recipe.alone if row.name == translator.name]
        assert alone.tasks == (task,)


@pytest.mark.parametrize("name", published.RIVALS)
def test_a_rivals_table_has_its_published_scores(name: str) -> None:
    source, members, scores = published.RIVALS[name]
    recipe = read_recipe(recipe_file(name))
    found: dict[str, dict[str, float]] = {}
    for table in recipe.expected:
        assert source in table.read_in
        for task, rows in table.scores.items():
            found.setdefault(task, {}).update(rows)
    assert found == scores and {spec.task for spec in recipe.tasks} == set(scores)
    assert {member.name for member in recipe.members} == set(members)
    ensembles = recipe.rows[len(recipe.members) :]
    assert all(set(row.members) == set(members) for row in ensembles)
    for row in ensembles:
        methods = {"GaC": "gac", "UniTE": "unite", "UniTE with SAFE": "unite", "AdaFuse": "adafuse"}
        assert row.config.method == methods.get(row.name, "deepen")
        assert (row.config.compat == "reference") == (row.name == "DeePEn")


def test_fusellm_is_evaluated_on_its_benchmarks() -> None:
    recipe = read_recipe(recipe_file("fusellm_benchmarks"))
    tasks = {spec.task for spec in recipe.tasks}
    assert tasks == set(published.FUSELLM_TASKS) and not recipe.expected
    trained = read_build(recipe_file("fusellm_llama2"), "distill")
    assert list(trained["models"].values()) == [published.MODELS[name] for name in published.FUSELLM]
    assert [member.pretrained for member in recipe.members][:3] == list(trained["models"].values())
    assert {tuple(row.members) for row in recipe.rows[4:]} == {tuple(member.name for member in recipe.members[:3])}


def test_there_is_a_test_of_every_shipped_table() -> None:
    tables = {name for name in shipped_recipes("leaderboard") if name.startswith(("paper_", "rival_"))}
    assert tables == {*PAPER, *published.RIVALS}
