"""Weights and learning rate from a development split, and the refusal of documents that are evaluated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lm_eval
import pytest
import yaml
from boards import planned, write_recipe

from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.cli import tune as command
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.model import DeepenLM, configure
from lm_eval_deepen.harness.tasks import TaskSpec, load_tasks
from lm_eval_deepen.leaderboard import fitting
from lm_eval_deepen.leaderboard.tuned import kept_digits, read_tuned
from lm_eval_deepen.tuning import by_score as tune_score

OPTIONS = ["one", "two fish", "the fox", "nothing at all"]


@pytest.fixture
def data(tmp_path):
    """A data folder whose development and test splits of two benchmarks are disjoint."""
    folder = tmp_path / "data"
    for name, letters in (("arc_challenge", "ABCD"), ("piqa", "AB")):
        (folder / name).mkdir(parents=True)
        for split in ("dev", "test"):
            rows = [
                {"question": f"{split} {n}?", **dict(zip(letters, OPTIONS, strict=False)), "answer": letters[n % 2]}
                for n in range(8)
            ]
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def tune(pico, data, tmp_path):
    """Runs the objective; returns the file's keys."""

    def tune(*arguments: str, **options):
        ensemble = tmp_path / "ensemble.yaml"
        members = [str(pico["bytelevel"]), str(pico["metaspace"])]
        ensemble.write_text(yaml.safe_dump({"members": members, "matrix_dir": str(tmp_path / "m"), **options}))
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        output = tmp_path / "tuned.yaml"
        where = ["--metadata", json.dumps({"data_dir": str(data)}), "--output", str(output), "--device", "cpu"]
        assert command.run(parser.parse_args([str(ensemble), "--objective", "score", *where, *arguments])) == 0
        return yaml.safe_load(output.read_text())

    return tune


def development(data: Path, task: str):
    [loaded] = load_tasks([TaskSpec(task=task, split="validation")], (), {"data_dir": str(data)})
    return loaded


def test_the_best_weights_of_the_development_split_are_written(tune, data, tmp_path):
    written = tune("--tasks", "deepen_sample_arc", "deepen_sample_piqa", "--weight-step", "0.25")
    evidence = written["evidence"]
    tried = {line.rpartition(": ")[0]: float(line.rpartition(": ")[2]) for line in evidence["search"]}
    # Those given by default learn from the text: what is scored are the equal ones with which they begin.
    assert list(tried) == [
        "equal weights",
        "adaptive weights",
        *(f"weights {a:g}/{1 - a:g}" for a in (0.25, 0.5, 0.75)),
    ]
    weights = [member["weight"] for member in written["members"]]
    chosen = sum(task["score"] for task in evidence["tasks"].values()) / 2
    assert chosen == pytest.approx(max(tried.values()), abs=1e-6) and sum(weights) == pytest.approx(1)
    # An evaluation of the file on the development documents, by the harness alone, gives that score.
    model = DeepenLM(pretrained=str(tmp_path / "tuned.yaml"), device="cpu")
    for name, told in evidence["tasks"].items():
        task = development(data, name)
        found = lm_eval.simple_evaluate(model=model, tasks=task.objects, task_manager=task.manager, bootstrap_iters=0)
        assert found["results"][name][told["metric"]] == pytest.approx(told["score"], abs=1e-6)
        assert told["documents"] == 8
        assert len(set(map(kept_digits, task.documents[name])) & set(evidence["document_hashes"])) == 8


