"""Items 15 to 18: generate_until."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from harness import deepen, hf, requests

from lm_eval_deepen.errors import RequestError

FAMILIES = ["bytelevel", "metaspace", "padded"]
CONTEXTS = ["The quick brown", "Question: What is 1 + 1?\nAnswer:", "café 中国", "walk", "x" * 30]
LONG = "In 1969 the first people walked on the moon; in 2024 there were many. " * 6
SAMPLED = {"do_sample": True, "temperature": 0.9, "until": [], "max_gen_toks": 8}


@pytest.fixture(scope="module")
def pair(pico, matrices):
    return deepen(pico["bytelevel"], pico["metaspace"], matrix_dir=matrices, batch_size=4)


def ask(model, *pairs):
    return model.generate_until(requests("generate_until", *copy.deepcopy(pairs)), disable_tqdm=True)


def free_text(model, context):
    """Return what follows without stop strings."""
    (text,) = ask(model, (context, {"until": [], "max_gen_toks": 12}))
    return text


@pytest.mark.parametrize("until", [["\n"], ["e", "the"], "a", [" "], [], None])
def test_15_greedy_text_is_that_of_hf(both, until):
    """`until` as a list, a string, or absent."""
    arguments = {"max_gen_toks": 12} | ({} if until is None else {"until": until})
    pairs = [(context, arguments) for context in CONTEXTS]
    assert ask(both[0], *pairs) == ask(both[1], *pairs)


def test_15_an_empty_stop_string_stops_nothing(both):
    """In `hf` it ends every text after one token."""
    pairs = [[(context, {"until": until, "max_gen_toks": 6}) for context in CONTEXTS] for until in ([""], [])]
    assert ask(both[0], *pairs[0]) == ask(both[0], *pairs[1]) == ask(both[1], *pairs[1])


def test_15_stops_over_several_tokens_and_inside_one(both):
    ours, theirs = both
    for context in CONTEXTS[:3]:
        text = free_text(theirs, context)
        ids = theirs.tok_encode(text, add_special_tokens=False)
        wide = text[2:7]  # spans tokens
        longest = max((theirs.tok_decode([token]).strip() for token in ids), key=len)
        inside = longest[len(longest) // 2]  # lies inside one
        for stop in (wide, inside):
            pairs = [(context, {"until": [stop], "max_gen_toks": 12})]
            (got,) = ask(ours, *pairs)
            assert [got] == ask(theirs, *pairs)
            assert stop not in got and text.startswith(got) and len(got) < len(text)


def test_15_a_leading_space_is_kept(pico):
    ours, theirs = deepen(pico["bytelevel"]), hf(pico["bytelevel"])
    contexts = [f"{a} {b}" for a in ("The fox", "A dog", "Paris", "10 + 20 =") for b in ("is", "was", "over", "and")]
    texts = ask(ours, *((context, {"until": ["\n"], "max_gen_toks": 4}) for context in contexts))
    assert texts == ask(theirs, *((context, {"until": ["\n"], "max_gen_toks": 4}) for context in contexts))
    assert any(text.startswith(" ") for text in texts)


def test_15_several_members_stop_too(pair):
    free = free_text(pair, CONTEXTS[0])
    for stop in (free[2:6], free[3]):
        (text,) = ask(pair, (CONTEXTS[0], {"until": [stop], "max_gen_toks": 12}))
        assert text == free.split(stop)[0]


@pytest.mark.parametrize("alias", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_16_every_alias_of_max_gen_toks(both, pair, alias):
    arguments = {"until": [], alias: 5}
    assert ask(both[0], (CONTEXTS[0], arguments)) == ask(both[1], (CONTEXTS[0], arguments))
    assert ask(pair, (CONTEXTS[0], arguments)) == ask(pair, (CONTEXTS[0], {"until": [], "max_gen_toks": 5}))


def test_16_precedence_defaults_and_total_lengths(both):
    ours, theirs = both
    assert ours.max_gen_toks == theirs.max_gen_toks == 256
    size = len(theirs.tok_encode(CONTEXTS[0]))
    for arguments in ({"max_tokens": 3, "max_gen_toks": 6}, {"max_length": size + 4}, {}):
        pairs = [(CONTEXTS[0], {"until": [], **arguments})]
        assert ask(ours, *pairs) == ask(theirs, *pairs)


def test_16_no_room_for_a_prompt_is_an_error(both, pair):
    ours, theirs = both
    for room in (512, 600):
        with pytest.raises(AssertionError, match="max tokens to generate"):
            ask(theirs, ("a", {"max_gen_toks": room}))
        for model in (ours, pair):
            with pytest.raises(RequestError, match=f"max_gen_toks={room} leaves no room.*'m0'"):
                ask(model, ("a", {"max_gen_toks": room}))


def test_16_a_long_prompt_is_cut_on_the_left_as_by_hf(pico):
    for family in FAMILIES:
        ours, theirs = deepen(pico[family], max_length=24), hf(pico[family], max_length=24)
        pairs = [(LONG, {"max_gen_toks": 6, "until": []}), (LONG[:50], {"max_gen_toks": 20, "until": []})]
        assert ask(ours, *pairs) == ask(theirs, *pairs)


def test_17_rows_with_different_stops_end_independently(both, pair):
    pairs = [
        (CONTEXTS[0], {"until": [], "max_gen_toks": 10}),
        (CONTEXTS[0], {"until": ["e", "a", "o"], "max_gen_toks": 10}),
        (CONTEXTS[1], {"until": ["1", " "], "max_gen_toks": 3}),
        (CONTEXTS[2], {"until": "t", "max_gen_toks": 1}),
        (CONTEXTS[3], {"max_gen_toks": 9, "repetition_penalty": 1.5}),
    ]
    alone = [ask(both[1], one)[0] for one in pairs]  # `hf` one by one: its stop strings end whole batches
    assert ask(both[0], *pairs) == ask(both[0], *pairs[::-1])[::-1] == alone
    assert ask(pair, *pairs) == [ask(pair, one)[0] for one in pairs]
    assert ask(pair) == []


def test_17_the_arguments_of_a_request_are_not_modified(both, pair):
    arguments = {"until": ["\n"], "max_gen_toks": 3, "temperature": 0.0, "do_sample": False}
    batch = requests("generate_until", ("The fox", arguments), ("A dog", arguments))
    before = copy.deepcopy(arguments)
    for model in (both[0], pair):
        model.generate_until(batch)
        assert arguments == before and all(request.args[1] is arguments for request in batch)


def test_18_sampling_depends_on_the_seed_alone(pico, pair, tmp_path):
    """Not on batch size, order, or the other requests; repeats of one request differ."""
    pairs = [(context, SAMPLED) for context in CONTEXTS]
    for one, four in (
        (deepen(pico["padded"]), deepen(pico["padded"], batch_size=4)),
        (deepen(pico["bytelevel"], pico["metaspace"], matrix_dir=str(tmp_path)), pair),
    ):
        torch.manual_seed(7)
        found = ask(one, *pairs)
        assert ask(one, *pairs) == found
        assert ask(four, *pairs[::-1])[::-1] == found == [ask(four, pair_)[0] for pair_ in pairs]
        torch.manual_seed(8)
        assert ask(one, *pairs) != found
        assert len(set(ask(four, *[(CONTEXTS[0], SAMPLED)] * 4))) > 1


def test_18_sampling_without_a_choice_is_greedy(both, pair):
    for model in (both[0], pair):
        expected = ask(model, (CONTEXTS[0], {"until": [], "max_gen_toks": 8}))
        for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"min_p": 1.0}):
            assert ask(model, (CONTEXTS[0], {**SAMPLED, **narrow})) == expected


def test_18_frequencies_are_the_probabilities_of_the_model(pico):
    model = deepen(pico["padded"], batch_size=64)
    expected = Counter()
    for token, mass in enumerate(torch.softmax(model.ensemble.next_logp("The fox").logp / 0.9, dim=-1).tolist()):
        expected["" if token in model.ensemble.main.eos_ids else model.tok_decode([token])] += mass
    torch.manual_seed(3)
    texts = Counter(ask(model, *[("The fox", {**SAMPLED, "max_gen_toks": 1, "top_k": 0})] * 600))
    for text, mass in expected.most_common(3):
        assert texts[text] / 600 == pytest.approx(mass, abs=0.06)


def test_18_gen_kwargs_of_the_command_line_are_honoured(pico, pair, evaluate):
    ours, theirs = deepen(pico["bytelevel"]), hf(pico["bytelevel"])
    greedy = "max_gen_toks=4,until=e"
    found = [evaluate(model, "conf_answer", gen_kwargs=greedy)["samples"] for model in (ours, theirs)]
    assert [s["resps"] for s in found[0]["conf_answer"]] == [s["resps"] for s in found[1]["conf_answer"]]
    sampled = {"do_sample": True, "temperature": 1.0, "top_p": 0.9}
    for model in (ours, pair):
        runs = [
            evaluate(model, "conf_answer", gen_kwargs=sampled, torch_random_seed=seed)["samples"]["conf_answer"]
            for seed in (1, 1, 2)
        ]
        texts = [[sample["resps"] for sample in run] for run in runs]
        assert texts[0] == texts[1] != texts[2]


def test_18_a_sample_depends_on_no_other_request(pico, pair):
    """Neither other arguments for the same prompt nor another task's requests shift a prompt's random stream."""
    hot, short = {**SAMPLED, "temperature": 1.3}, {**SAMPLED, "max_gen_toks": 7}
    mine = requests("generate_until", *[("The fox", SAMPLED)] * 3)
    others = requests("generate_until", *[("The fox", keys) for keys in (hot, short)] * 2)
    foreign = [replace(one, task_name="another", metadata=("another", n, 1)) for n, one in enumerate(mine)]
    turned = [("The fox", dict(reversed(SAMPLED.items())))] * 3
    for model in (deepen(pico["bytelevel"]), pair):

        def texts(asked, model=model):
            torch.manual_seed(3)
            return model.generate_until(asked, disable_tqdm=True)

        alone = texts(mine)
        assert len(set(alone)) == 3 and texts(requests("generate_until", *turned)) == alone
        assert texts([*others, *mine])[-3:] == texts([*foreign, *mine])[-3:] == texts([*mine, *others])[:3] == alone


@pytest.mark.parametrize(
    "unsupported",
    [{"num_beams": 2}, {"stop_strings": "a"}, {"penalty_alpha": 0.6}, {"num_return_sequences": 2}],
    ids=str,
)
def test_18_unsupported_arguments_are_errors(both, pair, unsupported):
    [(key, value)] = unsupported.items()
    for model in (both[0], pair):
        with pytest.raises(RequestError, match=f"{key}={value!r} is not supported.*Supported: until"):
            ask(model, ("a", {"until": [], "max_gen_toks": 2, **unsupported}))
    with pytest.raises(RequestError, match="Did you mean 'temperature'"):
        ask(pair, ("a", {"until": [], "temprature": 0.5}))
    with pytest.raises(RequestError, match=r"stop=\['b'\] is not supported. Stop strings are given as until"):
        ask(pair, ("a", {"stop": ["b"]}))


def test_18_the_generation_config_of_one_member_counts_as_in_hf(pico, tmp_path):
    """What decoding here does not do is an error, never dropped."""
    folder = tmp_path / "model"
    shutil.copytree(pico["bytelevel"], folder)
    pairs = [(context, {"until": [], "max_gen_toks": 10}) for context in CONTEXTS]
    plain = ask(deepen(folder), *pairs)
    settings = json.loads((folder / "generation_config.json").read_text())
    for more in ({"repetition_penalty": 2.0}, {"no_repeat_ngram_size": 1}, {"max_new_tokens": 3}):
        (folder / "generation_config.json").write_text(json.dumps({**settings, **more}))
        assert ask(deepen(folder), *pairs) == ask(hf(folder), *pairs) != plain
    (folder / "generation_config.json").write_text(json.dumps({**settings, "num_beams": 2}))
    with pytest.raises(RequestError, match="'m0': its generation config sets num_beams=2"):
        ask(deepen(folder), *pairs)
