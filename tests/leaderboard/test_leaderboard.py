"""The leaderboard: recipes, cells that are kept, passes that are shared, and the table."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import weakref
from dataclasses import replace
from html import unescape
from pathlib import Path
from urllib.parse import parse_qs

import lm_eval
import numpy as np
import pytest
import yaml
from boards import executed, measured, planned, write_recipe
from harness import by_default
from harness import requests as asked
from run_files import local_tasks

from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.errors import ConfigError, DeepenError, RequestError, ResultError
from lm_eval_deepen.fusion import METHODS
from lm_eval_deepen.harness import requests as answering
from lm_eval_deepen.harness.model import DeepenLM, configure
from lm_eval_deepen.harness.requests import share_passes
from lm_eval_deepen.harness.tasks import load_tasks
from lm_eval_deepen.harness.unanswered import attempt
from lm_eval_deepen.leaderboard import execution, models
from lm_eval_deepen.leaderboard import table as leaderboard_table
from lm_eval_deepen.leaderboard.cells import SUFFIX
from lm_eval_deepen.leaderboard.execution import plan
from lm_eval_deepen.leaderboard.models import RowModel, share_by_members
from lm_eval_deepen.leaderboard.recipe import read_recipe
from lm_eval_deepen.leaderboard.tuned import record
from lm_eval_deepen.pooling import POOLINGS
from lm_eval_deepen.results.files import find_runs
from lm_eval_deepen.results.pairing import measure as paired
from lm_eval_deepen.results.rows import compare
from lm_eval_deepen.results.statistics.correction import Comparisons, holm, step_down

ONE = {"orders": ["A+B"]}
CHOICE = {"task": "conf_choice", "metric": ["acc", "acc_norm"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("leaderboard")
    (root / "tasks").mkdir()
    local_tasks(root / "tasks")
    return root


def usual(pico, folder):
    """The recipe of the pair byte-level and metaspace."""
    return {
        "members": [
            {"name": "A", "pretrained": str(pico["bytelevel"])},
            {"name": "B", "pretrained": str(pico["metaspace"])},
        ],
        "common": {"matrix_dir": str(folder / "matrices")},
        "grid": {"methods": ["deepen", "gac"]},
        "tasks": [CHOICE],
        "include_path": str(folder / "tasks"),
        "resamples": 200,
    }


@pytest.fixture
def write(pico, folder, tmp_path):
    """Writes the recipe with some keys changed."""
    return lambda **changes: write_recipe(tmp_path, {**usual(pico, folder), **changes})


def scores(table):
    return {(row.system, row.column): row.score for row in table.rows}


# --- recipes


def names(path: Path) -> list[str]:
    return [row.name for row in read_recipe(path).rows]


def test_a_grid_is_the_product_of_its_axes_and_members_alone_come_first(write):
    grid = {
        "methods": ["deepen", {"method": "gac", "threshold": 0.5}],
        "weightings": ["none", "perplexity", {"weights": {"A": 0.7, "B": 0.3}, "name": "tilted"}],
    }
    found = read_recipe(write(grid=grid))
    assert [row.name for row in found.rows][:4] == ["A", "B", "A+B deepen", "A+B gac(threshold=0.5)"]
    assert len(found.rows) == 2 + 2 * 2 * 3
    by_name = {row.name: row.config for row in found.rows}
    assert by_name["A+B deepen tilted"].weights == (0.7, 0.3)
    assert by_name["B+A deepen tilted"].weights == (0.3, 0.7)  # by name: it fits every order
    assert by_name["B+A gac(threshold=0.5) perplexity"].weighting == "perplexity"


def test_poolings_leave_out_what_they_have_no_use_for(write):
    grid = {
        "orders": ["A+B"],
        "methods": ["deepen", "gac"],
        "weightings": ["none", "confidence"],
        "poolings": ["none", "vote", {"pooling": "mbr", "with_fused": True, "name": "+ mbr"}],
    }
    found = read_recipe(write(grid=grid))
    assert [row.name for row in found.rows] == [
        "A", "B", "A+B deepen", "A+B gac", "A+B deepen confidence", "A+B gac confidence", "A+B vote",
        "A+B deepen + mbr", "A+B gac + mbr",
    ]  # fmt: skip
    assert found.notes == tuple(
        f"{name} is not combined with weighting confidence, which weighs fused steps" for name in ("vote", "mbr")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taks": []}, r"recipe.yaml: unknown key 'taks'. Did you mean 'tasks'"),
        ({"tasks": []}, r"tasks must be a list with at least one entry; got \[\]"),
        ({"tasks": [{"task": "t", "limt": 3}]}, r"tasks\[0\]: unknown key 'limt'. Did you mean 'limit'"),
        ({"tasks": [{"task": "t", "limit": 1.5}]}, r"tasks\[0\]: limit must be a number of documents"),
        ({"tasks": ["t", "t"]}, r"task 't' is listed twice"),
        ({"tasks": ["a b", "A_b"]}, r"tasks 'a b' and 'A_b' would have the same files"),
        ({"tasks": [{"task": "t", "split": "dev"}]}, r"split must be 'test' or 'validation'; got 'dev'"),
        ({"tasks": ["t", 3]}, r"tasks\[1\] must be a task's name, or a mapping with task; got 3"),
        ({"tasks": ["t", "t"], "grid": {"methods": ["gaq"]}}, r"2 problems:\n .*listed twice.*\n .*method 'gaq' is"),
        ({"members": [3]}, r"members\[0\] must be a model's name, or a mapping with pretrained or build; got 3"),
        ({"members": [{"name": "x"}]}, r"members\[0\] must have pretrained or build, and not both; got {'name': 'x'}"),
        ({"members": [{"pretrained": "x", "name": 3}]}, r"members\[0\]: name must be .*got 3 \(quote it if it is"),
        ({"members": "A+B"}, r"members must be a list with at least one entry; got 'A\+B'"),
        ({"grid": None}, r"no ensemble: give rows, grid, or both"),
        ({"grid": {"method": ["gac"]}}, r"grid: unknown key 'method'. Did you mean 'methods'"),
        ({"grid": {"methods": ["gaq"]}}, r"row 'A\+B gaq': method 'gaq' is unknown. Did you mean 'gac'"),
        ({"grid": {"weightings": ["perplexty"]}}, r"weighting 'perplexty' is unknown. Did you mean 'perplexity'"),
        ({"grid": {"orders": [["A", "C"]]}}, r"grid: orders: member 'C' is unknown. .*Members: A, B"),
        ({"grid": {"orders": [["A"]]}}, r"grid: orders: A is a member alone"),
        ({"grid": {"methods": [{"method": name, "name": "x"} for name in ("deepen", "gac")]}}, "the name 'A.B x'"),
        ({"rows": [{"method": "gac", "treshold": 0.5}]}, r"row .*: unknown key 'treshold'. Did you mean 'threshold'"),
        ({"rows": [{"name": "x", "method": "gac", "dtype": "float16"}]}, r"dtype='float16' would load member 'A'"),
        ({"rows": [{"name": "x", "weights": {"A": 1, "C": 0}}]}, r"row 'x': weights names A, C, and its members are"),
        ({"rows": [{"name": "A", "method": "gac"}]}, r"rows 'A' and 'A' have one name"),
        ({"rows": [{"members": [["A"], "B"]}]}, r"rows\[0\]: member \['A'\] is unknown. .*Members: A, B"),
        ({"rows": [{"name": "leaderboard.json", "method": "gac"}]}, r"'leaderboard.json' has the name of something"),
        ({"common": {"members": "A"}}, r"common holds members, which is a member's own"),
        ({"seed": [0, 2**32, 0, 0]}, r"seed must be one number from 0 to 4294967295, or four: .*4294967296"),
        ({"resamples": "1e12"}, r"resamples must be a whole number from 1 to 1000000; got '1e12'"),
        ({"alpha": 5}, r"alpha must be a number between 0 and 1; got 5"),
        ({"include_path": "nowhere"}, r"include_path: .*nowhere is not a folder"),
    ],
)  # fmt: skip
def test_bad_recipes_are_refused_before_anything_loads(write, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(write(**changes))


def test_what_all_rows_have_alike_may_say_nothing_of_members_alone(write):
    common = {"rows": "prefix", "skip_when": "agree", "weighting": "perplexity"}
    rows = read_recipe(write(grid=ONE, common=common)).rows
    assert {row.config.options.rows for row in rows} == {"prefix"} and any(row.alone for row in rows)
    assert {row.config.weighting for row in rows if row.alone} == {None}
    with pytest.raises(ConfigError, match="rows='prefix' is about fusing steps, and there is one member"):
        read_recipe(write(rows=[{"members": ["A"], "rows": "prefix"}]))


def test_a_long_name_has_a_folder_of_its_own(write):
    long = ["ä" * 120 + end for end in ("x", "y")]
    rows = read_recipe(write(grid=None, rows=[{"name": name, "method": "gac"} for name in long])).rows[-2:]
    assert [row.name for row in rows] == long and len({row.slug for row in rows}) == 2
    assert all(len(row.slug.encode()) < 200 for row in rows)


def test_the_shipped_recipe_has_every_method_and_pooling_in_both_orders():
    path = Path(__file__).resolve().parents[2] / "matrices" / "leaderboard_smollm2_gemma3.yaml"
    recipe = read_recipe(path)
    for order in (("SmolLM2", "Gemma3"), ("Gemma3", "SmolLM2")):
        found = [row.config for row in recipe.rows if row.members == order]
        assert {config.method for config in found if config.pooling is None} == set(METHODS)
        assert {config.pooling for config in found} == {None, *POOLINGS}
    assert [row.name for row in read_recipe(path, {"Gemma3": "other"}).rows] == [row.name for row in recipe.rows]
    assert read_recipe(path, {"Gemma3": "other"}).members[1].pretrained == "other"
    with pytest.raises(ConfigError, match="--member Gema3: unknown. Did you mean 'Gemma3'"):
        read_recipe(path, {"Gema3": "other"})


def test_an_unknown_task_is_named_with_the_nearest(write, monkeypatch, folder):
    import lm_eval_deepen.harness.tasks as tasks

    manager = tasks.TaskManager
    # Without the harness's own task files, which take seconds to read.
    monkeypatch.setattr(tasks, "TaskManager", lambda **keys: manager(**{**keys, "include_defaults": False}))
    recipe = read_recipe(write(tasks=["conf_choise"]))
    with pytest.raises(ConfigError, match="task 'conf_choise' is unknown. Did you mean 'conf_choice'"):
        load_tasks(recipe.tasks, recipe.include_path)
    recipe = read_recipe(write(tasks=["conf_group", "conf_blank"]))
    with pytest.raises(ConfigError, match="'conf_blank' is in 'conf_group' and in 'conf_blank'"):
        load_tasks(recipe.tasks, recipe.include_path)


# --- cells


def test_shared_passes_give_what_separate_runs_give(write, tmp_path, folder):
    grid = {"orders": ["A+B"], "methods": ["deepen", "gac"], "weightings": ["none", "perplexity"]}
    path = write(grid=grid, tasks=[CHOICE, "conf_text"])
    todo, cells = executed(path, tmp_path / "out")
    manager = todo.tasks[0].manager
    for row in todo.recipe.rows:
        model = DeepenLM(**row.config.to_dict(), device="cpu")
        for task in todo.tasks:
            alone = lm_eval.simple_evaluate(model=model, tasks=[task.name], task_manager=manager, bootstrap_iters=0)
            cell = cells[row.name, task.name]
            written = json.loads(cell.mark.with_name(cell.results).read_text())
            for key, value in alone["results"][task.name].items():
                if "," in key and "stderr" not in key:
                    assert written["results"][task.name][key] == pytest.approx(value, rel=1e-4)
            records = [json.loads(line) for line in cell.mark.with_name(cell.samples[task.name]).open()]
            for record_, own in zip(records, alone["samples"][task.name], strict=True):
                got = [float(re.findall(r"-?\d+\.\d+", str(resp))[0]) for resp in record_["filtered_resps"]]
                want = [resp[0] if isinstance(resp, (tuple, list)) else resp for resp in own["filtered_resps"]]
                assert got == pytest.approx(want, rel=1e-3)
    names = ("deepen", "gac", "deepen perplexity", "gac perplexity")
    ensemble = [cells[f"A+B {name}", "conf_choice"].cost for name in names]
    assert {cost.shared_by for cost in ensemble} == {2} and len({cost.tokens for cost in ensemble}) == 1
    both = cells["A", "conf_choice"].cost.tokens + cells["B", "conf_choice"].cost.tokens
    assert both < ensemble[0].tokens < 2 * both  # once, with splits at the other member's token boundaries
    assert all(0 < cost.fusing < cost.seconds for cost in ensemble)


def test_the_fusing_of_weights_that_learn_has_its_seconds(write, tmp_path):
    grid = {"orders": ["A+B"], "methods": ["deepen", "gac"], "weightings": ["bayes"]}
    todo, cells = executed(write(grid=grid, tasks=[CHOICE, "conf_answer"]), tmp_path / "out")
    costs = [cell.cost for (row, _), cell in cells.items() if row.startswith("A+B")]
    assert len(costs) == 4 and all(0 < cost.fusing < cost.seconds for cost in costs)


def test_what_fuses_no_rows_has_no_seconds_of_it(write, tmp_path):
    """`mixture` fuses rows where it writes, none where it scores."""
    path = write(grid={"orders": ["A+B"], "methods": ["mixture"]}, tasks=[CHOICE, "conf_answer"])
    table = measured(path, tmp_path / "out")
    found = {(row.system, row.column): row.extra["fusing s/doc"] for row in table.rows}
    assert found["A+B mixture", "conf_choice acc"] is None and found["A", "conf_choice acc"] is None
    assert all(value > 0 for (row, name), value in found.items() if row == "A+B mixture" and "conf_answer" in name)
    assert "`mixture` fuses none where it scores texts (-)" in leaderboard_table.rendered(table, "text")


def test_where_numbers_come_from_names_limits_and_models_without_the_machines_folders(write, tmp_path):
    def told(*limits):
        specs = tuple(recipe.tasks[0].replace(task=f"conf_{n}", limit=limit) for n, limit in enumerate(limits))
        return leaderboard_table.provenance(replace(recipe, tasks=specs), [evaluation])

    recipe = read_recipe(write())
    folder, digest = str(tmp_path / "some model"), "0123456789abcdef"
    local = {"name": "L", "pretrained": folder, "dtype": "float32", "revision": "main", "files": {folder: digest}}
    hub = {"name": "H", "pretrained": "a/b", "dtype": "float32", "revision": "main", "files": {"a/b": "5" * 40}}
    evaluation = {"config": {"deepen": {"members": [local, hub]}}}
    assert told(None, None)["limits"] == "all documents"
    assert told(10, 10)["limits"] == "10 documents of each task"
    assert told(1_000_000, 1_000_000)["limits"] == "1000000 documents of each task"
    assert told(0.005, 0.005)["limits"] == "0.5 % of each task"
    assert told(None, 10, 0.07)["limits"] == "10 documents of conf_1; 7 % of conf_2; all documents of the others"
    assert told(None)["models"] == "L: some model (files 0123456789ab, float32); H: a/b (revision main, float32)"


def test_a_router_is_found_beside_the_recipe(write, tmp_path):
    knn = {"weighting": "knn", "router": "router.jsonl"}
    path = write(
        grid={"methods": ["deepen"], "weightings": [{**knn, "name": "g"}]},
        rows=[{"members": ["A", "B"], **knn, "name": "r"}],
    )
    (path.parent / "router.jsonl").write_text('{"prompt": "a", "scores": [1, 0]}\n')
    routers = {getattr(row.config.weighting_options, "router", None) for row in read_recipe(path).rows}
    assert routers == {None, str(path.parent / "router.jsonl")}


def test_the_harnesses_own_files_are_written_and_compare_reads_them(write, tmp_path):
    table = measured(write(), tmp_path / "out")
    [run] = find_runs(tmp_path / "out" / "A+B_gac")
    assert run.task("conf_choice").results["model_name"] == "A+B gac"
    assert run.task("conf_choice").results["config"]["deepen"]["method"] == "gac"
    assert run.task("conf_choice").results["config"]["model_args"]["method"] == "gac"
    assert len(find_runs(tmp_path / "out")) == len(table.recipe.rows)
    assert run.task("conf_choice").contradiction("acc", "none") is None


def test_a_killed_run_keeps_finished_cells(write, tmp_path, monkeypatch):
    path, out = write(tasks=[CHOICE, "conf_answer"], grid={"orders": ["B+A"]}), tmp_path / "out"
    evaluate, done = execution.evaluate, []

    def killed(model, task, seeds, tracker=None):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append((model, task.name))
        return evaluate(model, task, seeds, tracker)

    monkeypatch.setattr(execution, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(path, out)
    kept = {mark: mark.stat().st_mtime_ns for mark in out.rglob(f"*{SUFFIX}")}
    assert len(kept) == 4 and not list(out.rglob("*.cell-*"))
    todo = planned(path, out)
    assert len(todo.finished) == 4 and todo.missing == [("B+A", "conf_choice"), ("B+A", "conf_answer")]

    asked = []
    monkeypatch.setattr(
        execution, "evaluate", lambda model, *rest: asked.append(len(model.peers)) or evaluate(model, *rest)
    )
    resumed = scores(measured(path, out))
    assert len(asked) == 2
    assert all(mark.stat().st_mtime_ns == time for mark, time in kept.items())
    monkeypatch.setattr(execution, "evaluate", evaluate)
    fresh = scores(measured(path, tmp_path / "fresh"))
    assert resumed.keys() == fresh.keys()
    assert list(resumed.values()) == pytest.approx(list(fresh.values()))
    monkeypatch.setattr(execution, "load_members", lambda *_: pytest.fail("nothing is left to load models for"))
    assert scores(measured(path, out)) == resumed


def test_finished_rows_take_no_part_in_a_shared_pass(write, tmp_path, monkeypatch):
    out = tmp_path / "out"
    measured(write(grid={"orders": ["A+B"], "methods": ["deepen"]}), out)
    peers, evaluate = [], execution.evaluate
    monkeypatch.setattr(
        execution, "evaluate", lambda model, *rest: peers.append(len(model.peers)) or evaluate(model, *rest)
    )
    measured(write(grid={"orders": ["A+B"], "methods": ["deepen", "gac", "unite"]}), out)
    assert peers == [2, 2]


def test_members_of_one_checkpoint_share_it(write, pico, tmp_path, monkeypatch):
    """A model under several names is loaded once; names, temperatures and counts stay the members' own."""
    loads, load = [], models.load_member
    monkeypatch.setattr(models, "load_member", lambda member, *rest: loads.append(member.name) or load(member, *rest))
    link = tmp_path / "link"
    link.symlink_to(pico["bytelevel"])
    places = {"A": pico["bytelevel"], "B": pico["metaspace"], "A2": link, "B2": pico["metaspace"]}
    members = [{"name": name, "pretrained": str(place)} for name, place in places.items()]
    members += [{"name": "hot", "pretrained": str(link), "temperature": 2.0}]
    members += [{"name": "half", "pretrained": str(link), "dtype": "bfloat16"}]
    orders = ["A+B", "A2+B2", "A+A2", "hot+B"]
    path = write(members=members, grid={"orders": orders, "methods": ["deepen"]}, tasks=["conf_text"])
    todo, cells = executed(path, tmp_path / "out")
    assert loads == ["A", "B", "half"]
    rows = {row.name.removesuffix(" deepen"): row for row in todo.recipe.rows}
    found = {name: scores_of(cells[row.name, "conf_text"]) for name, row in rows.items()}
    assert found["A"] == found["A2"] != found["half"] and found["A+B"] == found["A2+B2"] != found["hot+B"]
    for name in ("A+A2", "hot+B"):
        row = rows[name]
        model = DeepenLM(**row.config.to_dict(), device="cpu")
        alone = lm_eval.simple_evaluate(
            model=model, tasks=["conf_text"], task_manager=todo.tasks[0].manager, bootstrap_iters=0
        )
        metric = "word_perplexity,none"
        assert found[name][metric] == pytest.approx(alone["results"]["conf_text"][metric], rel=1e-4)
    twice, once = (cells[name, "conf_text"] for name in (rows["A+A2"].name, "A"))
    assert twice.cost.tokens == 2 * once.cost.tokens and twice.facts["parameters"] == once.facts["parameters"]


