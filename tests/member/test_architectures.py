"""Architectures that are unlike Llama: one member is `hf` on the path that is right for it, or is refused by name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from harness import deepen, hf, requests
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.errors import MemberError, RequestError
from lm_eval_deepen.member import load_member
from lm_eval_deepen.member.attention import Alibi
from lm_eval_deepen.member.loading_check import check_tree
from lm_eval_deepen.member.runner import PlainRunner, TreeRunner
from lm_eval_deepen.member.tree import TokenTree

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from architectures import REQUESTS, VARIANTS, compare, path_of, write_tiny  # noqa: E402
from tiny_models import tiny_model  # noqa: E402

TREE, WHOLE, ALONE = "tree", "whole texts", "whole texts, one at a time"
STATE, BY_TOKEN, SINGLE = "state", "state, by token", "state, one at a time"
# A sample of the table in docs/conformance.md: an architecture's name there, and the path that is right for it.
SAMPLE = {
    "llama": TREE,
    "ministral3": TREE,
    "mistral": TREE,
    "gemma2": TREE,
    "deepseek_v3": TREE,
    "gpt2": TREE,
    "opt": TREE,
    "mpt": TREE,
    "falcon, alibi": TREE,
    "phi3, longrope": ALONE,
    "llama4_text": STATE,
    "mixtral": TREE,
    "mamba": BY_TOKEN,
    "recurrent_gemma": BY_TOKEN,
    "zamba2": STATE,
    "qwen3_next": STATE,
    "rwkv": SINGLE,
    "bart": STATE,
    "openai-gpt": WHOLE,
}
EQUAL = dict.fromkeys(REQUESTS, "equal")


def write(name, folder, **changes):
    kind, values = VARIANTS.get(name, (name, {}))
    return write_tiny(kind, folder, **{**values, **changes})


@pytest.mark.parametrize("name, path", SAMPLE.items(), ids=SAMPLE)
def test_one_member_is_hf(name, path, tmp_path):
    row = compare(tmp_path, name, **write(name, tmp_path))
    assert (row.outcomes, row.path, row.why) == (EQUAL, path, "")
    assert all(ours <= theirs for ours, theirs in row.tokens.values())


def test_the_table_of_all_architectures_says_the_same():
    page = (ROOT / "docs" / "conformance.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", page.partition("<!-- architectures -->")[2], re.M))
    for name, path in SAMPLE.items():
        assert rows[name].split(" | ")[1:5] == [path, "equal", "equal", "equal"]
    assert not re.search(r"\| (off by|another (text|is_greedy))", page)


@pytest.mark.parametrize("name", ["mpt", "bloom", "falcon, alibi", "opt", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flat_distributions_hide_nothing_from_the_check(name, dtype, tmp_path):
    """Untrained weights: all probabilities are nearly equal, and positions move them by 1e-6."""
    model = deepen(tmp_path, dtype=dtype, **write(name, tmp_path, wide=False))
    assert path_of(model) == TREE


@pytest.mark.parametrize("name", ["mpt", "bloom", "falcon, alibi"])
@pytest.mark.parametrize("wide", [True, False])
def test_alibi_by_columns_is_noticed(name, wide, monkeypatch):
    """Alibi counts the columns of a mask, unless it is told the positions; afterwards it counts them again."""
    kind, changes = VARIANTS.get(name, (name, {}))
    model = tiny_model(CONFIG_MAPPING[kind], 400, wide=wide, **changes).double()
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(input_ids=ids).logits
    check_tree(TreeRunner(model), 256)
    assert torch.equal(model(input_ids=ids).logits, before)
    by_position = Alibi.by_position
    columns = lambda self, keys: by_position(self, torch.arange(keys.shape[1])[None])  # noqa: E731
    monkeypatch.setattr(Alibi, "by_position", columns)
    with pytest.raises(ArithmeticError, match="differs from a plain forward pass"):
        check_tree(TreeRunner(model), 256)


def test_a_head_that_goes_round_the_body_is_noticed(monkeypatch):
    """OPT's head calls its decoder, not its body: states that are given to the body would never arrive."""
    model = tiny_model(CONFIG_MAPPING["opt"], 5000, wide=False)
    assert TreeRunner(model).network is model.model.decoder
    monkeypatch.setattr("lm_eval_deepen.member.runner.body_of", lambda model: model.model)
    runner = TreeRunner(model)
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
def test_the_check_tells_wrong_masks_and_positions(monkeypatch, break_it, message, wide):
    runner = TreeRunner(tiny_model(CONFIG_MAPPING["llama"], 400, wide=wide).double())
    check_tree(runner, 256)
    monkeypatch.setattr(TreeRunner, "body", break_it(TreeRunner.body))
    if message is None:
        check_tree(runner, 256)
    else:
        with pytest.raises(ArithmeticError, match=message):
            check_tree(runner, 256)


def test_a_window_that_the_model_does_not_have_is_noticed():
    """Moshi's configuration has a window that its masks ignore."""
    runner = TreeRunner(tiny_model(CONFIG_MAPPING["moshi"], 400, sliding_window=200).double())
    with pytest.raises(ArithmeticError, match="differs from a plain forward pass"):
        check_tree(runner, 256)
    assert runner.masks.window == runner.model.config.sliding_window == 200


