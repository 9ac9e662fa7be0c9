"""`lm-eval-deepen compare`: tables over result folders, and their renderings."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from run_files import doctored, edited, evaluate_dummy, local_tasks, synthesised, wrong

from lm_eval_deepen.cli import main as cli

FEW = ("--resamples", "200")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Two runs of the harness's dummy model on tasks of every output type, with different answers."""
    tasks = local_tasks(tmp_path_factory.mktemp("tasks"))
    names = ["conf_group", "conf_cloze", "conf_text", "conf_answer"]
    folder = tmp_path_factory.mktemp("tiny")
    return [evaluate_dummy(folder / f"run{seed}", names, tasks, seed=seed) for seed in (0, 1)]


def compare(*arguments):
    return cli.main(["compare", *map(str, arguments)])


def as_json(capsys, *arguments):
    assert compare(*arguments, "--format", "json", *FEW) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def three(tmp_path):
    def made(name, values):
        return synthesised(tmp_path / name, {"t": {"acc": values}})

    return [
        made("a", [1.0] * 40 + [0.0] * 60),
        made("b", [0.0] * 2 + [1.0] * 58 + [0.0] * 40),
        made("c", [1.0] * 41 + [0.0] * 59),
    ]


def test_json_and_another_format_are_refused(three, tmp_path, capsys):
    place = tmp_path / "x.html"
    for fmt in ("html", "md"):
        assert compare(*three[:2], "--json", "--format", fmt, "--output", place) == 2
        assert f"--format {fmt}" in capsys.readouterr().err and not place.exists()


def no_json(word):
    raise AssertionError(f"{word} is no JSON")


def test_a_run_beside_itself_and_a_score_without_bound(three, tmp_path, capsys):
    found = as_json(capsys, three[0], three[0])
    assert [row["system"] for row in found["rows"]] == [f"{three[0]} (1)", f"{three[0]} (2)"]
    assert found["rows"][1]["comparison"]["difference"] == 0
    a, b = (
        synthesised(
            tmp_path / name, {"t": {"perplexity": [far, -1.0]}}, {"perplexity": False}, {"perplexity": "perplexity"}
        )
        for name, far in (("near", -3.0), ("far", -5000.0))
    )
    for arguments in ((a, b), (b, a)):
        assert compare(*arguments, "--json", *FEW) == 0
        rows = json.loads(capsys.readouterr().out, parse_constant=no_json)["rows"]
        assert {row["system"]: row["score"] for row in rows}["far"] is None  # exp(2500)
        assert compare(*arguments, "--format", "html", *FEW) == 0
        assert "inf" in capsys.readouterr().out


@pytest.mark.parametrize("far", [-600.0, -1400.0, -1418.0])
def test_scores_that_are_nearly_without_bound_are_in_the_table_alone(tmp_path, capsys, far):
    a, b = (
        synthesised(tmp_path / name, {"t": {"p": [value, -1.0, -2.0]}}, {"p": False}, {"p": "perplexity"})
        for name, value in (("near", -3.0), ("far", far))
    )
    assert compare(a, b, "--format", "html", *FEW) == 0
    page = capsys.readouterr().out
    assert page.count("<svg") == 1 and "near" in page.split("<svg")[1]


def test_a_metric_without_a_score_in_the_results_has_that_of_its_samples(tmp_path, capsys):
    a, b = (synthesised(tmp_path / name, {"t": {"acc": [1.0, 0.0]}}) for name in "ab")
    odd = edited(b, tmp_path / "odd", lambda results: results["results"].clear())
    assert compare(a, odd, *FEW) == 0
    assert "acc is None there, but its samples give 0.5" in capsys.readouterr().out


def test_a_group_is_reported_of_the_evaluation_of_its_tasks(tmp_path, capsys):
    def grouped(name, values, date):
        folder = synthesised(tmp_path / name, values, date=date)
        path = folder / f"results_{date}.json"
        results = json.loads(path.read_text())
        score = results["results"]["t"]["acc,none"]
        results |= {"groups": {"g": {"acc,none": score}}, "group_subtasks": {"g": ["t"]}}
        path.write_text(json.dumps(results))

    for name in "ab":
        grouped(name, {"t": {"acc": [0.0, 0.0]}, "u": {"acc": [1.0, 0.0]}}, "2026-01-02T03-04-05.000006")
        grouped(name, {"t": {"acc": [1.0, 1.0]}}, "2026-02-02T03-04-05.000006")
    [told] = [note for note in as_json(capsys, tmp_path / "a", tmp_path / "b")["notes"] if note.startswith("group g")]
    assert "a 1.0000, b 1.0000; against a, paired over 2 documents of 1 tasks" in told


