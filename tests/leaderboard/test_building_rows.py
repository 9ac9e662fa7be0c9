"""Built models in a leaderboard: as members, as rows, over seeds, and where they cannot be merged."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from boards import executed, measured, planned, write_recipe
from run_files import local_tasks
from sibling_models import merge_of, write_sibling

from lm_eval_deepen.build import distill
from lm_eval_deepen.build import merge as merging
from lm_eval_deepen.build.merge_config import METHODS
from lm_eval_deepen.build.texts import TaskSource
from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.errors import ConfigError, RequestError, ResultError
from lm_eval_deepen.harness.requests import RequestHandler
from lm_eval_deepen.harness.tasks import load_tasks
from lm_eval_deepen.harness.unanswered import attempt
from lm_eval_deepen.leaderboard import execution
from lm_eval_deepen.leaderboard import table as leaderboard_table
from lm_eval_deepen.leaderboard.recipe import read_recipe
from lm_eval_deepen.leaderboard.reproduction import reproduced
from lm_eval_deepen.leaderboard.seeds import averaged
from lm_eval_deepen.results.aggregation import Scores, mean_scores
from lm_eval_deepen.results.rows import Measured

ROOT = Path(__file__).resolve().parents[2]
CHOICE = {"task": "conf_choice", "metric": "acc"}
CLM = {"method": "clm", "target": "base", "train_tokens": 1000}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without measuring every built model."""
    monkeypatch.setattr("lm_eval_deepen.build.publish.measured_bits", lambda folder: {})


@pytest.fixture
def builders(monkeypatch):
    """In place of training and of mergekit: a model that depends on the recipe's seed. Returns what was built."""
    calls = []

    def fake(place, out, seed, what):
        calls.append(what)
        shutil.copytree(write_sibling(Path(place), out.with_name(f"{out.name}-new"), seed), out, dirs_exist_ok=True)
        shutil.rmtree(out.with_name(f"{out.name}-new"))

    def train(recipe, out, members):
        fake(members[recipe["target"]], out, recipe["seed"], ("clm", recipe.get("shard")))
        return {"tokens_trained": recipe["train_tokens"]}

    def merge(recipe, out, members):
        fake(recipe.places(members)[recipe.models[0]], out, recipe.seed, (recipe.method, recipe.seed))
        return {"tokens_trained": 0}

    monkeypatch.setattr(distill, "build", train)
    monkeypatch.setattr(merging, "merge", merge)
    monkeypatch.setattr("lm_eval_deepen.leaderboard.builds.require", lambda: None)
    return calls


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return local_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def write(pico, tasks, tmp_path):
    """Writes a recipe of a base, two siblings that are trained, another model, and what is made of them."""

    def write(**changes):
        (tmp_path / "clm.yaml").write_text(yaml.safe_dump(CLM))
        (tmp_path / "merge_dare.yaml").write_text(yaml.safe_dump(merge_of("dare_linear", ["s0", "s1"])))
        raw = {
            "members": [
                {"name": "base", "pretrained": str(pico["bytelevel"])},
                {"name": "s0", "build": {"recipe": "clm.yaml", "shard": [0, 2]}},
                {"name": "s1", "build": {"recipe": "clm.yaml", "shard": [1, 2], "seed": 1}},
                {"name": "other", "pretrained": str(pico["metaspace"])},
            ],
            "common": {"matrix_dir": str(tmp_path / "matrices")},
            "rows": [
                {"name": "soup", "build": merge_of("linear", ["s0", "s1"], base=None)},
                {"build": "merge_dare.yaml", "seeds": [3, 4, 5]},
                {"name": "mixed", "build": merge_of("linear", ["s0", "other"], base=None)},
                {"members": ["s0", "s1"], "method": "deepen"},
            ],
            "tasks": [CHOICE],
            "include_path": str(tasks),
            "resamples": 200,
            **changes,
        }
        return write_recipe(tmp_path, raw)

    return write


