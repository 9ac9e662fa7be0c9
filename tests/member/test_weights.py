"""A model's weights are those of its files, all of them, or loading it is an error that names them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pico_seq2seq
import pytest
import torch
from harness import deepen, hf, requests
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from lm_eval_deepen.errors import ConfigError, MemberError

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "conformance")]

from custom_model import write_gguf  # noqa: E402
from tiny_models import tiny_model  # noqa: E402

ASKED = [("The fox walked", " away")]


@pytest.fixture
def edited(pico, tmp_path):
    """Copy a pico model, with keys of its config.json changed and its weights edited."""

    def edit(name="bytelevel", weights=None, **config):
        folder = tmp_path / "edited"
        shutil.copytree(pico[name], folder)
        settings = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(settings))
        if weights is not None:
            tensors = load_file(folder / "model.safetensors")
            weights(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return edit


def rename(old, new):
    def change(tensors):
        tensors[new] = tensors.pop(old)

    return change


def drop(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


PROJECTION = "model.layers.1.self_attn.q_proj.weight"
BROKEN = {
    "a layer too many in the config": (
        {"num_hidden_layers": 3},
        r"lack 9 weights \(model.layers.2.input_layernorm.weight, .* and 5 more\) of LlamaForCausalLM; random values .*"
        "allow_missing_weights: true",
    ),
    "a layer too few in the config": (
        {"num_hidden_layers": 1},
        r"hold 9 weights \(model.layers.1.input_layernorm.weight, .* left out.*allow_unexpected_weights: true",
    ),
    "a renamed weight": (
        {"weights": rename(PROJECTION, PROJECTION.replace("q_proj", "query"))},
        rf"lack 1 weight \({PROJECTION}\)",
    ),
    "a head that is not there": ({"weights": drop("lm_head.weight")}, r"lack 1 weight \(lm_head.weight\)"),
    "another shape": (
        {"intermediate_size": 48},
        r"have another shape of 6 weights \(.*down_proj.weight 32x64 for 32x48",
    ),
    "a larger vocabulary": (
        {"vocab_size": 500},
        r"have another shape of 2 weights \(lm_head.weight \d+x32 for 500x32, model.emb",
    ),
}


@pytest.mark.parametrize("edits, message", BROKEN.values(), ids=BROKEN)
def test_weights_that_are_not_those_of_the_files_are_an_error(edited, edits, message):
    folder = edited(**edits)
    with pytest.raises(MemberError, match=f"member 'm0': the files of {folder} {message}"):
        deepen(folder)


def test_another_shape_is_an_error_also_where_transformers_ignores_it(edited):
    folder = edited(intermediate_size=48)
    with pytest.raises(MemberError, match="another shape of 6 weights"):
        deepen(folder, hf_kwargs={"ignore_mismatched_sizes": True})
    model = deepen(folder, hf_kwargs={"ignore_mismatched_sizes": True}, allow_missing_weights=True)
    assert model.loglikelihood(requests("loglikelihood", *ASKED))


def test_a_second_member_is_checked_and_named(pico, edited):
    with pytest.raises(MemberError, match="member 'm1': the files of"):
        deepen(pico["metaspace"], edited(num_hidden_layers=3))


@pytest.mark.parametrize(
    "key, edits",
    [("allow_missing_weights", {"num_hidden_layers": 3}), ("allow_unexpected_weights", {"num_hidden_layers": 1})],
)
def test_what_is_allowed_is_loaded_as_by_hf(edited, key, edits):
    folder = edited(**edits)
    model = deepen(folder, **{key: True})
    other = "allow_unexpected_weights" if key == "allow_missing_weights" else "allow_missing_weights"
    with pytest.raises(MemberError, match="the files of"):
        deepen(folder, **{other: True, key: False})
    assert model.ensemble.config.to_dict()["members"][0][key] is True
    if key == "allow_unexpected_weights":
        expected = hf(folder).loglikelihood(requests("loglikelihood", *ASKED))
        assert model.loglikelihood(requests("loglikelihood", *ASKED))[0][0] == pytest.approx(expected[0][0], abs=1e-4)


def test_an_allowance_is_true_or_false_and_is_checked_before_anything_loads(pico):
    with pytest.raises(ConfigError, match="allow_missing_weights must be true or false; got 'yes'"):
        deepen(pico["bytelevel"], allow_missing_weights="yes")


@pytest.fixture
def saved_tiny(pico, tmp_path):
    """Write a tiny model of any architecture, its weights edited."""

    def save(kind, weights):
        tokenizer = AutoTokenizer.from_pretrained(pico["bytelevel"])
        tiny_model(CONFIG_MAPPING[kind], len(tokenizer)).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        weights(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return save


@pytest.mark.parametrize("with_head", [False, True])
def test_a_tied_head_needs_no_weight_of_its_own(edited, with_head):
    def head(tensors):
        assert "lm_head.weight" not in tensors
        if with_head:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    deepen(edited("metaspace", weights=head))


def test_buffers_of_older_versions_are_no_weights(saved_tiny):
    """GPT-2's causal masks are in its published checkpoints; newer models compute them."""

    def masks(tensors):
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    deepen(saved_tiny("gpt2", masks))

    def weight(tensors):
        tensors["h.0.attn.gate"] = torch.ones(4)

    with pytest.raises(MemberError, match=r"hold 1 weight \(h.0.attn.gate\), which GPT2LMHeadModel has no place for"):
        deepen(saved_tiny("gpt2", weight))


