"""The tokenizer that is loaded is the one of its file, or the member is refused, with both sides named."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import deepen
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer
from vocabulary_helpers import CORPUS, SPACE, byte_level, sentencepiece_bpe, unigram

from lm_eval_deepen.config import FrozenDict, MemberConfig
from lm_eval_deepen.errors import ConfigError, MemberError
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.member import load_member
from lm_eval_deepen.member.text import TextCodec
from lm_eval_deepen.member.tokenizer_files import (
    TokenizerFiles,
    differences,
    files_of,
    garbage_kept,
    load_tokenizer,
    require_same,
)

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TABS = ["foo\t\tbar\t\tfoo\t\t\tbar 123 456 foo(bar)", *CORPUS] * 5


def cl100k() -> Tokenizer:
    """Byte-level BPE behind the regular expression of cl100k."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(CL100K), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TABS, trainer)
    return tokenizer


def folder(path: Path, tokenizer: Tokenizer | dict[str, Any], model_type: str | None = None, **config: Any) -> str:
    """Write a tokenizer as a checkpoint has it; `config` goes into its tokenizer_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    written = tokenizer.to_str() if isinstance(tokenizer, Tokenizer) else json.dumps(tokenizer)
    (path / "tokenizer.json").write_text(written)
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", **config}))
    if model_type is not None:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return str(path)


def member(path: str, **given: Any) -> MemberConfig:
    allowed = given.pop("allow_altered_tokenizer", False)
    return MemberConfig(name="m", pretrained=path, loading=FrozenDict(given), allow_altered_tokenizer=allowed)


def load(path: str, **given: Any) -> Any:
    return load_tokenizer(member(path, **given))


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("GPT2Tokenizer", None),
        ("GPT2Tokenizer", "gpt2"),
        ("GPT2TokenizerFast", "llama"),
        ("Qwen2Tokenizer", "llama"),
        ("TokenizersBackend", "qwen2"),  # a class that the model's type forces upon it
    ],
)
def test_a_class_that_replaces_the_pre_tokenizer_is_refused(tmp_path: Path, kind: str, model_type: str | None) -> None:
    tokenizer = cl100k()
    path = folder(tmp_path / "m", tokenizer, model_type, tokenizer_class=kind)
    if kind == "GPT2Tokenizer":  # the bytes are right, the tokens are not
        assert len(AutoTokenizer.from_pretrained(path)("foo\t\tbar").input_ids) > len(
            tokenizer.encode("foo\t\tbar").ids
        )
    loaded = "Qwen2Tokenizer" if "Qwen2" in kind or model_type == "qwen2" else "GPT2Tokenizer"
    both = rf"The class {loaded} replaced its .*pre_tokenizer.* of the file: Split.*ByteLevel.*, loaded: .*ByteLevel"
    example = r"becomes \d+ tokens .* instead of \d+ "
    with pytest.raises(MemberError, match=rf"member 'm'.*{tmp_path}/m/tokenizer.json.*{both}.*{example}"):
        load(path)


def test_the_remedy_works(tmp_path: Path) -> None:
    tokenizer = cl100k()
    path = folder(tmp_path / "m", tokenizer, "qwen2", tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(MemberError) as error:
        load(path)
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in str(error.value) and "tokenizer=FOLDER" in str(error.value)
    own = folder(tmp_path / "own", tokenizer, tokenizer_class="PreTrainedTokenizerFast")
    assert load(path, tokenizer=own)("foo\t\tbar").input_ids == tokenizer.encode("foo\t\tbar").ids


def test_what_is_allowed_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder(tmp_path, cl100k(), tokenizer_class="GPT2Tokenizer")
    with caplog.at_level(logging.WARNING):
        tokenizer = load(path, allow_altered_tokenizer=True)
    assert type(tokenizer).__name__ == "GPT2Tokenizer"
    assert "'m'" in caplog.text and "allow_altered_tokenizer" in caplog.text and "pre_tokenizer" in caplog.text


def test_a_class_forced_onto_another_family_is_named_as_the_cause(tmp_path: Path) -> None:
    """Bytes break, too; that pieces do not spell the text would be true and no help."""
    path = folder(tmp_path, cl100k())
    with pytest.raises(MemberError, match="The class LlamaTokenizer replaced its pre_tokenizer .* and its decoder"):
        require_same(LlamaTokenizer.from_pretrained(path), TokenizerFiles.find(path), name="m")


def test_a_member_is_compared_before_its_weights_are_looked_for(tmp_path: Path, pico: dict[str, Path]) -> None:
    path = folder(tmp_path, cl100k(), "gpt2", tokenizer_class="GPT2Tokenizer")
    with pytest.raises(MemberError, match="is not the one of"):
        load_member(member(path), "cpu")
    with pytest.raises(MemberError, match="is not the one of"):
        deepen(pico["bytelevel"], path)


MERGES = [("t", "h"), ("th", "e"), (SPACE, "the"), (SPACE, "t")]


@pytest.mark.parametrize("legacy", [True, False])
def test_an_equivalent_rewriting_is_accepted(tmp_path: Path, legacy: bool, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level()  # with GPT-2's own regular expression
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)])]
    )
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    load(folder(tmp_path / "gpt2", tokenizer, tokenizer_class="GPT2Tokenizer"))
    with caplog.at_level(logging.WARNING):
        llama = sentencepiece_bpe(MERGES)
        if not legacy:
            llama.normalizer = None
            llama.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        path = folder(tmp_path / "llama", llama, tokenizer_class="LlamaTokenizer", legacy=legacy, **names)
        assert type(load(path)).__name__ == "LlamaTokenizer"
    assert ("not quite" in caplog.text) == legacy  # whether a text with a space gets a second one


def test_a_dummy_space_that_the_file_has_not_is_a_difference(tmp_path: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    path = folder(tmp_path / "none", sentencepiece_bpe(MERGES, prefix_space=False), **names)
    with pytest.raises(MemberError, match=r"the text 'a' begins as \['▁', 'a'\] instead of \['a'\]"):
        load(path)
    first = sentencepiece_bpe(MERGES)
    first.normalizer = None
    first.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    path = folder(tmp_path / "first", first, legacy=True, **names)
    with pytest.raises(MemberError, match=r"the text '<x>a' begins as \['<x>', '▁'\] instead of \['<x>', 'a'\]"):
        load(path)


@pytest.mark.parametrize("where", ["tokenizer.json", "tokenizer_config.json"])
def test_added_tokens_keep_the_ids_of_the_files(tmp_path: Path, where: str) -> None:
    """The library gives added tokens the next free ids, whatever the file says."""
    spec = json.loads(cl100k().to_str())
    size = len(spec["model"]["vocab"])
    token = {"content": "<new>", "special": True, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False}
    given: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if where == "tokenizer.json":
        spec["added_tokens"].append({"id": size + 3, **token})
    else:
        given["added_tokens_decoder"] = {str(size + 3): token}
    with pytest.raises(MemberError, match=r"'<new>' gets .*no id may be left out") as error:
        load(folder(tmp_path / "hole", spec, **given))
    assert f"the file: id {size + 3}, loaded: id {size}" in str(error.value)
    twice = json.loads(cl100k().to_str())
    twice["added_tokens"] += [{"id": size, **token}, {"id": size + 1, **token}]
    load(folder(tmp_path / "twice", twice, tokenizer_class="PreTrainedTokenizerFast"))


def parts(path: str, **loaded: Any) -> list[str]:
    """Name the parts in which a tokenizer would differ from its file if it were loaded with other ones."""
    files = TokenizerFiles.find(path)
    assert files is not None
    found, _ = differences({**files.read(), **loaded}, files)
    return [difference.part for difference in found]


def test_added_tokens_take_the_spaces_that_the_files_say(tmp_path: Path) -> None:
    tokenizer = cl100k()
    tokenizer.add_special_tokens([AddedToken("<end>", rstrip=True)])
    path = folder(tmp_path / "file", tokenizer, tokenizer_class="PreTrainedTokenizerFast")
    load(path)
    added = json.loads(tokenizer.to_str())["added_tokens"]
    other = [*added[:-1], {**added[-1], "rstrip": False}]
    assert parts(path, added_tokens=added) == [] and parts(path, added_tokens=other) == ["added_tokens"]
    assert parts(path, added_tokens=added[:-1]) == ["added_tokens"]
    assert parts(path, added_tokens=[*added, {**added[-1], "id": 400, "content": "<pad>"}]) == []
    listed = {str(added[-1]["id"]): {**added[-1], "rstrip": False}}
    load(folder(tmp_path / "config", tokenizer, added_tokens_decoder=listed))  # one of its files says so


def test_a_bos_that_the_file_adds_is_added(tmp_path: Path) -> None:
    tokenizer = byte_level()
    path = folder(tmp_path / "file", tokenizer)
    bare = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
    bare["pair"] = [*bare["single"], {"Sequence": {"id": "B", "type_id": 1}}]
    for other in (None, bare, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}):
        assert parts(path, post_processor=other) == ["post_processor"]
        assert parts(folder(tmp_path / "asked", tokenizer, add_bos_token=False), post_processor=other) == []
    tokenizer.post_processor = None
    assert parts(folder(tmp_path / "none", tokenizer), post_processor=bare) == []


def codec_of(path: str, size: int | None = None, **given: Any) -> TextCodec:
    config, tokenizer = member(path, **given), load(path, **given)
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return TextCodec.build(
        tokenizer,
        size=size or len(tokenizer),
        eos=eos,
        prefix_id=0,
        add_special=True,
        name="m",
        files=files_of(config),
    )


def test_special_is_what_the_file_marks(tmp_path: Path) -> None:
    """A role makes a piece special in the loaded tokenizer alone."""
    tokenizer = byte_level([AddedToken("<mask>", special=False, normalized=False)])
    word = next(piece for piece in ("caf", "ing", "sing", "talk") if tokenizer.token_to_id(piece))
    given = {"pad_token": "!", "mask_token": "<mask>", "additional_special_tokens": ["(", word, "<|im_end|>"]}
    path = folder(tmp_path, tokenizer, eos_token="\u010a", tokenizer_class="PreTrainedTokenizerFast", **given)
    loaded = AutoTokenizer.from_pretrained(path)
    marked = {token.content for token in loaded.added_tokens_decoder.values() if token.special}
    assert {"!", "<mask>", "(", word, "\u010a"} <= marked  # what the library made of it
    codec = codec_of(path)
    text = f"so (it) is! <mask> {word}s\n\u010a<|im_end|></s>"
    ids = codec.encode(text)
    assert codec.vocab.decode(ids) == text.encode()
    assert ids == codec_of(folder(tmp_path / "plain", tokenizer, tokenizer_class="PreTrainedTokenizerFast")).encode(
        text
    )
    assert codec.vocab.control == {0, 1, 2} and codec.vocab.eos == (tokenizer.token_to_id("\u010a"),)
    assert tokenizer.token_to_id("<mask>") in ids and tokenizer.token_to_id("!") in ids


def test_a_control_piece_that_no_file_lists_stays_one(tmp_path: Path) -> None:
    for tokenizer in (sentencepiece_bpe(MERGES), unigram(byte_fallback=True)):
        spec = {**json.loads(tokenizer.to_str()), "added_tokens": [], "post_processor": None}
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        codec = codec_of(folder(tmp_path, spec, tokenizer_class="PreTrainedTokenizerFast", **names))
        assert codec.vocab.control == {0, 1, 2} and codec.vocab.decode(codec.encode("a</s>")) == b"a</s>"


def test_a_new_token_of_a_role_is_control(tmp_path: Path) -> None:
    path = folder(tmp_path, cl100k(), pad_token="[PAD]", tokenizer_class="PreTrainedTokenizerFast")
    size = cl100k().get_vocab_size()
    assert size in codec_of(path).vocab.control
    small = codec_of(path, size=size)  # no logit was made for it
    assert small.vocab.decode(small.encode("a [PAD]")) == b"a [PAD]"


def test_files_are_found_where_the_tokenizer_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, a folder in it, a hub name in the cache; GGUF files and memory have none."""
    bad = {"tokenizer_class": "GPT2Tokenizer"}
    folder(tmp_path / "repo" / "sub", cl100k(), "llama", **bad)
    with pytest.raises(MemberError, match=r"repo/sub/tokenizer.json"):
        load(str(tmp_path / "repo"), subfolder="sub")
    with pytest.raises(MemberError, match=r"repo/sub/tokenizer.json"):  # a tokenizer beside a GGUF file has files
        load(str(tmp_path), gguf_file="m.gguf", tokenizer=str(tmp_path / "repo" / "sub"))
    assert load(str(tmp_path), gguf_file="m.gguf") is None
    cache = tmp_path / "hub"
    snapshot = cache / "models--some--name" / "snapshots" / ("0" * 40)
    shutil.copytree(tmp_path / "repo" / "sub", snapshot)
    refs = cache / "models--some--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    (refs / "v1").write_text("0" * 40)
    for module in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(module, str(cache), raising=False)
    for given in ({}, {"revision": "v1"}):
        with pytest.raises(MemberError, match="snapshots/0000"):
            load("some/name", **given)
    assert TokenizerFiles.find("some/other") is None and TokenizerFiles.find("") is None
    assert files_of(member(str(tmp_path), gguf_file="m.gguf")) is None
    assert TokenizerFiles.find(str(tmp_path)) is None