def test_adaptive_weights_are_in_proportion_to_the_members_scores(tune, tmp_path, monkeypatch):
    evaluate = fitting.Search._evaluate
    own = iter([0.75, 0.25])  # of the members; of the ensemble whatever it gets

    def score(self, model, task):
        return {name: next(own, found) for name, found in evaluate(self, model, task).items()}

    monkeypatch.setattr(fitting.Search, "_evaluate", score)
    written = tune("--tasks", "deepen_sample_piqa", "--weights", "adaptive")
    assert list(written["evidence"]["members"].values()) == [{"deepen_sample_piqa": s} for s in (0.75, 0.25)]
    assert [line.partition(":")[0] for line in written["evidence"]["search"]] == ["adaptive weights"]
    assert configure({"pretrained": str(tmp_path / "tuned.yaml")}).weights == pytest.approx((0.75, 0.25))
    own = iter([0.0, 0.0])
    with pytest.raises(ConfigError, match="needs scores of which higher is better, one above 0; the members have"):
        tune("--tasks", "deepen_sample_piqa", "--weights", "adaptive")
    assert fitting.adaptive({"a": {"t": 0.6, "u": 0.2}, "b": {"t": 0.1, "u": 0.1}}) == pytest.approx([0.8, 0.2])
    with pytest.raises(ConfigError, match="--weights adaptive needs scores of which higher is better"):
        fitting.adaptive({"a": {"t": -1.0}, "b": {"t": 0.5}})


def test_scores_of_which_lower_is_better_are_written_as_they_are(tune, monkeypatch):
    evaluate = fitting.evaluate

    def lower(*arguments):
        results = evaluate(*arguments)
        return {**results, "higher_is_better": {"deepen_sample_piqa": {"acc": False}}}

    monkeypatch.setattr(fitting, "evaluate", lower)
    arguments = ("--tasks", "deepen_sample_piqa", "--metric", "acc", "--weights", "grid", "--weight-step", "0.25")
    evidence = tune(*arguments)["evidence"]
    maximised = [float(line.rpartition(": ")[2]) for line in evidence["search"]]
    assert evidence["tasks"]["deepen_sample_piqa"]["score"] == -max(maximised) > 0
    assert all(0 < score <= 1 for own in evidence["members"].values() for score in own.values())


def test_adaptive_weights_of_published_options_keep_them(tune, tmp_path):
    """As documented for the paper's recipes: then only the learning rate is chosen."""
    written = tune(
        "--tasks", "deepen_sample_piqa", "--weights", "adaptive", "--learning-rates", "0.15", "0.3", compat="reference"
    )
    own = [scores["deepen_sample_piqa"] for scores in written["evidence"]["members"].values()]
    config = configure({"pretrained": str(tmp_path / "tuned.yaml")})
    assert config.weights == pytest.approx([score / sum(own) for score in own], abs=1e-6)
    assert config.compat == "reference" and config.options_dict()["learning_rate"] in (None, 0.15, 0.3)
    assert [line.partition(":")[0] for line in written["evidence"]["search"]] == [
        "adaptive weights", "adaptive weights, learning rate 0.15", "adaptive weights, learning rate 0.3",
    ]  # fmt: skip


def test_learning_rates_are_tried_under_the_best_weights(tune):
    written = tune(
        "--tasks", "deepen_sample_piqa", "--weights", "keep", "--learning-rates", "0.05", "0.3", inverse="adamw",
        rows="embedding",
    )  # fmt: skip
    assert [line.partition(":")[0] for line in written["evidence"]["search"]] == [
        "as given", "as given, learning rate 0.05", "as given, learning rate 0.3",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="learning_rate"):
        tune("--tasks", "deepen_sample_piqa", "--weights", "keep", "--learning-rates", "0.1", inverse="em")


def test_documents_that_are_evaluated_are_refused(tune, data):
    dev = data / "piqa" / "dev.jsonl"
    test = (data / "piqa" / "test.jsonl").read_text().splitlines()
    dev.write_text(dev.read_text() + "\n".join(test[:3]) + "\n")
    told = "was fitted on 3 of the 8 documents of task 'deepen_sample_piqa'.*--tasks takes the task that"
    with pytest.raises(ConfigError, match=told):
        tune("--tasks", "deepen_sample_piqa")
    written = tune("--tasks", "deepen_sample_piqa", "--evaluated", "deepen_sample_arc", "--weights", "adaptive")
    assert written["evidence"]["tasks"]["deepen_sample_piqa"]["documents"] == 11


