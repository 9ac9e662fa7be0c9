"""Item 22, `--use_cache`: nothing is computed twice, and no other ensemble's answers are used."""

from __future__ import annotations

import random
import signal
import sqlite3
from collections import Counter

import pytest
from harness import deepen, hf, requests
from lm_eval.api.model import CacheHook, CachingLM, hash_args
from processes import compact, job_of, log_of, run_worker

from lm_eval_deepen.caches import FINGERPRINT_KEY
from lm_eval_deepen.engine import memory
from lm_eval_deepen.errors import CacheError

TASKS = ["conf_choice", "conf_text", "conf_answer"]
PAIRS = [
    ("The fox ", "jumps"),
    ("", "Sofia"),
    ("The fox", " jumps over"),
    ("café 中国", " 🙂"),
    ("walk\n", " on"),
]
GENERATION = {"until": ["\n"], "max_gen_toks": 4}


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    return str(tmp_path_factory.mktemp("matrices"))


@pytest.fixture
def ensemble(pico, matrices):
    def load(**kwargs):
        options = {"matrix_dir": matrices, "batch_size": 2, **kwargs}
        return deepen(pico["bytelevel"], pico["metaspace"], **options)

    return load


@pytest.fixture
def short_rounds(monkeypatch):
    """Forward 8 tokens at once, so that a few short texts take several rounds."""
    monkeypatch.setattr(memory, "NODES_PER_FORWARD", 8)


@pytest.fixture
def hook_calls(monkeypatch):
    """What the cache hook is called with, once each call has returned."""
    calls, original = [], CacheHook.add_partial

    def add_partial(hook, attr, req, res):
        original(hook, attr, req, res)
        calls.append((attr, req, res))

    monkeypatch.setattr(CacheHook, "add_partial", add_partial)
    return calls


def count_forwards(model):
    calls = []
    for member in model.ensemble.members:
        member.lm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def stored_keys(path):
    with sqlite3.connect(path) as connection:
        return {key for (key,) in connection.execute("SELECT key FROM unnamed")}


def batches():
    texts = ["The quick fox " * 30, "", "café", "a b"]
    return {
        "loglikelihood": requests("loglikelihood", *PAIRS, *PAIRS[:2]),
        "loglikelihood_rolling": requests("loglikelihood_rolling", *((text,) for text in texts)),
        "generate_until": requests("generate_until", *((context, dict(GENERATION)) for context, _ in PAIRS)),
    }


def test_a_second_run_forwards_nothing(ensemble, evaluate, tmp_path):
    path = str(tmp_path / "folder" / "responses")
    model = ensemble()
    calls = count_forwards(model)
    first = compact(evaluate(model, *TASKS, use_cache=path))
    assert calls
    model = ensemble(batch_size=5)  # changes no result, and so no fingerprint
    calls = count_forwards(model)
    second = compact(evaluate(model, *TASKS, use_cache=path))
    assert calls == []
    assert (second["results"], second["samples"]) == (first["results"], first["samples"])
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["responses_rank0.db"]


def test_the_hook_gets_the_original_strings(ensemble, hook_calls):
    model = ensemble()
    for kind, batch in batches().items():
        answers = getattr(model, kind)(batch)
        assert Counter(hash_args(attr, req) for attr, req, _ in hook_calls) == Counter(
            hash_args(kind, request.args) for request in batch
        )
        by_key = {hash_args(attr, req): res for attr, req, res in hook_calls}
        for request, answer in zip(batch, answers, strict=True):
            assert by_key[hash_args(kind, request.args)] == pytest.approx(answer) or kind == "generate_until"
        hook_calls.clear()


