"""A request without an honest answer is set aside: all others are answered, then one error lists those that are not."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import yaml
from harness import deepen, requests
from lm_eval import simple_evaluate
from lm_eval.api.model import CacheHook, CachingLM, hash_args
from lm_eval.tasks import TaskManager

from lm_eval_deepen.engine.bits_per_byte import Document, Reading
from lm_eval_deepen.engine.calibration import load_documents
from lm_eval_deepen.errors import MemberError, RequestError, UnansweredError
from lm_eval_deepen.harness import requests as answering
from lm_eval_deepen.harness import unanswered
from lm_eval_deepen.harness.unanswered import SHOWN, Unanswered, error_of

HALF = "\ud83d"  # of a smile
GREEDY = {"until": ["e"], "max_gen_toks": 4}
GOOD = {
    "loglikelihood": [("The fox", " jumps"), ("null \x00 byte", " \x00\x01"), ("", "Sofia")],
    "loglikelihood_rolling": [("The quick brown fox",), ("\x00",), ("",)],
    "generate_until": [("The fox", GREEDY), ("null \x00 byte", GREEDY), ("a" * 3000, GREEDY)],
}
BAD = {
    "loglikelihood": [
        ((f"The {HALF} fox", " jumps"), "the context has the lone surrogate U+D83D at character 4, after 'The '"),
        (("The fox", f" ju{HALF}mps"), "the continuation has the lone surrogate U+D83D at character 3"),
        ((None, " jumps"), "the context is no text but None of type NoneType. Correct the task: doc_to_text"),
        (("The fox", b" jumps"), "the continuation is no text but b' jumps' of type bytes"),
        (("The fox", " jumps" * 600), "does not fit into the context of 512 tokens of member 'm0'"),
    ],
    "loglikelihood_rolling": [
        ((HALF,), "the text has the lone surrogate U+D83D at character 0, after ''"),
        ((7,), "the text is no text but 7 of type int"),
    ],
    "generate_until": [
        ((f"The fox{HALF}", GREEDY), "the prompt has the lone surrogate U+D83D at character 7"),
        ((b"The fox", GREEDY), "the prompt is no text but b'The fox' of type bytes"),
        (("The fox", {**GREEDY, "max_gen_toks": 512}), "max_gen_toks=512 leaves no room"),
        (("The fox", {**GREEDY, "num_beams": 2}), "num_beams=2"),
        (("The fox", {**GREEDY, "until": ["e", HALF]}), "until has '\\ud83d', with half of a UTF-16 pair"),
        (("The fox", {**GREEDY, 2: "num_beams"}), "generation argument 2='num_beams' has no name"),
        (("The fox", ["num_beams", 2]), "generation arguments must be a mapping; got list"),
    ],
}


@pytest.fixture(scope="module")
def paths(pico):
    return pico["bytelevel"], pico["metaspace"]


@pytest.fixture(scope="module", params=["one member", "two members", "pooled"])
def model(request, paths, tmp_path_factory):
    """What answers a type of requests."""
    options = {"matrix_dir": str(tmp_path_factory.mktemp("matrices")), "batch_size": 2}
    if request.param == "pooled":
        found = [deepen(*paths, pooling=pooling, **options) for pooling in ("mbr", "logp-mean")]
        return lambda kind: found[kind != "generate_until"]
    found = deepen(*paths[: 1 if request.param == "one member" else 2], **options)
    return lambda kind: found


@pytest.fixture
def kept(monkeypatch):
    """What goes into the response cache, by the request's arguments."""
    kept = {}
    monkeypatch.setattr(CacheHook, "add_partial", lambda hook, kind, args, answer: kept.update({repr(args): answer}))
    return kept


@pytest.mark.parametrize("kind", GOOD)
def test_all_others_are_answered_as_they_are_without_it(model, kept, kind):
    good, bad = GOOD[kind], BAD[kind]
    expected = dict(zip(map(repr, good), getattr(model(kind), kind)(requests(kind, *good)), strict=True))
    kept.clear()
    mixed = [bad[0][0], good[0], *(args for args, _ in bad[1:]), *good[1:]]
    with pytest.raises(UnansweredError) as caught:
        getattr(model(kind), kind)(requests(kind, *mixed))
    assert kept == {key: pytest.approx(value, abs=1e-4) if kind != "generate_until" else value
                    for key, value in expected.items()}  # fmt: skip
    found = {request.document: request for request in caught.value.requests}
    assert list(found) == [0, *range(2, len(bad) + 1)]
    for (_, reason), (document, request) in zip(bad, found.items(), strict=True):
        assert reason in request.reason and request.task == "task"
        assert f"task 'task', document {document}: {request.reason}" in str(caught.value)
    assert "use_cache" in str(caught.value)