def test_an_encoder_decoder_member_is_checked(tmp_path):
    folder = pico_seq2seq.build(tmp_path)["translator"]
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"decoder_layers": 3}))
    with pytest.raises(MemberError, match=r"'m0': .* lack \d+ weights \(model.decoder.layers.2"):
        deepen(folder)


@pytest.fixture
def adapter(pico, tmp_path):
    """Write a LoRA adapter of a pico model, its weights edited."""
    peft = pytest.importorskip("peft")

    def write(change=lambda tensors: None):
        base = AutoModelForCausalLM.from_pretrained(pico["bytelevel"])
        settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
        return tmp_path / "adapter"

    return write


LORA = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize("native", [False, True], ids=["peft=", "beside the weights"])
@pytest.mark.parametrize(
    "change, message",
    [
        (drop(LORA), r"adapter lack 1 weight \(.*layers.1.self_attn.q_proj.lora_B"),
        (rename(LORA, LORA.replace("q_proj", "k_proj")), r"adapter lack 1 weight \(.*layers.1.self_attn.q_proj.lora_B"),
        (
            lambda tensors: tensors.update({LORA.replace("1", "7"): torch.ones(32, 4)}),
            r"adapter hold 1 weight \(.*layers.7",
        ),
    ],
    ids=["missing", "renamed", "unexpected"],
)
def test_an_adapter_is_checked(pico, adapter, native, change, message):
    def load(folder):
        if native:
            for name in ("config.json", "model.safetensors"):  # a model with an adapter beside its weights
                shutil.copy(pico["bytelevel"] / name, folder)
            return deepen(folder, tokenizer=str(pico["bytelevel"]))
        return deepen(pico["bytelevel"], peft=str(folder))

    load(adapter())
    with pytest.raises(MemberError, match=f"member 'm0': the files of .*{message}"):
        load(adapter(change))


def test_the_model_below_an_adapter_is_checked(pico, edited, adapter):
    folder, below = adapter(), edited(num_hidden_layers=3)
    with pytest.raises(MemberError, match="edited lack 9 weights"):
        deepen(below, peft=str(folder))
    for path in folder.iterdir():
        shutil.copy(path, below)
    with pytest.raises(MemberError, match="edited lack 9 weights"):
        deepen(below)


def test_a_delta_is_checked(pico, edited):
    folder = edited(weights=drop(PROJECTION))
    with pytest.raises(MemberError, match=rf"member 'm0': the files of {folder} lack 1 weight \({PROJECTION}\)"):
        deepen(pico["bytelevel"], delta=str(folder))


def test_a_delta_is_added_once(pico, tmp_path):
    """The harness adds it once for every name, so that tied embeddings would get it twice."""

    def delta(name):
        lm = hf(pico[name])
        with torch.no_grad():
            for weight in lm.model.parameters():
                weight.fill_(0.5)
        lm.model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    added = deepen(pico["bytelevel"], delta=delta("bytelevel")).model
    for own, before in zip(added.parameters(), hf(pico["bytelevel"]).model.parameters(), strict=True):
        assert torch.equal(own, before + 0.5)
    with pytest.raises(
        MemberError, match=r"'m0': .* model.embed_tokens.weight and lm_head.weight are one weight .*twice"
    ):
        deepen(pico["metaspace"], delta=delta("metaspace"))


def test_a_gguf_file_is_checked(pico, tmp_path):
    pytest.importorskip("gguf")
    lm = hf(pico["bytelevel"])
    write_gguf(lm, tmp_path / "whole.gguf")
    lm.model.config.num_hidden_layers = 3
    write_gguf(lm, tmp_path / "short.gguf")
    deepen(tmp_path, gguf_file="whole.gguf", tokenizer=str(pico["bytelevel"]))
    with pytest.raises(MemberError, match=r"'m0': the files of .* lack 9 weights \(model.layers.2.input_layernorm"):
        deepen(tmp_path, gguf_file="short.gguf", tokenizer=str(pico["bytelevel"]))