def scores_of(cell):
    [found] = json.loads(cell.mark.with_name(cell.results).read_text())["results"].values()
    return found


def test_what_no_later_cell_needs_is_released(write, tmp_path, monkeypatch):
    made, build, alive, evaluate = [], execution.RowModel.build, [], execution.evaluate

    def watched(config, *rest):
        made.append((config.options.inverse, weakref.ref(model := build(config, *rest))))
        return model

    def seen(model, task, *rest):
        alive.append((task.name, sorted(inverse for inverse, ref in made if inverse and ref() is not None)))
        return evaluate(model, task, *rest)

    monkeypatch.setattr(execution.RowModel, "build", watched)
    monkeypatch.setattr(execution, "evaluate", seen)
    by_task = {"conf_choice": {"inverse": "mirror"}, "conf_text": {"inverse": "em"}}
    rows = [{"name": "tuned", "method": "deepen", "weights": [0.5, 0.5], "by_task": by_task}]
    rows += [{"name": "both", "method": "deepen", "weights": [0.5, 0.5], "inverse": "exact"}]
    path = write(grid=None, rows=rows, tasks=[CHOICE, "conf_text"])
    executed(path, tmp_path / "out")
    assert ("conf_choice", ["em", "exact", "mirror"]) in alive and alive[-1] == ("conf_text", ["em", "exact"])


