"""Weight merging: what mergekit is given, what it gives, and everything that is refused before it runs."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from sibling_models import MERGES, configured, family_of, merge_of, parsed, tensors, with_head, write_sibling
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from lm_eval_deepen.build import build, read_build
from lm_eval_deepen.build.architecture import IncompatibleError, check_alike, read_otherwise
from lm_eval_deepen.build.merge_config import METHODS
from lm_eval_deepen.build.weights import weights_sha256
from lm_eval_deepen.errors import ConfigError

needs_mergekit = pytest.mark.skipif(
    importlib.util.find_spec("mergekit") is None, reason="mergekit is not installed: pip install '.[merge]'"
)


@pytest.fixture(scope="module")
def family(pico, tmp_path_factory):
    return family_of(pico["bytelevel"], tmp_path_factory.mktemp("family"))


@pytest.fixture
def merged(family, tmp_path, monkeypatch):
    """Builds a configuration and returns the folder; without measuring, which test_building does."""
    monkeypatch.setattr("lm_eval_deepen.build.publish.measured_bits", lambda folder: {})

    def merged(raw, name="out", seed=0):
        build(parsed({**raw, "seed": seed}, tmp_path), tmp_path / name, family)
        return tmp_path / name

    return merged


def test_every_method_of_the_table_has_its_parameters_checked():
    assert set(METHODS) == set(MERGES)


@needs_mergekit
def test_the_parameters_known_here_are_those_of_mergekit():
    from mergekit.merge_methods.registry import get

    for name, parameters in METHODS.items():
        assert parameters == {parameter.name for parameter in get(name).spec.parameters}


@needs_mergekit
@pytest.mark.parametrize("method", MERGES)
def test_merging_a_model_with_itself_gives_the_model(merged, pico, tmp_path, method):
    same = tensors(pico["bytelevel"])
    twins = [str(write_sibling(pico["bytelevel"], tmp_path / name, 0, scale=0.0)) for name in ("one", "two")]
    raw = merge_of(method, twins[:1] if method == "slerp" else twins, base=None if method == "linear" else "base")
    found = tensors(merged(raw))
    assert found.keys() == same.keys()
    for name, value in same.items():
        assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-7), name


@needs_mergekit
def test_linear_is_the_mean(merged, family):
    found = tensors(merged(merge_of("linear", ["s1", "s2", "s3"], base=None)))
    own = [tensors(Path(family[name])) for name in ("s1", "s2", "s3")]
    for name, value in found.items():
        assert torch.allclose(value, sum(one[name] for one in own) / 3, atol=1e-6), name


@needs_mergekit
def test_task_arithmetic_adds_the_differences(merged, family):
    found = tensors(merged(merge_of("task_arithmetic", ["s1", "s2"], weight=0.3)))
    base, first, second = (tensors(Path(family[name])) for name in ("base", "s1", "s2"))
    for name, value in found.items():
        want = base[name] + 0.3 * (first[name] - base[name]) + 0.3 * (second[name] - base[name])
        assert torch.allclose(value, want, atol=1e-6), name


@needs_mergekit
def test_slerp_is_the_great_circle(merged, family):
    found = tensors(merged(merge_of("slerp", ["base", "s1"], t=0.25)))
    base, other = tensors(Path(family["base"])), tensors(Path(family["s1"]))
    for name, value in found.items():
        a, b = base[name].double().flatten(), other[name].double().flatten()
        cosine = float((a @ b) / (a.norm() * b.norm()))
        if cosine > 0.9995:
            want = 0.75 * a + 0.25 * b
        else:
            angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
            want = (torch.sin(0.75 * angle) * a + torch.sin(0.25 * angle) * b) / torch.sin(angle)
        assert torch.allclose(value.double().flatten(), want, atol=1e-5), name


@needs_mergekit
def test_a_merge_depends_on_its_seed_alone(merged, family, tmp_path, pico):
    raw = merge_of("dare_ties", ["s1", "s2", "s3"])
    first, again, other = merged(raw, "a"), merged(raw, "b"), merged(raw, "c", seed=1)
    assert weights_sha256(first) == weights_sha256(again) != weights_sha256(other)
    moved = {**family, "s1": str(write_sibling(pico["bytelevel"], tmp_path / "zz" / "elsewhere", 1))}
    build(parsed(raw, tmp_path), tmp_path / "d", moved)
    assert weights_sha256(tmp_path / "d") == weights_sha256(first)  # nor on where its models are
    for method in ("linear", "ties"):
        raw = merge_of(method, ["s1", "s2"], base=None if method == "linear" else "base")
        assert weights_sha256(merged(raw, f"{method}0")) == weights_sha256(merged(raw, f"{method}1", seed=1))


@needs_mergekit
def test_tokenizer_and_configuration_come_from_the_first_model(merged, family, tmp_path):
    other = configured(Path(family["s2"]), tmp_path / "other", rms_norm_eps=0.5)
    for order, eps in ((["s1", str(other)], 1e-6), ([str(other), "s1"], 0.5)):
        folder = merged(merge_of("linear", order, base=None), f"eps{eps}")
        assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == eps
        assert (folder / "tokenizer.json").read_bytes() == (Path(family["s1"]) / "tokenizer.json").read_bytes()


@needs_mergekit
def test_an_ordinary_model_folder_comes_out(merged):
    from lm_eval_deepen.engine import Ensemble
    from lm_eval_deepen.harness.model import configure

    folder = merged(merge_of("ties", ["s1", "s2"]))
    logp = Ensemble.load(configure({"pretrained": str(folder)}), "cpu").next_logp("The capital of").logp
    assert torch.isfinite(logp).all() and float(logp.exp().sum()) == pytest.approx(1, abs=1e-4)


@needs_mergekit
def test_tensors_that_mergekit_does_not_know_are_told(pico, tmp_path):
    config = AutoConfig.from_pretrained(pico["bytelevel"], attention_bias=True)
    for name in ("one", "two"):
        shutil.copytree(pico["bytelevel"], tmp_path / name)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    raw = merge_of("linear", [str(tmp_path / name) for name in ("one", "two")], base=None)
    told = r"recipe.yaml: the merge cannot be loaded \(.*what mergekit made lack 8 weights .*as biases. Distil them"
    with pytest.raises(ConfigError, match=told):
        build(parsed(raw, tmp_path), tmp_path / "out", {})
    assert not list(tmp_path.glob("*out*/*"))


@needs_mergekit
def test_a_stored_head_is_merged_whatever_the_configuration_says_of_ties(merged, family, tmp_path):
    own, other = (tensors(Path(family[name])) for name in ("s1", "s2"))
    head = torch.randn(own["lm_head.weight"].shape, generator=torch.Generator().manual_seed(3))
    tied = {"tie_word_embeddings": True}
    for case, (first, second, ties) in enumerate(
        [(head, other["lm_head.weight"], False), (head, None, False), (None, head, False),
         (None, None, True), (own["model.embed_tokens.weight"], None, True)]
    ):  # fmt: skip
        folders = [
            with_head(Path(family[name]), tmp_path / f"{name}-{case}", given, **tied)
            for name, given in (("s1", first), ("s2", second))
        ]
        folder = merged(merge_of("linear", list(map(str, folders)), base=None), f"out{case}")
        heads = [AutoModelForCausalLM.from_pretrained(place).lm_head.weight for place in (*folders, folder)]
        assert torch.allclose(heads[2], (heads[0] + heads[1]) / 2, atol=1e-6)
        # transformers 5 sees that they differ; other readers do what the configuration says
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is ties


@needs_mergekit
@pytest.mark.parametrize("method", ["dare_ties", "dare_linear", "ties", "linear"])
@pytest.mark.parametrize("ties", [True, False])
def test_a_head_that_is_the_embedding_stays_so_where_the_sources_say_it(merged, family, tmp_path, method, ties):
    """Random masks of a stored head are others than those of the embedding; so are values by filter."""
    names = {}
    for name in ("base", "s1", "s2"):
        head = tensors(Path(family[name]))["model.embed_tokens.weight"]
        names[name] = str(with_head(Path(family[name]), tmp_path / name, head, tie_word_embeddings=ties))
    base = None if method == "linear" else names["base"]
    raw = merge_of(method, [names["s1"], names["s2"]], base=base)
    raw["models"][0]["parameters"] = {
        **MERGES[method], "weight": [{"filter": "lm_head", "value": 0.9}, {"value": 0.5}]
    }  # fmt: skip
    folder = merged(raw)
    model, held = AutoModelForCausalLM.from_pretrained(folder), tensors(folder)
    assert model.config.tie_word_embeddings is ties
    assert torch.equal(model.lm_head.weight, held["lm_head.weight"])
    assert torch.equal(held["lm_head.weight"], held["model.embed_tokens.weight"]) is ties
    if method != "linear":
        want = held["model.embed_tokens.weight"] - tensors(Path(names["base"]))["model.embed_tokens.weight"]
        assert want.any()


@needs_mergekit
@pytest.mark.parametrize("last", ["s1", "s2"])
def test_a_head_of_the_last_layers_model_is_not_the_embedding_of_the_firsts(merged, family, tmp_path, last):
    places = {}
    for name in ("s1", "s2"):
        head = tensors(Path(family[name]))["model.embed_tokens.weight"]
        places[name] = with_head(Path(family[name]), tmp_path / name, head, tie_word_embeddings=True)
    sources = [{"sources": [{"model": str(places[name]), "layer_range": [0, 1]}]} for name in ("s1", last)]
    folder = merged({"merge_method": "passthrough", "dtype": "float32", "slices": sources})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings is (last == "s1")
    assert torch.equal(model.lm_head.weight, tensors(places[last])["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, tensors(places["s1"])["lm_head.weight"])


@needs_mergekit
def test_a_folder_may_have_any_name(merged, family, tmp_path):
    ways = {"model": lambda name: ([name, "s2", "s3"], "base"), "base": lambda name: (["s3"], name)}
    for way, given in ways.items():
        models, base = given("s1")
        plain = weights_sha256(merged(merge_of("task_arithmetic", models, base=base), f"plain-{way}"))
        for name in ("s1@v2", "a+b", "c@1+d@2"):
            folder = shutil.copytree(family["s1"], tmp_path / name, dirs_exist_ok=True)
            models, base = given(str(folder))
            found = merged(merge_of("task_arithmetic", models, base=base), f"{name}-{way}")
            assert weights_sha256(found) == plain, (name, way)


@needs_mergekit
def test_a_model_may_give_its_tokenizer_alone(merged, family, tmp_path):
    larger = configured(Path(family["base"]), tmp_path / "larger", hidden_size=64, rms_norm_eps=0.5)
    (larger / "model.safetensors").write_bytes((Path(family["s3"]) / "model.safetensors").read_bytes())
    raw = {"tokenizer_source": str(larger), **merge_of("linear", ["s1", "s2"], base=None)}
    assert parsed(raw, tmp_path).architecture_of == "s1"
    found, plain = tensors(merged(raw)), tensors(merged(merge_of("linear", ["s1", "s2"], base=None), "plain"))
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


@needs_mergekit
def test_what_a_merge_gets_is_told_of_the_base_model(merged, family, tmp_path, caplog):
    other = configured(Path(family["base"]), tmp_path / "other", rms_norm_eps=0.5)
    folder = merged({**merge_of("task_arithmetic", ["s1"], base=None), "base_model": str(other)})
    assert json.loads((folder / "config.json").read_text())["rms_norm_eps"] == 0.5
    assert "rms_norm_eps is 0.5 in" in caplog.text and "which the merge gets, and 1e-06 in s1" in caplog.text


def of_kind(kind, config, pico, folder, **tie):
    """Write a small model of another architecture, with a pico tokenizer."""
    shutil.copytree(pico["bytelevel"], folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    kind(config(vocab_size=vocabulary, **sizes, **heads, **tie)).save_pretrained(folder)
    return folder


@needs_mergekit
@pytest.mark.parametrize(
    ("kind", "config", "without", "why"),
    [
        (GemmaForCausalLM, GemmaConfig, False, "mergekit knows none of GemmaForCausalLM"),
        (OlmoForCausalLM, OlmoConfig, True, "b stores none"),
    ],
)
def test_a_head_that_mergekit_would_leave_out_is_refused(merged, pico, tmp_path, kind, config, without, why):
    folder = of_kind(kind, config, pico, tmp_path / "plain", tie_word_embeddings=True)
    head = torch.ones_like(tensors(folder)["model.embed_tokens.weight"])
    names = [str(with_head(folder, tmp_path / "a", head))]
    names.append(str(with_head(folder, tmp_path / "b", None if without else head)))
    with pytest.raises(ConfigError, match=rf"a has an output head .*lm_head.weight.*{why}: .*fusellm"):
        merged(merge_of("linear", names, base=None))
    names[0] = str(folder)  # without a head of its own there is nothing to leave out
    if without:
        merged(merge_of("linear", names, base=None))


@needs_mergekit
def test_a_head_that_is_nowhere_is_not_replaced_by_the_embedding(merged, family, tmp_path):
    lacking = with_head(Path(family["s2"]), tmp_path / "lacking", None)
    with pytest.raises(ConfigError, match=r"lacking lack the output head lm_head.weight, .*tie_word_embeddings: false"):
        merged(merge_of("linear", ["s1", str(lacking)], base=None))


# --- refusals


DARE = {"weight": 0.5}


def placed(*models, **parts):
    """Return a configuration of dare_ties with these models, or slices, or modules."""
    return {"merge_method": "dare_ties", "base_model": "base", **({"models": list(models)} if models else {}), **parts}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], r"recipe.yaml: a recipe holds merge_method, or method; got list"),
        ({"models": []}, r"give merge_method: linear.* or method: clm or fusellm.*; got the keys models"),
        ({"merge_method": "linear", "method": "clm"}, r"and not both"),
        ({"method": "fusellmm"}, r"method 'fusellmm' is unknown. Did you mean 'fusellm'"),
        ({**merge_of("linear", ["a", "b"]), "paramters": {}}, r"unknown key 'paramters'. Did you mean 'parameters'"),
        ({**merge_of("linear", ["a", "b"]), "slices": [{}]}, r"one of models, slices, modules; got models and slices"),
        ({"merge_method": "linear"}, r"one of models, slices, modules; got none of them"),
        (merge_of("linear", ["a", "b"], wieght=1), r"parameters: parameter 'wieght' .*Did you mean 'weight'"),
        (merge_of("linear", ["a", "a"]), r"model 'a' is listed twice"),
        (merge_of("slerp", ["a"], weight=1), r"parameters: parameter 'weight' is none of slerp's"),
        (merge_of("linear", ["a"], base=None), r"one model alone is no merge"),
        (merge_of("ties", ["a", "b"], base=None), r"ties needs base_model, the model that the others were"),
        (merge_of("slerp", ["a", "b"], base=None), r"slerp needs base_model, the model that it starts from; got none"),
        (merge_of("slerp", ["a", "b"]), r"slerp merges two models, base_model and one other; got base and a, b"),
        ({**merge_of("linear", ["a", "b"]), "models": ["a"]}, r"models must be a list of mappings with model"),
        (merge_of("dare_ties", ["a"], **DARE), r"dare_ties drops .* below 1: .*got none, which is 1 to mergekit for a"),
        (merge_of("dare_linear", ["a"], density=1.0, **DARE), r"density above 0 and below 1: .*; got 1.0 for a"),
        (merge_of("dare_linear", ["a"], density=0, **DARE), r"; got 0 for a"),
        (merge_of("dare_linear", ["a"], density="half", **DARE), r"; got 'half' for a"),
        (merge_of("dare_ties", ["a"], density=[1, 1.0], **DARE), r"; got \[1, 1.0\] for a"),
        ({**merge_of("dare_ties", ["a"], **DARE), "seed": "x"}, r"recipe.yaml: seed"),
        (merge_of("ties", ["base", "a"], weight=1), r"ties .* needs a density: .*; got none for a, which is 1 to mer"),
        (placed({"model": "a", "weight": 1}), r"models\[0\]: unknown key 'weight'. It takes: model, parameters"),
        (placed({"model": {"model": {"path": "a"}}}), r"models\[0\].model must be a model's name, as text; got {'mod"),
        (placed({"model": "a", "parameters": [1]}), r"models\[0\].parameters must be a mapping .*; got \[1\]"),
        (placed(slices="a"), r"recipe.yaml: slices must be a list of mappings with sources .*; got 'a'"),
        (placed(slices=[{"sources": None}]), r"slices\[0\] must have sources"),
        (placed(slices=[{"sources": ["a"]}]), r"slices\[0\].sources must be a list of mappings with model .*'a'"),
        (placed(slices=[{"sources": [{"modl": "a"}]}]), r"slices\[0\].sources\[0\]: unknown key 'modl'. Did you mean"),
        (placed({"model": "a"}, tokenizer={"sorce": "base"}), r"tokenizer must be a mapping with source and tokens"),
        (placed({"model": "a"}, tokenizer={"tokens": ["x"]}), r"tokenizer.tokens must be a mapping of mappings"),
        (placed({"model": "a"}, tokenizer={"tokens": {"x": {"a": 1}}}), r"tokenizer.tokens.x: unknown key 'a'"),
        (placed(modules=[1]), r"modules must be a mapping of mappings"),
        (placed(modules={"default": {"models": [{}]}}), r"modules.default.models\[0\] must have model"),
    ],
)  # fmt: skip
def test_recipes_that_mean_something_else_are_refused(tmp_path, raw, message):
    with pytest.raises(ConfigError, match=message):
        parsed(raw, tmp_path)


@pytest.mark.parametrize(
    "density",
    [
        [1.0, {"filter": "mlp", "value": 0.5}],  # the first entry takes all
        [{"filter": "mlp", "value": 0.5}],  # mergekit's default, 1, takes the rest
        [{"filter": "mlp", "value": [1.0, 1.0]}, {"value": 1.0}, {"value": 0.5}],
        [],
    ],
)
def test_a_density_that_no_tensor_gets_is_none(tmp_path, density):
    with pytest.raises(ConfigError, match="density above 0 and below 1"):
        parsed(merge_of("dare_ties", ["a"], density=density, **DARE), tmp_path)


def test_dropping_needs_a_model_beside_the_base(tmp_path):
    with pytest.raises(ConfigError, match="dare_ties merges differences to base_model, and no other model is listed"):
        parsed(merge_of("dare_ties", ["base"], density=0.5, **DARE), tmp_path)


def test_a_key_that_an_older_file_lacks_is_no_difference(pico, tmp_path):
    old = configured(pico["bytelevel"], tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    assert config["head_dim"] == config["hidden_size"] // config["num_attention_heads"]
    for key in ("head_dim", "tie_word_embeddings"):
        config.pop(key, None)
    (old / "config.json").write_text(json.dumps(config))
    check_alike({"old": str(old), "new": str(pico["bytelevel"])}, True, True)
    other = configured(pico["bytelevel"], tmp_path / "other", head_dim=2)
    with pytest.raises(IncompatibleError, match="head_dim is 2 in other and [0-9]+ in old"):
        check_alike({"other": str(other), "old": str(old)}, True, True)


def test_how_models_read_the_same_tensors_is_told_where_it_differs(pico, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    other = configured(pico["bytelevel"], tmp_path / "other", rope_parameters=rope)
    alike = configured(pico["bytelevel"], tmp_path / "alike")
    places = {"a": str(pico["bytelevel"]), "b": str(alike), "c": str(other)}
    check_alike(places, True, True)
    [told] = read_otherwise(places)
    assert told.startswith("rope_parameters is {") and "500000.0" in told and told.endswith("in c")
    assert not read_otherwise({"a": places["a"], "b": places["b"]})


def test_tokenizers_of_hub_models_are_compared(pico, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    places = {}
    for name in ("a", "b"):
        snapshot = tmp_path / f"models--org--{name}" / "snapshots" / ("1" * 40)
        shutil.copytree(pico["bytelevel"], snapshot)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("1" * 40)
        places[f"org/{name}"] = f"org/{name}"
    check_alike(places, True, True)
    raw = json.loads((snapshot / "tokenizer.json").read_text("utf-8"))
    ids = raw["model"]["vocab"]
    ids["P"], ids["Q"] = ids["Q"], ids["P"]
    (snapshot / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    with pytest.raises(IncompatibleError, match="vocabularies differ: 'P' has the id"):
        check_alike(places, True, True)
    (snapshot / "tokenizer.json").unlink()  # nor is it known that the repository has none
    with pytest.raises(ConfigError, match="model 'org/b': tokenizer.json of 'org/b' cannot be had from the hub"):
        check_alike(places, True, True)


def test_the_tokenizers_tokens_may_name_members(tmp_path):
    tokens = {"<|x|>": {"source": "s1"}, "<|y|>": {"source": {"kind": "model_token", "model": "s2", "token": "y"}}}
    recipe = parsed({**merge_of("ties", ["s3"]), "tokenizer": {"source": "union", "tokens": tokens}}, tmp_path)
    assert set(recipe.models) == {"base", "s1", "s2", "s3"}
    located = recipe.located({name: f"org/{name}" for name in recipe.models})["tokenizer"]
    assert located["source"] == "union" and located["tokens"]["<|x|>"] == {"source": "org/s1"}


def test_a_density_may_stand_anywhere(tmp_path):
    raw = merge_of("dare_ties", ["base", "a"], **DARE)  # the base has no difference, and needs no density
    with pytest.raises(ConfigError, match="for a"):
        parsed(raw, tmp_path)
    parsed({**raw, "parameters": {"density": 0.5}}, tmp_path)
    parsed({**raw, "parameters": {"density": [0.3, 1.0]}}, tmp_path)
    parsed({**raw, "parameters": {"density": [{"filter": "mlp", "value": 0.5}, 1.0]}}, tmp_path)
    sources = [{"model": "a", "layer_range": [0, 2], "parameters": DARE}]
    sliced = {"merge_method": "dare_ties", "base_model": "base", "slices": [{"sources": sources}]}
    with pytest.raises(ConfigError, match="got none"):
        parsed(sliced, tmp_path)
    parsed({**sliced, "slices": [{"sources": sources, "parameters": {"density": 0.5}}]}, tmp_path)


def test_normalising_dare_is_warned_of(tmp_path):
    raw = merge_of("dare_linear", ["a", "b"])
    with pytest.warns(UserWarning, match="recipe.yaml: parameters: normalize: true with dare_linear divides"):
        parsed({**raw, "parameters": {"normalize": True}}, tmp_path)
    with pytest.warns(UserWarning, match="normalize: true with dare_linear"):
        parsed({**raw, "parameters": {"normalize": "true"}}, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parsed({**raw, "parameters": {"normalize": False}}, tmp_path)
        parsed({**merge_of("ties", ["a", "b"]), "parameters": {"normalize": True}}, tmp_path)


def test_other_architectures_are_refused_before_weights_load(family, pico, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mergekit.merge", None)  # nothing may get so far
    members = {**family, "gemma": str(pico["metaspace"])}
    raw = merge_of("linear", ["s1", "gemma"], base=None)
    told = r"architectures differ: architectures is \['LlamaForCausalLM'\] in s1 and \['Gemma3ForCausalLM'\] in gemma"
    with pytest.raises(IncompatibleError, match=f"{told}.*method: fusellm"):
        build(parsed(raw, tmp_path), tmp_path / "out", members)
    assert not (tmp_path / "out").exists()


def test_other_shapes_and_vocabularies_are_refused(family, tmp_path):
    first = Path(family["s1"])
    for key, value, label in (
        ("hidden_size", 64, "architectures differ: hidden_size is 32 in s1 and 64 in other"),
        ("attention_bias", True, "architectures differ: attention_bias is False in s1 and True in other"),
        ("num_hidden_layers", 3, "architectures differ: num_hidden_layers is 2 in s1 and 3 in other"),
        ("vocab_size", 500, "vocabularies differ: vocab_size is 400 in s1 and 500 in other"),
    ):
        members = {**family, "other": str(configured(first, tmp_path / key, **{key: value}))}
        with pytest.raises(IncompatibleError, match=label):
            build(parsed(merge_of("ties", ["s1", "other"]), tmp_path), tmp_path / "out", members)
    swapped = configured(first, tmp_path / "swapped")
    raw = json.loads((swapped / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    one, two = (piece for piece, index in vocab.items() if index in (300, 301))
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (swapped / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(IncompatibleError, match="vocabularies differ: .* has the id 30[01] in s1 and 30[01] in swap"):
        build(parsed(merge_of("ties", ["s1", "swapped"]), tmp_path), tmp_path / "out", {
            **family, "swapped": str(swapped)})  # fmt: skip


def test_models_that_are_nowhere_are_named_with_the_nearest(family, tmp_path):
    told = r"recipe.yaml: model 's4' is no member, and no folder in .*Did you mean 's\d'.*--member s4=FOLDER"
    with pytest.raises(ConfigError, match=told):
        build(parsed(merge_of("linear", ["s1", "s4"]), tmp_path), tmp_path / "out", family)


def test_without_mergekit_the_command_is_told(family, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mergekit", None)
    with pytest.raises(ConfigError, match=r"mergekit, which is not installed: pip install 'lm_eval_deepen\[merge\]'"):
        build(parsed(merge_of("linear", ["s1", "s2"]), tmp_path), tmp_path / "out", family)
    with pytest.raises(ConfigError, match="not installed"):
        parsed(merge_of("nearswap", ["a", "b"], t=0.1), tmp_path)


@needs_mergekit
def test_what_only_mergekit_has_is_taken_and_what_it_refuses_is_told(family, tmp_path):
    recipe = parsed(merge_of("karcher", ["s1", "s2"], base=None, max_iter=3), tmp_path)
    assert recipe.models == ("s1", "s2")
    with pytest.raises(ConfigError, match="merge_method 'nearswop' is unknown. Did you mean 'nearswap'"):
        parsed(merge_of("nearswop", ["a", "b"], t=0.1), tmp_path)
    raw = merge_of("linear", ["s1", "s2"], normalize=True)  # no weight, which mergekit wants
    with pytest.raises(ConfigError, match="mergekit refuses the merge: RuntimeError: Missing required parameter w"):
        build(parsed(raw, tmp_path), tmp_path / "out", family)
    assert not (tmp_path / "out").exists()


def test_the_shipped_merges_are_sound():
    folder = Path(__file__).resolve().parents[2] / "matrices"
    found = {path.stem: read_build(path) for path in sorted(folder.glob("merge_*.yaml"))}
    assert {recipe.method for recipe in found.values()} == set(METHODS)
    assert all(f"merge_{recipe.method}" == name and recipe.title for name, recipe in found.items())
