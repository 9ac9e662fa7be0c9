"""What makes two runs incomparable, and what is only worth a note."""

from __future__ import annotations

import json
import shutil

import pytest
from run_files import DATE, edited, synthesised

from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.results.comparable import objections
from lm_eval_deepen.results.files import find_runs


def set_in(*keys_and_value):
    *keys, last, value = keys_and_value

    def edit(results):
        here = results
        for key in keys:
            here = here[key]
        here[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (set_in("versions", "t", 2.0), "t: task version: 1.0 -> 2.0"),
        (set_in("n-shot", "t", 5), "t: number of few-shots: 0 -> 5"),
        (set_in("chat_template_sha", "abc"), 't: chat template: null -> "abc"'),
        (set_in("system_instruction", "Be brief."), 't: system instruction: null -> "Be brief."'),
        (set_in("fewshot_as_multiturn", True), "t: few-shots as turns of a conversation: false -> true"),
        (set_in("configs", "t", "generation_kwargs", {"temperature": 1}), "t: generation_kwargs: null -> "),
        (set_in("configs", "t", "doc_to_text", "{{q}}"), 't: doc_to_text: null -> "{{q}}"'),
        (set_in("n-samples", "t", "effective", 2), "t: number of documents: 3 -> 2"),
        (
            lambda r: (set_in("n-samples", "t", "effective", 2)(r), set_in("config", "limit", 2)(r)),
            "t: limit: null -> 2",
        ),
        (set_in("config", "deepen", {"fingerprint": "0123456789abcdef"}), "t: ensemble fingerprint: none"),
    ],
)
def test_every_difference_of_the_task_is_a_reason(tmp_path, edit, reason):
    folder = synthesised(tmp_path / "a", {"t": {"acc": [1.0, 0.0, 1.0]}})
    [a], [b] = find_runs(folder), find_runs(edited(folder, tmp_path / "b", edit))
    found = objections(a, b, ["t"])
    assert [r for r in found.reasons if r.startswith(reason)] and len(found.reasons) == 1
    assert objections(a, a, ["t"]).reasons == ()


def test_other_weights_under_the_same_names_are_a_note(tmp_path):
    """They are what a check is about; older results do not tell."""
    plain = synthesised(tmp_path / "a", {"t": {"acc": [1.0, 0.0]}})
    runs = []
    for at, files in enumerate(({"m": "1", "n": "1"}, {"m": "2", "n": "1"}, None)):
        deepen = {"fingerprint": "f", "members": [{"name": "x", "files": files}]}
        runs += find_runs(edited(plain, tmp_path / f"run{at}", set_in("config", "deepen", deepen)))
    found = objections(runs[0], runs[1], ["t"])
    assert found.reasons == () and found.notes == ("t: other files, so other weights, under the same name: m",)
    assert objections(runs[0], runs[2], ["t"]).notes == objections(runs[2], runs[0], ["t"]).notes == ()


def test_the_few_shot_seed_counts_only_with_few_shots(tmp_path):
    a = synthesised(tmp_path / "a", {"t": {"acc": [1.0]}})
    seed = set_in("config", "fewshot_seed", 2)
    assert objections(*find_runs(a), *find_runs(edited(a, tmp_path / "b", seed)), ["t"]).reasons == ()
    shots = edited(a, tmp_path / "c", set_in("n-shot", "t", 1))
    other = edited(shots, tmp_path / "d", seed)
    assert objections(*find_runs(shots), *find_runs(other), ["t"]).reasons == ("t: few-shot seed: 1 -> 2",)


def test_documents_prompts_and_targets_are_compared_by_their_hashes(tmp_path):
    a = synthesised(tmp_path / "a", {"t": {"acc": [1.0, 0.0, 1.0]}})

    def change(name, edit):
        b = tmp_path / name
        shutil.copytree(a, b)
        path = b / f"samples_t_{DATE}.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        edit(records)
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return objections(*find_runs(a), *find_runs(b), ["t"]).reasons

    assert change("docs", lambda rs: rs[0].update(doc_hash="other")) == (
        "t: other documents: 2 in common, 1 of the baseline alone, 1 of the candidate alone",
    )
    assert change("prompts", lambda rs: rs[1].update(prompt_hash="other")) == (
        "t: other prompts for 1 of 3 documents (few-shots, template, description)",
    )
    assert change("targets", lambda rs: rs[1].update(target_hash="other")) == (
        "t: other expected answers for 1 of 3 documents",
    )
    assert change("none", lambda rs: [r.update(doc_hash=f"other {i}") for i, r in enumerate(rs)]) == (
        "t: no document in common (by doc_hash): other split, data or processing of documents",
    )


