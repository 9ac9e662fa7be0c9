"""``reproduce``: every shipped table runs as a miniature; what is published stands beside what is measured."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import yaml

from lm_eval_deepen.build.demo_models import DEMO_MODELS
from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.cli import reproduce as reproduce_command
from lm_eval_deepen.config.recipes import shipped_recipes
from lm_eval_deepen.harness.ensemble_recipe import load_recipe
from lm_eval_deepen.leaderboard import miniature, reproduction
from lm_eval_deepen.leaderboard.recipe import parse_recipe, read_recipe

# The others are tables of the demo's pair, whose rows stand in files of their own.
TABLES = [
    name
    for name in shipped_recipes("leaderboard")
    if name.startswith(("paper_", "rival_", "open_", "mllm_", "fusellm_"))
]
TABLES += ["leaderboard_trio"]
ENSEMBLES = list(shipped_recipes("ensemble"))
# One of each kind is run; the others are rows of the paper's tables, which are.
RUN = ("deepen_mmlu_2", "deepen_one_by_one_nq_2", "deepen_llama2_13b_nllb_en_ro", "deepen_llama2_70b_mixtral")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.delenv("LM_EVAL_DEEPEN_DATA", raising=False)


@pytest.fixture
def reproduce(pico: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs a miniature of one document; returns the status, what was printed, and the comparison."""

    def reproduce(name: str, *more: str):
        models = ["--models", str(pico["bytelevel"]), str(pico["metaspace"])]
        out = tmp_path / "out"
        status = cli.main(
            ["reproduce", name, "--miniature", *models, "--limit", "1", "--device", "cpu", "--out", str(out), *more]
        )
        told = capsys.readouterr()
        file = out / "reproduction.json"
        return status, told.out + told.err, json.loads(file.read_text()) if file.is_file() else None

    return reproduce


@pytest.mark.parametrize("name", TABLES)
def test_every_line_of_every_table_runs(name: str, reproduce) -> None:
    if name.startswith("mllm_"):
        pytest.importorskip("mergekit", reason="mergekit is not installed: pip install '.[merge]'")
    status, told, found = reproduce(name)
    assert status == 0, told
    recipe = read_recipe(shipped_recipes()[name])
    assert {row["row"] for row in found["rows"]} == {row.group for row in recipe.rows}
    own = {spec.task for spec in recipe.tasks if spec.miniature is None}
    scores = [
        score for table in recipe.expected for task, rows in table.scores.items() if task in own
        for score in rows.values()
    ]  # fmt: skip
    assert sum(row["published"] is not None for row in found["rows"]) == len(scores)
    assert "differences and verdicts mean nothing" in told


@pytest.mark.parametrize("name", ENSEMBLES)
def test_every_ensemble_is_a_table_of_itself_and_its_members(name: str, pico: dict[str, Path]) -> None:
    path = shipped_recipes()[name]
    keys = miniature.miniature(reproduction.leaderboard_keys(path), [str(pico["bytelevel"]), str(pico["padded"])], 1)
    small, whole = parse_recipe(keys, path, {}, {}), parse_recipe(reproduction.leaderboard_keys(path), path, {}, {})
    config = load_recipe(path).configure()
    [row] = [row for row in whole.rows if row.group == "ensemble"]
    own = row.config.replace(self_check=config.self_check)
    assert [member.pretrained for member in own.members] == [member.pretrained for member in config.members]
    assert (own.fingerprint(), own.weights) == (config.fingerprint(), config.weights)
    assert [row.name for row in small.rows] == [row.name for row in whole.rows]
    assert {spec.limit for spec in small.tasks} == {1}


def test_a_miniature_has_the_options_of_all_rows(tmp_path: Path, pico: dict[str, Path]) -> None:
    models = [str(pico["bytelevel"]), str(pico["padded"])]
    raw = {
        "members": [{"name": "A", "pretrained": "x/a"}, {"name": "B", "pretrained": "x/b"}],
        "tasks": ["deepen_nq"],
        "common": {"compat": "reference", "dtype": "float16"},
        "rows": [{"name": "ours", "learning_rate": 0.2, "by_task": None}],
    }
    raw["members"][0]["tasks"] = None  # what is null is not given
    row = parse_recipe(miniature.miniature(raw, models, 1), tmp_path / "r.yaml", {}, {}).rows[-1]
    assert row.config.compat == "reference" and row.config.options.max_anchors == miniature.MOST_ANCHORS
    assert row.config.members[0].loading_dict()["dtype"] == "float32"


