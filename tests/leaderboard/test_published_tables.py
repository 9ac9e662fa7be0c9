"""Rows by task, weights measured on development splits, groups as one column, and published scores beside measured."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from boards import write_recipe

from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.tasks import load_tasks
from lm_eval_deepen.leaderboard import miniature
from lm_eval_deepen.leaderboard.development import adapted
from lm_eval_deepen.leaderboard.execution import plan
from lm_eval_deepen.leaderboard.published import PublishedTable, distance, figure, told_apart, verdict
from lm_eval_deepen.leaderboard.recipe import read_recipe
from lm_eval_deepen.results.files import TaskRun


@pytest.fixture
def write(pico, tmp_path):
    """Writes a recipe of three members with synthetic samples, with some keys changed."""
    miniature.sample_data(tmp_path / "data", None)

    def write(**changes):
        names = {"A": "bytelevel", "B": "metaspace", "C": "padded"}
        raw = {
            "members": [{"name": name, "pretrained": str(pico[model])} for name, model in names.items()],
            "common": {"matrix_dir": str(tmp_path / "matrices")},
            "rows": [{"name": "pair", "method": "gac", "by_task": {
                "deepen_sample_arc": {"members": ["A", "B"]}, "deepen_sample_piqa": {"members": ["C", "A"]}}}],
            "tasks": [{"task": name, "metric": "acc"} for name in ("deepen_sample_arc", "deepen_sample_piqa")],
            "metadata": {"data_dir": str(tmp_path / "data")},
            "resamples": 200,
            **changes,
        }  # fmt: skip
        return write_recipe(tmp_path, raw)

    return write


def run(path: Path, *more: str) -> dict:
    out = path.parent / "out"
    assert cli.main(["leaderboard", str(path), "--out", str(out), "--device", "cpu", *more]) == 0
    return json.loads((out / "leaderboard.json").read_text())


PAIR = [{"name": "pair", "members": ["A", "B"], "method": "gac"}]
ADAPT = {"name": "Adapt", "members": ["A", "B"], "method": "gac", "weighting": "adaptive", "dev_scores": "measured"}
SCORES = {"deepen_sample_arc": {"pair": 50.0, "A": 25}, "deepen_sample_piqa": {"pair": 60}}
TABLE = {"table": "table 1", "read_in": "a picture", "metric": "acc", "scores": SCORES}


def test_a_row_has_other_members_on_every_task_and_one_line_in_the_table(write, capsys):
    path = write(expected=[TABLE])
    recipe = read_recipe(path)
    assert [(row.name, row.group, row.members, row.tasks) for row in recipe.rows[3:]] == [
        ("pair [deepen_sample_arc]", "pair", ("A", "B"), ("deepen_sample_arc",)),
        ("pair [deepen_sample_piqa]", "pair", ("C", "A"), ("deepen_sample_piqa",)),
    ]
    found = run(path)
    assert [(row["system"], row["task"]) for row in found["rows"] if row["system"] == "pair"] == [
        ("pair", "deepen_sample_arc"), ("pair", "deepen_sample_piqa"),
    ]  # fmt: skip
    by = {(row["system"], row["task"]): row for row in found["rows"]}
    for (system, task), published in {("pair", "deepen_sample_arc"): 0.5, ("A", "deepen_sample_arc"): 0.25}.items():
        row = by[system, task]
        assert row["extra"]["published"] == published
        want = distance(row["score"], row["stderr"], row["documents"], published)
        assert row["extra"]["from published (SE)"] == want and want is not None
    assert "published" not in by["B", "deepen_sample_arc"]["extra"]
    told = capsys.readouterr().out
    assert "from published (SE)" in told and "table 1: read in a picture" in told and "seeds" not in told


def test_members_may_have_columns_of_their_own(write):
    members = yaml.safe_load(write().read_text())["members"]
    members[1]["tasks"] = "deepen_sample_arc"
    found = run(write(members=members))
    assert [row["task"] for row in found["rows"] if row["system"] == "B"] == ["deepen_sample_arc"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [{"name": "x", "by_task": {"deepen_sample_arx": {}}}]}, "by_task names 'deepen_sample_arx'.*Did you"),
        ({"rows": [{"name": "x", "by_task": []}]}, "by_task must be a mapping"),
        ({"rows": [{"name": "x", "by_task": {"deepen_sample_arc": 3}}]}, "must be a mapping; got 3"),
        ({"rows": [{"name": "x", "dev_scores": "measured"}]}, "dev_scores belong to weighting: adaptive"),
        ({"expected": [{**TABLE, "scores": {"deepen_sample_arx": {"A": 1}}}]}, "expected.0.: 'deepen_sample_arx'"),
        ({"expected": [{**TABLE, "scores": {"deepen_sample_arc": {"a": 1}}}]}, "'a' is no row of the recipe"),
        ({"expected": [{**TABLE, "scores": {"deepen_sample_arc": {"A": math.nan}}}]}, "a score must be a number"),
        ({"expected": [{**TABLE, "scores": {"deepen_sample_arc": {"A": "1"}}}]}, "a score must be a number"),
        ({"expected": [TABLE, TABLE]}, "stands twice"),
        ({"expected": [{key: TABLE[key] for key in TABLE if key != "read_in"}]}, "read_in"),
        ({"members": [{"pretrained": "x", "tasks": ["y"]}]}, "'y' is no task of the recipe"),
    ],
)  # fmt: skip
def test_what_such_a_recipe_must_not_say(write, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(write(**changes))


def test_a_column_without_a_single_member_says_what_its_reference_is(write, capsys):
    members = [{**one, "tasks": "deepen_sample_arc"} for one in yaml.safe_load(write().read_text())["members"]]
    rows = [{"name": name, "members": ["A", "B"], "method": name} for name in ("gac", "unite")]
    found = run(write(members=members, rows=rows))
    told = "deepen_sample_piqa acc: no single member is evaluated there; the reference is the best row"
    assert [note for note in found["notes"] if "no single member" in note] == [told]
    assert "Of 2 comparisons of ensembles with the best single member" in capsys.readouterr().out  # those on ARC


def test_a_published_score_that_fits_two_columns_stands_beside_none(write):
    tasks = [{"task": "deepen_sample_arc", "metric": ["acc", "acc_norm"]}]
    table = {"table": "table 1", "read_in": "a picture", "scores": {"deepen_sample_arc": {"A": 25}}}
    for metric, want in ((None, {}), ("acc_norm,none", {"acc_norm": 0.25})):
        found = run(write(tasks=tasks, rows=PAIR, expected=[{**table, **({"metric": metric} if metric else {})}]))
        said = {row["metric"]: row["extra"]["published"] for row in found["rows"] if "published" in row["extra"]}
        assert said == want
        assert any("stand beside none of acc,none and acc_norm,none" in note for note in found["notes"]) is not bool(
            want
        )


def test_weights_are_the_members_scores_on_the_development_split(write, tmp_path, capsys):
    tasks = [{"task": name, "metric": "acc"} for name in ("deepen_sample_piqa", "deepen_sample_mmlu")]
    path, out = write(rows=[{**ADAPT, "method": "deepen"}], tasks=tasks), tmp_path / "out"
    assert cli.main(["leaderboard", str(path), "--out", str(out), "--dry-run", "--device", "cpu"]) == 0
    assert "first, 4 scores on development splits, for the weights of Adapt" in capsys.readouterr().out
    found = run(path)
    recipe = read_recipe(path)
    weighed = adapted(recipe, out, "cpu", lambda text: None)
    for row in weighed.rows[3:]:
        [task] = row.tasks
        scores = []
        for name in "AB":
            mark = json.loads((out / "development" / name / f"{task}.cell.json").read_text())
            results = json.loads((out / "development" / name / mark["results"]).read_text())
            assert results["configs"][task].get("test_split") is None
            scores.append(results["results"][task]["acc,none"])
        assert row.config.weights == pytest.approx([score / sum(scores) for score in scores])
        assert row.tuned is not None and not row.adapts
        assert row.config.weighting in (None, "explicit") and not row.config.weights_change  # none that learn
    assert {row["system"] for row in found["rows"]} == {"A", "B", "C", "Adapt"}
    before = {str(path): path.stat().st_mtime_ns for path in out.rglob("*.cell.json")}
    assert len(before) == 4 + 8 and run(path)["rows"] == found["rows"]
    assert {str(path): path.stat().st_mtime_ns for path in out.rglob("*.cell.json")} == before


def test_a_router_knows_the_members_scores_on_the_development_split(write, tmp_path):
    row = {"name": "Routed", "members": ["A", "B"], "method": "gac", "weighting": "knn", "router": "measured"}
    tasks = [{"task": "deepen_sample_piqa", "metric": "acc"}]
    recipe, out = read_recipe(write(rows=[{**row, "nearest": 3}], tasks=tasks)), tmp_path / "out"
    routed = adapted(recipe, out, "cpu", lambda text: None).rows[-1]
    options = routed.config.weighting_options
    assert (routed.config.weighting, options.nearest) == ("knn", 3) and not routed.adapts
    for at, name in enumerate("AB"):
        mark = json.loads((out / "development" / name / "deepen_sample_piqa.cell.json").read_text())
        results = json.loads((out / "development" / name / mark["results"]).read_text())
        mean = sum(one.scores[at] for one in options.examples) / len(options.examples)
        assert mean == pytest.approx(results["results"]["deepen_sample_piqa"]["acc,none"])
    assert run(tmp_path / "recipe.yaml")["rows"]
    with pytest.raises(ConfigError, match="router belong to weighting: knn"):
        read_recipe(write(rows=[{**row, "weighting": "uniform"}], tasks=tasks))


@pytest.mark.parametrize("score", [-0.25, math.nan])
def test_scores_that_give_no_proportion(write, tmp_path, monkeypatch, score):
    recipe = read_recipe(write(rows=[ADAPT], tasks=[{"task": "deepen_sample_piqa", "metric": "acc"}]))
    read = TaskRun.__init__

    def scored(self, task, *others):
        others[-1]["results"][task]["acc,none"] = score
        read(self, task, *others)

    monkeypatch.setattr(TaskRun, "__init__", scored)
    with pytest.raises(ConfigError, match=f"acc of member 'A' is {score} on the development split"):
        adapted(recipe, tmp_path / "out", "cpu", lambda text: None)


def test_development_documents_that_are_evaluated_too_are_refused(write, tmp_path):
    """The task's own splits are disjoint; a recipe that evaluates the development split is not."""
    path = write(rows=[ADAPT], tasks=[{"task": "deepen_sample_arc", "split": "validation"}])
    with pytest.raises(ConfigError, match="looks at its development split, which is what the recipe evaluates"):
        adapted(read_recipe(path), tmp_path / "out", "cpu", lambda text: None)
    recipe = read_recipe(write(rows=[ADAPT], tasks=["deepen_sample_piqa"]))
    weighed = adapted(recipe, tmp_path / "out", "cpu", lambda text: None)
    tasks = load_tasks([spec.replace(split="validation") for spec in recipe.tasks], (), recipe.metadata)
    with pytest.raises(ConfigError, match="the development split of deepen_sample_piqa"):
        plan(weighed, tasks, tmp_path / "other")


