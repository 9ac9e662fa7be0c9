"""Item 24: the trace of a killed run, and of two processes that go on from its response cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from harness import deepen
from processes import compact, job_of, log_of, reports, run_worker

from lm_eval_deepen.results.traces import documents_of, find_traces

TASKS = ["conf_choice", "conf_text", "conf_answer"]


def told(folder: Path) -> dict[tuple, Mapping[str, Any]]:
    """Return the records of a trace by what they are of, however many files they lie in."""
    names = ("doc_id", "doc_hash", "request", "repeat", "type")
    found = find_traces(folder)
    return {(task, *(one[name] for name in names)): one for task in found for one in documents_of(found[task])}


def test_two_processes_that_go_on_from_a_killed_one_leave_the_trace_of_one(pico, task_folder, tmp_path, evaluate):
    members = [pico["bytelevel"], pico["metaspace"]]
    traced = {"trace": True, "trace_dir": str(tmp_path / "traces")}
    steps = [["run", "evaluate", {"tasks": TASKS, "use_cache": str(tmp_path / "responses")}]]
    job = job_of(tmp_path, members, task_folder, steps, **traced)
    (ended,) = run_worker({**job, "die_at_forward": {"0": 14}})
    assert ended.returncode < 0
    answered = len(set(log_of(job, "run")))
    killed = told(tmp_path / "traces")
    assert 0 < answered <= len(killed)  # nothing is in the cache whose steps are lost
    first, _ = reports(tmp_path, run_worker(job, ranks=2))
    assert list((tmp_path / "traces").glob("*_rank0.jsonl.gz")) and list((tmp_path / "traces").glob("*_rank1.jsonl.gz"))

    alone = deepen(*members, batch_size=2, trace=True, trace_dir=str(tmp_path / "alone"))
    expected = compact(evaluate(alone, *TASKS))
    plain = compact(evaluate(deepen(*members, batch_size=2), *TASKS))
    assert (plain["results"], plain["samples"]) == (expected["results"], expected["samples"])
    for task, scores in first["run"]["found"]["results"].items():
        numbers = {key: value for key, value in scores.items() if isinstance(value, float)}
        assert numbers == pytest.approx({key: plain["results"][task][key] for key in numbers}, rel=1e-4)
    whole, here = told(tmp_path / "alone"), told(tmp_path / "traces")
    assert here.keys() == whole.keys() and len(killed) < len(whole)
    for key, one in whole.items():
        assert [step["piece"] for step in here[key]["steps"]] == [step["piece"] for step in one["steps"]]
        got, wanted = ([step["logp"] for step in record["steps"]] for record in (here[key], one))
        assert got == pytest.approx(wanted, abs=1e-3)


def test_the_first_documents_are_the_task_s_not_the_first_that_are_left(pico, tmp_path, evaluate):
    """Of a run that goes on from a response cache, documents whose answers are there count as well."""
    members, cache = [pico["bytelevel"], pico["metaspace"]], str(tmp_path / "responses")
    for limit, trace, expected in ((1, None, set()), (3, 2, {1}), (4, 2, {1})):
        keys = {} if trace is None else {"trace": trace, "trace_dir": str(tmp_path / "traces")}
        evaluate(deepen(*members, **keys), *TASKS, limit=limit, use_cache=cache)
        for task in TASKS if trace else ():
            assert {key[1] for key in told(tmp_path / "traces") if key[0] == task} == expected