def test_answers_are_on_disk_as_soon_as_their_round_is_done(ensemble, tmp_path, monkeypatch, short_rounds):
    """Another process sees every answer when the hook returns; a failure later on loses none of them."""
    original, seen = CacheHook.add_partial, []
    path = str(tmp_path / "responses.db")

    def add_partial(hook, attr, req, res):
        original(hook, attr, req, res)
        assert hash_args(attr, req) in stored_keys(path)
        seen.append(hash_args(attr, req))

    monkeypatch.setattr(CacheHook, "add_partial", add_partial)
    pairs = [(f"{count} foxes walked", f" over {other}") for count in range(6) for other in ("it", "the dog", "10")]
    for kind, batch in (batches() | {"loglikelihood": requests("loglikelihood", *pairs)}).items():
        model = ensemble()
        cached = CachingLM(model, path)
        seen.clear()
        fuse, calls = model.ensemble.fuse, []

        def failing(*args, fuse=fuse, calls=calls):
            calls.append(1)
            if seen:  # the first round was delivered before the second one is computed
                raise RuntimeError("power cut")
            return fuse(*args)

        monkeypatch.setattr(model.ensemble, "fuse", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            getattr(cached, kind)(batch)
        assert 0 < len(seen) < len(batch) and calls
        cached.dbdict.close()


def test_texts_of_many_windows_are_finished_one_after_the_other(ensemble, monkeypatch, hook_calls, short_rounds):
    """Windows are scored in the order of their prompts; without rounds, every text would end with the last of them."""
    model = ensemble(max_length=24, batch_size=1)
    before, fuse = [], model.ensemble.fuse
    monkeypatch.setattr(model.ensemble, "fuse", lambda *args: (before.append(len(hook_calls)), fuse(*args))[1])
    texts = [("The quick brown fox " * count,) for count in (9, 12, 8, 10, 11, 7)]
    model.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    assert len(before) >= 6, before
    assert before[len(before) // 2] >= 2


def test_a_killed_run_resumes_from_what_it_had(pico, matrices, ensemble, evaluate, task_folder, tmp_path):
    """kill -9 in the middle of a batch; nothing that was answered before is answered again."""
    expected = ensemble()
    calls = count_forwards(expected)
    expected = compact(evaluate(expected, *TASKS))
    path = str(tmp_path / "responses")
    steps = [["run", "evaluate", {"tasks": TASKS, "use_cache": path}]]
    job = job_of(tmp_path, [pico["bytelevel"], pico["metaspace"]], task_folder, steps, matrix_dir=matrices)
    job["die_at_forward"] = {"0": random.Random(1).randrange(8, len(calls))}
    [killed] = run_worker(job)
    assert killed.returncode == -signal.SIGKILL
    finished = [key for _, key in log_of(job, "run")]
    assert finished and set(finished) <= stored_keys(path + "_rank0.db")

    answered, original = [], CacheHook.add_partial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CacheHook,
            "add_partial",
            lambda hook, attr, req, res: (
                answered.append(hash_args(attr, req)),
                original(hook, attr, req, res),
            ),
        )
        found = compact(evaluate(ensemble(), *TASKS, use_cache=path))
    assert answered and not set(answered) & set(finished)
    assert set(answered) | set(finished) | {FINGERPRINT_KEY} == stored_keys(path + "_rank0.db")
    assert found["results"]["conf_answer"] == expected["results"]["conf_answer"]
    assert found["results"]["conf_text"]["bits_per_byte,none"] == pytest.approx(
        expected["results"]["conf_text"]["bits_per_byte,none"], abs=1e-5
    )
    assert found["results"]["conf_choice"] == expected["results"]["conf_choice"]


def test_another_ensembles_answers_are_refused(ensemble, tmp_path):
    path = str(tmp_path / "responses.db")
    batch = requests("loglikelihood", *PAIRS)
    CachingLM(ensemble(), path).loglikelihood(batch)
    assert FINGERPRINT_KEY in stored_keys(path)
    for changed in ({"weights": [0.7, 0.3]}, {"steps": 7}, {"max_length": 64}):
        model = ensemble(**changed)
        with pytest.raises(CacheError, match=r"responses\.db.*fingerprint [0-9a-f]{64}.*Give --use_cache another path"):
            CachingLM(model, path)
    again = ensemble()
    calls = count_forwards(again)
    CachingLM(again, path).loglikelihood(batch)
    assert calls == []


def test_answers_that_hf_left_are_refused(pico, tmp_path):
    path = str(tmp_path / "responses.db")
    CachingLM(hf(pico["bytelevel"]), path).loglikelihood(requests("loglikelihood", *PAIRS))
    with pytest.raises(CacheError, match="a model that left no fingerprint"):
        CachingLM(deepen(pico["bytelevel"]), path)


def test_an_empty_database_is_taken(pico, tmp_path):
    path = str(tmp_path / "responses.db")
    CachingLM(hf(pico["bytelevel"]), path).dbdict.close()
    CachingLM(deepen(pico["bytelevel"]), path).dbdict.close()
    assert stored_keys(path) == {FINGERPRINT_KEY}


def test_sampled_texts_are_drawn_again_and_alike(ensemble, tmp_path):
    """The harness does not look sampled texts up; our rows have seeds of their own, so they repeat anyway."""
    sampled = {**GENERATION, "do_sample": True, "temperature": 1.0}
    batch = requests("generate_until", *((context, dict(sampled)) for context, _ in PAIRS))
    first = CachingLM(ensemble(), str(tmp_path / "responses.db")).generate_until(batch)
    model = ensemble()
    calls = count_forwards(model)
    assert CachingLM(model, str(tmp_path / "responses.db")).generate_until(batch) == first
    assert calls
