"""What is kept of a tokenizer or a model is what reading it gives, and a damaged or stale file is made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast
from vocabulary_helpers import CAFE, CORPUS, byte_level, codec_of, sentencepiece_bpe, unigram

from lm_eval_deepen.config import FrozenDict, MemberConfig
from lm_eval_deepen.errors import MemberError
from lm_eval_deepen.member import load_member, loading_check, member, text, tokenizer_files
from lm_eval_deepen.member import reading_cache as kept
from lm_eval_deepen.member.runner import PlainRunner, TreeRunner
from lm_eval_deepen.member.text import Backend, TextCodec
from lm_eval_deepen.member.tokenizer_files import TokenizerFiles, require_same
from lm_eval_deepen.vocabulary import SAMPLE_TEXTS
from lm_eval_deepen.vocabulary.text_only import text_only_spec

FAMILIES = {
    "byte level": lambda: byte_level([AddedToken("  ", normalized=False), AddedToken("caf\u00e9 was", lstrip=True)]),
    "prefix space": lambda: sentencepiece_bpe(CAFE),
    "no prefix space": lambda: sentencepiece_bpe(CAFE, prefix_space=False),
    "control merges": lambda: sentencepiece_bpe([("<", "s"), ("<s", ">"), *CAFE]),
    "whole words": lambda: sentencepiece_bpe(CAFE, ignore_merges=True),
    "unigram": lambda: unigram(byte_fallback=True),
}
TEXTS = [*SAMPLE_TEXTS, *CORPUS, "a <s>b</s>  caf\u00e9 was  <0x0A>", "\ufdd0 <s>"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder, in which every tokenizer is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "LARGE", 0)
    return tmp_path / "cache" / "lm_eval_deepen" / "tokenizers"


def codec(tokenizer: Tokenizer) -> TextCodec:
    size = tokenizer.get_vocab_size()
    return codec_of(tokenizer, size=size + 3, known=size, eos=[2])


def facts(read: TextCodec) -> list[Any]:
    """Return all that a codec is and does."""
    spelt = []
    for sample in TEXTS:
        try:
            spelt.append(read.encode(sample))
        except Exception as error:
            spelt.append(str(error))
    return [read.identity, read.vocab.fingerprint, read.vocab.pieces, read.cuts, spelt]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kept_tokenizer_is_the_one_that_is_read(family, folder, monkeypatch, caplog):
    make = FAMILIES[family]
    with monkeypatch.context() as uncached:
        uncached.setattr(kept, "LARGE", 1 << 60)
        expected = facts(codec(make()))
        assert not folder.exists()
    assert facts(codec(make())) == expected
    names = sorted(path.name.partition("-")[0] for path in folder.iterdir())
    assert names == ["text", "vocabulary"]
    with monkeypatch.context() as warm:  # nothing is read off the JSON again
        warm.setattr(text, "byte_vocab_from_json", None)
        warm.setattr(text, "text_only_spec", None)
        assert facts(codec(make())) == expected
    stamps = {path: path.read_bytes() for path in folder.iterdir()}
    for damage in (lambda raw: raw[:-9], lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: b""):
        for path, raw in stamps.items():
            path.write_bytes(damage(raw))
        caplog.clear()
        assert facts(codec(make())) == expected
        assert caplog.text.count("made again") == len(stamps)
        assert {path: path.read_bytes() for path in folder.iterdir()} == stamps
    monkeypatch.setattr(kept, "code", lambda: "of other code")
    caplog.clear()
    assert facts(codec(make())) == expected and "made again" not in caplog.text  # no fault of anyone
    assert all(path.read_bytes().startswith(b"of other code ") for path in stamps)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shared_model_gives_the_tokens_of_the_rewritten_one(family: str) -> None:
    tokenizer = FAMILIES[family]()
    read = Backend(PreTrainedTokenizerFast(tokenizer_object=tokenizer), None, size=9999, eos=[2], name="m")
    control, roles = read._control_and_text
    rewritten = Tokenizer.from_str(json.dumps(text_only_spec(read.spec, control=control, text=roles, name="m")))
    rewritten.encode_special_tokens = True
    encode, _ = read.text_only(9999)
    for sample in TEXTS:
        assert list(encode(sample)) == rewritten.encode(sample, add_special_tokens=False).ids, sample


def test_what_changes_a_tokenizer_in_memory_changes_its_content() -> None:
    tokenizer = byte_level()
    seen = {kept.content_of(tokenizer)[0]}
    assert kept.content_of(tokenizer)[0] in seen
    for change in (
        lambda: tokenizer.add_tokens(["new"]),
        lambda: tokenizer.add_special_tokens([AddedToken("new", special=True)]),
        lambda: setattr(tokenizer, "pre_tokenizer", None),
        lambda: tokenizer.enable_truncation(4),
        lambda: setattr(tokenizer.model, "dropout", 0.5),
    ):
        change()
        content = kept.content_of(tokenizer)[0]
        assert content not in seen
        seen.add(content)


def test_a_folder_that_cannot_be_used_costs_time_alone(tmp_path, folder, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert codec(byte_level()).encode("the caf\u00e9")


def test_a_tokenizer_that_is_not_its_files_is_refused_again(tmp_path, folder, monkeypatch):
    (tmp_path / "tokenizer.json").write_text(sentencepiece_bpe(CAFE, prefix_space=False).to_str())
    files = TokenizerFiles(tmp_path / "tokenizer.json", {})
    loaded = PreTrainedTokenizerFast(tokenizer_object=sentencepiece_bpe(CAFE[:2], prefix_space=False))
    with pytest.raises(MemberError) as first:
        require_same(loaded, files, name="m")
    monkeypatch.setattr(tokenizer_files, "differences", None)  # it is not compared again
    with pytest.raises(MemberError) as second:
        require_same(loaded, files, name="m")
    assert str(first.value) == str(second.value)
    with pytest.raises(TypeError):  # another file is compared
        (tmp_path / "tokenizer.json").write_text(byte_level().to_str())
        require_same(loaded, TokenizerFiles(tmp_path / "tokenizer.json", {}), name="m")


@pytest.fixture
def model(pico: dict[str, Path], tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose checks are kept although it is small."""
    monkeypatch.setattr(loading_check, "SMALL_MODEL", 0)
    shutil.copytree(pico["bytelevel"], tmp_path / "model")
    return tmp_path / "model"