def test_scores_of_zero_are_no_proportion(write, tmp_path):
    recipe = read_recipe(write(rows=[ADAPT], tasks=[{"task": "deepen_sample_nq", "limit": 1}]))
    with pytest.raises(ConfigError, match="all members score 0 on the development split of 'deepen_sample_nq'"):
        adapted(recipe, tmp_path / "out", "cpu", lambda text: None)
    told: list[str] = []
    equal = adapted(recipe, tmp_path / "out", "cpu", told.append, when_zero="equal")
    assert equal.rows[-1].config.weights == (0.5, 0.5) and "its weights are equal" in told[-1]


def test_a_published_score_of_a_group_is_of_the_whole_group(write, tmp_path, monkeypatch):
    monkeypatch.setenv("LM_EVAL_DEEPEN_DATA", str(tmp_path / "data"))
    table = {**TABLE, "metric": "exact_match", "scores": {"deepen_mmlu": {"pair": 30}}}
    path = write(rows=PAIR, tasks=[{"task": "deepen_mmlu", "metric": "exact_match"}], expected=[table])
    found = run(path)
    assert {row["task"] for row in found["rows"]} == {"deepen_mmlu"}
    pair = next(row for row in found["rows"] if row["system"] == "pair")
    assert pair["documents"] == 2 * miniature.DOCUMENTS and pair["extra"]["published"] == 0.3
    out = write(rows=PAIR, tasks=[{"task": "deepen_mmlu", "metric": "exact_match"}])
    assert {row["task"] for row in run(out)["rows"]} == {"deepen_mmlu_anatomy", "deepen_mmlu_high_school_physics"}


