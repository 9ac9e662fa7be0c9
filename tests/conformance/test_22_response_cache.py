"""Item 22, `--use_cache`: nothing is computed twice, and no other ensemble's answers are used."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from harness import deepen, hf, requests
from lm_eval.api.model import CacheHook, CachingLM, hash_args
from processes import compact, job_of, log_of, run_worker

from lm_eval_deepen.engine import memory
from lm_eval_deepen.errors import CacheError
from lm_eval_deepen.harness.requests import share_passes
from lm_eval_deepen.harness.response_cache import FINGERPRINT_KEY

TASKS = ["conf_choice", "conf_text", "conf_answer"]
PAIRS = [
    ("The fox ", "jumps"),
    ("", "Sofia"),
    ("The fox", " jumps over"),
    ("café 中国", " 🙂"),
    ("walk\n", " on"),
]
GENERATION = {"until": ["\n"], "max_gen_toks": 4}


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
    for changed in ({"weights": [0.7, 0.3]}, {"inverse": "em", "steps": 7}, {"max_length": 64}):
        model = ensemble(**changed)
        with pytest.raises(CacheError, match=r"responses\.db.*fingerprint [0-9a-f]{64}.*Give --use_cache another path"):
            CachingLM(model, path)
    again = ensemble()
    calls = count_forwards(again)
    CachingLM(again, path).loglikelihood(batch)
    assert calls == []


def test_answers_of_other_weights_under_the_same_name_are_refused(pico, tmp_path):
    """Caches that older versions wrote do not say, and are taken."""
    path, folder = tmp_path / "responses.db", tmp_path / "model"
    shutil.copytree(pico["bytelevel"], folder)
    batch = requests("loglikelihood", *PAIRS)
    CachingLM(deepen(folder), str(path)).loglikelihood(batch)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(2048))
    model = deepen(folder)
    with pytest.raises(CacheError, match=r"responses\.db holds answers .* before the files in .*model changed"):
        CachingLM(model, str(path))
    with sqlite3.connect(path) as connection:
        old = pickle.dumps(model.ensemble_config.fingerprint())
        connection.execute("REPLACE INTO unnamed VALUES (?, ?)", (FINGERPRINT_KEY, old))
    calls = count_forwards(model)
    CachingLM(model, str(path)).loglikelihood(batch)
    assert calls == []


TALKS = [
    [{"role": role, "content": text}] for role, text in (("user", "a fox"), ("user", "a fox \n"), ("tool", "a fox"))
]


@pytest.fixture
def talkers(pico, matrices, tmp_path):
    """Members of which the main one renders all `TALKS` alike."""
    folders = []
    said = {"bytelevel": "{{ m['content'] | trim }} ", "metaspace": "{{ m['role'] + ': ' + m['content'] + ' ' }}"}
    for name, template in said.items():
        folders.append(shutil.copytree(pico[name], tmp_path / "talkers" / name))
        (folders[-1] / "chat_template.jinja").write_text("{% for m in messages %}" + template + "{% endfor %}")

    def load(count=2, **options):
        return deepen(*folders[:count], matrix_dir=matrices, **options)

    return load


@pytest.mark.parametrize("options", [{}, {"method": "mixture"}, {"pooling": "logp-mean"}], ids=str)
def test_conversations_that_the_main_member_renders_alike_have_answers_of_their_own(talkers, tmp_path, options):
    path, expected = str(tmp_path / "cache" / "responses.db"), []
    for talk in TALKS:
        model = talkers(**options)
        expected += model.loglikelihood(requests("loglikelihood", (model.apply_chat_template(talk) + "It", " walks")))
    assert len(set(expected)) == 3
    for talk, answer in [*zip(TALKS, expected, strict=True)] * 2:
        model = talkers(**options)
        cached = CachingLM(model, path)
        asked = requests("loglikelihood", (cached.apply_chat_template(talk) + "It", " walks"))
        assert cached.loglikelihood(asked) == [pytest.approx(answer)]
    assert len(stored_keys(path)) == 4


def test_answers_to_conversations_that_older_versions_left_are_not_read(talkers, tmp_path):
    """They may be another conversation's. Other answers are read, and those of one member, whose keys are `hf`'s."""
    plain, path = ("a fox", " walks"), str(tmp_path / "cache" / "responses.db")
    for count, read in ((2, 1), (1, 2)):
        model = talkers(count)
        cached = CachingLM(model, path)
        talk = model.apply_chat_template(TALKS[0]), " walks"
        keys = [hash_args("loglikelihood", tuple(map(str, own))) for own in (talk, plain)]
        cached.dbdict.update(dict.fromkeys(keys, (-1.0, False)))
        cached.dbdict.commit()
        answers = cached.loglikelihood(requests("loglikelihood", talk, plain))
        assert answers.count((-1.0, False)) == read and answers[1] == (-1.0, False)
        cached.dbdict.close()
        Path(path).unlink()


def test_models_that_share_passes_tell_conversations_apart(talkers):
    models = [talkers(), talkers(weights=[0.25, 0.75])]
    models[1] = type(models[0]).around(models[1].ensemble_config, models[0].ensemble.members)
    asked = [requests("loglikelihood", (models[0].apply_chat_template(talk) + "It", " walks"))[0] for talk in TALKS]
    expected = [models[1].loglikelihood([one])[0] for one in asked]
    share_passes(models)
    models[0].loglikelihood(asked)
    assert models[1].loglikelihood(asked) == [pytest.approx(answer) for answer in expected]


def test_a_sample_depends_on_no_other_conversation_that_the_main_member_renders_alike(talkers):
    model = talkers()
    sampled = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", *((model.apply_chat_template(talk), dict(sampled)) for talk in TALKS))
    expected = [model.generate_until([one])[0] for one in asked]
    assert model.generate_until(asked) == expected


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


# --- whose database it is, and how it ends


@pytest.fixture
def ours(pico, tmp_path):
    """A database with answers, in a folder of its own."""
    path = tmp_path / "cache" / "responses.db"
    CachingLM(deepen(pico["bytelevel"]), str(path)).loglikelihood(requests("loglikelihood", *PAIRS))
    return path


class Planted:
    """Creates a file when it is read by pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.skipif(os.name != "posix", reason="modes and owners are those of POSIX")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.chmod(0o666), "can be written by everybody.*`chmod go-w .*responses.db`"),
        (lambda file: file.parent.chmod(0o777), "can be written by everybody.*`chmod go-w .*cache`"),
        (lambda file: (os.chown(file, -1, 12345), file.chmod(0o664)), "can be written by its group .id 12345"),
        (lambda file: (os.chown(file.parent, -1, 12345), file.parent.chmod(0o775)), "can be written by its group"),
        (lambda file: os.chown(file, 12345, -1), "belongs to another user .id 12345.*Give --use_cache a path"),
        (lambda file: os.chown(file.parent, 12345, -1), "belongs to another user .id 12345"),
        (
            lambda file: (Path(f"{file}-journal").touch(0o600), os.chown(f"{file}-journal", 12345, -1)),
            "-journal belongs",
        ),
    ],
    ids=["file", "folder", "file group", "folder group", "file owner", "folder owner", "journal owner"],
)
def test_a_database_that_others_can_write_to_is_refused_before_it_is_read(pico, ours, tmp_path, change, message):
    with sqlite3.connect(ours) as connection:
        connection.execute("UPDATE unnamed SET value = ?", (pickle.dumps(Planted(tmp_path / "read")),))
    try:
        change(ours)
    except PermissionError:
        pytest.skip("only root gives files away")
    with pytest.raises(CacheError, match=f"is not yours alone: .*{message}"):
        CachingLM(deepen(pico["bytelevel"]), str(ours))
    assert not (tmp_path / "read").exists()


