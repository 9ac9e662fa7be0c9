"""Item 7: loading arguments reach the member they are meant for, through the harness's own `HFLM`."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from custom_model import write_custom_code, write_gguf
from harness import deepen, hf, requests

from lm_eval_deepen.errors import ConfigError, MemberError
from lm_eval_deepen.harness.model import DeepenLM
from lm_eval_deepen.member.loading import switches

PAIRS = [("The quick brown fox", " jumps over"), ("", "Paris"), ("Question: Where?\nAnswer:", " in the forest")]


def scores(model):
    return [total for total, _ in model.loglikelihood(requests("loglikelihood", *PAIRS))]


def pair(pico, tmp_path, names=("bytelevel", "metaspace"), first=None, second=None, **defaults):
    """Return two members, each with arguments of its own."""
    members = [
        {"name": name, "pretrained": str(pico[name]), **(own or {})}
        for name, own in zip(names, (first, second), strict=True)
    ]
    main = members[0]["pretrained"]
    keys = {"self_check": False, "matrix_dir": str(tmp_path / "matrices"), **defaults}
    return DeepenLM(main, members=members, device="cpu", **keys)


def described(model):
    return model.get_model_info()["deepen"]["members"]


def equal_and_different(path, **arguments):
    """Check that an argument gives `hf`'s scores, and other ones than without it."""
    ours = scores(deepen(path, **arguments))
    assert ours == pytest.approx(scores(hf(path, **arguments)), abs=1e-3)
    assert ours != pytest.approx(scores(deepen(path)), abs=1e-3)


def test_07_dtype(pico, tmp_path):
    model = pair(pico, tmp_path, second={"dtype": "bfloat16"}, dtype="float32")
    assert [member["dtype"] for member in described(model)] == ["float32", "bfloat16"]
    assert [member.lm.model.dtype for member in model.ensemble.members] == [torch.float32, torch.bfloat16]
    assert all(total < 0 for total in scores(model))