def test_a_cell_of_another_evaluation_is_refused_or_redone(write, tmp_path):
    out = tmp_path / "out"
    first = measured(write(limit=2, grid=ONE), out)
    assert {row.documents for row in first.rows} == {2}
    with pytest.raises(ResultError, match=r"another evaluation: fingerprint \w+ there, \w+ wanted .*limit: 2 -> 3"):
        planned(write(limit=3, grid=ONE), out)
    again = measured(write(limit=3, grid=ONE), out, redo=True)
    assert {row.documents for row in again.rows} == {3}
    assert len(list((out / "A").glob("results_*.json"))) == 1  # what the cell was before is gone
    with pytest.raises(ResultError, match="ensemble: "):
        planned(write(limit=3, grid=ONE, common={"matrix_dir": "m", "seed": 5}), out)
    with pytest.raises(ResultError, match="seeds: "):
        planned(write(limit=3, grid=ONE, seed=7), out)
    [mark] = (out / "A").glob(f"*{SUFFIX}")
    json.loads(mark.read_text())
    next((out / "A").glob("samples_*")).unlink()
    with pytest.raises(ResultError, match="the cell is damaged .*is gone.*--redo"):
        planned(write(limit=3, grid=ONE), out)
    assert planned(write(limit=3, grid=ONE), out, redo=True).missing == [("A", "conf_choice")]