def test_built_models_are_members_and_rows_and_each_is_built_once(write, tmp_path, builders):
    path, out = write(), tmp_path / "out"
    recipe = read_recipe(path)
    assert [row.name for row in recipe.rows] == [
        "base", "s0", "s1", "other", "soup", "merge_dare, seed 3", "merge_dare, seed 4", "merge_dare, seed 5", "mixed",
        "s0+s1 deepen",
    ]  # fmt: skip
    told = leaderboard_table.listing(planned(path, out))
    seeds = ", ".join(f"merge_dare, seed {n}" for n in (3, 4, 5))
    assert f"to build in {out / 'built'}: s0, s1, soup, {seeds}\n" in told and "n/a: architectures differ: " in told
    table = measured(path, out)
    assert builders == [("clm", [0, 2]), ("clm", [1, 2]), ("linear", 0), *(("dare_linear", n) for n in (3, 4, 5))]
    shown = leaderboard_table.summary(table)
    names = [line[0] for line in shown[1:]]
    assert names == ["base", "s0", "s1", "other", "soup", "merge_dare", "mixed", "s0+s1 deepen"]
    assert dict((line[0], line[1]) for line in shown)["mixed"] == "n/a (architectures differ)"
    for fmt in ("text", "md", "html"):
        told = leaderboard_table.rendered(table, fmt)
        assert "n/a (architectures differ)" in told and "architectures is" in told
    by_name = {row.system: row for row in table.rows}
    assert by_name["soup"].pool == ("base", "s0", "s1", "other")  # what is merged is no single member
    assert by_name["soup"].extra["training tokens (k)"] == 2 == by_name["s0+s1 deepen"].extra["training tokens (k)"]
    assert by_name["s0"].extra["training tokens (k)"] == 1 and by_name["base"].extra["training tokens (k)"] == 0
    one = by_name["base"].extra["parameters (M)"]
    assert by_name["soup"].extra["parameters (M)"] == one == by_name["s0+s1 deepen"].extra["parameters (M)"] / 2
    assert all(row.extra["tokens/s"] > 0 for row in table.rows)
    fused = {row.system for row in table.rows if row.extra["fusing s/doc"] is not None}
    assert fused == {"s0+s1 deepen"}  # a built model is a model alone

    builders.clear()
    assert planned(path, out).missing == [] and "to build" not in leaderboard_table.listing(planned(path, out))
    again = measured(path, out)
    assert builders == [] and [row.score for row in again.rows] == [row.score for row in table.rows]

    next((out / "s0").glob("*.cell.json")).unlink()  # whoever is evaluated again is needed, and damaged by now
    [weights] = (out / "built").glob("s0-*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="'s0': .* its weights are damaged.*build the model again with --redo"):
        measured(path, out)
    mended = measured(path, out, redo=True)
    assert builders == [("clm", [0, 2])] and [row.score for row in mended.rows] == [row.score for row in table.rows]


def test_a_row_over_seeds_is_the_mean_of_its_seeds(write, tmp_path, builders):
    path, out = write(), tmp_path / "out"
    todo, cells = executed(path, out)
    found = {row.system: row for row in leaderboard_table.measure(todo, cells).rows}["merge_dare"]
    own = []
    for seed in (3, 4, 5):
        cell = cells[f"merge_dare, seed {seed}", "conf_choice"]
        results = json.loads(cell.mark.with_name(cell.results).read_text())
        own.append(results["results"]["conf_choice"]["acc,none"])
        [said] = results["config"]["built"].values()
        assert said["seed"] == seed and said["method"] == "dare_linear"
    assert found.score == pytest.approx(np.mean(own))
    assert found.extra["sd over seeds"] == pytest.approx(np.std(own, ddof=1)) and found.extra["seeds"] == 3


def test_a_published_metric_that_is_no_mean_is_reported_once_a_row_over_seeds(write, tmp_path, builders):
    """As BLEU: with the mean and the spread of the seeds, and in reproduced tables once as well."""
    scores = {"merge_dare": 30.0, "base": 20.0}
    published = {"table": "1", "read_in": "x", "metric": "bleu", "scores": {"conf_choice": scores}}
    path, out = write(expected=[published], tasks=[{**CHOICE, "metric": "bleu"}]), tmp_path / "out"
    todo, cells = executed(path, out)
    bleu = {"merge_dare, seed 3": 28.0, "merge_dare, seed 4": 31.0, "merge_dare, seed 5": 34.0}
    for (row, _), cell in cells.items():
        results = cell.mark.with_name(cell.results)
        told = json.loads(results.read_text())
        told["results"]["conf_choice"] |= {"bleu,none": bleu.get(row, 20.5), "bleu_stderr,none": 1.5}
        results.write_text(json.dumps(told))
        samples = results.with_name(next(iter(cell.samples.values())))
        lines = [json.loads(line) | {"bleu": ["x", "y"]} for line in samples.read_text().splitlines()]
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = leaderboard_table.measure(todo, cells)
    by_row = {one.system: one for one in table.reported}
    assert [one.system for one in table.reported if one.system.startswith("merge_dare")] == ["merge_dare"]
    assert vars(by_row["merge_dare"]) == {
        "system": "merge_dare", "column": "conf_choice bleu", "score": 31.0, "stderr": 1.5, "published": 30.0,
        "seeds": 3, "spread": 3.0,
    }  # fmt: skip
    assert (by_row["base"].seeds, by_row["base"].spread, by_row["s0"].published) == (1, None, None)
    [told] = [note for note in table.notes if "merge_dare" in note and "as reported" in note]
    assert told.endswith("merge_dare 31.0000 (3 seeds, sd over seeds 3.0000), published 30.0000")
    assert [one.row for one in reproduced(table)].count("merge_dare") == 1


def test_a_row_of_which_a_seed_has_no_results_is_left_out(write, tmp_path, builders, monkeypatch, capsys):
    prepare = RequestHandler.prepare

    def refusing(self, kind, request, *rest):
        if self.ensemble.active[0].name == "merge_dare, seed 4" and request.task_name == "conf_choice":
            raise RequestError("no honest answer")
        return prepare(self, kind, request, *rest)

    path, out = write(tasks=[CHOICE, {"task": "conf_answer", "metric": "exact_match,whole"}]), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(RequestHandler, "prepare", lambda *given: attempt(lambda: refusing(*given)))
        assert cli.main(["leaderboard", str(path), "--out", str(out), "--device", "cpu"]) == 2
    assert "row 'merge_dare, seed 4', task 'conf_choice':" in capsys.readouterr().err
    told = json.loads((out / "leaderboard.json").read_text())
    assert [row["task"] for row in told["rows"] if row["system"] == "merge_dare"] == ["conf_answer"]
    [reason] = [one["reason"] for one in told["not_applicable"] if one["system"] == "merge_dare"]
    assert reason.startswith("merge_dare, seed 4: ") and "no honest answer" in reason
    assert "| merge_dare | n/a (1) |" in (out / "leaderboard.md").read_text()
    assert cli.main(["leaderboard", str(path), "--out", str(out), "--device", "cpu"]) == 0
    told = json.loads((out / "leaderboard.json").read_text())
    assert {row["extra"]["seeds"] for row in told["rows"] if row["system"] == "merge_dare"} == {3}


def test_averaging_takes_documents_one_by_one():
    scores = {"a": mean_scores([1, 0, 1]), "b, 0": mean_scores([1, 1, 0]), "b, 1": mean_scores([0, 1, 0])}
    extra = {name: {"s/doc": float(i), "x": None} for i, name in enumerate(scores)}
    found = averaged(Measured("t", "acc", "none", True, scores, extra), {"a": ["a"], "b": ["b, 0", "b, 1"]})
    assert list(found.scores) == ["a", "b"] and found.scores["b"].per_document.tolist() == [0.5, 1, 0]
    assert found.extra["b"] == {"s/doc": 1.5, "x": None, "seeds": 2, "sd over seeds": pytest.approx(np.sqrt(1 / 18))}
    assert found.extra["a"] == extra["a"] and not found.scores["b"].binary
    corpus = Scores(np.array([[2.0, 1.0], [4.0, 1.0]]), lambda means: means[..., 0] / means[..., 1], False)
    twice = averaged(Measured("t", "m", "none", False, {"x": corpus, "y": corpus}), {"z": ["x", "y"]})
    assert twice.scores["z"].score == corpus.score and not twice.scores["z"].averaged


def test_a_model_that_another_leaderboard_builds_is_waited_for(write, tmp_path, builders, monkeypatch):
    builds, built = read_recipe(write()).builds, tmp_path / "built"
    told, places, waits = [], [], threading.Event()
    train = distill.build

    def hear(text):
        told.append(text)
        waits.set()

    def meanwhile(*given):
        other.start()
        assert waits.wait(60)
        return train(*given)

    other = threading.Thread(target=lambda: places.append(builds.make(["s0"], built, hear)))
    monkeypatch.setattr(distill, "build", meanwhile)
    first = builds.make(["s0"], built, lambda text: None)
    other.join(60)
    assert places == [first] and builders == [("clm", [0, 2])]
    assert told == [f"{first['s0']}: another process builds this model; waiting for it",
                    f"{first['s0']}: is built already"]  # fmt: skip


def test_a_changed_recipe_or_base_makes_another_model_and_another_cell(write, tmp_path, builders, pico):
    path, out = write(rows=None, grid={"orders": ["s0+s1"]}), tmp_path / "out"
    measured(path, out)
    assert planned(path, out).missing == []
    longer = {"name": "s1", "build": {"recipe": "clm.yaml", "shard": [1, 2], "seed": 1, "train_tokens": 2000}}
    members = yaml.safe_load(path.read_text())["members"]
    with pytest.raises(ResultError, match="of another evaluation"):
        planned(write(rows=None, grid={"orders": ["s0+s1"]}, members=[*members[:2], longer]), out)
    base = write_sibling(pico["bytelevel"], tmp_path / "base", 9)
    moved = [{"name": "base", "pretrained": str(base)}, *members[1:3]]
    todo = planned(write(rows=None, grid={"orders": ["s0+s1"]}, members=moved), tmp_path / "new")
    assert len(todo.missing) == 4
    assert len({todo.recipe.builds.identity("s0"), read_recipe(path).builds.identity("s1")}) == 2


def test_a_built_member_may_be_loaded_from_elsewhere(write, pico, tmp_path):
    recipe = read_recipe(write(), {"s0": str(pico["bytelevel"])})
    assert "s0" not in recipe.builds.recipes and recipe.members[1].pretrained == str(pico["bytelevel"])
    assert recipe.builds.places["s0"] == str(pico["bytelevel"])


def test_built_rows_are_not_kept_in_memory(write, tmp_path, builders, monkeypatch):
    loaded, load = [], execution.load_members

    def watched(members, *rest):
        loaded.append([member.name for member in members])
        return load(members, *rest)

    monkeypatch.setattr(execution, "load_members", watched)
    run = execution.Execution(planned(write(), tmp_path / "out"), "cpu", lambda text: None)
    list(run.outcomes())
    assert loaded == [["base", "s0", "s1", "other"], ["soup"], *([f"merge_dare, seed {n}"] for n in (3, 4, 5))]
    assert set(run.members) == {"base", "s0", "s1", "other"}


def test_training_on_what_is_evaluated_is_refused(write, tmp_path, builders, monkeypatch, tasks):
    recipe = read_recipe(write())
    [task] = load_tasks(recipe.tasks, recipe.include_path)
    monkeypatch.setattr(
        "lm_eval_deepen.leaderboard.builds.task_hashes", lambda name, _: task.documents["conf_choice"][:2]
    )
    members = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["members"]
    members[1] = {"name": "s0", "build": {"recipe": "clm.yaml", "text": "task:conf_choice"}}
    builds = read_recipe(write(members=members, metadata={"a": 1}), metadata={"b": 2}).builds
    assert builds.tasks == builds.recipes["s0"].tasks == TaskSource((str(tasks),), '{"a": 1, "b": 2}')
    monkeypatch.setattr("lm_eval_deepen.build.texts.files", lambda *_: [])
    told = r"model 's0', trained on task:conf_choice, was fitted on 2 of the 5 documents of task 'conf_choice'"
    with pytest.raises(ConfigError, match=told):
        planned(write(members=members), tmp_path / "out")
    folder = shutil.copytree(members[0]["pretrained"], tmp_path / "made")
    (folder / "provenance.json").write_text(json.dumps({"trained_on_tasks": ["conf_choice"]}))
    members[0]["pretrained"] = str(folder)  # what a folder says of itself counts, too, and for what is made of it
    with pytest.raises(ConfigError, match="model 'base', trained on task:conf_choice, was fitted on 2"):
        planned(write(members=[members[0]], rows=[{"build": "clm.yaml"}]), tmp_path / "out")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"build": "none.yaml"}], r"none.yaml: no such file"),
        ([{"build": 3}], r"rows\[0\]: what is built from a recipe in place needs a name"),
        ([{"name": "x", "build": 3}], r"rows\[0\]: build must be a recipe's file, a mapping with `recipe`"),
        ([{"build": CLM}], r"rows\[0\]: what is built from a recipe in place needs a name"),
        ([{"build": "clm.yaml", "sead": 1}], r"rows\[0\]: unknown key 'sead'. Did you mean 'seeds'"),
        ([{"build": "merge_dare.yaml", "seeds": [1, 2]}], r"row 'merge_dare': dare_linear draws .* at least 3 seeds"),
        ([{"build": "clm.yaml", "seeds": [1, 1]}], r"seeds must be different whole numbers"),
        ([{"name": "x", "build": merge_of("linear", ["s0", "s1"]), "seeds": [1, 2]}], r"linear draws nothing"),
        ([{"build": "clm.yaml"}, {"build": "clm.yaml"}], r"two models are built by the name 'clm'"),
        ([{"build": "clm.yaml", "name": "s0"}], r"two models are built by the name 's0'"),
        ([{"build": "clm.yaml", "name": "x", "seeds": seeds} for seeds in ([1, 2], [3, 4])],
         r"rows\[1\]: two models are built by the name 'x'"),
        ([{"build": "clm.yaml", "name": "x", "seeds": [1, 2]},
          {"name": "x", "members": ["s0", "s1"], "by_task": {"conf_choice": {"method": "gac"}}}],
         r"two rows have the name 'x'"),
        ([{"build": {**CLM, "target": n}, "name": m} for n, m in ("ab", "ba")], r"made from each other: "),
        ([{"build": "merge_dare.yaml", "name": "other"}], r"two rows have the name 'other'"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused(write, rows, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(write(rows=rows))


def test_a_member_is_built_or_found(write, pico):
    both = [{"name": "x", "pretrained": str(pico["bytelevel"]), "build": "clm.yaml"}]
    with pytest.raises(ConfigError, match=r"members\[0\] must have pretrained or build, and not both"):
        read_recipe(write(members=both))


@pytest.mark.parametrize("beside", [{"revision": "v2"}, {"delta": "x/d"}, {"hf_kwargs": {"variant": "fp16"}}])
def test_a_build_from_what_is_more_than_a_folder_is_refused(write, pico, beside):
    members = [{"name": "base", "pretrained": str(pico["bytelevel"]), **beside}]
    ((key, value),) = beside.get("hf_kwargs", beside).items()
    with pytest.raises(ConfigError, match=f"'clm' is built from member 'base', which has {key}: {value}, and a build"):
        read_recipe(write(members=members, rows=[{"build": "clm.yaml"}]))
    members[0] |= {"revision": "main"} if "revision" in beside else {}
    if "revision" in beside:
        read_recipe(write(members=members, rows=[{"build": "clm.yaml"}]))


def test_rows_that_draw_at_random_have_three_seeds_by_default(write):
    recipe = read_recipe(write(rows=[{"build": "merge_dare.yaml"}]))
    assert [row.name for row in recipe.rows[4:]] == [f"merge_dare, seed {n}" for n in (0, 1, 2)]


FUSED = {"method": "fusellm", "target": "base", "sources": ["other"], "train_tokens": 1000}


def test_models_are_trained_on_the_leaderboards_device(write, tmp_path, monkeypatch):
    devices = []

    def train(recipe, out, members):
        devices.append(recipe.get("device"))
        raise ConfigError("enough")

    monkeypatch.setattr(distill, "build", train)
    for name, own, given in (("a", {}, "cpu"), ("b", {}, "cuda:1"), ("c", {"device": "cuda:0"}, "cpu")):
        todo = planned(write(rows=[{"name": name, "build": {**CLM, **own}}]), tmp_path / name)
        with pytest.raises(ConfigError, match="enough"):
            todo.recipe.builds.make([name], tmp_path / name, lambda text: None, device=given)
    assert devices == ["cpu", "cuda:0", "cuda:0"]


def test_a_distilled_row_has_its_control_beside_it(write, tmp_path, builders):
    table = measured(write(rows=[{"name": "fused", "build": FUSED, "seeds": [0, 1]}]), tmp_path / "out")
    assert [row.group for row in table.recipe.rows][4:] == ["fused"] * 2 + ["fused, control"] * 2
    for seed in (0, 1):
        control = table.recipe.builds.recipes[f"fused, control, seed {seed}"]
        assert (control.seed, control.method) == (seed, "clm")
        assert control.content == {"method": "clm", "target": "base", "train_tokens": 1000}
    assert builders.count(("clm", None)) == 4  # two seeds, two controls
    told = leaderboard_table.rendered(table, "text")
    assert "fused, control: added to the rows, the training of fused on its text alone" in told
    found = {row.system: row.score for row in table.rows}
    difference = found["fused"] - found["fused, control"]
    assert f"conf_choice acc: fused against its control, fused, control: {difference:+.4f} [" in told


@pytest.mark.parametrize(
    ("row", "other", "same"),
    [
        ({}, {}, True),
        ({}, {"note": "said otherwise", "learning_rate": 1.0e-5, "clm_weight": None}, True),  # a default, spelt out
        ({}, {"train_tokens": 2000}, False),
        ({}, {"seed": 1}, False),
        ({"seed": 1}, {"seed": 1}, True),
        ({}, {"shard": [0, 2]}, False),
        ({}, {"target": "other"}, False),
    ],
)
def test_a_control_is_the_same_training_without_sources(write, row, other, same):
    control = {"name": "alone", "build": {**CLM, **other}}
    recipe = read_recipe(write(rows=[{"name": "fused", "build": {**FUSED, **row}}, control]))
    assert recipe.builds.controls == {"fused": "alone" if same else "fused, control"}
    assert [one.name for one in recipe.rows][4:] == ["fused", "alone", *([] if same else ["fused, control"])]


def test_a_member_that_is_distilled_has_a_control_too(write, pico):
    members = [{"name": "base", "pretrained": str(pico["bytelevel"])}, {"name": "other", "pretrained": "x/y"},
               {"name": "m", "build": FUSED}]  # fmt: skip
    recipe = read_recipe(write(members=members, rows=[{"members": ["base", "m"]}]))
    assert recipe.builds.controls == {"m": "m, control"}


def test_a_random_merge_is_no_member(write, pico):
    members = [{"name": "base", "pretrained": str(pico["bytelevel"])},
               {"name": "d", "build": merge_of("dare_linear", ["base", "x/y"], base="base")}]  # fmt: skip
    with pytest.raises(ConfigError, match="member 'd': dare_linear draws at random"):
        read_recipe(write(members=members, rows=None))


@pytest.mark.parametrize("name", ["leaderboard_siblings", "leaderboard_merge_and_distil"])
def test_the_shipped_leaderboards_have_every_merge(name):
    recipe = read_recipe(ROOT / "matrices" / f"{name}.yaml")
    merges = {one.method for one in recipe.builds.recipes.values() if one.is_merge}
    assert merges == set(METHODS)
    siblings = [name for name in recipe.builds.recipes if name.startswith("sibling-")]
    assert [recipe.builds.recipes[name].content["shard"] for name in siblings] == [[i, 3] for i in range(3)]
    assert tuple(siblings) in {row.members for row in recipe.rows}
    assert all(row.group == row.name for row in recipe.rows if "dare" not in row.name and "seed" not in row.name)
    fused = {"FuseLLM MinCE": "CLM control", "FuseLLM AvgCE": "CLM control"}
    assert recipe.builds.controls == (fused if "distil" in name else {})