def test_07_revision(pico, tmp_path, monkeypatch):
    """A folder has no revisions: what is asked for is seen at the loader."""
    import transformers

    asked = {}
    for loader in (transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        real = loader.from_pretrained

        def spy(name, *args, real=real, loader=loader, **kwargs):
            asked.setdefault(str(name), set()).add(kwargs["revision"])
            return real(name, *args, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", spy)
    model = pair(pico, tmp_path, first={"revision": "step1000"}, second={"revision": "step2000"})
    assert asked == {str(pico["bytelevel"]): {"step1000"}, str(pico["metaspace"]): {"step2000"}}
    assert [member["revision"] for member in described(model)] == ["step1000", "step2000"]
    assert model.get_model_info()["model_revision"] == "step1000"


def test_07_tokenizer(pico, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(pico["metaspace"], folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    model = pair(pico, tmp_path, second={"tokenizer": str(folder)})
    main, other = model.ensemble.members
    assert (main.lm.tokenizer.name_or_path, other.lm.tokenizer.name_or_path) == (str(pico["bytelevel"]), str(folder))
    assert other.has_chat_template
    equal_and_different(pico["metaspace"], tokenizer=str(pico["bytelevel"]))


def test_07_max_length(pico, tmp_path):
    model = pair(pico, tmp_path, second={"max_length": 48}, max_length=64)
    assert [member["max_length"] for member in described(model)] == [64, 48]
    assert model.max_length == 64 == hf(pico["bytelevel"], max_length=64).max_length


def test_07_add_bos_token(pico, tmp_path):
    equal_and_different(pico["metaspace"], add_bos_token=False)
    model = pair(pico, tmp_path, second={"add_bos_token": False})
    assert model.ensemble.members[0].lm.add_bos_token is None
    assert model.ensemble.members[1].codec.automatic_prefix == ()
    assert scores(model) != pytest.approx(scores(pair(pico, tmp_path)), abs=1e-4)


def test_07_prefix_token_id(pico, tmp_path):
    equal_and_different(pico["metaspace"], prefix_token_id=1)
    model = pair(pico, tmp_path, second={"prefix_token_id": 1})
    assert [member.codec.prefix_ids for member in model.ensemble.members] == [(0,), (1,)]
    assert model.prefix_token_id == 0


@pytest.mark.parametrize("prefix", [400, 10**12, -1, "2", 2.0, True, float("nan")], ids=str)
def test_07_a_prefix_token_that_is_none_is_an_error_that_names_it(pico, tmp_path, prefix):
    """In `hf` it fails at the first request, or none."""
    words = f"member.*prefix_token_id={re.escape(repr(prefix))}.*leave it out"
    with pytest.raises(ConfigError, match=words):
        deepen(pico["bytelevel"], prefix_token_id=prefix)
    with pytest.raises(ConfigError, match=words):
        pair(pico, tmp_path, first={"prefix_token_id": prefix})


@pytest.mark.parametrize("key", ["add_bos_token", "trust_remote_code", "enable_thinking", "truncation", "load_in_8bit"])
def test_07_a_switch_given_as_text_is_an_error(pico, tmp_path, key):
    """`hf` takes the text "false" for true."""
    assert {"logits_cache", "use_fast_tokenizer", "parallelize", "gptqmodel"} <= set(switches())
    with pytest.raises(ConfigError, match=f"'metaspace': {key}='false' must be true or false.*without quotes"):
        pair(pico, tmp_path, second={key: "false"})


def test_07_trust_remote_code(pico, tmp_path, monkeypatch):
    modules = tmp_path / "modules"
    for where in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{where}.HF_MODULES_CACHE", str(modules), raising=False)
    monkeypatch.syspath_prepend(str(modules))
    own = write_custom_code(pico["bytelevel"], tmp_path / "own_llama")
    with pytest.raises(MemberError, match="member 'm0': cannot load .*trust_remote_code"):
        deepen(own)
    ours, theirs = deepen(own, trust_remote_code=True), hf(own, trust_remote_code=True)
    assert type(ours.model).__name__ == "OwnForCausalLM"
    assert scores(ours) == pytest.approx(scores(theirs), abs=1e-4)
    assert scores(ours) != pytest.approx(scores(deepen(pico["bytelevel"])), abs=1e-3)
    trusting = {"pretrained": str(own), "trust_remote_code": True}
    model = pair(pico, tmp_path, names=("metaspace", "bytelevel"), second=trusting)
    assert [type(m.lm.model).__name__ for m in model.ensemble.members] == ["Gemma3ForCausalLM", "OwnForCausalLM"]
    assert all(total < 0 for total in scores(model))


def test_07_peft(pico, tmp_path):
    peft = pytest.importorskip("peft")
    base = hf(pico["metaspace"]).model
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(5)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    equal_and_different(pico["metaspace"], peft=adapter)
    model = pair(pico, tmp_path, second={"peft": adapter})
    assert [hasattr(member.lm.model, "peft_config") for member in model.ensemble.members] == [False, True]
    assert scores(model) != pytest.approx(scores(pair(pico, tmp_path)), abs=1e-4)
    batch = requests("generate_until", ("The fox", {"until": [], "max_gen_toks": 8}))
    theirs = hf(pico["metaspace"], peft=adapter)
    assert deepen(pico["metaspace"], peft=adapter).generate_until(batch) == theirs.generate_until(batch)


def test_07_gguf_file(pico, tmp_path):
    pytest.importorskip("gguf")
    reference = deepen(pico["bytelevel"])
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_gguf(reference.ensemble.main.lm, folder / "pico.gguf")
    given = {"gguf_file": "pico.gguf", "tokenizer": str(pico["bytelevel"])}
    ours = scores(deepen(folder, **given))
    assert ours == pytest.approx(scores(hf(folder, **given)), abs=1e-4)
    assert ours == pytest.approx(scores(reference), abs=1e-3)
    quantised = {"pretrained": str(folder), **given}
    model = pair(pico, tmp_path, names=("metaspace", "bytelevel"), second=quantised)
    plain = scores(pair(pico, tmp_path, names=("metaspace", "bytelevel")))
    assert scores(model) == pytest.approx(plain, rel=1e-3)  # the file holds half precision


def test_07_a_member_that_cannot_be_loaded_is_an_error_that_names_it(pico, tmp_path):
    with pytest.raises(MemberError, match="member 'metaspace': cannot load .*no_such_adapter"):
        pair(pico, tmp_path, second={"peft": "no_such_adapter"})


@pytest.mark.parametrize("length", ["40", 40.0], ids=repr)
def test_07_a_whole_number_may_be_spelt_otherwise(pico, length):
    """`hf` compares the text with a number, or cuts prompts by 40.0, and fails."""
    model, text = deepen(pico["bytelevel"], max_length=length), requests("loglikelihood_rolling", ("The fox. " * 40,))
    assert model.loglikelihood_rolling(text) == deepen(pico["bytelevel"], max_length=40).loglikelihood_rolling(text)
    assert model.ensemble_config.members[0].loading["max_length"] == 40


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backend": "seq2sec"}, "backend must be 'default', 'causal' or 'seq2seq'"),
        ({"chat_template_args": '{"enable_thinking": false}'}, "chat_template_args must be a mapping"),
        ({"chat_template_args": {"add_generation_prompt": False}}, "'add_generation_prompt', which the harness gives"),
        ({"mixed_precision_dtype": "auto"}, "mixed_precision_dtype='auto' must be the name of a type of torch"),
        ({"dtype": "fp16"}, "dtype='fp16' must be the name of a type of torch"),
        ({"dtype": "int8"}, "dtype='int8' must be the name of a type of torch"),
        ({"think_end_token": -1}, "think_end_token must be a token's text, or its id of at least 0; got -1"),
        ({"think_end_token": ""}, "think_end_token must be a token's text"),
    ],
    ids=str,
)
def test_07_a_value_that_would_fail_later_is_an_error_before_anything_loads(
    pico, tmp_path, monkeypatch, arguments, words
):
    """In `hf` it fails at the first conversation or forward pass, without the argument's name, or changes nothing."""
    monkeypatch.setattr("lm_eval_deepen.engine.ensemble.load_member", None)
    for given in ({"first": arguments, "second": arguments}, arguments):
        with pytest.raises(ConfigError, match=re.escape(words)):
            pair(pico, tmp_path, **given)