def test_changed_documents_make_another_cell(write, tmp_path, folder):
    out, data = tmp_path / "out", folder / "tasks" / "choice.jsonl"
    measured(write(grid={"orders": ["A+B"]}), out)
    before = data.read_text()
    try:
        data.write_text(before.replace("capital of France", "capital of Gaul"))
        with pytest.raises(ResultError, match="tasks.conf_choice.documents: "):
            planned(write(grid={"orders": ["A+B"]}), out)
    finally:
        data.write_text(before)


def test_an_error_names_row_and_task_and_keeps_what_is_finished(write, tmp_path, monkeypatch):
    evaluate = execution.evaluate

    def failing(model, task, *rest):
        if model.ensemble_config.method == "gac":
            raise RequestError("no honest answer")
        return evaluate(model, task, *rest)

    monkeypatch.setattr(execution, "evaluate", failing)
    with pytest.raises(DeepenError, match=r"row 'A\+B gac', task 'conf_choice': no honest answer"):
        measured(write(), tmp_path / "out")
    assert len(list((tmp_path / "out").rglob(f"*{SUFFIX}"))) == 3  # both members, and A+B deepen


def test_a_row_without_an_answer_to_a_request_stops_no_other(write, tmp_path, monkeypatch, capsys):
    """The cell is left out and says why; all others are there, that of the row which shares its pass too."""
    prepare = answering.RequestHandler.prepare

    def refusing(self, kind, request, *rest):
        here = request.task_name == "conf_choice" and request.doc_id == 1 and len(self.ensemble.active) > 1
        if here and self.ensemble_config.method == "deepen":
            return attempt(_refused)
        return prepare(self, kind, request, *rest)

    path, out = write(grid=ONE | {"methods": ["deepen", "gac"]}, tasks=[CHOICE, "conf_answer"]), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(answering.RequestHandler, "prepare", refusing)
        assert cli.main(["leaderboard", str(path), "--out", str(out), "--device", "cpu", "--json"]) == 2
    printed, told = capsys.readouterr()
    assert json.loads(printed) == json.loads((out / "leaderboard.json").read_text())  # of all other cells
    assert "error: 1 cell has no results; all others are finished.\nrow 'A+B deepen', task 'conf_choice':" in told
    assert "task 'conf_choice', document 1: no honest answer" in told
    table = (out / "leaderboard.md").read_text()
    assert "document 1: no honest answer" in table and "| A+B deepen | n/a (1) |" in table
    assert len(list(out.rglob(f"*{SUFFIX}"))) == 7
    assert planned(path, out).missing == [("A+B deepen", "conf_choice")]
    assert cli.main(["leaderboard", str(path), "--out", str(out), "--device", "cpu"]) == 0
    assert "n/a" not in (out / "leaderboard.md").read_text()


def _refused():
    raise RequestError("no honest answer")


def test_another_process_at_work_is_told(write, tmp_path):
    from filelock import FileLock

    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(ResultError, match="another process writes this leaderboard"):
        measured(write(), out)


def test_a_table_says_what_its_rows_need_where_it_is_asked_to(write, tmp_path):
    table = measured(write(power=0.8, grid=ONE, common={"covers": "off"}), tmp_path / "out")
    for row in table.rows:
        seen, needed = row.extra[leaderboard_table.SEEN], row.extra[leaderboard_table.NEEDED]
        if row.comparison is None:
            assert seen is None and needed is None
        elif seen is None:
            assert row.comparison.below == row.comparison.above == 0
        elif row.comparison.difference:
            assert (needed <= row.documents) == (abs(row.comparison.difference) >= seen > 0)
    assert any(row.extra[leaderboard_table.NEEDED] for row in table.rows)
    assert "with a chance of 0.8" in leaderboard_table.rendered(table, "md")


def test_rows_that_share_passes_score_as_they_do_alone(pico, tmp_path):
    """Methods that fuse steps, and one that scores by stretches, with every kind of weights."""
    first = by_default(pico["bytelevel"], pico["metaspace"], matrix_dir=str(tmp_path))
    members = first.ensemble.members
    named = [{"name": f"m{i}", "pretrained": member.config.pretrained} for i, member in enumerate(members)]
    base = {"pretrained": named[0]["pretrained"], "members": named, "matrix_dir": str(tmp_path), "self_check": False}
    from_prompt = {"weighting": "bayes", "learn_from": "prompt"}
    choices = {
        "deepen": [{}, {"weighting": "perplexity"}],
        "gac": [{"weights": [0.2, 0.8]}],
        "mixture": [{}, from_prompt, {"weights": [0.2, 0.8]}],
    }
    given = [{**base, "method": method, **choice} for method, own in choices.items() for choice in own]
    configs = [configure(keys) for keys in given]
    batch = asked("loglikelihood", ("The quick brown fox", " jumps over"), ("walk", " walk"))
    rolling = asked("loglikelihood_rolling", ("The quick brown fox",), ("1 2 3",))
    models = [RowModel.build(config, members, {}) for config in configs]
    for model in models:
        model.begin("task")
    share_by_members(models)
    for config, model in zip(configs, models, strict=True):
        own = DeepenLM.around(config, members)
        for found, alone in zip(model.loglikelihood(batch), own.loglikelihood(batch), strict=True):
            assert found == (pytest.approx(alone[0], abs=1e-4), alone[1]), config.to_dict()
        assert model.loglikelihood_rolling(rolling) == pytest.approx(own.loglikelihood_rolling(rolling), abs=1e-4)
    with pytest.raises(ValueError, match="the same way"):
        share_passes([models[0], models[-1]])


