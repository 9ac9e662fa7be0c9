"""Items 20 and 21: chat templates, as `hf` for one member, and each member's own for several."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import shutil

import naive
import pytest
from harness import deepen, hf, requests

from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.errors import ConfigError, MemberError, RequestError
from lm_eval_deepen.harness.model import DeepenLM
from lm_eval_deepen.member.chat import ChatPrompt, plain_rendering

TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' + (m['content'] | trim) + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[model] ' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the fox?"},
    {"role": "assistant", "content": "There."},
    {"role": "user", "content": "Where is the dog?"},
]
PREFIXED = [*TALK, {"role": "assistant", "content": "The answer is "}]


@pytest.fixture(scope="module")
def chatty(pico, tmp_path_factory):
    """A BOS-adding member with a template that writes the BOS itself, and one that refuses system messages."""
    folders = {}
    for name, template in {"turns": TURNS, "no_system": NO_SYSTEM}.items():
        folders[name] = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(pico["metaspace"], folders[name])
        (folders[name] / "chat_template.jinja").write_text(template)
    named = folders["named"] = tmp_path_factory.mktemp("named") / "model"
    shutil.copytree(pico["metaspace"], named)
    settings = json.loads((named / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": TURNS}, {"name": "other", "template": NO_SYSTEM}]
    (named / "tokenizer_config.json").write_text(json.dumps(settings))
    return folders


@pytest.fixture(scope="module")
def pair(pico, chatty, tmp_path_factory):
    return deepen(pico["bytelevel"], chatty["turns"], matrix_dir=str(tmp_path_factory.mktemp("matrices")))


def seen(member, prompt):
    """Return a prompt's text as the member sees it, control tokens spelled out."""
    return member.lm.tok_decode(list(prompt.ids), skip_special_tokens=False)


@pytest.mark.parametrize(("multiturn", "shots"), [(False, 0), (False, 2), (True, 2)])
@pytest.mark.parametrize("name", ["bytelevel", "turns", "no_system"])
def test_20_the_rendered_prompt_and_the_results_are_those_of_hf(pico, chatty, evaluate, name, multiturn, shots):
    path = chatty.get(name) or pico[name]
    arguments = {
        "apply_chat_template": True,
        "fewshot_as_multiturn": multiturn,
        "system_instruction": "Be brief.",
        "num_fewshot": shots,
    }
    tasks = ("conf_answer", "conf_prefixed", "conf_choice")
    theirs, ours = (evaluate(model, *tasks, **arguments) for model in (hf(path), deepen(path)))
    for task in tasks:
        for got, expected in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            assert got["arguments"] == expected["arguments"]
            if task != "conf_choice":
                assert got["resps"] == expected["resps"]
                continue
            for [mine], [other] in zip(got["resps"], expected["resps"], strict=True):
                assert mine[0] == pytest.approx(other[0], abs=1e-3) and mine[1] == other[1]
    assert ours["config"].get("chat_template") == theirs["config"].get("chat_template")


def test_20_no_second_bos(chatty, pico, tmp_path):
    """Neither for one member, as `hf`, nor for a member of several, whatever its prefix token is."""
    single = deepen(chatty["turns"])
    text = single.apply_chat_template(TALK)
    assert text.startswith("<bos>[system]")
    assert Prompter(single.ensemble).prompts(text)[0].ids[:3].count(2) == 1
    member = {"name": "other", "pretrained": str(chatty["turns"]), "prefix_token_id": 1, "add_bos_token": True}
    members = [str(pico["bytelevel"]), member]
    both = DeepenLM(members[0], members=members, device="cpu", matrix_dir=str(tmp_path))
    prompt = Prompter(both.ensemble).prompts(both.apply_chat_template(TALK))[1]
    assert prompt.ids[:3].count(2) == 1


def test_20_template_and_tokenizer_name_are_those_of_hf(chatty, pico):
    for path in (chatty["named"], chatty["turns"], pico["bytelevel"], pico["metaspace"]):
        ours, theirs = deepen(path), hf(path)
        assert ours.tokenizer_name == theirs.tokenizer_name
        assert ours.chat_template(True) == theirs.chat_template(True)
        assert ours.chat_template(False) is theirs.chat_template(False) is None
    ours, theirs = deepen(chatty["named"]), hf(chatty["named"])
    assert ours.chat_template("other") == theirs.chat_template("other") == NO_SYSTEM
    assert ours.apply_chat_template(TALK) == theirs.apply_chat_template(TALK)
    for model in (ours, theirs):
        with pytest.raises(ValueError, match="'absent' is not available"):
            model.chat_template("absent")


def test_20_a_member_without_a_template_is_an_error_before_anything_is_computed(pico, chatty, tmp_path):
    with pytest.raises(ValueError, match="chat_template is not set"):
        hf(pico["metaspace"]).apply_chat_template(TALK)
    for paths in ([pico["metaspace"]], [pico["bytelevel"], pico["metaspace"]]):
        model = deepen(*paths, matrix_dir=str(tmp_path))
        with pytest.raises(MemberError, match=r"member 'm\d' has no chat template.*chat_fallback=plain"):
            model.apply_chat_template(TALK)