def test_a_versioned_file_is_the_one_that_is_compared(tmp_path: Path) -> None:
    path = folder(tmp_path, cl100k(), fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json"])
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "tokenizer.4.0.0.json")
    found = TokenizerFiles.find(path)
    assert found is not None and found.path.name == "tokenizer.4.0.0.json"


@pytest.mark.parametrize("use_fast_tokenizer", [True, False])
def test_pico_tokenizers_are_what_their_files_say(pico, use_fast_tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        for path in pico.values():
            load(str(path), use_fast_tokenizer=use_fast_tokenizer)
    assert not [record for record in caplog.records if record.name.startswith("lm_eval_deepen")]


def test_the_allowance_is_a_key_of_a_member_or_of_all(tmp_path: Path) -> None:
    strict = configure({"members": ["a", "b"]})
    one = configure({"members": [{"pretrained": "a", "allow_altered_tokenizer": True}, "b"]})
    both = configure({"members": ["a", "b"], "allow_altered_tokenizer": True})
    assert [m.allow_altered_tokenizer for m in (*strict.members, *one.members)] == [False, False, True, False]
    assert all(m.allow_altered_tokenizer and not m.loading for m in both.members)
    assert len({config.fingerprint() for config in (strict, one, both)}) == 3
    assert "allow_altered_tokenizer" not in strict.to_dict()["members"][0]
    assert configure(one.to_dict()) == one
    with pytest.raises(ConfigError, match="allow_altered_tokenizer must be true or false; got 'yes'"):
        configure({"pretrained": "a", "allow_altered_tokenizer": "yes"})


def test_pythons_copies_of_a_vocabulary_are_dropped(tmp_path):
    """Those of Gemma's take 145 MB, and nothing reads them."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "a", "b", "ab", *(f"<0x{byte:02X}>" for byte in range(256))]
    GemmaTokenizer({piece: at for at, piece in enumerate(pieces)}, [("a", "b")]).save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert isinstance(loaded, GemmaTokenizer) and not {"_vocab", "_merges"} & vars(loaded).keys()
    assert loaded.encode("abé", add_special_tokens=False) == [7, 8 + 0xC3, 8 + 0xA9]
    assert len(loaded.get_vocab()) == len(pieces)


def test_no_garbage_is_collected_while_tokenizers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enabled, read = [], AutoTokenizer.from_pretrained

    def observed(*args: Any, **kwargs: Any) -> Any:
        enabled.append(gc.isenabled())
        return read(*args, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", observed)
    load(folder(tmp_path, byte_level()))
    with pytest.raises(MemberError):
        load(str(tmp_path / "missing"))
    assert enabled == [False, False]
    assert gc.isenabled()
    gc.disable()
    try:
        with garbage_kept():
            pass
        assert not gc.isenabled()  # whoever switched it off before still has it off
    finally:
        gc.enable()
