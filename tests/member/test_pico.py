"""The pico ensemble has the properties that the other tests rely on."""

from __future__ import annotations

import pico as pico_models
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAMES = tuple(pico_models.RECIPES)


@pytest.fixture(scope="module")
def loaded(pico):
    """Reloaded (model, tokenizer) by name."""
    return {
        name: (AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path))
        for name, path in pico.items()
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", pico_models.ROUND_TRIP)
def test_text_survives_the_reloaded_tokenizer(loaded, name, text):
    tokenizer = loaded[name][1]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", NAMES)
def test_distributions_are_finite_and_peaked(loaded, name):
    model, tokenizer = loaded[name]
    ids = tokenizer(pico_models.CORPUS[:300], return_tensors="pt").input_ids
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)
    assert model.dtype == torch.float32
    assert torch.isfinite(logp).all()
    assert logp.exp().amax(-1).mean() > 10 / logp.shape[-1]
    best = logp.topk(2, dim=-1).values
    assert (best[..., 0] - best[..., 1]).median() > 1e-2


def test_special_arrangements(loaded):
    model, tokenizer = loaded["bytelevel"]
    assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids
    assert tokenizer.eos_token_id == tokenizer.pad_token_id
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

    model, tokenizer = loaded["metaspace"]
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert model.config.sliding_window == 16
    assert tokenizer.tokenize("ing")[0] != tokenizer.tokenize(" ing")[0]

    model, tokenizer = loaded["padded"]
    assert tokenizer.tokenize("ing")[0].startswith("▁")
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == len(tokenizer) + pico_models.PADDED_ROWS
    assert (rows[-pico_models.ZERO_ROWS :] == 0).all()
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["</s>", "<|end|>"])


def test_two_builds_are_equal(pico, tmp_path):
    again = pico_models.build_pico(tmp_path)
    for name, path in pico.items():
        for file in ("model.safetensors", "tokenizer.json"):
            assert (path / file).read_bytes() == (again[name] / file).read_bytes(), (name, file)