def loaded(model: Path, monkeypatch: pytest.MonkeyPatch, **loading: Any) -> tuple[Any, list[str]]:
    """Return the runner of a model that is loaded, and which checks ran."""
    ran: list[str] = []
    with monkeypatch.context() as counted:
        for check in ("check_reading", "check_tree"):
            run = getattr(member, check)
            counted.setattr(member, check, lambda *a, name=check, run=run, **kw: (ran.append(name), run(*a, **kw)))
        return load_member(
            MemberConfig(name="m", pretrained=str(model), loading=FrozenDict(loading)), "cpu"
        ).runner, ran


def test_forward_passes_are_checked_once_and_again_where_anything_has_changed(model, monkeypatch):
    cold, first = loaded(model, monkeypatch)
    warm, second = loaded(model, monkeypatch)
    assert first == ["check_reading", "check_tree"] and second == []
    assert isinstance(warm, TreeRunner)
    paths = [[5, 6, 7], [5, 6, 9]]
    assert torch.equal(warm.logp(warm.states_at(paths)), cold.logp(cold.states_at(paths)))

    def one_weight() -> None:
        weights = load_file(model / "model.safetensors")
        name = next(name for name, weight in weights.items() if weight.ndim == 2)
        weights[name][3, 3] += 1e-3  # same names, shapes and size of the file
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    def config(**changes: Any) -> None:
        old = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(old | changes))

    for change in (
        one_weight,
        lambda: config(rms_norm_eps=1e-4),
        lambda: config(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
        lambda: monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium"),
        lambda: monkeypatch.setattr(kept, "code", lambda: "of other code"),
    ):
        change()
        assert loaded(model, monkeypatch)[1] == ["check_reading", "check_tree"]
        assert loaded(model, monkeypatch)[1] == []
    for loading in (
        {"dtype": "bfloat16"},
        {"attn_implementation": "eager"},
        {"mixed_precision_dtype": "bfloat16"},
        {"max_length": 100},
    ):
        assert "check_tree" in loaded(model, monkeypatch, **loading)[1], loading
        assert loaded(model, monkeypatch, **loading)[1] == [], loading
    assert loaded(model, monkeypatch)[1] == []  # the first is still there


def test_a_check_that_fails_is_not_kept(model: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with monkeypatch.context() as failing:
        failing.setattr(member, "check_tree", lambda *_: 1 / 0)
        failing.setattr(member, "check_state", lambda *_: 1 / 0)
        assert all(isinstance(loaded(model, monkeypatch)[0], PlainRunner) for _ in range(2))
    weights = load_file(model / "model.safetensors")
    for weight in weights.values():
        weight.fill_(float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for _ in range(2):
        with pytest.raises(MemberError, match="NaN"):
            loaded(model, monkeypatch)
    assert not (folder.parent / "checks").exists()


def test_the_checks_of_a_small_model_are_not_kept(pico, folder, monkeypatch):
    assert [loaded(pico["padded"], monkeypatch)[1] for _ in range(2)] == [["check_reading", "check_tree"]] * 2
    assert not (folder.parent / "checks").exists()