@pytest.mark.parametrize(
    "name, message",
    [
        ("bert", r"BertLMHeadModel.* changes with the text that follows.*is_decoder: false; a decoder has true"),
        ("xlnet", "XLNetLMHeadModel.* changes with the text that follows"),
        ("cpmant", "CpmAntForCausalLM.* changes with the text that follows"),
        ("reformer", "ReformerModelWithLMHead.* changes each time that it is asked"),
    ],
)
def test_what_does_not_read_from_left_to_right_is_refused(name, message, tmp_path):
    with pytest.raises(MemberError, match=f"member 'm0': {message}"):
        deepen(tmp_path, **write(name, tmp_path))


def test_a_model_without_numbers_is_refused(tmp_path):
    loading = write("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(MemberError, match="'m0': LlamaForCausalLM gives no numbers"):
        deepen(tmp_path, **loading)


@pytest.mark.parametrize("name, changes", [("roberta", {"is_decoder": True}), ("moshi", {}), ("xlm, causal", {})])
def test_where_generate_is_not_the_forward_pass_it_is_refused_and_scores_are_those_of_hf(name, changes, tmp_path):
    loading = write(name, tmp_path, **changes)
    outcomes = dict(compare(tmp_path, **loading).outcomes)
    assert outcomes.pop("generate_until").startswith("refused: ")
    assert set(outcomes.values()) == {"equal"}
    with pytest.raises(RequestError, match="'m0': .*generate, which --model hf calls, says something else"):
        deepen(tmp_path, **loading).generate_until(requests("generate_until", *REQUESTS["generate_until"]))


def test_a_long_text_changes_nothing_for_a_short_one_beside_it(tmp_path):
    """Where positions follow the length of a text, every text has a forward pass of its own."""
    loading = write("phi3, longrope", tmp_path)
    runner = load_member(MemberConfig(name="m", pretrained=str(tmp_path), loading=loading), "cpu").runner
    assert isinstance(runner, PlainRunner) and runner.alone
    short, long = list(range(5, 20)), list(range(9, 60))
    assert torch.equal(runner.states_at([short, long])[0], runner.states_at([short])[0])
    text, rows = list(range(5, 31)), runner.rows()  # 32 tokens have short frequencies, longer texts have others
    rows.admit(runner.walker().prefill(*TokenTree.of([text, long]))[0])
    for token in range(40, 50):
        text, long = [*text, token], [*long, token]
        assert torch.allclose(rows.advance([text, long]), runner.states_at([text, long]), atol=1e-3)


def adapted(folder, where, **settings):
    """Write a LoRA adapter of a model, with random weights."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            weight.normal_(0, 0.5, generator=generator)
    model.save_pretrained(where)
    return str(where)


def test_a_wrapper_that_turns_an_adapter_on_is_not_passed_by(pico, tmp_path):
    """An activated LoRA changes what comes after certain tokens, which the wrapper looks for."""
    asked = requests("loglikelihood", ("The quick brown fox walked", " away"), ("The dog", " away"))
    alone = hf(pico["bytelevel"])
    tokens = alone.tok_encode(" fox")
    folder = adapted(pico["bytelevel"], tmp_path, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=tokens)
    expected = hf(pico["bytelevel"], peft=folder).loglikelihood(asked, disable_tqdm=True)
    assert expected[0][0] != pytest.approx(alone.loglikelihood(asked, disable_tqdm=True)[0][0], abs=0.1)
    found = deepen(pico["bytelevel"], peft=folder).loglikelihood(asked)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_a_tree_is_compared_with_what_the_wrapper_says(pico, tmp_path):
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(pico["bytelevel"]).double()
    whole = PeftModel.from_pretrained(model, adapted(pico["bytelevel"], tmp_path, target_modules=["q_proj"])).double()
    check_tree(TreeRunner(whole), 64)
    whole.register_forward_hook(lambda part, _, out: setattr(out, "logits", 2 * out.logits))
    with pytest.raises(ArithmeticError, match="a packed tree differs from a plain forward pass"):
        check_tree(TreeRunner(whole), 64)


def test_rows_of_embeddings_have_what_an_adapter_adds(pico, tmp_path):
    folder = adapted(pico["bytelevel"], tmp_path, target_modules=["embed_tokens", "lm_head"])
    member = load_member(MemberConfig(name="a", pretrained=str(pico["bytelevel"]), loading={"peft": folder}), "cpu")
    model = member.lm.model
    with torch.no_grad():
        rows = model.get_input_embeddings()(torch.arange(member.vocab_size))
        head = model.get_output_embeddings()(torch.eye(rows.shape[1])).T
    assert torch.allclose(member.embeddings(), rows) and torch.allclose(member.output_embeddings(), head, atol=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(pico["bytelevel"])
    assert not torch.allclose(rows, plain.get_input_embeddings().weight[: len(rows)], atol=0.1)
    assert member.output_fingerprint != member.embedding_fingerprint


def test_virtual_tokens_of_an_adapter_are_not_read(tmp_path):
    """Prompt tuning puts tokens before a text, and their logits before its own."""
    from peft import PromptTuningConfig, get_peft_model

    loading = write("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    adapter = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with torch.no_grad():
        adapter.prompt_encoder["default"].embedding.weight.normal_()
    adapter.save_pretrained(tmp_path / "adapter")
    row = compare(tmp_path, **loading, peft=str(tmp_path / "adapter"))
    assert (row.outcomes, row.path) == (EQUAL, WHOLE)
    alone = hf(tmp_path, **loading).loglikelihood(requests("loglikelihood", *REQUESTS["loglikelihood"]))
    tuned = deepen(tmp_path, **loading, peft=str(tmp_path / "adapter"))
    assert tuned.loglikelihood(requests("loglikelihood", *REQUESTS["loglikelihood"])) != alone