@pytest.mark.skipif(os.name != "posix", reason="modes and owners are those of POSIX")
def test_a_new_database_is_its_users_alone_whatever_the_umask(pico, tmp_path):
    """Also in a folder like /tmp, in which nobody can replace what another one has."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    before = os.umask(0)
    try:
        cached = CachingLM(deepen(pico["bytelevel"]), str(folder / "responses.db"))
    finally:
        os.umask(before)
    cached.loglikelihood(requests("loglikelihood", *PAIRS))
    assert (folder / "responses.db").stat().st_mode & 0o777 == 0o644
    CachingLM(deepen(pico["bytelevel"]), str(folder / "responses.db"))


def test_nothing_but_plain_answers_is_read(pico, ours, tmp_path):
    """Whoever planted them: an object that runs code, and bytes that are no pickle."""
    answer = hash_args("loglikelihood", PAIRS[1])
    planted = pickle.dumps(Planted(tmp_path / "read"))
    for key, data, reason in (
        (answer, b"\x80\x05\xff", "UnpicklingError"),
        (answer, planted, "an object of pathlib"),
        (FINGERPRINT_KEY, planted, "an object of pathlib"),
    ):
        with sqlite3.connect(ours) as connection:
            connection.execute("REPLACE INTO unnamed VALUES (?, ?)", (key, data))
        with pytest.raises(CacheError, match=rf"responses\.db holds something that is no answer \(.*{reason}.*Delete"):
            CachingLM(deepen(pico["bytelevel"]), str(ours)).loglikelihood(requests("loglikelihood", *PAIRS))
    assert not (tmp_path / "read").exists()


def test_a_full_disk_names_the_database_and_leaves_it_readable(pico, tmp_path):
    path = tmp_path / "responses.db"
    cached = CachingLM(deepen(pico["bytelevel"], batch_size=1), str(path))
    (pages,) = cached.dbdict.conn.select_one("PRAGMA page_count")
    cached.dbdict.conn.select_one(f"PRAGMA max_page_count = {pages}")
    batch = requests("generate_until", *((f"{n} foxes " * 60, {"until": [], "max_gen_toks": 8}) for n in range(40)))
    with pytest.raises(CacheError, match=r"responses\.db cannot be written .*full.*Free space"):
        cached.generate_until(batch)
    cached.dbdict.close()
    assert [file.name for file in tmp_path.iterdir()] == ["responses.db"]
    assert FINGERPRINT_KEY in stored_keys(path)


INTERRUPTED = """
import os, signal, sys
import lm_eval.__main__
from lm_eval.models.huggingface import HFLM