def test_a_metric_that_is_no_mean_is_shown_as_reported_where_it_was_published(write, capsys):
    tasks = [{"task": "deepen_flores_en_de", "metric": "bleu", "limit": 2, "gen_kwargs": {"max_gen_toks": 4}}]
    table = {**TABLE, "metric": "bleu", "scores": {"deepen_flores_en_de": {"pair": 33.34}}}
    assert run(write(rows=PAIR, tasks=tasks, expected=[table]))["rows"] == []
    told = capsys.readouterr().out
    assert re.search(r"deepen_flores_en_de bleu, as reported, without a test: pair \d+\.\d+, published 33\.34", told)
    path = write(rows=PAIR, tasks=tasks)
    assert cli.main(["leaderboard", str(path), "--out", str(path.parent / "out"), "--device", "cpu"]) == 2
    assert "not a function of means over documents" in capsys.readouterr().err


def test_published_shares_are_in_per_cent_and_other_scores_as_they_are():
    tables = [PublishedTable(table="1", read_in="x", scores={"t": {"A": 12.5}})]
    metrics = ("acc", "exact_match", "bleu", "word_perplexity", "bits_per_byte", "perplexity")
    found = [figure(tables, "A", "t", metric, "none") for metric in metrics]
    assert found == [0.125, 0.125, 12.5, 12.5, 12.5, 12.5]