def test_a_conversation_with_half_a_character_is_set_aside(paths, tmp_path):
    """The other member's rendering is its own: what the main member's leaves out may be in it."""
    pair = deepen(paths[1], paths[0], chat_fallback="plain", matrix_dir=str(tmp_path))
    chat = pair.apply_chat_template([{"role": "user", "content": f"The {HALF} fox"}])
    hidden = type(chat)("The fox", chat.messages, True)
    for context in (chat, hidden):
        with pytest.raises(UnansweredError, match="lone surrogate U.D83D"):
            pair.generate_until(requests("generate_until", (context, GREEDY)))


STRICT = (
    "{% for m in messages %}{% if 'forbidden' in m['content'] %}{{ raise_exception('not this') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.parametrize("pooling", [None, "mbr"])
def test_a_conversation_that_one_template_refuses_stops_no_other(paths, tmp_path, pooling):
    """The harness renders all of them before it asks for any; one template that refuses all is an error at once."""
    folder = tmp_path / "strict"
    shutil.copytree(paths[1], folder)
    (folder / "chat_template.jinja").write_text(STRICT)
    for order in ((paths[0], folder), (folder, paths[0])):
        model = deepen(*order, matrix_dir=str(tmp_path), pooling=pooling)
        talks = [[{"role": "user", "content": text}] for text in ("The fox", "the forbidden fox", "Sofia")]
        chats = [model.apply_chat_template(talk) + " Well," for talk in talks]
        batch = requests("generate_until", *((chat, GREEDY) for chat in pickle.loads(pickle.dumps(chats))))
        with pytest.raises(UnansweredError) as caught:
            model.generate_until(batch)
        (request,) = caught.value.requests
        name = f"m{order.index(folder)}"
        assert request.document == 1 and f"member '{name}': its chat template cannot render" in request.reason
        assert "not this" in request.reason
        assert model.generate_until(batch[::2])
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    with pytest.raises(MemberError, match="cannot render a conversation of user: TemplateError: never"):
        deepen(paths[0], folder, matrix_dir=str(tmp_path)).apply_chat_template(talks[0])


def test_faults_of_members_and_of_the_program_are_never_set_aside(paths, monkeypatch):
    one = deepen(paths[0])
    batch = requests("loglikelihood", ("The fox", " jumps"), (HALF, " jumps"))

    def broken(*_):
        raise TypeError("a fault of the program")

    with monkeypatch.context() as patch:
        patch.setattr(one.texts.prompter, "span", broken)
        with pytest.raises(TypeError, match="a fault of the program"):
            one.loglikelihood(batch)
    monkeypatch.setattr(one.ensemble.main.runner, "body", broken)
    with pytest.raises(TypeError, match="a fault of the program"):
        one.loglikelihood(batch)


def test_a_member_without_room_gives_no_text_to_choose_from(paths, tmp_path):
    """Of pooled texts only: a mean of scores without a member's would not compare with the others."""
    arguments = {"until": [], "max_gen_toks": 20}
    members = [{"name": "a", "pretrained": str(paths[0])}, {"name": "b", "pretrained": str(paths[1]), "max_length": 16}]
    batch = requests("generate_until", ("The fox", arguments), ("The fox", GREEDY))
    alone, pool = deepen(paths[0]), answering_model(members, pooling="vote")
    assert pool.generate_until(batch)[0] == alone.generate_until(batch)[0]
    assert pool.get_model_info()["deepen"]["pooled"]["without_answer_of"] == {"b": 1}
    mean = answering_model(members, pooling="logp-mean")
    with pytest.raises(UnansweredError, match="does not fit into the context of 16 tokens of member 'b'"):
        mean.loglikelihood(requests("loglikelihood", ("The fox", " jumps" * 16)))


def answering_model(members, **options):
    from lm_eval_deepen.harness.model import DeepenLM

    return DeepenLM(members[0]["pretrained"], members=members, device="cpu", self_check=False, **options)


# --- under the harness

LOADER = """
from datasets import Dataset

TEXTS = ["The fox", "Sofia is HERE", "1 2 3"]

def rows(**_):
    return {"test": Dataset.from_list([{"text": text} for text in TEXTS])}

def question(doc):
    return doc["text"].replace("HERE", "the \\ud83d city" if BROKEN else "the city")
"""
COMMON = {"custom_dataset": "!function loader.rows", "test_split": "test", "doc_to_text": "!function loader.question"}
TASKS = {
    "choice": {"output_type": "multiple_choice", "doc_to_choice": ["jumps", "sits"], "doc_to_target": 0},
    "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "!function loader.question"},
    "answer": {"output_type": "generate_until", "doc_to_target": "x", "generation_kwargs": {**GREEDY}},
    "sampled": {
        "output_type": "generate_until",
        "doc_to_target": "x",
        "generation_kwargs": {**GREEDY, "do_sample": True, "temperature": 1.0},
    },
}


def manager(folder: Path, broken: bool) -> TaskManager:
    """Write a task of every type, in each of which document 1 has half a character, or the whole."""
    folder.mkdir()
    (folder / "loader.py").write_text(f"BROKEN = {broken}\n{LOADER}".replace("\\\\", "\\"))
    for name, spec in TASKS.items():
        text = yaml.safe_dump({"task": name, **COMMON, **spec}).replace("'!function", "!function")
        (folder / f"{name}.yaml").write_text(text.replace("question'", "question").replace("rows'", "rows"))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(model, tasks: TaskManager, **kwargs):
    return simple_evaluate(model, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0, **kwargs)


@pytest.mark.parametrize("cached", [True, False])
def test_one_error_lists_the_documents_of_every_task(paths, tmp_path, cached):
    """The answers of the other types are kept as well; once the documents are mended, the rest alone is computed."""
    options = {"matrix_dir": str(tmp_path / "matrices"), "batch_size": 2}
    use = {"use_cache": str(tmp_path / "responses")} if cached else {}
    broken, mended = manager(tmp_path / "broken", True), manager(tmp_path / "mended", False)
    with pytest.raises(UnansweredError) as caught:
        evaluated(deepen(*paths, **options), broken, **use)
    assert {(request.task, request.document) for request in caught.value.requests} == {(task, 1) for task in TASKS}
    told = " ".join(str(caught.value).split())
    for task in TASKS:
        assert f"task {task!r}, document 1: the {'text' if task == 'text' else ''}" in told
    assert ("the same command goes on from there" in told) == cached and ("With --use_cache" in told) != cached
    if not cached:
        return
    asked, answer = [], answering.RequestHandler.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            answering.RequestHandler,
            "prepare",
            lambda self, kind, request, *rest: (asked.append(request), answer(self, kind, request, *rest))[1],
        )
        found = evaluated(deepen(*paths, **options), mended, **use)
    assert {(request.task_name, request.doc_id) for request in asked} == {
        ("choice", 1), ("text", 1), ("answer", 1), ("sampled", 0), ("sampled", 1), ("sampled", 2),
    }  # fmt: skip
    expected = evaluated(deepen(*paths, **options), mended)
    for task in TASKS:
        for key, value in expected["results"][task].items():
            assert found["results"][task][key] == (pytest.approx(value) if isinstance(value, float) else value)