# The table ---------------------------------------------------------------------------------------------


def test_every_metric_of_every_kind_of_task_is_compared(tiny, capsys):
    found = as_json(capsys, *tiny)
    columns = {(row["task"], row["metric"], row["filter"]) for row in found["rows"]}
    assert columns == {
        *(("conf_choice", metric, "none") for metric in ("acc", "acc_norm", "acc_mutual_info")),
        ("conf_blank", "acc", "none"),
        *(("conf_cloze", metric, "none") for metric in ("perplexity", "acc")),
        *(("conf_text", metric, "none") for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")),
        *(("conf_answer", "exact_match", flt) for flt in ("first-word", "whole")),
    }
    assert len(found["rows"]) == 2 * len(columns)
    tests = {row["metric"]: row["comparison"]["test"] for row in found["rows"] if row["comparison"]}
    assert (tests["acc"], tests["bits_per_byte"]) == ("exact McNemar test", "paired permutation test")
    [group] = [note for note in found["notes"] if note.startswith("group conf_group")]
    assert "acc, as reported, over all documents and without a test: run0 " in group and "run1 " in group


def test_scores_are_those_of_the_results_files(tiny, capsys):
    found = as_json(capsys, *tiny)
    for label, folder in zip(("run0", "run1"), tiny, strict=True):
        [path] = folder.rglob("results_*.json")
        results = json.loads(path.read_text())["results"]
        for row in found["rows"]:
            if row["system"] == label:
                assert row["score"] == pytest.approx(results[row["task"]][f"{row['metric']},{row['filter']}"])


def test_rows_hold_the_paired_comparison_with_the_first_run(three, capsys):
    rows = as_json(capsys, *three)["rows"]
    assert [row["system"] for row in rows] == ["a", "b", "c"]
    assert [row["verdict"] for row in rows] == ["reference", "better", "not significant"]
    b = rows[1]["comparison"]
    assert (b["reference"], b["below"], b["above"]) == ("a", 2, 20)
    assert b["agreement"] == pytest.approx(0.78)
    assert b["low"] < b["difference"] < b["high"]
    assert b["p_holm"] == pytest.approx(2 * b["p"])
    assert rows[1]["oracle"] == pytest.approx(0.60) and rows[1]["pool"] == ["a", "b"]


def test_against_names_the_reference_or_takes_the_best(three, capsys):
    best = as_json(capsys, *three, "--against", "best")["rows"]
    assert [row["verdict"] for row in best] == ["worse", "reference", "worse"]
    assert best[0]["comparison"]["candidates"] == ["a", "b", "c"]
    assert best[0]["comparison"]["p_holm"] == pytest.approx(3 * best[0]["comparison"]["p"])  # any two of the three
    third = as_json(capsys, *three, "--against", "c")["rows"]
    assert {row["comparison"]["reference"] for row in third if row["comparison"]} == {"c"}
    assert compare(*three, "--against", "bset") == 2
    assert "the runs are a, b, c, or best. Did you mean 'best'?" in capsys.readouterr().err


def test_mid_p_is_smaller_and_said(three, capsys):
    exact = as_json(capsys, *three)["rows"][1]["comparison"]
    mid = as_json(capsys, *three, "--mid-p")["rows"][1]["comparison"]
    assert mid["p"] < exact["p"] and mid["test"] == "mid-p McNemar test"


def test_names_are_given_or_made_distinct(three, tmp_path, capsys):
    found = as_json(capsys, *three, "--names", "x", "y", "z")
    assert [row["system"] for row in found["rows"]] == ["x", "y", "z"]
    twin = synthesised(tmp_path / "other" / "a", {"t": {"acc": [1.0] * 100}})
    assert len({row["system"] for row in as_json(capsys, three[0], twin)["rows"]}) == 2
    assert compare(*three, "--names", "x") == 2
    assert "1 names for 3 folders" in capsys.readouterr().err
    assert compare(*three, "--names", "x", "x", "y") == 2
    assert "are not all different" in capsys.readouterr().err


def test_a_folder_of_several_models_is_compared_within(tmp_path, capsys):
    for name, values in (("m", [1.0] * 9), ("n", [0.0] * 9)):
        synthesised(tmp_path / "out" / name, {"t": {"acc": values}})
    assert [row["system"] for row in as_json(capsys, tmp_path / "out")["rows"]] == ["out/m", "out/n"]


def test_what_an_interval_and_a_p_value_mean_is_said_where_the_reference_was_picked(three, capsys):
    assert compare(*three, "--against", "best") == 0
    told = capsys.readouterr().out
    assert "The reference is the best of all systems on these very documents" in told
    assert re.search(r"^a +0\.4000 \[0\.3", told, re.MULTILINE) and " ± " not in told
    assert compare(*three) == 0
    assert "on these very documents" not in capsys.readouterr().out


def test_a_groups_score_is_compared_as_it_was_aggregated(tmp_path, capsys):
    generator = np.random.default_rng(0)
    sizes = {"big": 90, "small": 10}
    right = {t: [(generator.random(n) < p).astype(float) for p in (0.4, 0.6)] for t, n in sizes.items()}

    def grouped(name, system, by_size):
        values = {task: list(right[task][system]) for task in sizes}
        folder = synthesised(tmp_path / f"plain {name}", {task: {"acc": own} for task, own in values.items()})
        means = [np.mean(own) for own in values.values()]
        score = np.mean(np.concatenate(list(values.values()))) if by_size else np.mean(means)

        def edit(results):
            results["groups"] = {"g": {"acc,none": float(score), "alias": "g"}}
            results["group_subtasks"] = {"g": ["inner"], "inner": list(sizes)}

        return edited(folder, tmp_path / name, edit), float(score)

    for by_size in (True, False):
        (a, first), (b, second) = (grouped(f"{name}{by_size}", i, by_size) for i, name in enumerate("ab"))
        [note] = [note for note in as_json(capsys, a, b)["notes"] if note.startswith("group g")]
        assert f"against a{by_size}, paired over 100 documents of 2 tasks: b{by_size} {second - first:+.4f} [" in note
        low, high = map(float, note[note.rindex("[") + 1 : -1].split(", "))
        assert low < second - first < high
    # All wrong is 0 either way: how the group is aggregated is what the other run says.
    right = {task: [np.zeros(n), right[task][1]] for task, n in sizes.items()}
    (a, _), (b, second) = (grouped(f"{name} of 0", i, False) for i, name in enumerate("ab"))
    [note] = [note for note in as_json(capsys, a, b)["notes"] if note.startswith("group g")]
    assert f"b of 0 {second:+.4f} [" in note
    other, _ = grouped("other", 1, True)
    told = edited(other, tmp_path / "odd", lambda results: results["groups"]["g"].update({"acc,none": 0.123}))
    [note] = [note for note in as_json(capsys, told, a)["notes"] if note.startswith("group g")]
    assert "paired" not in note  # aggregated in some other way


def test_what_runs_aggregate_otherwise_or_a_task_by_itself_is_not_compared(tmp_path, capsys):
    def made(name, values, how):
        tasks = {"t": {"acc": [1.0, 0.0, 1.0], "m": values}}
        return synthesised(tmp_path / name, tasks, aggregations={"m": how})

    mean, other = made("a", [-1.0, -2.0, -3.0], "mean"), made("b", [-1.0, -2.5, -3.0], "perplexity")
    pairs = made("c", [[-1.0, 2], [-2.5, 3], [-3.0, 1]], "weighted_perplexity")
    for second in (other, pairs):
        found = as_json(capsys, mean, second)
        assert {row["metric"] for row in found["rows"]} == {"acc"}
        assert f"not compared: t: {second.name} aggregates m otherwise than a" in found["notes"]
    # As SQuAD has them: the task's own code makes a score of all documents' texts.
    texts = made("d", [[{"prediction_text": "x"}, {"answers": []}]] * 3, "mean")
    own = edited(texts, tmp_path / "e", lambda results: results["configs"]["t"].pop("metric_list"))
    found = as_json(capsys, own, own)
    assert {row["metric"] for row in found["rows"]} == {"acc"}
    assert any("m has values that are no numbers, which the task aggregates" in note for note in found["notes"])
    assert cli.main(["gate", "--baseline", str(own), "--candidate", str(own)]) == 0
    assert compare(texts, texts) == 2  # where they should be numbers


# What is said about what is compared -------------------------------------------------------------------


def test_only_common_documents_and_tasks_are_compared_and_the_rest_is_noted(tmp_path, capsys):
    a = synthesised(tmp_path / "a", {"t": {"acc": [1.0, 0.0, 1.0, 1.0]}, "u": {"acc": [1.0]}})
    b = synthesised(tmp_path / "b", {"t": {"acc": [1.0, 1.0]}})
    found = as_json(capsys, a, b)
    assert [(row["score"], row["documents"]) for row in found["rows"]] == [(0.5, 2), (1.0, 2)]
    assert "u is left out: not in b" in found["notes"]
    assert "t: a has 4 documents, 2 of them are compared in acc" in found["notes"]


def test_other_prompts_and_contradictions_are_noted(tmp_path, capsys):
    a = synthesised(tmp_path / "a", {"t": {"acc": [1.0, 0.0, 1.0]}})
    b = doctored(a, tmp_path / "b", "t", lambda records: records[0].update(prompt_hash="x", target_hash="y", acc=0.0))
    notes = "\n".join(as_json(capsys, a, b)["notes"])
    assert "t: b was asked otherwise than a in 1 of 3 documents" in notes
    assert "t: b was judged by other expected answers than a in 1 of 3 documents" in notes
    assert "acc is 0.666" in notes and "its samples give 0.333333; the samples count" in notes


def test_metrics_that_cannot_be_paired_are_noted_or_refused_when_asked_for(tmp_path, capsys):
    a = synthesised(tmp_path / "a", {"t": {"acc": [1.0], "bleu": [["x", "y"]]}}, aggregations={"bleu": "bleu"})
    found = as_json(capsys, a, a)
    assert {row["metric"] for row in found["rows"]} == {"acc"}
    assert any(note.startswith("not compared: t in") for note in found["notes"])
    assert compare(a, a, "--metric", "bleu") == 2
    assert "bleu is aggregated by 'bleu'" in capsys.readouterr().err
    only = synthesised(tmp_path / "only", {"t": {"bleu": [["x", "y"]]}}, aggregations={"bleu": "bleu"})
    assert compare(only, only) == 2
    assert "nothing to compare:\n  not compared: t in" in capsys.readouterr().err


def test_errors_name_what_is_wrong(tmp_path, three, capsys):
    def fails(message, *arguments):
        assert compare(*arguments) == 2
        assert message in capsys.readouterr().err

    other = synthesised(tmp_path / "other", {"u": {"acc": [1.0]}})
    fails("one run alone cannot be compared", three[0])
    fails("the runs have no task in common: a: t; other: u", three[0], other)
    fails("no samples of task 'u'; there are: t.", *three, "--tasks", "u")
    fails("metric 'ac': in none of the tasks t of", *three, "--metric", "ac")

    def rename(records):
        for record in records:
            record["doc_hash"] += "moved"

    moved = doctored(three[0], tmp_path / "moved", "t", rename)
    fails("no document in common (by doc_hash)", three[0], moved)
    fails("no document in common (by doc_hash)", three[0], moved, "--metric", "acc")
    bounds = {"--resamples": ("1", "1000000"), "--seed": ("0", "4294967295")}
    for option, text in (("--resamples", "0"), ("--resamples", "1e12"), ("--seed", "-1"), ("--seed", str(2**32))):
        with pytest.raises(SystemExit) as stop:
            compare(*three, option, text)
        assert stop.value.code == 2
        least, most = bounds[option]
        told = f"argument {option}: {text}: must be a whole number from {least} to {most}"
        assert told in capsys.readouterr().err


# Formats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "start"), [("text", "t acc"), ("md", "#### t acc"), ("html", "<!DOCTYPE html>")])
def test_the_command_writes_every_format(three, tmp_path, capsys, fmt, start):
    assert compare(*three, "--format", fmt, "--output", tmp_path / "new" / "table", *FEW) == 0
    assert (tmp_path / "new" / "table").read_text("utf-8").startswith(start)
    assert capsys.readouterr().out == ""


def test_results_do_not_depend_on_the_run(tiny, capsys):
    assert as_json(capsys, *tiny) == as_json(capsys, *tiny)


def test_a_doctored_run_is_significantly_worse(tmp_path, capsys):
    a = synthesised(tmp_path / "a", {"t": {"acc": [1.0] * 50 + [0.0] * 50}})
    b = doctored(a, tmp_path / "b", "t", wrong(20))
    assert as_json(capsys, a, b)["rows"][1]["verdict"] == "worse"
    unknown = edited(b, tmp_path / "c", lambda results: results.update(higher_is_better={}))
    assert as_json(capsys, unknown, a)["rows"][0]["higher_is_better"] is None


def test_a_run_with_predictions_alone_has_no_metric(tmp_path, capsys):
    bare = synthesised(tmp_path / "bare", {"t": {"bypass": [999, 999]}})
    full = synthesised(tmp_path / "full", {"t": {"acc": [1.0, 0.0]}})
    assert cli.main(["compare", str(bare), str(full)]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "not compared" in line]
    assert f"{bare}" in line and "metric 'acc' is not there, and another run has it. A run with --predict_only" in line
    assert cli.main(["gate", "--baseline", str(bare), "--candidate", str(bare)]) == 3
    assert "the runs have no metric: with --predict_only nothing is measured" in capsys.readouterr().out
    assert cli.main(["gate", "--baseline", str(full), "--candidate", str(bare)]) == 3
    told = capsys.readouterr().out
    assert "t: " in told and "has no metric (--predict_only); evaluate without it" in told and "metric_list" not in told