def test_the_leaderboard_takes_the_file_on_the_test_split_alone(tune, data, tmp_path, pico):
    tune("--tasks", "deepen_sample_piqa", "--weights", "adaptive")
    raw = {
        "members": [str(pico["bytelevel"]), str(pico["metaspace"])],
        "rows": [{"ensemble": "tuned.yaml"}],
        "metadata": {"data_dir": str(data)},
        "tasks": ["deepen_sample_piqa"],
    }
    todo = planned(write_recipe(tmp_path, raw), tmp_path / "out")
    tuned = todo.recipe.rows[-1].tuned
    assert todo.missing and tuned is not None and len(tuned.documents) == 8
    raw["tasks"] = [{"task": "deepen_sample_piqa", "split": "validation"}]
    with pytest.raises(ConfigError, match="row 'tuned' .* was fitted on 8 of the 8 documents"):
        planned(write_recipe(tmp_path, raw), tmp_path / "out")


def test_an_edited_file_is_told(tune, tmp_path):
    written = tune("--tasks", "deepen_sample_piqa", "--weights", "adaptive")
    path = tmp_path / "tuned.yaml"
    assert read_tuned(path, configure({"pretrained": str(path)})).documents
    written["members"][0]["temperature"] = 1.5
    path.write_text(yaml.safe_dump(written))
    with pytest.raises(ConfigError, match="is of another ensemble .*members or options changed since"):
        read_tuned(path, configure({"pretrained": str(path)}))


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, [], "--objective score needs --tasks"),
        ({"weighting": "perplexity"}, ["--tasks", "t"], "weighting=perplexity makes the weights by request or step"),
        ({"weighting": "confidence"}, ["--tasks", "t"], "weighting=confidence makes the weights by request or step"),
        ({"pooling": "vote"}, ["--tasks", "t"], "pooling=vote alone fuses no steps"),
        ({"members": None, "pretrained": "m"}, ["--tasks", "t"], "a member alone has no weights to fit"),
    ],
)
def test_nothing_to_fit_is_an_error(tune, options, arguments, message):
    with pytest.raises(ConfigError, match=message):
        tune(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "acc"], "--metric belongs to --objective score"),
        (["--num-fewshot", "0"], "--num-fewshot belongs to --objective score"),
        (["--objective", "score", "--tasks", "t", "--text", "a"], "--text belongs to --objective bpb"),
        (["--objective", "score", "--tasks", "t", "--weight-step", "0.3"], "--weight-step must divide 1"),
    ],
)
def test_options_without_an_effect_are_refused_before_anything_loads(arguments, message, tmp_path, capsys):
    argv = ["tune", "pretrained=a/A,members=a/A+b/B", "--output", str(tmp_path / "t.yaml"), *arguments]
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_the_grid_of_weights():
    assert fitting.simplex(2, 0.25) == [(0.25, 0.75), (0.5, 0.5), (0.75, 0.25)]
    assert len(fitting.simplex(3, 0.1)) == 36
    assert len(fitting.simplex(10, 0.1)) == 1  # not one by one of 9**9
    assert all(sum(point) == pytest.approx(1) and min(point) > 0 for point in fitting.simplex(3, 0.1))
    with pytest.raises(ConfigError, match="a grid of more than 10,000 weights"):
        fitting.simplex(2, 1e-9)
    for step in (0, -1, 0.3, 1, 0.7):
        with pytest.raises(ConfigError, match="--weight-step must divide 1"):
            fitting.simplex(2, step)


def test_generation_arguments_reach_the_tasks_and_the_record(tune):
    written = tune("--tasks", "deepen_piqa", "--weights", "keep", "--gen-kwargs", "max_gen_toks=2")
    assert written["evidence"]["gen_kwargs"] == "max_gen_toks=2"
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["ensemble.yaml", "--gen-kwargs", "max_gen_toks=2"])
    assert tune_score.spec_of(args, "deepen_piqa", "validation").gen_kwargs == {"max_gen_toks": 2}
