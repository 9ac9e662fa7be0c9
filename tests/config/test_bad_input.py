"""Bad input is one clear error that names the argument and the remedy, before any weight is loaded where it can be."""

from __future__ import annotations

import json
import shutil

import pytest
from harness import requests
from lm_eval.models.huggingface import HFLM

from lm_eval_deepen.errors import DeepenError, MatrixError, MemberError, RequestError, VocabularyError
from lm_eval_deepen.harness.model import DeepenLM


@pytest.fixture
def no_weights(monkeypatch):
    """Fail where a model is loaded."""

    def refuse(*_, **__):
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr(HFLM, "_create_model", refuse)


def two(pico, **more):
    a, b = str(pico["bytelevel"]), str(pico["metaspace"])
    return {"pretrained": a, "members": [a, b], "device": "cpu", **more}


BAD = {
    "no member": ({"members": []}, "members"),
    "unknown method": ({"method": "deepenn"}, "did you mean 'deepen'"),
    "unknown key": ({"normalisation": "cosine"}, "did you mean 'normalization'"),
    "unknown inverse": ({"inverse": "adam"}, "did you mean 'adamw'"),
    "unknown normalization": ({"normalization": "cosin"}, "did you mean 'cosine'"),
    "too few weights": ({"weights": [1.0]}, "weights"),
    "learning rate for em": ({"learning_rate": 0.1}, "learning_rate"),
    "conflict with compat": ({"compat": "reference", "inverse": "em"}, "inverse"),
    "more anchors wanted than common": ({"min_anchors": 100_000}, "anchors"),
    "support of no piece": ({"support": 0}, "support"),
    "missing path": ({"pretrained": "/does/not/exist", "members": ["/does/not/exist"]}, "/does/not/exist"),
    "batch of nothing": ({"batch_size": 0}, "batch_size"),
    "batch of half a pair": ({"batch_size": "\ud800"}, "batch_size"),
    "inverse of half a pair": ({"inverse": "\ud800"}, "inverse"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_before_any_weight_is_loaded(pico, no_weights, name):
    change, words = BAD[name]
    with pytest.raises(DeepenError) as caught:
        DeepenLM(**two(pico, **change))
    assert words.lower() in str(caught.value).lower()


def test_a_tokenizer_without_a_byte_mapping(pico, tmp_path, no_weights):
    """WordPiece drops spaces: it cannot be exact."""
    folder = tmp_path / "wordpiece"
    shutil.copytree(pico["bytelevel"], folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = {
        token["content"]: token["id"] for token in spec["added_tokens"]
    }  # as the file says, else that is the fault
    vocab |= {"[UNK]": len(vocab), **{f"##{i}": i for i in range(len(vocab) + 1, 300)}}
    spec |= {
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "normalizer": None,
        "post_processor": None,
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(VocabularyError, match="wordpiece.*WordPiece"):
        DeepenLM(**two(pico) | {"members": [str(pico["bytelevel"]), str(folder)]})


def test_a_folder_without_a_tokenizer(pico, tmp_path, no_weights):
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(pico["bytelevel"] / "config.json", folder)
    with pytest.raises(MemberError, match="'bare': cannot load the tokenizer"):
        DeepenLM(**two(pico) | {"members": [str(pico["bytelevel"]), str(folder)]})


def test_rows_that_drop_too_much(pico, tmp_path):
    with pytest.raises(MatrixError, match="metaspace.*top_m"):
        DeepenLM(**two(pico, matrix_dir=str(tmp_path), rows="embedding", normalization="reference", top_m=1))
    left = {path.name.split("-")[0] for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert left <= {"bytelevel"}, "a failed build leaves no partial file"


@pytest.mark.parametrize("damage", ["truncated", "tampered"])
def test_a_damaged_matrix_file(pico, tmp_path, damage):
    DeepenLM(**two(pico, matrix_dir=str(tmp_path)))
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    else:
        data[-1] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(MatrixError, match=path.name):
        DeepenLM(**two(pico, matrix_dir=str(tmp_path)))


def test_a_matrix_built_for_another_revision_is_not_used(pico, tmp_path):
    """Other embeddings under the same names have other files; a file under a wrong name is refused."""
    import torch
    from transformers import AutoModelForCausalLM

    DeepenLM(**two(pico, matrix_dir=str(tmp_path / "m"), rows="embedding"))
    before = {path.name for path in (tmp_path / "m").glob("*.safetensors")}
    folder = tmp_path / "metaspace"
    shutil.copytree(pico["metaspace"], folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1
    model.save_pretrained(folder)
    members = [str(pico["bytelevel"]), str(folder)]
    changed = two(pico, matrix_dir=str(tmp_path / "m"), rows="embedding") | {"members": members}
    DeepenLM(**changed)
    after = {path.name for path in (tmp_path / "m").glob("*.safetensors")}
    (new,) = after - before
    (old,) = (name for name in before if name.startswith("metaspace"))
    shutil.copy(tmp_path / "m" / old, tmp_path / "m" / new)
    with pytest.raises(MatrixError, match="embedding"):
        DeepenLM(**changed)


def test_a_context_shorter_than_the_request(pico, tmp_path):
    model = DeepenLM(**two(pico, matrix_dir=str(tmp_path), max_length=32))
    with pytest.raises(RequestError, match="max_length"):
        model.loglikelihood(requests("loglikelihood", ("a", " word" * 100)))
    with pytest.raises(RequestError, match="max_gen_toks"):
        model.generate_until(requests("generate_until", ("a", {"max_gen_toks": 32})))
