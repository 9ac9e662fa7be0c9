"""Items 13, 25 and 26 within one process: whole tasks of every kind, `hf` beside one member, and three members."""

from __future__ import annotations

import math

import pytest
from harness import HARNESS_05, deepen, hf

KINDS = ("conf_choice", "conf_blank", "conf_cloze", "conf_text", "conf_answer", "conf_prefixed")


def numbers(results):
    """Return every metric of a run, by task and name."""
    return {
        (task, name): value
        for task, metrics in results["results"].items()
        for name, value in metrics.items()
        if isinstance(value, (int, float))
    }


def answers(results):
    return {
        task: [(sample["doc_id"], sample["filter"], sample["filtered_resps"]) for sample in samples]
        for task, samples in results["samples"].items()
    }


def test_13_every_kind_of_task_gives_the_results_of_hf(pico, evaluate):
    theirs = evaluate(hf(pico["metaspace"]), *KINDS, num_fewshot=1)
    ours = evaluate(deepen(pico["metaspace"], batch_size=4), *KINDS, num_fewshot=1)
    assert set(ours["results"]) == set(KINDS)
    expected = numbers(theirs)
    mutual = set() if HARNESS_05 else {"acc_mutual_info,none"}
    assert {"acc,none", "acc_norm,none", *mutual} <= set(ours["results"]["conf_choice"])
    assert {"exact_match,first-word", "exact_match,whole"} <= set(ours["results"]["conf_answer"])
    for key, value in numbers(ours).items():
        assert value == pytest.approx(expected[key], rel=1e-4), key
    assert answers(ours)["conf_answer"] == answers(theirs)["conf_answer"]
    assert answers(ours)["conf_prefixed"] == answers(theirs)["conf_prefixed"]
    assert ours["n-samples"] == theirs["n-samples"] and ours["versions"] == theirs["versions"]


def test_13_every_kind_of_task_runs_with_three_members(pico, evaluate, tmp_path):
    trio = deepen(
        *(pico[name] for name in ("metaspace", "padded", "bytelevel")), batch_size=4, matrix_dir=str(tmp_path)
    )
    found = evaluate(trio, *KINDS)
    assert set(found["results"]) == set(KINDS)
    assert all(math.isfinite(value) for value in numbers(found).values())
    assert trio.ensemble.counters.rows["fused"] > 100


@pytest.mark.skipif(HARNESS_05, reason="the metric of 0.5.0.dev1 fails before it has a score, with any model")
@pytest.mark.parametrize("members", [["metaspace"], ["metaspace", "bytelevel"]], ids="+".join)
def test_13_mutual_information_is_the_conditional_less_the_unconditional_score(pico, evaluate, tmp_path, members):
    model = deepen(*(pico[name] for name in members), matrix_dir=str(tmp_path))
    for sample in evaluate(model, "conf_choice")["samples"]["conf_choice"]:
        scores = [response[0][0] for response in sample["resps"]]
        count = len(sample["doc"]["choices"])
        assert len(scores) == 2 * count
        gains = [scores[i] - scores[count + i] for i in range(count)]
        assert sample["acc_mutual_info"] == float(gains.index(max(gains)) == sample["doc"]["answer"])