def test_samples_are_read_where_they_are_given_and_never_written(tmp_path: Path) -> None:
    """In one folder of results, with and without them."""
    given, out = tmp_path / "given", tmp_path / "out"
    (given / "piqa").mkdir(parents=True)
    (given / "piqa" / "test.jsonl").write_text("mine\n")
    for samples in (given, None, given, given, out, None):
        assert ("piqa" in miniature.sample_data(out, samples)) == (samples is None)
        read = (out / "piqa" / "test.jsonl").read_text()
        assert (read == "mine\n") == (samples is not None)
        assert (given / "piqa" / "test.jsonl").read_text() == "mine\n"
    assert (out / "nq" / "test.jsonl").is_file() and not (out / "piqa").is_symlink()


def test_members_that_are_all_built_cannot_be_checked(tmp_path: Path, capsys) -> None:
    path, build = tmp_path / "built.yaml", {"method": "clm", "target": "x/a", "train_tokens": 100}
    keys = {"members": [{"name": "m", "build": build}], "rows": [{"name": "r", "build": build}], "tasks": ["piqa"]}
    path.write_text(yaml.safe_dump({"kind": "leaderboard", **keys}))
    assert cli.main(["reproduce", str(path), "--dry-run"]) == 0
    assert "1 tasks, 2 cells" in capsys.readouterr().out


@pytest.mark.parametrize(
    "keys", [{"pretrained": "x/a"}, {"members": ["x/a", "x/b"], "hf_kwargs": {"a": 1}}, {"members": "x/a+x/b"}]
)
def test_an_ensemble_as_it_may_be_written_is_a_table(keys: dict, tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text(yaml.safe_dump({"kind": "ensemble", "task": "piqa", "dtype": "float32", **keys}))
    recipe = parse_recipe(reproduction.leaderboard_keys(path), path, {}, {})
    *alone, row = recipe.rows
    assert row.name == "ensemble" and list(row.members) == [one.name for one in alone]
    assert all(member.hf_kwargs_dict() == keys.get("hf_kwargs", {}) for member in row.config.members)


def test_generation_arguments_of_an_ensemble_may_be_a_text(tmp_path: Path, pico: dict[str, Path]) -> None:
    raw = {"kind": "ensemble", "members": [str(pico["bytelevel"]), str(pico["padded"])], "task": "deepen_nq",
           "harness": {"gen_kwargs": "max_gen_toks=5"}}  # fmt: skip
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(raw))
    [spec] = parse_recipe(reproduction.leaderboard_keys(tmp_path / "e.yaml"), tmp_path / "e.yaml", {}, {}).tasks
    assert dict(spec.gen_kwargs) == {"max_gen_toks": 5}


@pytest.mark.parametrize("name", [name for name in ENSEMBLES if name in RUN or not name.startswith("deepen_")])
def test_every_kind_of_ensemble_runs_beside_its_members(name: str, reproduce) -> None:
    status, told, found = reproduce(name, "--no-check")
    assert status == 0, told
    recipe = reproduction.leaderboard_keys(shipped_recipes()[name])
    assert {row["row"] for row in found["rows"]} == {"ensemble", *(member["name"] for member in recipe["members"])}
    published = [row["published"] for row in found["rows"] if row["published"] is not None]
    assert len(published) == len(recipe["expected"])