def test_a_score_that_is_published_twice_or_of_no_column_is_told(write):
    arc = {**TABLE, "scores": {"deepen_sample_arc": {"A": 25}}}
    tasks = ["deepen_sample_arc"]
    for first, second in ((None, "acc"), ("acc", "acc"), ("acc,none", "acc"), ("acc_norm", None)):
        tables = [{**arc, "metric": metric} for metric in (first, second)]
        with pytest.raises(
            ConfigError, match=r"expected\[1\]: the score of row 'A' on 'deepen_sample_arc' stands twice"
        ):
            read_recipe(write(tasks=tasks, rows=PAIR, expected=tables))
    tables = [{**arc, "metric": metric} for metric in ("acc", "acc_norm", "f,one", "f,two")]
    assert len(read_recipe(write(tasks=tasks, rows=PAIR, expected=tables)).expected) == 4
    columns = [("acc", "none"), ("acc_norm", "none"), ("f", "one")]
    kept, notes = told_apart([PublishedTable(**table) for table in tables], "deepen_sample_arc", columns)
    assert [table.metric for table in kept] == ["acc", "acc_norm", "f,one"]
    assert notes == [f"{TABLE['table']}: its scores of deepen_sample_arc are of f,two, which is no column here"]


@pytest.mark.parametrize(
    ("measured", "stderr", "documents", "published", "want", "word"),
    [
        (0.5, 0.05, 100, 0.45, 1.0, "agrees"),
        (0.5, 0.05, 100, 0.61, -2.2, "differs"),
        (0.0, 0.0, 100, 0.5, -10.0, "differs"),  # of so many documents, if the published share were true
        (0.0, None, 0, 0.5, None, "cannot be told"),
        (0.0, 0.0, 10, 33.3, None, "cannot be told"),
    ],
)
def test_the_distance_to_a_published_score(measured, stderr, documents, published, want, word):
    found = distance(measured, stderr, documents, published)
    assert found == (want if want is None else pytest.approx(want)) and verdict(found) == word
