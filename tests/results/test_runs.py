"""Result folders: reading, pairing, aggregation, rows, and what makes two runs incomparable."""

from __future__ import annotations

import os

import numpy as np
import pytest
from run_files import DATE, ROOT, evaluate_dummy, local_tasks, record, synthesised

from lm_eval_deepen.errors import ResultError
from lm_eval_deepen.results.aggregation import Scores, mean_scores
from lm_eval_deepen.results.files import find_runs
from lm_eval_deepen.results.samples import Key, common_keys, mismatch, read_samples, samples_of

LATER = "2026-02-02T03-04-05.000006"


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    """A run of the harness's dummy model on tiny tasks of every output type."""
    tasks = local_tasks(tmp_path_factory.mktemp("tasks"))
    names = ["conf_group", "conf_cloze", "conf_text", "conf_answer"]
    return evaluate_dummy(tmp_path_factory.mktemp("everything"), names, tasks)


def samples(*records):
    return samples_of(((f"file:{i}", r) for i, r in enumerate(records, 1)), "file")


# Reading -----------------------------------------------------------------------------------------------


def test_every_metric_of_the_harness_is_recomputed_from_its_samples(everything):
    [run] = find_runs(everything)
    assert set(run.tasks) == {"conf_choice", "conf_blank", "conf_cloze", "conf_text", "conf_answer"}
    seen = 0
    for task in run.tasks.values():
        for metric, flt in task.columns:
            assert task.contradiction(metric, flt) is None
            table = task.samples.under(flt)
            scores = task.scores(metric, flt, list(table))
            assert scores.score == pytest.approx(task.results["results"][task.task][f"{metric},{flt}"])
            seen += 1
    assert seen == 3 + 1 + 2 + 3 + 2
    assert run.tasks["conf_answer"].columns == [("exact_match", "first-word"), ("exact_match", "whole")]
    assert run.tasks["conf_text"].higher_is_better("bits_per_byte") is False
    assert run.tasks["conf_choice"].higher_is_better("acc") is True


def test_a_sub_folder_and_a_file_are_the_same_run(everything):
    [folder] = [path for path in everything.iterdir() if path.is_dir()]
    [file] = folder.glob("results_*.json")
    for path in (folder, file):
        [run] = find_runs(path)
        assert set(run.tasks) == set(find_runs(everything)[0].tasks)
    assert find_runs(folder, "mine")[0].label == "mine"


def test_an_output_path_that_ends_in_json_is_read_too(tmp_path):
    tasks = local_tasks(tmp_path)
    evaluate_dummy(tmp_path / "out" / "one.json", ["conf_blank"], tasks)
    evaluate_dummy(tmp_path / "out" / "two.json", ["conf_blank"], tasks)
    runs = find_runs(tmp_path / "out")
    assert len(runs) == 2 and len({run.label for run in runs}) == 2


def test_several_models_are_several_runs_named_after_them(tmp_path):
    for name in ("b", "a"):
        synthesised(tmp_path / "out" / name, {"t": {"acc": [1.0]}})
    assert [run.label for run in find_runs(tmp_path / "out")] == ["out/a", "out/b"]


def test_what_weights_of_a_leaderboard_were_made_from_is_none_of_its_runs(tmp_path):
    """A folder of that name is a run elsewhere, and where it is asked for."""
    for name in ("row/t", "development/member/t"):
        synthesised(tmp_path / name, {"t": {"acc": [1.0]}})
    assert len(find_runs(tmp_path)) == 2
    (tmp_path / "leaderboard.json").write_text("{}")
    [run] = find_runs(tmp_path)
    assert "row" in run.folder.parts
    assert len(find_runs(tmp_path / "development")) == 1


def test_the_latest_evaluation_of_each_task_counts_and_the_rest_is_noted(tmp_path):
    synthesised(tmp_path, {"t": {"acc": [0.0]}, "u": {"acc": [1.0]}})
    synthesised(tmp_path, {"t": {"acc": [1.0]}}, date=LATER)
    [run] = find_runs(tmp_path)
    assert (run.tasks["t"].results_path.name, run.tasks["u"].results_path.name) == (
        f"results_{LATER}.json",
        f"results_{DATE}.json",
    )
    assert [note for note in run.notes if f"its t is left out, results_{LATER}.json is later" in note]