IGNORES = TURNS.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
DEFAULTS = "{% if messages[0]['role'] != 'system' %}[system] Be brief.\n{% endif %}" + TURNS


@pytest.fixture(scope="module")
def templated(pico, tmp_path_factory):
    def make(template):
        folder = tmp_path_factory.mktemp("templated") / "model"
        shutil.copytree(pico["metaspace"], folder)
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return functools.cache(make)


@pytest.mark.parametrize("template", [NO_SYSTEM, IGNORES], ids=["refused", "ignored"])
@pytest.mark.parametrize("pooling", [None, "vote"])
def test_21_a_system_message_is_dropped_for_all_members_or_none(pico, templated, tmp_path, template, pooling):
    """`hf` drops it for the one model that it has; beside others that model would be told something else."""
    keys = {"matrix_dir": str(tmp_path), "pooling": pooling}
    quiet = templated(template)
    assert deepen(quiet).apply_chat_template(TALK) == hf(quiet).apply_chat_template(TALK)
    for paths, name in (([pico["bytelevel"], quiet], "m1"), ([quiet, templated(TURNS)], "m0")):
        model = deepen(*paths, **keys)
        with pytest.raises(MemberError, match=f"member '{name}' leaves out the system message.*tokenizer="):
            model.apply_chat_template(TALK)
        assert "Where is the fox?" in model.apply_chat_template(TALK[1:])
    both = deepen(quiet, templated(IGNORES), **keys)
    prompt = both.apply_chat_template(TALK)
    assert prompt == hf(quiet).apply_chat_template(TALK) and prompt.messages == TALK[1:]


def test_21_a_template_that_says_the_system_message_anyway_drops_nothing(pico, templated, tmp_path):
    model = deepen(pico["bytelevel"], templated(DEFAULTS), matrix_dir=str(tmp_path))
    assert model.apply_chat_template(TALK).messages == TALK


@pytest.mark.parametrize(
    "failing", ["{{ raise_exception('roles must alternate') }}", "{{ messages[9].content }}", "{% if %}"]
)
def test_21_a_template_that_fails_is_named_with_its_member(pico, templated, tmp_path, failing):
    for paths, name in (([templated(failing)], "m0"), ([pico["bytelevel"], templated(failing)], "m1")):
        model = deepen(*paths, matrix_dir=str(tmp_path))
        with pytest.raises(
            MemberError, match=f"member '{name}': its chat template cannot render.*tokenizer="
        ) as caught:
            model.apply_chat_template(TALK)
        assert "\n" not in str(caught.value)


def test_21_every_member_gets_the_conversation_in_its_own_template(pair):
    prompt = pair.apply_chat_template(TALK)
    main, other = Prompter(pair.ensemble).prompts(prompt)
    assert seen(pair.ensemble.members[0], main) == prompt
    assert seen(pair.ensemble.members[1], other) == (
        "<bos>[system] Be brief.\n[user] Where is the fox?\n[assistant] There.\n[user] Where is the dog?\n[model] "
    )
    control = pair.ensemble.main.lm.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert main.ids.count(control) == 5  # a marker is one control token, not its letters


def test_21_a_gen_prefix_reaches_every_member(pair):
    prompt = pair.apply_chat_template(PREFIXED, add_generation_prompt=False)
    main, other = Prompter(pair.ensemble).prompts(prompt)
    assert seen(pair.ensemble.members[0], main).endswith("<|im_start|>assistant\nThe answer is ")
    assert seen(pair.ensemble.members[1], other).rstrip().endswith("[assistant] The answer is")


def test_21_spaces_after_a_gen_prefix_belong_to_the_continuation_of_every_member(pair):
    prompt = pair.apply_chat_template(PREFIXED, add_generation_prompt=False)
    span = Prompter(pair.ensemble).span(prompt, "Paris")
    bare = [{**PREFIXED[-1], "content": "The answer is"}]
    same = pair.apply_chat_template([*TALK, *bare], add_generation_prompt=False)
    assert span == Prompter(pair.ensemble).span(same, " Paris")
    assert pair.ensemble.main.codec.vocab.decode(span.target) == b" Paris"
    for member, own in zip(pair.ensemble.members, span.prompts, strict=True):
        assert seen(member, own).endswith("The answer is")
    (got,) = pair.loglikelihood(requests("loglikelihood", (prompt, "Paris")))
    assert got[0] == pytest.approx(sum(naive.score_span(pair.ensemble, span)), abs=1e-3)


def test_21_the_spaces_of_a_template_stay_in_its_member_s_prompt(pair):
    span = Prompter(pair.ensemble).span(pair.apply_chat_template(TALK), "Paris")
    assert pair.ensemble.main.codec.vocab.decode(span.target) == b"Paris"
    for member, own, end in zip(pair.ensemble.members, span.prompts, ("assistant\n", "[model] "), strict=True):
        assert seen(member, own).endswith(end)