# --- pooling


def test_pooled_rows_take_the_answers_of_other_rows(write, tmp_path, monkeypatch):
    """Nothing is generated twice, and the answers are those of a model that generates everything itself."""
    grid = {
        "orders": ["A+B", "B+A"],
        "poolings": ["none", "logp-mean", "vote", {"pooling": "mbr", "with_fused": True}, "rerank"],
        "weightings": ["none"],
    }  # a pooled ensemble is static
    static = {"matrix_dir": str(tmp_path / "matrices"), "covers": "off"}
    path = write(grid=grid, common=static, tasks=[CHOICE, "conf_answer"])
    todo, cells = executed(path, tmp_path / "out")
    costs = {key: cell.cost for key, cell in cells.items()}
    pair = costs["A", "conf_answer"].tokens + costs["B", "conf_answer"].tokens
    assert costs["A+B vote", "conf_answer"].tokens == costs["B+A vote", "conf_answer"].tokens == pair
    fused = next(name for name in (row.name for row in todo.recipe.rows) if name == "A+B")
    expected = pair + costs[fused, "conf_answer"].tokens
    assert costs["A+B mbr(with_fused=True)", "conf_answer"].tokens == expected
    assert costs["A+B rerank", "conf_answer"].tokens > pair  # the members' texts, and their scores by the ensemble
    for row in todo.recipe.rows:
        if row.config.pooling not in ("vote", "mbr", "rerank"):
            continue
        model = DeepenLM(**row.config.to_dict(), device="cpu")
        own = lm_eval.simple_evaluate(
            model=model, tasks=["conf_answer"], task_manager=todo.tasks[0].manager, bootstrap_iters=0
        )
        cell = cells[row.name, "conf_answer"]
        records = [json.loads(line) for line in cell.mark.with_name(cell.samples["conf_answer"]).open()]
        assert [r["resps"] for r in records] == [r["resps"] for r in own["samples"]["conf_answer"]]


def test_no_row_pays_for_answers_that_were_drawn_for_another(write, tmp_path):
    drawn = {"task": "conf_answer", "gen_kwargs": {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}}
    grid = {"orders": ["A+B"], "poolings": ["none", "vote", "mbr"], "weightings": ["none"]}
    common = {"matrix_dir": str(tmp_path / "matrices"), "covers": "off"}
    _, cells = executed(write(grid=grid, common=common, tasks=[drawn]), tmp_path / "out")
    tokens = {row: cell.cost.tokens for (row, _), cell in cells.items()}
    assert tokens["A+B vote"] == tokens["A+B mbr"] == tokens["A"] + tokens["B"]


def test_rows_of_other_seeds_draw_other_texts(write, tmp_path):
    """A row's, and those of the members whose answers it pools."""
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    drawn = {"task": "conf_answer", "limit": 2, "gen_kwargs": sampled}
    kinds = {"vote": {"pooling": "vote"}, "gac": {"method": "gac"}}
    pooled = [{"name": f"{kind} {n}", **kinds[kind], "seed": n} for kind in kinds for n in (0, 1, 1001)]
    out = tmp_path / "out"
    _, cells = executed(write(grid=None, rows=pooled, tasks=[drawn]), out)
    texts = {}
    for (row, _), cell in cells.items():
        records = [json.loads(line) for line in cell.mark.with_name(cell.samples["conf_answer"]).open()]
        texts[row] = str([record["resps"] for record in records])
    assert len({texts[row["name"]] for row in pooled[:3]}) == len({texts[row["name"]] for row in pooled[3:]}) == 3


def test_no_task_costs_less_since_another_asked_the_same(write, folder, tmp_path):
    """As TruthfulQA's two tasks, which have most of their answers in common."""
    twin = Path(shutil.copytree(folder / "tasks", tmp_path / "twin"))
    for path in twin.glob("*.yaml"):
        text = path.read_text().replace("task: conf_choice\n", "task: conf_twin\n")
        path.write_text(text) if path.name == "conf_choice.yaml" else path.unlink()
    grid = {"orders": ["A+B"], "methods": ["gac", "unite"], "poolings": ["none", "logp-mean"], "weightings": ["none"]}
    include = [str(folder / "tasks"), str(twin)]
    path = write(grid=grid, include_path=include, tasks=["conf_choice", "conf_twin"])
    _, cells = executed(path, tmp_path / "out")
    tokens = {key: cell.cost.tokens for key, cell in cells.items()}
    rows = {row for row, _ in tokens}
    assert len(rows) == 5 and all(tokens[row, "conf_choice"] == tokens[row, "conf_twin"] > 0 for row in rows)


def test_meaningless_cells_are_not_run_and_say_why(write, tmp_path):
    rows = [{"name": "by words", "members": ["A", "B"], "method": "adafuse"}]
    table = measured(write(grid={"orders": ["A+B"], "poolings": ["none", "vote"]}, rows=rows), tmp_path / "out")
    assert table.meaningless["by words", "conf_choice acc"] == "adafuse writes texts, and scores none that is given"
    assert table.meaningless["A+B vote", "conf_choice acc"] == (
        "vote combines answers to generate_until, not to loglikelihood"
    )
    assert not (tmp_path / "out" / "A+B_vote").exists()
    for fmt in ("text", "md", "html"):
        text = leaderboard_table.rendered(table, fmt)
        assert "n/a (1)" in text and "n/a (1): vote combines answers to generate_until" in text
    told = json.loads(leaderboard_table.rendered(table, "json"))["not_applicable"]
    assert {entry["column"] for entry in told} == {"conf_choice acc", "conf_choice acc_norm"}


def test_an_encoder_decoder_member_scores_no_text(write, pico, tmp_path):
    import pico_seq2seq

    translator = pico_seq2seq.build(tmp_path / "models")["translator"]
    languages = {"source_language": "eng_Latn", "target_language": "deu_Latn"}
    members = [{"name": "A", "pretrained": str(pico["bytelevel"])},
               {"name": "T", "pretrained": str(translator), **languages}]  # fmt: skip
    path = write(members=members, grid=None, rows=[{"members": ["A", "T"]}], tasks=[CHOICE, "conf_answer"])
    assert {(row, task) for row, task in planned(path, tmp_path / "out").missing} == {
        ("A", "conf_choice"), ("A", "conf_answer"), ("T", "conf_answer"), ("A+T", "conf_answer"),
    }  # fmt: skip
    table = measured(path, tmp_path / "out")
    reason = "T is an encoder-decoder model, which takes part in generation only"
    assert table.meaningless["A+T", "conf_choice acc"] == table.meaningless["T", "conf_choice acc"] == reason
    assert {system for system, column in scores(table) if column.startswith("conf_answer")} == {"A", "T", "A+T"}
    assert reason in leaderboard_table.rendered(table, "text")


