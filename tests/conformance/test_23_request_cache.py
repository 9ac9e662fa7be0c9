"""Item 23, `--cache_requests`: rendered conversations survive the file, and belong to one way of rendering."""

from __future__ import annotations

import copy
import pickle
import shutil

import dill
import pytest
from harness import HARNESS_05, deepen, hf
from processes import compact, job_of, reports, run_worker

from lm_eval_deepen.member.chat import ChatPrompt

TASKS = ["conf_choice", "conf_answer"]
CHAT = {
    "apply_chat_template": True,
    "fewshot_as_multiturn": True,
    "system_instruction": None if HARNESS_05 else "Be brief.",  # 0.5.0.dev1 makes a file name of it that is too long
    "num_fewshot": 1,
    "cache_requests": True,
}
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}ANSWER "


def with_template(source, folder, template):
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def chatty(pico, tmp_path_factory):
    return with_template(pico["metaspace"], tmp_path_factory.mktemp("chatty") / "model", TEMPLATE)


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "requests"
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(folder))
    return folder


def forbid_rendering(model, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("rendered again")

    monkeypatch.setattr(type(model), "apply_chat_template", refuse)


def test_a_fresh_process_reads_the_conversations(pico, chatty, matrices, evaluate, task_folder, tmp_path, cache_folder):
    """It renders nothing for the main member, and the other member still gets its own rendering."""
    paths = [pico["bytelevel"], chatty]
    expected = compact(evaluate(deepen(*paths, matrix_dir=matrices, batch_size=2), *TASKS, **CHAT))
    assert len(list(cache_folder.iterdir())) == len(TASKS)
    steps = [["forbid", "no_template", {}], ["run", "evaluate", {"tasks": TASKS, **CHAT}]]
    job = job_of(tmp_path, paths, task_folder, steps, matrix_dir=matrices)
    [report] = reports(tmp_path, run_worker(job, LM_HARNESS_CACHE_PATH=str(cache_folder)))
    found = report["run"]["found"]
    assert (found["results"], found["samples"]) == (expected["results"], expected["samples"])


def test_the_other_members_rendering_counts(pico, chatty, matrices, evaluate, cache_folder):
    """What was read is not the main member's text: it gives other scores than that text would."""
    model = deepen(pico["bytelevel"], chatty, matrix_dir=matrices)
    evaluate(model, "conf_choice", **CHAT)
    kept = pickle.loads(next(cache_folder.iterdir()).read_bytes())
    prompt = next(instance.args[0] for group in kept for instance in group if instance.args[0])
    assert isinstance(prompt, ChatPrompt)
    first = {"role": "system", "content": "Be brief."} if CHAT["system_instruction"] else prompt.messages[0]
    assert prompt.messages[0] == first and prompt.messages[-1]["role"] == "user"
    seen = model.ensemble.members[1].lm.tok_decode(
        list(model.texts.prompter.prompts(prompt, 4)[1].ids), skip_special_tokens=True
    )
    assert (
        seen.startswith(f"{first['role']}: {first['content']}\n")
        and seen.endswith("ANSWER ")
        and str(prompt) not in seen
    )


def test_ensembles_that_render_differently_have_files_of_their_own(pico, chatty, matrices, evaluate, cache_folder):
    """Also where only the second member's template differs, or only its arguments."""
    plain = deepen(pico["bytelevel"], pico["metaspace"], matrix_dir=matrices, chat_fallback="plain")
    models = [
        deepen(pico["bytelevel"], chatty, matrix_dir=matrices),
        deepen(pico["bytelevel"], chatty, matrix_dir=matrices, chat_template_args={"tone": "dry"}),
        plain,
    ]
    assert len({model.tokenizer_name for model in models}) == 3
    assert all(len(model.tokenizer_name) < 60 for model in models)  # a file's name has 255 bytes
    again = deepen(pico["bytelevel"], chatty, matrix_dir=matrices, weights=[0.7, 0.3])
    assert again.tokenizer_name == models[0].tokenizer_name  # weights do not change a prompt
    (chatty / "chat_template.jinja").write_text(TEMPLATE.replace("ANSWER", "REPLY"))
    try:
        changed = deepen(pico["bytelevel"], chatty, matrix_dir=matrices)
    finally:
        (chatty / "chat_template.jinja").write_text(TEMPLATE)
    assert changed.tokenizer_name not in {model.tokenizer_name for model in models}
    for count, model in enumerate([*models, changed], start=1):
        evaluate(model, "conf_answer", **CHAT)
        assert len(list(cache_folder.iterdir())) == count
        evaluate(model, "conf_answer", **CHAT)
        assert len(list(cache_folder.iterdir())) == count


def test_one_member_shares_the_files_of_hf(pico, evaluate, cache_folder, monkeypatch):
    theirs = hf(pico["bytelevel"])
    expected = evaluate(theirs, "conf_answer", **CHAT)["results"]
    ours = deepen(pico["bytelevel"])
    forbid_rendering(ours, monkeypatch)
    assert ours.tokenizer_name == theirs.tokenizer_name
    assert evaluate(ours, "conf_answer", **CHAT)["results"] == expected
    assert len(list(cache_folder.iterdir())) == 1


def test_a_limit_takes_part_of_what_is_kept(pico, chatty, matrices, evaluate, cache_folder, monkeypatch):
    model = deepen(pico["bytelevel"], chatty, matrix_dir=matrices)
    short = evaluate(model, "conf_answer", limit=2, **CHAT)
    forbid_rendering(model, monkeypatch)
    assert len(evaluate(model, "conf_answer", **CHAT)["samples"]["conf_answer"]) > len(short["samples"]["conf_answer"])


@pytest.mark.parametrize("copied", [lambda p: pickle.loads(pickle.dumps(p)), lambda p: dill.loads(dill.dumps(p))])
def test_a_conversation_survives_pickling_and_copying(copied):
    prompt = ChatPrompt("[user] café 🙂 ", [{"role": "user", "content": "café 🙂"}], False) + "The answer is "
    for original in (prompt, prompt.split_spaces()[0]):
        for twin in (copied(original), copy.deepcopy(copied(original))):
            assert type(twin) is ChatPrompt and str(twin) == str(original)
            assert vars(twin) == vars(original)