def test_addresses_of_functions_and_places_of_files_are_no_difference(tmp_path):
    a = synthesised(tmp_path / "a", {"t": {"acc": [1.0]}})
    one = edited(a, tmp_path / "one", set_in("configs", "t", "process_results", "<function f at 0x7f00>"))
    two = edited(a, tmp_path / "two", set_in("configs", "t", "process_results", "<function f at 0x8f00>"))
    moved = edited(two, tmp_path / "moved", set_in("configs", "t", "metadata", {"config_source": "elsewhere"}))
    assert objections(*find_runs(one), *find_runs(moved), ["t"]).reasons == ()


def test_an_ensembles_change_is_named_and_can_be_declared(tmp_path):
    def ensemble(name, fingerprint, **changes):
        told = {"fingerprint": fingerprint, "method": "deepen", "options": {"steps": 5}, "members": [], **changes}
        config = {"model": "deepen", "deepen": told}
        return find_runs(synthesised(tmp_path / name, {"t": {"acc": [1.0]}}, config=config))[0]

    a = ensemble("a", "aaaaaaaaaaaaaaaa")
    b = ensemble("b", "bbbbbbbbbbbbbbbb", options={"steps": 9}, members=[{"pretrained": "m", "weight": 0.4}])
    told = 't: ensemble fingerprint: aaaaaaaaaaaa -> bbbbbbbbbbbb (steps: 5 -> 9; members: [] -> ["m x 0.4"])'
    assert objections(a, b, ["t"]).reasons == (f"{told}; where this is meant, give --allow-config-change",)
    allowed = objections(a, b, ["t"], allow_config_change=True)
    assert allowed.reasons == () and told in allowed.notes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"covers": "off"}, 'covers: "on" -> null'),
        ({"chat_fallback": "plain"}, 'chat_fallback: "error" -> "plain"'),
        ({"seed": 3}, "seed: 0 -> 3"),
        ({"skip_when": "agree"}, 'skip: null -> ["agree", null]'),
        ({"prior_share": 0.5, "learn_from": "prompt"}, "weighting.prior_share: 0.25 -> 0.5"),
        ({"members": ["org/a", {"pretrained": "org/b", "temperature": 0.5}]}, "members[1].temperature: 1.0 -> 0.5"),
        ({"dtype": "bfloat16"}, 'members[0].dtype: null -> "bfloat16"; members[1].dtype: null -> "bfloat16"'),
        ({"pooling": "vote"}, 'pooling: null -> "vote"'),
    ],
    ids=str,
)
def test_whatever_changes_the_fingerprint_is_named(tmp_path, changes, told):
    def ensemble(name, **keys):
        config = configure({"pretrained": "org/a", "members": "org/a+org/b", **keys})
        described = {"fingerprint": config.fingerprint(), "configuration": config.identity()}
        run = synthesised(tmp_path / name, {"t": {"acc": [1.0]}}, config={"model": "deepen", "deepen": described})
        return find_runs(run)[0]

    before = {"learn_from": "prompt"} if "learn_from" in changes else {}
    [reason] = objections(ensemble("a", **before), ensemble("b", **changes), ["t"]).reasons
    assert told in reason


def test_other_model_arguments_and_versions_are_notes(tmp_path):
    a = synthesised(tmp_path / "a", {"t": {"acc": [1.0]}})
    b = edited(a, tmp_path / "b", lambda r: (set_in("config", "model_args", "x")(r), set_in("lm_eval_version", "9")(r)))
    found = objections(*find_runs(a), *find_runs(b), ["t"])
    assert found.reasons == ()
    assert found.notes == ('t: lm_eval: "0.4.13" -> "9"', 't: model arguments: {"pretrained": "m"} -> "x"')


def test_a_task_that_the_candidate_lacks_is_a_reason_and_one_more_a_note(tmp_path):
    [a] = find_runs(synthesised(tmp_path / "a", {"t": {"acc": [1.0]}, "u": {"acc": [1.0]}}))
    [b] = find_runs(synthesised(tmp_path / "b", {"t": {"acc": [1.0]}, "v": {"acc": [1.0]}}))
    found = objections(a, b, ["t", "u"])
    assert found.reasons == (f"u: b has no samples of it ({b.folder})",)
    assert found.notes == ("b has tasks that a does not have: v",)