def test_a_flat_space_is_told_below_the_table(write, tmp_path):
    flat = {"rows": "embedding", "normalization": "reference", "top_m": 0, "relative_temperature": 0.01}
    rows = [{"members": ["A", "B"], "name": "flat", "method": "deepen", **flat}, {"members": ["A", "B"], "name": "own"}]
    told = leaderboard_table.rendered(measured(write(grid=None, rows=rows), tmp_path / "out"), "text")
    assert "flat: the relative rows of member 'A' have" in told and "own: the relative rows" not in told


# --- the table


def test_figures_are_those_of_the_statistics(write, tmp_path):
    path, out = write(), tmp_path / "out"
    table = measured(path, out)
    runs = {row.name: find_runs(out / row.slug, row.name)[0] for row in table.recipe.rows}
    p_values = {}
    for row in table.rows:
        best = max(("A", "B"), key=lambda name: scores(table)[name, row.column])
        found = paired([runs[best], runs[row.system]], row.task, row.metric, row.flt, []).scores
        assert row.score == found[row.system].score
        assert row.pool == ("A", "B")
        pair = paired([runs["A"], runs["B"]], row.task, row.metric, row.flt, []).scores
        right = np.maximum(pair["A"].per_document, pair["B"].per_document)
        assert row.oracle == pytest.approx(right.mean())  # any member right
        if row.comparison is None:
            assert row.system == best
            continue
        assert 0.95 <= row.comparison.level < 0.99 and row.comparison.candidates == ("A", "B")
        want = compare(best, found[best], found[row.system], resamples=200, level=row.comparison.level)
        assert (row.comparison.difference, row.comparison.p) == (want.difference, want.p)
        assert (row.comparison.low, row.comparison.high) == (want.low, want.high)
        p_values.setdefault(row.column, []).append((row.comparison.p, row.system in ("A", "B")))
    adjusted = [row.comparison.p_holm for row in table.rows if row.comparison]
    assert [len(column) for column in p_values.values()] == 2 * [len(table.recipe.rows) - 1]
    # Either member could have been the reference: the comparisons with both count.
    expected = step_down([Comparisons(*map(tuple, zip(*column, strict=True))) for column in p_values.values()])
    assert adjusted == [p for column in expected for p in column]
    assert all(p >= own for p, own in zip(adjusted, holm([p for c in p_values.values() for p, _ in c]), strict=True))
    for row in table.rows:
        fusing = row.extra["fusing s/doc"]
        assert row.extra["tokens/doc"] > 0 and row.extra["s/doc"] > (fusing or 0) >= 0
        assert (fusing is None) == (row.system in ("A", "B"))


def test_every_format_has_every_row_and_nothing_is_fetched(write, tmp_path):
    table = measured(write(grid={"orders": ["A+B"]}), tmp_path / "out")
    for fmt in ("text", "md", "json", "html"):
        text = leaderboard_table.rendered(table, fmt)
        for row in table.recipe.rows:
            assert row.name in text
    assert "not significantly different" in leaderboard_table.rendered(table, "text")
    page = leaderboard_table.rendered(table, "html")
    assert page.count("<svg") >= 2 and 'class="bar"' in page
    assert not re.search(r"""src=|@import|href=(?!"documents.html#)""", page) and page.count("<script") == 1
    data = json.loads(leaderboard_table.rendered(table, "json"))["provenance"]
    for fact in ("evaluated", "versions", "models", "few-shots", "limits", "seeds", "fingerprints"):
        assert data[fact] and f"<dt>{fact}</dt>" in page
        assert f"| {fact} | " in leaderboard_table.rendered(table, "md")
    for row in table.recipe.rows:
        assert f"{row.name} {row.config.fingerprint()[:12]}" in data["fingerprints"]
    assert "A: bytelevel (files " in data["models"] and "lm_eval 0.4" in data["versions"]


def test_the_command_writes_tables_and_fills_the_markers(write, tmp_path, capsys):
    doc = tmp_path / "doc.md"
    doc.write_text("before\n")
    path, out = str(write(grid={"orders": ["A+B"]})), str(tmp_path / "out")
    assert cli.main(["leaderboard", path, "--out", out, "--dry-run"]) == 0
    assert "3 cells to do, 0 finished" in capsys.readouterr().out and not Path(out).exists()
    assert cli.main(["leaderboard", path, "--out", out, "--into", str(doc)]) == 2
    assert "the table goes between" in capsys.readouterr().err and not Path(out).exists()
    doc.write_text(f"before\n{leaderboard_table.BEGIN}\nold\n{leaderboard_table.END}\nafter\n")
    arguments = ["leaderboard", path, "--out", out, "--into", str(doc), "--limit", "2", "--device", "cpu"]
    assert cli.main([*arguments, "--format", "md"]) == 0
    printed = capsys.readouterr().out
    assert "2 documents" in printed and printed.strip() in doc.read_text()
    assert doc.read_text().startswith("before\n") and doc.read_text().endswith("after\n")
    assert "old" not in doc.read_text()
    assert {f"leaderboard.{kind}" for kind in ("md", "html", "json")} <= {p.name for p in Path(out).iterdir()}
    assert cli.main([*arguments, "--limit", "3"]) == 2
    assert "--redo evaluates such cells again" in capsys.readouterr().err
    assert cli.main([*arguments, "--metadata", "[1]"]) == 2
    assert "--metadata must be a JSON object" in capsys.readouterr().err


# --- tuned files


@pytest.fixture
def tuned(write, tmp_path, folder):
    """Writes an ensemble file that was fitted on given documents, and the recipe that has it as a row."""
    recipe = read_recipe(write(grid={"orders": ["A+B"]}))
    [task] = load_tasks(recipe.tasks, recipe.include_path)
    hashes = task.documents["conf_choice"]

    def tuned(documents, **changes):
        config = recipe.rows[2].config
        raw = {**config.to_dict(), "evidence": {**record(config, documents, {"objective": "score"}), **changes}}
        (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(raw))
        return write(grid=None, rows=[{"ensemble": "tuned.yaml"}])

    tuned.hashes = hashes
    return tuned


def test_a_tuned_file_is_a_row_unless_it_saw_the_documents(tuned, tmp_path):
    assert scores(measured(tuned([]), tmp_path / "out"))["tuned", "conf_choice acc"] >= 0
    with pytest.raises(ConfigError, match=r"row 'tuned' \(.*tuned.yaml\) was fitted on 2 of the 5 documents of task"):
        planned(tuned(tuned.hashes[:2]), tmp_path / "out")


def test_a_tuned_file_of_another_ensemble_is_refused(tuned, write, pico):
    with pytest.raises(ConfigError, match="its record `evidence` is of another ensemble"):
        read_recipe(tuned([], fingerprint="0" * 64))
    with pytest.raises(ConfigError, match="its record `evidence` is damaged"):
        read_recipe(tuned(tuned.hashes, document_hashes=[]))
    tuned([])
    others = [str(pico["bytelevel"]), str(pico["padded"])]
    with pytest.raises(ConfigError, match="row 'tuned': .*tuned.yaml has the member .*metaspace.*another ensemble"):
        read_recipe(write(members=others, grid=None, rows=[{"ensemble": "tuned.yaml"}]))