def test_it_says_what_it_needs_and_keeps_cells(reproduce, tmp_path: Path) -> None:
    status, told, found = reproduce("deepen_piqa_2", "--dry-run")
    assert status == 0 and found is None
    assert re.search(r"3 rows, 1 tasks, 3 cells", told) and "its newest revision" in told and "memory" in told
    status, told, found = reproduce("deepen_piqa_2", "--dry-run", "--no-check")
    assert status == 0 and found is None and "3 rows, 1 tasks, 3 cells" in told and "memory" not in told
    status, told, found = reproduce("deepen_piqa_2")
    assert status == 0 and "[3/3]" in told and re.search(r"ensemble +deepen_piqa exact_match +0\.7887", told)
    status, told, again = reproduce("deepen_piqa_2")
    assert "[1/" not in told and again == found


def test_what_a_full_run_prints(tmp_path: Path, pico, capsys) -> None:
    """Models of one's own in the place of the recipe's, documents from samples."""
    data, out = tmp_path / "data", tmp_path / "full"
    assert "piqa" in miniature.sample_data(data, None)
    members = ["--member", f"Yi-6B={pico['bytelevel']}", f"Skywork-13B-base={pico['metaspace']}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LM_EVAL_DEEPEN_DATA", str(data))
        status = cli.main(["reproduce", "deepen_piqa_2", *members, "--out", str(out), "--device", "cpu"])
    told = capsys.readouterr().out
    assert status == 0 and "Of 1 published scores" in told and "mean nothing" not in told
    [row] = [row for row in json.loads((out / "reproduction.json").read_text())["rows"] if row["published"]]
    assert row["verdict"] == ("agrees" if abs(row["distance"]) <= 2 else "differs")
    cli.main(["inspect", "deepen_piqa_2", *members, "--no-tasks", "--results", str(out)])
    told = capsys.readouterr().out
    assert re.search(rf"deepen_piqa: 78\.87 \(main results.*\); measured {100 * row['measured']:.2f}", told), told


def test_a_model_that_cannot_be_had_is_a_numbered_problem(tmp_path: Path, capsys) -> None:
    status = cli.main(["reproduce", "deepen_nq_2", "--out", str(tmp_path), "--device", "cpu", "--dry-run"])
    assert status == 1 and re.search(r"cannot run it here:\n  1\. .*Llama-2-13b-hf", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deepen_nq_2", "--models", "a"], "--models are those of a miniature"),
        (["merge_ties"], "is a recipe of kind merge"),
        (["deepen_nq_3"], "Use 'deepen_one_by_one_nq_3'"),
    ],
)
def test_what_cannot_be_reproduced(arguments, message, capsys) -> None:
    assert cli.main(["reproduce", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"members": 3}, {"members": [[]]}, {"rows": ["x"]}, {"tasks": [3]}, {"expected": 3}])
def test_a_miniature_of_a_recipe_that_is_none(wrong, tmp_path: Path, capsys) -> None:
    recipe = {"kind": "leaderboard", "members": ["a/A", "b/B"], "rows": [{"method": "gac"}], "tasks": ["t"], **wrong}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    command = ["reproduce", str(tmp_path / "r.yaml"), "--miniature", "--models", "m", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert str(tmp_path / "r.yaml") in capsys.readouterr().err


def test_samples_are_taken_where_there_are_some(tmp_path: Path) -> None:
    given = tmp_path / "given"
    (given / "nq").mkdir(parents=True)
    (given / "nq" / "test.jsonl").write_text("{}\n")
    made = miniature.sample_data(tmp_path / "data", given)
    assert "nq" not in made and "piqa" in made
    assert (tmp_path / "data" / "nq" / "test.jsonl").read_text() == "{}\n"


def test_a_miniature_takes_the_demos_models_from_their_packages(monkeypatch, tmp_path, pico):
    """Where they are installed, so that nothing is asked of a hub; else by their hub names."""
    monkeypatch.setattr("lm_eval_deepen.build.demo_models.is_available", lambda model: model is DEMO_MODELS[0])
    monkeypatch.setattr("lm_eval_deepen.build.demo_models.prepare", lambda model: pico["bytelevel"])
    parser = argparse.ArgumentParser()
    reproduce_command.add_arguments(parser)
    recipe, _ = reproduce_command.asked(parser.parse_args(["deepen_nq_2", "--miniature", "--out", str(tmp_path)]))
    assert [member.pretrained for member in recipe.members] == [str(pico["bytelevel"]), miniature.MODELS[1]]