def test_21_generation_and_scoring_of_a_conversation_agree_with_the_naive_loop(pair):
    prompt = pair.apply_chat_template(TALK)
    ids, _ = naive.generate_ids(pair, prompt, 8)
    (text,) = pair.generate_until(requests("generate_until", (prompt, {"max_gen_toks": 8, "until": []})))
    assert text == pair.tok_decode(ids)


def test_21_text_after_a_conversation_reaches_every_member(pair):
    """Custom tasks put text after the rendered prompt themselves."""
    prompt = pair.apply_chat_template(TALK) + "The" + " answer"
    assert isinstance(prompt, ChatPrompt) and prompt.endswith("assistant\nThe answer")
    _, other = Prompter(pair.ensemble).prompts(prompt)
    assert seen(pair.ensemble.members[1], other).endswith("[model] The answer")
    with pytest.raises(TypeError):
        prompt + 1


def test_21_a_prompt_survives_copies_and_pickling(pair):
    prompt = pair.apply_chat_template(TALK) + "The"
    for again in (copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert again == prompt and isinstance(again, ChatPrompt)
        assert (again.messages, again.appended, again.add_generation_prompt) == (TALK, "The", True)
        assert Prompter(pair.ensemble).prompts(again) == Prompter(pair.ensemble).prompts(prompt)


def test_21_a_later_change_of_the_messages_changes_nothing(pair):
    talk = copy.deepcopy(TALK)
    prompt = pair.apply_chat_template(talk)
    talk[-1]["content"] = "something else"
    assert prompt.messages == TALK


def test_21_a_prompt_that_lost_its_messages_is_plain_text_to_every_member(pair):
    prompt = pair.apply_chat_template(TALK)
    for member, own in zip(pair.ensemble.members, Prompter(pair.ensemble).prompts(str(prompt)), strict=True):
        assert member.codec.vocab.decode(own.ids).decode() == prompt
        assert set(own.ids) & member.codec.vocab.control <= {2}


def test_21_plain_rendering_is_an_option(pico, tmp_path):
    turns = ["System:\nBe brief.", "User:\nWhere is the fox?", "Assistant:\nThere.", "User:\nWhere is the dog?"]
    expected = "\n\n".join([*turns, "Assistant:\n"])
    assert plain_rendering(TALK, True) == expected
    assert plain_rendering(PREFIXED, False) == expected + "The answer is "
    model = deepen(pico["bytelevel"], pico["metaspace"], chat_fallback="plain", matrix_dir=str(tmp_path))
    for talk, text in ((TALK, expected), (PREFIXED, expected + "The answer is ")):
        prompt = model.apply_chat_template(talk, add_generation_prompt=talk is TALK)
        main, other = Prompter(model.ensemble).prompts(prompt)
        assert seen(model.ensemble.members[0], main) == prompt
        assert model.ensemble.members[1].codec.vocab.decode(other.ids).decode() == text
    reverse = deepen(pico["metaspace"], pico["bytelevel"], chat_fallback="plain", matrix_dir=str(tmp_path))
    main, other = Prompter(reverse.ensemble).prompts(reverse.apply_chat_template(TALK))
    assert seen(reverse.ensemble.main, main) == f"<bos>{expected}"
    assert seen(reverse.ensemble.members[1], other).endswith("<|im_start|>assistant\n")
    alone = deepen(pico["metaspace"], chat_fallback="plain")
    assert alone.apply_chat_template(TALK) == expected
    assert alone.tokenizer_name.endswith("-plain") and "plain" in alone.chat_template(True)


def test_21_the_fallback_is_validated_and_part_of_the_fingerprint(pico):
    with pytest.raises(ConfigError, match="chat_fallback must be 'error' or 'plain'; got 'pain'.*'plain'"):
        deepen(pico["metaspace"], chat_fallback="pain")
    plain, error = deepen(pico["metaspace"], chat_fallback="plain"), deepen(pico["metaspace"])
    assert error.ensemble_config.chat_fallback == "error"
    assert plain.ensemble_config.fingerprint() != error.ensemble_config.fingerprint()
    assert plain.ensemble_config.to_dict()["chat_fallback"] == "plain"


def test_21_a_conversation_that_does_not_fit_is_a_clear_error(pair):
    long = [{"role": "user", "content": "word " * 600}]
    with pytest.raises(RequestError, match="a rendered chat template cannot be cut"):
        Prompter(pair.ensemble).prompts(pair.apply_chat_template(long), 8)


def test_21_whole_tasks_run_with_members_of_different_templates(pair, evaluate):
    arguments = {"apply_chat_template": True, "system_instruction": "Be brief.", "fewshot_as_multiturn": True}
    found = evaluate(pair, "conf_answer", "conf_prefixed", "conf_choice", num_fewshot=1, **arguments)
    assert set(found["results"]) == {"conf_answer", "conf_prefixed", "conf_choice"}