# --- damage


@pytest.fixture(scope="module")
def finished(pico, folder, tmp_path_factory):
    """A finished leaderboard of one ensemble and two tasks: its recipe and its folder."""
    root = tmp_path_factory.mktemp("finished")
    changes = {"grid": {"orders": ["A+B"], "methods": ["gac"]}, "tasks": [CHOICE, "conf_answer"]}
    path = write_recipe(root, {**usual(pico, folder), **changes})
    assert cli.main(["leaderboard", str(path), "--out", str(root / "out"), "--device", "cpu"]) == 0
    return path, root / "out"


def test_each_cell_leads_to_its_documents(finished):
    _, out = finished
    data = json.loads((out / "documents.html").read_text("utf-8").split('id="data">')[1].split("</script>")[0])
    systems = [system["name"] for system in data["systems"]]
    board = json.loads((out / "leaderboard.json").read_text())
    page = (out / "leaderboard.html").read_text("utf-8")
    links = [parse_qs(unescape(link)) for link in re.findall(r'<a href="documents.html#([^"]*)">', page)]
    asked = {(systems[int(link["system"][0])], link["task"][0], link["score"][0]) for link in links}
    names = {row["system"] for row in board["rows"]}
    assert {name for name, _, _ in asked} == names and len(links) == 2 * len(board["rows"])  # in both tables
    for system, task, score in asked:
        documents = data["systems"][systems.index(system)]["tasks"][task]
        assert documents and all(score in document["scores"] for document in documents)
    references = {int(link["beside"][0]) for link in links}
    assert -1 in references and references <= {-1, systems.index("A"), systems.index("B")}


def test_a_finished_leaderboard_is_given_as_json(finished, capsys):
    recipe, out = finished
    assert cli.main(["leaderboard", str(recipe), "--out", str(out), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "leaderboard.json").read_text())


@pytest.fixture(scope="module")
def columns(finished):
    recipe = read_recipe(finished[0])
    return recipe, load_tasks(recipe.tasks, recipe.include_path, recipe.metadata)


@pytest.fixture
def copied(finished, tmp_path):
    recipe, out = finished
    return recipe, Path(shutil.copytree(out, tmp_path / "out"))


def lines_of(path: Path, change) -> None:
    path.write_text("".join(change(path.read_text("utf-8").splitlines(keepends=True))), "utf-8")


def data_of(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "samples": {
        "gone": Path.unlink,
        "empty": lambda path: path.write_text(""),
        "binary": lambda path: path.write_bytes(bytes(range(256))),
        "cut in its last line": lambda path: path.write_bytes(path.read_bytes()[:-20]),
        "without its last line": lambda path: lines_of(path, lambda lines: lines[:-1]),
        "a line twice": lambda path: lines_of(path, lambda lines: [*lines, lines[-1]]),
        "NaN": lambda path: path.write_text(re.sub(r'"acc": [\d.]+', '"acc": NaN', path.read_text(), count=1)),
        "another score": lambda path: lines_of(path, lambda lines: [flipped(lines[0]), *lines[1:]]),
    },
    "results": {
        "gone": Path.unlink,
        "empty": lambda path: path.write_text(""),
        "binary": lambda path: path.write_bytes(b"\xff\x00"),
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
        "another kind": lambda path: path.write_text("[]"),
        "NaN": lambda path: path.write_text(re.sub(r'(,none": )[\d.]+', r"\1NaN", path.read_text(), count=1)),
    },
    "mark": {
        "empty": lambda path: path.write_text(""),
        "binary": lambda path: path.write_bytes(b"\xff\x00\x80"),
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
        "another kind": lambda path: path.write_text("3"),
        "without a cost": lambda path: data_of(path, cost=None),
        "another cost": lambda path: data_of(path, cost={"seconds": "1"}),
        "an endless cost": lambda path: data_of(path, cost={"seconds": math.inf}),
        "other samples": lambda path: data_of(path, samples=["x"]),
        "samples elsewhere": lambda path: data_of(path, samples={"conf_choice": "../x"}),
        "other facts": lambda path: data_of(path, facts={"parameters": None}),
        "no documents": lambda path: data_of(path, documents=0),
        "other digests": lambda path: data_of(path, sha256=3),
    },
}  # fmt: skip


def flipped(line: str) -> str:
    record = json.loads(line)
    return json.dumps({**record, "acc": 1 - record["acc"]}) + "\n"


def files_of(out: Path, kind: str) -> Path:
    [mark] = (out / "B").glob(f"conf_choice{SUFFIX}")
    if kind == "mark":
        return mark
    said = json.loads(mark.read_text())
    return mark.with_name(said["results"] if kind == "results" else said["samples"]["conf_choice"])


UNSEEN = {("samples", "another score"), ("results", "NaN"), ("mark", "other digests")}  # without digests
DAMAGED = [(kind, damage, old) for kind in DAMAGE for damage in DAMAGE[kind] for old in (False, True)]


@pytest.mark.parametrize(("kind", "damage", "old"), [case for case in DAMAGED if not case[2] or case[:2] not in UNSEEN])
def test_a_damaged_cell_is_an_error_and_redo_evaluates_that_cell_alone(kind, damage, old, copied, columns):
    """Cells of versions that wrote no digests too, as far as the files show it."""
    _, out = copied
    if old:
        data_of(files_of(out, "mark"), sha256={})
    DAMAGE[kind][damage](files_of(out, kind))
    read, tasks = columns
    told = r"B/conf_choice.cell.json: the cell is damaged (?!.*pydantic).*--redo evaluates it again"
    with pytest.raises(ResultError, match=told):
        plan(read, tasks, out)
    assert plan(read, tasks, out, redo=True).missing == [("B", "conf_choice")]


def test_a_cell_of_other_weights_in_the_same_folder_is_refused_or_redone(pico, write, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(pico["bytelevel"], model)
    members = [{"name": "A", "pretrained": str(model)}, {"name": "B", "pretrained": str(pico["metaspace"])}]
    path = write(members=members, grid=None, rows=[{"name": "pair", "method": "gac"}])
    before = scores(measured(path, out))
    (model / "README.md").write_text("about it")
    assert not planned(path, out).missing
    weights = model / "model.safetensors"
    with weights.open("r+b") as file:  # another training: the same sizes
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(2048))
    with pytest.raises(ResultError, match=r"was evaluated before the files in .*model changed\. --redo"):
        planned(path, out)
    assert {row for row, _ in planned(path, out, redo=True).missing} == {"A", "pair"}
    for mark in out.rglob("*.cell.json"):  # as older versions wrote it
        cell = json.loads(mark.read_text())
        del cell["facts"]["files"]
        mark.write_text(json.dumps(cell))
    assert not planned(path, out).missing and before