def test_the_response_cache_holds_nothing_for_what_was_set_aside(paths, tmp_path):
    cached = CachingLM(deepen(paths[0]), str(tmp_path / "responses.db"))
    good, bad = ("The fox", " jumps"), (HALF, " jumps")
    with pytest.raises(UnansweredError):
        cached.loglikelihood(requests("loglikelihood", good, bad))
    assert hash_args("loglikelihood", good) in cached.dbdict and hash_args("loglikelihood", bad) not in cached.dbdict


def test_without_the_harness_no_other_requests_are_looked_for():
    assert unanswered.requests_to_come("loglikelihood") == {}


# --- what a person reads


def test_long_lists_are_cut_and_equal_reasons_are_told_once():
    many = [Unanswered("a", document, index, "it is bad.") for index, document in enumerate([*range(30), 3, 3])]
    told = str(error_of(many, cached=False))
    assert told.startswith("32 requests cannot be answered, so nothing was scored.")
    assert told.count("it is bad.") == 1 and "task 'a', document 0, 1, 2, " in told and "18, 19 and 10 more: it" in told
    each = [Unanswered(None, None, index, f"it is {index}.") for index in range(SHOWN + 7)]
    told = str(error_of(each, cached=True))
    assert "request 0: it is 0." in told and told.endswith("and 7 more reasons, of other requests")
    assert len(told.splitlines()) == SHOWN + 2


def test_documents_to_predict_are_refused_together_with_their_places(paths, tmp_path):
    ensemble = deepen(*paths, matrix_dir=str(tmp_path)).ensemble
    documents = [Document("fine"), Document(" "), Document("a" + HALF), Document("fine", HALF)]
    with pytest.raises(RequestError) as caught:
        Reading.of(ensemble, documents)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 of 4 documents cannot be read:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["document 1", "document 2", "document 3"]
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "fine"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(RequestError, match=r"texts.jsonl, line 2: the text has the lone surrogate U.D83D at charact"):
        load_documents([file])