def test_what_other_model_arguments_left_in_the_folder_is_another_model(tmp_path):
    # The harness names folders after `pretrained`: an ensemble and its main member alone share one.
    ensemble = {"model": "deepen", "deepen": {"fingerprint": "f" * 64}}
    synthesised(tmp_path, {"t": {"acc": [0.0]}, "u": {"acc": [1.0]}}, config=ensemble)
    synthesised(tmp_path, {"t": {"acc": [1.0]}}, date=LATER)
    [run] = find_runs(tmp_path)
    assert set(run.tasks) == {"t"}
    assert "left out, it is of other model arguments" in run.notes[0]


def test_an_evaluation_without_samples_is_left_out_and_noted(tmp_path):
    synthesised(tmp_path, {"t": {"acc": [0.0]}})
    synthesised(tmp_path, {"t": {"acc": [1.0]}}, date=LATER)
    (tmp_path / f"samples_t_{LATER}.jsonl").unlink()
    [run] = find_runs(tmp_path)
    assert run.tasks["t"].results_path.name == f"results_{DATE}.json"
    assert f"results_{LATER}.json: left out, it has no samples" in run.notes[0]


def test_a_task_without_samples_beside_others_is_noted(tmp_path):
    synthesised(tmp_path, {"t": {"acc": [0.0]}, "u": {"acc": [1.0]}})
    (tmp_path / f"samples_u_{DATE}.jsonl").unlink()
    [run] = find_runs(tmp_path)
    assert set(run.tasks) == {"t"} and "u has no samples" in run.notes[0]


