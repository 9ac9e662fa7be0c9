"""Item 19: thinking."""

from __future__ import annotations

import shutil

import pytest
from harness import HARNESS_05, by_default, deepen, hf, requests

from lm_eval_deepen.engine.following import Generation
from lm_eval_deepen.errors import ConfigError, RequestError

CONTEXTS = ["The quick brown", "Question: What is 1 + 1?\nAnswer:", "Paris is"]
ARGUMENTS = {"until": [], "max_gen_toks": 14}
TEMPLATE = "{% if enable_thinking %}<think>{% endif %}{{ messages[0]['content'] }}"


def ask(model):
    return model.generate_until(requests("generate_until", *((context, ARGUMENTS) for context in CONTEXTS)))


@pytest.fixture(scope="module")
def middle(pico):
    """A token that the model writes in the middle of its text, and that token's text."""
    model = hf(pico["bytelevel"])
    (text,) = model.generate_until(requests("generate_until", (CONTEXTS[0], ARGUMENTS)))
    ids = model.tok_encode(text, add_special_tokens=False)
    token = ids[len(ids) // 2]
    return token, model.tok_decode([token])


@pytest.mark.parametrize("kind", ["id", "digits", "text"])
def test_19_the_text_after_think_end_token_is_that_of_hf(pico, middle, kind):
    end = {"id": middle[0], "digits": str(middle[0]), "text": middle[1]}[kind]
    ours, theirs = (make(pico["bytelevel"], think_end_token=end) for make in (deepen, hf))
    assert ask(ours) == ask(theirs) != ask(deepen(pico["bytelevel"]))


@pytest.mark.parametrize("kind", [0, 1])
def test_19_several_members_think_once(pico, tmp_path, kind):
    """There is one text: what is cut off is the main member's affair."""
    free = deepen(pico["bytelevel"], pico["metaspace"], matrix_dir=str(tmp_path))
    texts = ask(free)
    chosen = next(at for at, text in enumerate(texts) if "\ufffd" not in text)  # no halves of characters
    ids = free.tok_encode(texts[chosen], add_special_tokens=False)
    end = (ids[len(ids) // 2], free.tok_decode([ids[len(ids) // 2]]))[kind]
    cut = deepen(pico["bytelevel"], pico["metaspace"], matrix_dir=str(tmp_path), think_end_token=end)
    got = ask(cut)
    assert got[chosen] != texts[chosen] and all(full.endswith(part) for full, part in zip(texts, got, strict=True))


def test_19_a_text_with_a_piece_that_the_main_member_lacks_is_cut_and_begins_like_others(pico):
    """Such a text is spelt from bytes: its thinking is cut off too, and its first space where the decoder drops it."""
    for name in ("bytelevel", "padded"):
        model = deepen(pico[name], pico["metaspace"], method="gac", think_end_token=70)
        main, pieces = model.ensemble.main, model.ensemble.pieces
        other = next(n for n in range(main.vocab_size, len(pieces)) if pieces[n].isalpha() and len(pieces[n]) > 2)
        begin = main.codec.encode(" walked")
        for thought in ([], [*begin, 70]):
            texts = []
            for ids in ([*thought, *begin], [*thought, *begin, other]):
                found = Generation(ids=ids, data=b"".join(pieces[token] for token in ids))
                texts.append(model.texts.finished(found, []))
            assert texts[1] == texts[0] + pieces[other].decode() and texts[0].strip() == "walked"


def test_19_thinking_refuses_loglikelihood(pico, tmp_path):
    arguments = {"enable_thinking": True, "think_end_token": "</think>"}
    batch = requests("loglikelihood", ("a", "b"))
    theirs = hf(pico["bytelevel"], **arguments)
    if not HARNESS_05:  # which scores what a model that thinks would say at once
        with pytest.raises(ValueError, match="enable_thinking=True is not compatible with loglikelihood tasks.*task"):
            theirs.loglikelihood(batch)
    ensembles = (
        deepen(pico["bytelevel"], **arguments),
        deepen(pico["bytelevel"], pico["metaspace"], matrix_dir=str(tmp_path), **arguments),
    )
    for model in ensembles:
        with pytest.raises(RequestError, match="enable_thinking=True is not compatible with.*triggered by task"):
            model.loglikelihood(batch)
    batch = requests("loglikelihood_rolling", ("The fox",))  # `hf` has nothing against these
    expected = theirs.loglikelihood_rolling(batch)
    assert ensembles[0].loglikelihood_rolling(batch) == pytest.approx(expected, abs=1e-3)
    assert ensembles[1].loglikelihood_rolling(batch)[0] < 0


def test_19_thinking_needs_its_end_as_in_hf(pico):
    for make in (deepen,) if HARNESS_05 else (hf, deepen):
        with pytest.raises(ValueError, match="think_end_token is required"):
            make(pico["bytelevel"], enable_thinking=True)


def test_19_enable_thinking_reaches_the_template(pico, tmp_path):
    folder = tmp_path / "thinker"
    shutil.copytree(pico["bytelevel"], folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for thinking in (True, False, None):
        arguments = {"enable_thinking": thinking, "think_end_token": "</think>"}
        ours, theirs = deepen(folder, **arguments), hf(folder, **arguments)
        talk = [{"role": "user", "content": "hi"}]
        assert ours.apply_chat_template(talk) == theirs.apply_chat_template(talk)
        assert ours.apply_chat_template(talk).startswith("<think>") is bool(thinking)


def test_19_an_id_that_is_no_token_or_another_one_of_a_pool_is_an_error(pico):
    """Else the thinking stays in the answer without a word."""
    with pytest.raises(ConfigError, match="'m0': think_end_token=99999 is no token.*Give the token's text"):
        deepen(pico["bytelevel"], think_end_token=99999)
    paths = (pico["bytelevel"], pico["metaspace"])
    with pytest.raises(ConfigError, match="'m1': think_end_token=70 is .* of the main member"):
        by_default(*paths, pooling="vote", think_end_token=70)
    assert deepen(*paths, think_end_token=70).ensemble.main.lm.think_end_token == 70  # the main member writes
