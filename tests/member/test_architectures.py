"""Architectures that are unlike Llama: one member is `hf` on the path that is right for it, or is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from harness import deepen, hf, requests
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import MemberError, RequestError
from lm_eval_deepen.member import load_member
from lm_eval_deepen.member.loading_check import check_tree
from lm_eval_deepen.member.runner import PlainRunner, TreeRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from tiny_models import tiny_model  # noqa: E402

SHOTS = "Question: What is the largest planet of the solar system? It is not the Earth.\nAnswer:"
PAIRS = [
    (SHOTS, " Jupiter"),
    (SHOTS, " the café in 中国"),
    (SHOTS, " Rome is the capital"),
    ("", "Paris"),
    ("The fox", " a"),
]
TEXTS = [("The quick brown fox jumps over the lazy dog.",), ("In 1969 the first people walked on the moon. " * 4,)]
ENDLESS = {"until": [], "max_gen_toks": 12}
PROMPTS = [(SHOTS, ENDLESS), ("The quick brown", {**ENDLESS, "until": ["e"]}), ("def add(a, b):\n", ENDLESS)]

# Positions scaled by the length of the text: from 32 tokens on, every key of a text is turned otherwise.
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 32,
    },
    "original_max_position_embeddings": 32,
}
TREE, PLAIN = "TreeRunner", "PlainRunner"
EQUAL = {
    "rotary": ("llama", {}, TREE),
    "yarn": ("ministral3", {}, TREE),
    "sliding window": ("mistral", {"sliding_window": 20}, TREE),
    "windows in some layers": ("gemma2", {}, TREE),
    "multi-latent attention": ("deepseek_v3", {}, PLAIN),
    "learned positions": ("gpt2", {}, PLAIN),
    "learned positions with an offset": ("opt", {}, PLAIN),
    "alibi": ("mpt", {}, PLAIN),
    "alibi by its mask": ("falcon", {"alibi": True}, PLAIN),
    "positions by length": ("phi3", LONGROPE, PLAIN),
    "chunks": ("llama4_text", {}, PLAIN),
    "experts": ("mixtral", {}, PLAIN),
    "recurrent": ("mamba", {}, PLAIN),
    "hybrid": ("jamba", {}, PLAIN),
}


@pytest.fixture(scope="module")
def tokenizer(pico):
    return AutoTokenizer.from_pretrained(pico["bytelevel"])


@pytest.fixture
def saved(tokenizer, tmp_path):
    def save(kind, tokenizer=tokenizer, **changes):
        model = tiny_model(CONFIG_MAPPING[kind], len(tokenizer), **changes)
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return save


def runner_of(model):
    return type(model.ensemble.main.runner).__name__


def assert_scores_equal(ours, theirs):
    asked = requests("loglikelihood", *PAIRS)
    for got, expected in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert got[0] == pytest.approx(expected[0], abs=1e-4) and got[1] is expected[1]
    asked = requests("loglikelihood_rolling", *TEXTS)
    expected = theirs.loglikelihood_rolling(asked)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, abs=1e-3, rel=0)


@pytest.mark.parametrize("kind, changes, path", EQUAL.values(), ids=EQUAL)
def test_one_member_is_hf(saved, kind, changes, path):
    folder = saved(kind, **changes)
    ours, theirs = deepen(folder, batch_size=3), hf(folder)
    assert runner_of(ours) == path
    assert_scores_equal(ours, theirs)
    asked = requests("generate_until", *PROMPTS)
    assert ours.generate_until(asked) == theirs.generate_until(asked)


@pytest.mark.parametrize("kind", ["mpt", "bloom", "falcon", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flat_distributions_hide_nothing_from_the_check(saved, kind, dtype):
    """Untrained weights: all probabilities are nearly equal, and positions move them by 1e-6."""
    changes = {"alibi": True} if kind == "falcon" else {}
    model = deepen(saved(kind, wide=False, **changes), dtype=dtype)
    assert runner_of(model) == PLAIN
    model = deepen(saved("llama", wide=False), dtype=dtype)
    assert runner_of(model) == TREE


def test_a_head_that_goes_round_the_body_is_noticed(saved, pico):
    """OPT's head calls its decoder, not its body: the states that are given to it never arrive."""
    folder = saved("opt", wide=False)
    runner = TreeRunner(AutoModelForCausalLM.from_pretrained(folder).eval())
    with pytest.raises(ArithmeticError, match="its head does not read what its body returns"):
        check_tree(runner, 64)


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda body: lambda self, ids, at, ok, *rest: body(self, ids, at, torch.ones_like(ok), *rest), "differs"),
        (lambda body: lambda self, ids, at, *rest: body(self, ids, torch.arange(at.shape[1])[None], *rest), "differs"),
        (lambda body: lambda self, ids, at, *rest: body(self, ids, at + at.max(), *rest), None),
        (lambda body: lambda self, ids, at, *rest: body(self, ids, at // 2, *rest), "differs"),
        (lambda body: lambda self, ids, at, *rest: body(self, ids, 0 * at, *rest), "differs"),
    ],
    ids=["mask", "columns", "a shift, which rotary positions do not show", "halves", "none"],
)
@pytest.mark.parametrize("wide", [True, False])
def test_the_check_tells_wrong_masks_and_positions(tokenizer, monkeypatch, break_it, message, wide):
    runner = TreeRunner(tiny_model(CONFIG_MAPPING["llama"], len(tokenizer), wide=wide).double())
    check_tree(runner, 256)
    monkeypatch.setattr(TreeRunner, "body", break_it(TreeRunner.body))
    if message is None:
        check_tree(runner, 256)
    else:
        with pytest.raises(ArithmeticError, match=message):
            check_tree(runner, 256)