def test_folders_that_hold_no_run_are_errors(tmp_path):
    with pytest.raises(ResultError, match="nowhere: no such file or folder; give what --output_path"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(ResultError, match="holds no results_<date>.json of the harness"):
        find_runs(tmp_path)
    bare = synthesised(tmp_path / "bare", {"t": {"acc": [1.0]}})
    (bare / f"samples_t_{DATE}.jsonl").unlink()
    with pytest.raises(ResultError, match=r"results without samples \(results_.*\).* again with --log_samples"):
        find_runs(bare)
    with pytest.raises(ResultError, match="bare: no samples of task 'tt'; there are: t. Did you mean 't'"):
        find_runs(synthesised(tmp_path / "bare", {"t": {"acc": [1.0]}}))[0].task("tt")


def test_damaged_files_are_errors_by_file_and_line(tmp_path):
    folder = synthesised(tmp_path / "run", {"t": {"acc": [1.0, 0.0, 1.0]}})
    path = folder / f"samples_t_{DATE}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:40] + "\n", lines[2]]))
    with pytest.raises(ResultError, match=r"samples_t_.*\.jsonl:2: not a line of JSON .*cut off"):
        read_samples(path)
    path.write_text('{"doc_id": 3}\n')
    with pytest.raises(ResultError, match=":1: not a sample of the harness, doc_hash, .*, filter missing"):
        read_samples(path)
    path.write_text("[]\n")
    with pytest.raises(ResultError, match=":1: not a sample of the harness"):
        read_samples(path)
    path.write_text("".join([*lines, lines[1]]))  # n would be larger than it is, and p-values smaller
    with pytest.raises(ResultError, match=r"samples_t_.*: document 1 stands 2 times under filter 'none'"):
        read_samples(path)
    path.write_text("\n")
    with pytest.raises(ResultError, match="holds no sample"):
        read_samples(path)
    results = folder / f"results_{DATE}.json"
    results.write_text('{"results": {},\n "configs": ')
    with pytest.raises(ResultError, match=r"results_.*\.json:2: not JSON"):
        find_runs(folder)
    results.write_text("[]")
    with pytest.raises(ResultError, match="not a results file of the harness"):
        find_runs(folder)


# Pairing -----------------------------------------------------------------------------------------------


def test_documents_are_paired_by_content_whatever_their_order():
    a = samples(record(0, {"acc": 1}, doc="x"), record(1, {"acc": 0}, doc="y"), record(2, {"acc": 1}, doc="z"))
    b = samples(record(0, {"acc": 0}, doc="z"), record(5, {"acc": 1}, doc="x"))
    keys = common_keys([a, b], "none", "acc")
    assert [a.under("none")[key].doc_id for key in keys] == [0, 2]
    assert [b.under("none")[key].doc_id for key in keys] == [5, 0]


def test_equal_documents_are_paired_in_order_of_their_numbers():
    a = samples(record(7, {"acc": 0}, doc="x"), record(3, {"acc": 1}, doc="x"))
    b = samples(record(1, {"acc": 1}, doc="x"), record(2, {"acc": 0}, doc="x"), record(9, {"acc": 1}, doc="x"))
    keys = common_keys([a, b], "none", "acc")
    assert [key.occurrence for key in keys] == [0, 1]
    assert [a.under("none")[key].values["acc"] for key in keys] == [1, 0]
    assert [b.under("none")[key].values["acc"] for key in keys] == [1, 0]


def test_pairing_without_a_common_document_metric_or_filter_is_an_error():
    a, b = samples(record(0, {"acc": 1}, doc="x")), samples(record(0, {"acc": 1}, doc="y"))
    with pytest.raises(ResultError, match=r"no document in common \(by doc_hash\): file: 1; file: 1"):
        common_keys([a, b], "none", "acc")
    with pytest.raises(ResultError, match="metric 'ac' is in no sample .* there are: acc. Did you mean 'acc'"):
        common_keys([a, a], "none", "ac")
    bare = samples(record(0, {"bypass": 999}, doc="x"))
    with pytest.raises(ResultError, match="^file: metric 'acc' is not there, and another run has it.*--predict_only"):
        common_keys([a, bare], "none", "acc")
    with pytest.raises(ResultError, match="no sample of filter 'non'; there are: none. Did you mean 'none'"):
        common_keys([a, a], "non", "acc")


def test_documents_that_lack_a_metric_in_one_run_are_not_paired():
    a = samples(record(0, {"acc": 1}, doc="x"), record(1, {"acc": 1}, doc="y"))
    b = samples(record(0, {"acc": 0}, doc="x"), record(1, {}, doc="y"))
    assert len(common_keys([a, b], "none", "acc")) == 1


def test_other_prompts_targets_and_documents_are_counted():
    asked = {**record(1, {"acc": 1}, doc="y"), "prompt_hash": "other"}
    judged = {**record(2, {"acc": 1}, doc="z"), "target_hash": "other"}
    a = samples(*(record(i, {"acc": 1}, doc=doc) for i, doc in enumerate("xyzv")))
    found = mismatch(a, samples(record(0, {"acc": 1}, doc="x"), asked, judged, record(3, {"acc": 1}, doc="w")))
    assert (found.shared, found.only_first, found.only_second, found.prompts, found.targets) == (3, 1, 1, 1, 1)


def test_keys_are_what_documents_are_known_by():
    assert list(samples(record(0, {"acc": 1}, doc="x")).under("none")) == [Key(record(0, {}, doc="x")["doc_hash"], 0)]


# Scores ------------------------------------------------------------------------------------------------


def test_metrics_over_a_corpus_and_broken_values_are_errors(tmp_path):
    folder = synthesised(
        tmp_path, {"t": {"bleu": [[1, 2], [3, 4]], "acc": [float("nan"), 1.0], "words": [[-1.0, 2], [-3.0, 4]]}},
        aggregations={"bleu": "bleu", "words": "weighted_perplexity"},
    )  # fmt: skip
    task = find_runs(folder)[0].tasks["t"]
    keys = list(task.samples.under("none"))
    with pytest.raises(ResultError, match="bleu is aggregated by 'bleu', which is not a function of means"):
        task.scores("bleu", "none", keys)
    with pytest.raises(ResultError, match="acc of document 0 should be a finite number, got nan"):
        task.scores("acc", "none", keys)
    assert task.scores("words", "none", keys).score == pytest.approx(np.exp(4 / 6))
    assert task.scores("words", "none", keys).per_document == pytest.approx(np.exp([1 / 2, 3 / 4]))
    assert "words is" in str(task.contradiction("words", "none"))  # the synthesised file reports 0


def test_right_and_wrong_are_recognised():
    assert mean_scores([1, 0, True]).binary
    assert not mean_scores([1, 0.5]).binary
    assert not Scores(np.ones((3, 1)), averaged=False).binary


def test_nothing_here_needs_tensors_or_the_harness():
    import subprocess
    import sys

    code = (
        "import sys, lm_eval_deepen.results, lm_eval_deepen.results.regression, lm_eval_deepen.cli.gate, "
        "lm_eval_deepen.cli.compare, lm_eval_deepen.results.page; "
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'scipy') if m in sys.modules])"
    )
    env = {**os.environ, "LM_EVAL_DEEPEN_NO_HOOK": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