from lm_eval.tasks import TaskManager

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without
load, index, forwards = HFLM._create_model, TaskManager.__init__, []

def count(*_):
    forwards.append(1)
    if len(forwards) == 40:
        os.kill(os.getpid(), signal.SIGINT)

def loaded(self, *args, **kwargs):
    load(self, *args, **kwargs)
    self._model.register_forward_pre_hook(count)

HFLM._create_model = loaded
TaskManager.__init__ = lambda self, *args, **kwargs: index(self, *args, **{**kwargs, "include_defaults": False})
lm_eval.__main__.cli_evaluate()
"""


def test_an_interrupt_is_told_in_one_line_and_leaves_no_files(pico, matrices, task_folder, tmp_path):
    """Status 130, under the harness's own command; what was answered is kept."""
    command = ["lm_eval", "run", "--model", "deepen", "--tasks", "conf_choice", "conf_answer", "--device", "cpu"]
    command += ["--model_args", f"pretrained={pico['bytelevel']},batch_size=1,self_check=false"]
    command += ["--include_path", str(task_folder), "--use_cache", str(tmp_path / "responses")]
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = {command!r}\n{INTERRUPTED}"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 130, ended.stderr[-4000:]
    assert "Traceback" not in ended.stderr
    told = ended.stderr.splitlines()[-1]
    assert told == "interrupted; a response cache (--use_cache) has what was answered"
    assert [file.name for file in tmp_path.iterdir()] == ["responses_rank0.db"]
    assert len(stored_keys(tmp_path / "responses_rank0.db")) > 1


def test_an_interrupt_stays_an_exception_to_a_program(ensemble, monkeypatch, tmp_path):
    model = ensemble()
    before = sys.excepthook

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.ensemble.main.runner, "body", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CachingLM(model, str(tmp_path / "responses.db")).loglikelihood(requests("loglikelihood", *PAIRS))
    assert sys.excepthook is before