def test_a_window_that_the_model_does_not_have_is_noticed(tokenizer):
    """Moshi's configuration has a window that its masks ignore."""
    runner = TreeRunner(tiny_model(CONFIG_MAPPING["moshi"], len(tokenizer), sliding_window=200).double())
    with pytest.raises(ArithmeticError, match="differs from a plain forward pass"):
        check_tree(runner, 256)
    assert runner.masks.window == runner.model.config.sliding_window == 200


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("bert", {}, r"BertLMHeadModel.* changes with the text that follows.*is_decoder: false; a decoder has true"),
        ("xlnet", {}, "XLNetLMHeadModel.* changes with the text that follows"),
        ("cpmant", {}, "CpmAntForCausalLM.* changes with the text that follows"),
        ("reformer", {}, "ReformerModelWithLMHead.* changes each time that it is asked"),
    ],
)
def test_what_does_not_read_from_left_to_right_is_refused(saved, kind, changes, message):
    with pytest.raises(MemberError, match=f"member 'm0': {message}"):
        deepen(saved(kind, **changes))


def test_a_model_without_numbers_is_refused(saved):
    folder = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(MemberError, match="'m0': LlamaForCausalLM gives no numbers"):
        deepen(folder)


@pytest.mark.parametrize("kind, changes", [("roberta", {"is_decoder": True}), ("moshi", {}), ("xlm", {"causal": True})])
def test_where_generate_is_not_the_forward_pass_it_is_refused_and_scores_are_those_of_hf(saved, kind, changes):
    folder = saved(kind, **changes)
    ours, theirs = deepen(folder), hf(folder)
    assert_scores_equal(ours, theirs)
    with pytest.raises(RequestError, match="generate, which --model hf calls, says something else"):
        ours.generate_until(requests("generate_until", *PROMPTS))


def test_a_long_text_changes_nothing_for_a_short_one_beside_it(saved):
    """Where positions follow the length of a text, every text has a forward pass of its own."""
    folder = saved("llama", **LONGROPE)
    runner = load_member(MemberConfig(name="m", pretrained=str(folder)), "cpu").runner
    assert isinstance(runner, PlainRunner) and runner.alone
    short, long = list(range(5, 20)), list(range(9, 60))
    assert torch.equal(runner.states_at([short, long])[0], runner.states_at([short])[0])


def test_virtual_tokens_of_an_adapter_are_not_read(saved, tmp_path):
    """Prompt tuning puts tokens before a text, and their logits before its own."""
    from peft import PromptTuningConfig, get_peft_model

    folder = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapter = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with torch.no_grad():
        adapter.prompt_encoder["default"].embedding.weight.normal_()
    adapter.save_pretrained(tmp_path / "adapter")
    ours = deepen(folder, peft=str(tmp_path / "adapter"))
    theirs = hf(folder, peft=str(tmp_path / "adapter"))
    assert_scores_equal(ours, theirs)
    asked = requests("generate_until", *PROMPTS)
    assert ours.generate_until(asked) == theirs.generate_until(asked)