def test_a_cell_of_other_few_shots_is_refused_or_redone(write, tmp_path):
    tasks, out = tmp_path / "tasks", tmp_path / "out"
    tasks.mkdir()
    local_tasks(tasks)
    shots = tasks / "shots.jsonl"
    shutil.copy(tasks / "choice.jsonl", shots)
    loader = (
        (tasks / "loader.py").read_text().replace('"fewshot": rows("choice.jsonl")', '"fewshot": rows("shots.jsonl")')
    )
    (tasks / "loader.py").write_text(loader)
    asked = [{"task": "conf_choice", "num_fewshot": 2}, {"task": "conf_answer"}]
    path = write(grid=None, rows=[{"name": "pair", "method": "gac"}], tasks=asked, include_path=str(tasks))
    measured(path, out)
    assert not planned(path, out).missing
    shots.write_text("".join(reversed(shots.read_text("utf-8").splitlines(keepends=True)[1:])), "utf-8")
    with pytest.raises(ResultError, match=r"was evaluated before the files in the few-shots of conf_choice changed"):
        planned(path, out)
    assert {task for _, task in planned(path, out, redo=True).missing} == {"conf_choice"}  # the other one shows none


def test_what_redo_mends_is_what_it_was(copied, capsys):
    recipe, out = copied
    before = json.loads((out / "leaderboard.json").read_text())
    for kind, damage in (("samples", "cut in its last line"), ("mark", "binary")):
        DAMAGE[kind][damage](files_of(out, kind))
        command = ["leaderboard", str(recipe), "--out", str(out), "--device", "cpu"]
        capsys.readouterr()
        assert cli.main(command) == 2
        assert capsys.readouterr().err.startswith("error: ")
        assert cli.main([*command, "--redo"]) == 0
        after = json.loads((out / "leaderboard.json").read_text())
        assert [row["score"] for row in after["rows"]] == [row["score"] for row in before["rows"]]
        assert cli.main(command) == 0
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize("short", ["samples", "results"])
def test_a_disk_that_fills_up_while_the_harness_writes_leaves_no_cell(copied, short, monkeypatch):
    """The harness logs what it cannot write, and goes on."""
    recipe, out = copied
    files_of(out, "mark").unlink()
    save = execution.EvaluationTracker.save_results_samples

    def cut_short(self, **keys):
        save(self, **keys)
        [path] = Path(self.output_path).rglob("samples_*" if short == "samples" else "results_*")
        path.write_bytes(path.read_bytes()[:-30])

    monkeypatch.setattr(execution.EvaluationTracker, "save_results_samples", cut_short)
    with pytest.raises(ResultError, match="the harness could not write it .*is the disk full"):
        measured(recipe, out)
    assert planned(recipe, out).missing == [("B", "conf_choice")] and not list(out.rglob(".cell-*"))


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_kill_between_any_two_files_of_a_cell_costs_that_cell_alone(copied, moves):
    recipe, out = copied
    files_of(out, "mark").unlink()
    if (child := os.fork()) == 0:
        done, real = iter(range(100)), os.replace
        os.replace = lambda *places: os._exit(9) if next(done) == moves else real(*places)
        with contextlib.suppress(BaseException):
            measured(recipe, out)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert planned(recipe, out).missing == [("B", "conf_choice")]
    before = json.loads((out / "leaderboard.json").read_text())
    table = measured(recipe, out)
    assert [row.score for row in table.rows] == [row["score"] for row in before["rows"]]
    assert not [path for path in out.rglob("*") if path.suffix == ".tmp" or path.name.startswith(".cell-")]


def test_a_value_that_is_no_number_takes_its_own_row_out_of_the_column_alone(copied):
    recipe, out = copied
    [mark] = (out / "A+B_gac").glob(f"conf_choice{SUFFIX}")
    said = json.loads(mark.read_text())
    path = mark.with_name(said["samples"]["conf_choice"])
    path.write_text(re.sub(r'"acc": [\d.]+', '"acc": NaN', path.read_text(), count=1))  # as the model gave it
    data_of(mark, sha256={**said["sha256"], path.name: hashlib.sha256(path.read_bytes()).hexdigest()})
    table = measured(recipe, out)
    assert ("A", "conf_choice acc") in scores(table) and ("A+B gac", "conf_choice acc") not in scores(table)
    assert ("A+B gac", "conf_choice acc_norm") in scores(table)
    assert "should be a finite number, got nan" in table.meaningless["A+B gac", "conf_choice acc"]
    for kind in ("text", "md", "html", "json"):
        assert "finite number" in leaderboard_table.rendered(table, kind)


def test_a_value_that_is_no_number_takes_its_own_row_out_of_a_group_alone(write, tmp_path):
    path = write(grid=ONE | {"methods": ["gac"]}, tasks=[{"task": "conf_group", "metric": "acc", "whole": True}])
    first = measured(path, tmp_path / "out")
    [mark] = (tmp_path / "out" / "A+B_gac").glob(f"conf_group{SUFFIX}")
    said = json.loads(mark.read_text())
    samples = mark.with_name(said["samples"]["conf_blank"])
    samples.write_text(re.sub(r'"acc": [\d.]+', '"acc": NaN', samples.read_text(), count=1))  # as the model gave it
    data_of(mark, sha256={**said["sha256"], samples.name: hashlib.sha256(samples.read_bytes()).hexdigest()})
    table = measured(path, tmp_path / "out")
    assert scores(table) == {key: score for key, score in scores(first).items() if key[0] != "A+B gac"} != {}
    assert "should be a finite number, got nan" in table.meaningless["A+B gac", "conf_group acc"]


def test_a_readme_is_whole_whatever_happens(copied, tmp_path, capsys, monkeypatch):
    recipe, out = copied
    page, command = tmp_path / "README.md", ["leaderboard", str(recipe), "--out", str(out), "--into"]
    text = f"# Ü\r\n\r\n{leaderboard_table.BEGIN}\r\nold\r\n{leaderboard_table.END}\r\n\r\nmore\r\n"
    page.write_bytes(text.encode())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _full)
        assert cli.main([*command, str(page)]) == 2
    assert "No space left on device" in capsys.readouterr().err and page.read_bytes() == text.encode()
    assert not list(tmp_path.glob(".*.tmp")) and not list(out.rglob("*.tmp"))
    assert cli.main([*command, str(page)]) == 0
    lines = page.read_bytes().decode().split("\n")
    assert lines[0] == "# Ü\r" and lines[-2] == "more\r" and all(line.endswith("\r") for line in lines[:-1])
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(leaderboard_table, "write_into", lambda path, table: path.rmdir())  # which another one changed
        assert cli.main([*command, str(page)]) == 2
        assert "A+B gac" in capsys.readouterr().out  # the table is printed all the same
        patch.setattr(os, "access", lambda path, mode: path != tmp_path)
        patch.setattr(leaderboard_table, "measure", None)
        assert cli.main([*command, str(page)]) == 2
    assert f"{page} cannot be written (Permission denied)" in capsys.readouterr().err
    page.write_bytes(b"\xff" + text.encode())
    assert cli.main([*command, str(page)]) == 2
    assert f"--into {page}: {page}:1: byte 0xff is not UTF-8" in capsys.readouterr().err


def _full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
