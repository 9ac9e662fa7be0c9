"""The ground of the harness's own `test_bos_handling.py`, through our class on pico tokenizers.

With a checkout of the harness at `LM_EVAL_CHECKOUT` its own files run as well, our class in place of `HFLM`
(they download tokenizers).
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import deepen, hf, requests

from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.windows import rolling_spans

BOS = {"metaspace": (2, "<bos>"), "padded": (1, "<s>")}  # the first adds it by itself, the second does not
CASES = list(itertools.product(BOS, [None, True, False]))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def both(request, pico):
    """A model with each setting of `add_bos_token`: our class and the harness's own."""
    name, add = request.param
    return name, add, deepen(pico[name], add_bos_token=add), hf(pico[name], add_bos_token=add)


def test_bos_adding_follows_the_setting(both):
    name, add, ours, theirs = both
    assert ours.add_bos_token is theirs.add_bos_token is add
    assert ours.tok_encode("Hello") == theirs.tok_encode("Hello")
    first = ours.tok_encode("Hello")[0]
    assert (first == BOS[name][0]) is (name == "metaspace" if add is None else add)
    for special in (True, False):
        expected = theirs.tok_encode("Hello", add_special_tokens=special)
        assert ours.tok_encode("Hello", add_special_tokens=special) == expected
    batch = ["Hello", "Hello world"]
    for got, expected in zip(ours.tok_batch_encode(batch), theirs.tok_batch_encode(batch), strict=True):
        assert torch.equal(got, expected)


def test_bos_is_never_doubled(both):
    name, _, ours, theirs = both
    token, literal = BOS[name]
    for text in (f"{literal}Hello", f"{literal}User: Hello\nAssistant:"):
        ids = ours.tok_encode(text)
        assert ids == theirs.tok_encode(text) and ids[:2].count(token) == 1
        assert Prompter(ours.ensemble).prompts(text)[0].ids == tuple(ids)
        assert ours.tok_batch_encode([text])[0].tolist() == [ids]


def test_bos_of_an_empty_context_is_the_context(both):
    name, _, ours, theirs = both
    token, literal = BOS[name]
    for continuation in ("Hello", f"{literal}Hello"):
        span = Prompter(ours.ensemble).span("", continuation)
        assert span.prompts[0].ids == (token,)
        assert token not in span.target
        batch = requests("loglikelihood", ("", continuation))
        assert ours.loglikelihood(batch)[0][0] == pytest.approx(theirs.loglikelihood(batch)[0][0], abs=1e-4)


def test_bos_in_the_context_is_kept_once(both):
    name, _, ours, theirs = both
    token, literal = BOS[name]
    pairs = [(f"{literal}The fox", " jumps"), ("The fox", " jumps"), (f"{literal}The fox ", "jumps")]
    for pair in pairs:
        span = Prompter(ours.ensemble).span(*pair)
        assert span.prompts[0].ids.count(token) <= 1 and token not in span.target
        batch = requests("loglikelihood", pair)
        assert ours.loglikelihood(batch)[0][0] == pytest.approx(theirs.loglikelihood(batch)[0][0], abs=1e-3)
    arguments = {"until": [], "max_gen_toks": 4}
    for text in (pairs[0][0], pairs[1][0]):
        batch = requests("generate_until", (text, arguments))
        assert ours.generate_until(batch) == theirs.generate_until(batch)


def test_bos_with_a_prefix_token_of_its_own_generates_as_in_hf(pico):
    """`hf` looks for the prefix token where it scores, and for the BOS where it generates."""
    ours, theirs = (make(pico["metaspace"], prefix_token_id=1) for make in (deepen, hf))
    for text in ("<bos>The fox", "<eos>The fox", "The fox", ""):
        batch = requests("generate_until", (text, {"until": [], "max_gen_toks": 6}))
        assert ours.generate_until(batch) == theirs.generate_until(batch)
        if text:
            batch = requests("loglikelihood", (text, " jumps"))
            assert ours.loglikelihood(batch)[0][0] == pytest.approx(theirs.loglikelihood(batch)[0][0], abs=1e-3)
    batch = requests("loglikelihood", ("\t", "jumps"), ("", "jumps"))  # white space is not nothing
    expected = theirs.loglikelihood(batch, disable_tqdm=True)
    assert [value for value, _ in ours.loglikelihood(batch)] == pytest.approx([v for v, _ in expected], abs=1e-3)


@pytest.mark.parametrize("add", [None, True, False])
def test_bos_of_several_members_is_each_member_s_own_and_single(pico, tmp_path, add):
    model = deepen(pico["bytelevel"], pico["metaspace"], add_bos_token=add, matrix_dir=str(tmp_path))
    prompts = [Prompter(model.ensemble).prompts("The fox")[1], rolling_spans(model.ensemble, "The fox")[0].prompts[1]]
    assert prompts[0].ids.count(2) == (add is not False)
    assert prompts[1].ids == (2,)
    reverse = deepen(pico["metaspace"], pico["bytelevel"], add_bos_token=add, matrix_dir=str(tmp_path))
    main, other = Prompter(reverse.ensemble).prompts("<bos>The fox")  # a literal the main member knows
    assert main.ids.count(2) == 1
    assert reverse.ensemble.members[1].codec.vocab.decode(other.ids) == b"The fox"


@pytest.mark.skipif("LM_EVAL_CHECKOUT" not in os.environ, reason="LM_EVAL_CHECKOUT names no checkout of the harness")
@pytest.mark.parametrize("name", ["test_bos_handling.py", "test_max_length.py"])
def test_bos_and_lengths_in_the_harness_s_own_tests(name):
    file = Path(os.environ["LM_EVAL_CHECKOUT"]) / "tests" / "models" / name
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "bound_in_place", str(file)],
        env=os.environ | {"PYTHONPATH": here, "HF_HUB_OFFLINE": "0"},
        cwd=os.environ["LM_EVAL_CHECKOUT"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
