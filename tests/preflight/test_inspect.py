"""``lm-eval-deepen inspect``: what it reports is what loading finds, and what would fail is numbered."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pico_seq2seq
import pytest
import torch
import yaml
from safetensors.torch import save_file
from sibling_models import configured, tensors, with_head

from lm_eval_deepen.cli.main import main
from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.engine.memory import kv_bytes
from lm_eval_deepen.errors import MemberError
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.member.configuration import is_left_out
from lm_eval_deepen.preflight import cost as inspect_cost
from lm_eval_deepen.preflight import files as inspect_files
from lm_eval_deepen.preflight.files import ModelFiles, TensorHeader, estimate_parameters, look_up, read_header
from lm_eval_deepen.preflight.members import Inspected

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from tiny_models import tiny_model  # noqa: E402

LLAMA_13B = {
    "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
    "num_attention_heads": 40, "num_key_value_heads": 40, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
MIXTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_30B = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def recipe(tmp_path: Path, pico: dict[str, Path], *names: str, **keys: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    content = {"members": [{"pretrained": str(pico[name])} for name in names], **keys}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def report(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, dict[str, Any]]:
    status = main(["inspect", *argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture
def inspected(tmp_path, pico, capsys):
    """Returns a function that inspects a recipe of pico models, without its tasks unless told otherwise."""

    def inspect(*argv: str, names=("bytelevel", "metaspace"), **keys: Any) -> tuple[int, dict[str, Any]]:
        return report(capsys, str(recipe(tmp_path, pico, *names, **keys)), *(argv or ["--no-tasks"]))

    return inspect


def text(capsys: pytest.CaptureFixture, *argv: str) -> tuple[int, str]:
    status = main(["inspect", *argv])
    return status, capsys.readouterr().out.rstrip()


# --- what it says is what loading finds


@pytest.mark.parametrize(
    "options",
    [
        {"rows": "embedding", "top_m": 0},
        {"rows": "embedding", "normalization": "cosine"},
        {"rows": "embedding", "embeddings": "output", "top_m": 0},
        {"rows": "exact", "top_m": 0, "row_entropy": 2.0},
        {},
    ],
)
def test_the_report_agrees_with_the_loaded_ensemble(tmp_path, pico, inspected, options) -> None:
    names = ("bytelevel", "metaspace", "padded")
    status, found = inspected(names=names, **options)
    assert status == 0 and found["ready"], found["problems"]
    arguments = {"pretrained": str(pico[names[0]]), "members": [str(pico[name]) for name in names], **options}
    ensemble = Ensemble.load(configure({**arguments, "matrix_dir": str(tmp_path / "matrices")}), "cpu")
    for fact, member in zip(found["members"], ensemble.members, strict=True):
        assert fact["parameters"] == sum(p.numel() for p in member.lm.model.parameters())
        assert fact["vocabulary"]["logits"] == member.vocab_size
        assert fact["vocabulary"]["pieces"] == len(member.codec.vocab.ids_of)
        assert fact["kv_bytes_per_token"] == kv_bytes(member)
        assert fact["eos"].keys() == {str(i) for i in member.eos_ids}
        assert fact["bos"].keys() == {str(i) for i in member.codec.automatic_prefix}
        assert fact["dummy_space"] == member.codec.prefix_space
        assert fact["dtype"] == "float32" and fact["weight_bytes"] == 4 * fact["parameters"]
        assert fact["context"] == member.max_length
    facts = ensemble.fuser.facts
    assert found["anchors"] == facts["anchors"]
    for plan, matrix in zip(found["matrices"], facts["matrices"], strict=True):
        assert plan["file_bytes"] == pytest.approx(matrix["bytes"], rel=0.2, abs=4000)
        if options and options["rows"] == "embedding":
            assert plan["entropy_share"] == pytest.approx(matrix["row_entropy_share"], abs=0.02)
            assert plan["dropped_mass"] == pytest.approx(matrix["mean_dropped_mass"], abs=0.01)


def test_overlaps_are_counted_by_hand(inspected) -> None:
    _, found = inspected(names=("bytelevel", "metaspace", "padded"))
    assert [tuple(entry["members"]) for entry in found["overlaps"]] == [
        ("bytelevel", "metaspace", "padded"),
        ("bytelevel", "metaspace"),
        ("bytelevel", "padded"),
        ("metaspace", "padded"),
    ]
    assert found["overlaps"][0]["common"] == found["anchors"]
    for entry in found["overlaps"]:
        for name, share in zip(entry["members"], entry["shares"], strict=True):
            (pieces,) = [m["vocabulary"]["pieces"] for m in found["members"] if m["name"] == name]
            assert entry["common"] == pytest.approx(share * pieces)


def test_text_ends_in_ready(tmp_path: Path, pico: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    status, shown = text(capsys, str(recipe(tmp_path, pico, "bytelevel", "metaspace", title="Two")), "--no-tasks")
    assert status == 0
    assert shown.startswith("Two\n  method deepen\n") and shown.endswith("\n\nready")
    for expected in ("(<|endoftext|>)", "in front 2 (<bos>)", "one role anchor", "sample texts come back byte for byte",
                     "relative matrices", "2 forward passes per token", "common pieces",
                     "lm-eval-deepen bpb"):  # fmt: skip
        assert expected in shown
    assert "problems" not in shown


def test_nearly_flat_rows_are_a_note(inspected) -> None:
    status, found = inspected(rows="embedding", relative_temperature=0.01, top_m=0)
    assert status == 0
    assert [plan["entropy_share"] > 0.99 for plan in found["matrices"]] == [True, True]
    assert len([note for note in found["notes"] if "entropy of flat ones" in note]) == 2


# --- problems


def test_no_way_to_the_hub_is_a_numbered_problem(capsys: pytest.CaptureFixture) -> None:
    status, shown = text(capsys, "pretrained=org/no-such-model,members=org/no-such-model+org/another")
    assert status == 1
    assert "  1. member 'no-such-model': config.json of 'org/no-such-model' cannot be had from the hub: " in shown
    assert "\n  2. member 'another': config.json of 'org/another'" in shown
    assert "--member another=FOLDER" in shown and "Traceback" not in shown
    assert not shown.endswith("ready")


def test_an_unreachable_hub_is_tried_once(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    tried = []

    def unreachable(repo: str, name: str, **arguments: Any) -> str:
        tried.append((repo, arguments.get("local_files_only", False)))
        raise LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    status, found = report(capsys, "pretrained=org/a,members=org/a+org/b+org/c")
    assert status == 1 and len(found["problems"]) == 3
    assert tried == [("org/a", False), ("org/b", True), ("org/c", True)]
    assert "LocalEntryNotFoundError: no connection Check the name" in found["problems"][0]


def test_a_recipe_that_cannot_be_read_is_a_numbered_problem(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("members: [a, b]\nmetod: deepen\n")
    status, shown = text(capsys, str(path))
    assert status == 1 and shown.startswith(f"problems\n  1. {path}: ") and "Did you mean 'method'?" in shown


def test_members_from_elsewhere_make_a_recipe_ready(pico: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    """As the demo's models stand for hub names on a machine without a hub; the tasks are those that ship."""
    pair = [f"SmolLM2-135M-Instruct={pico['bytelevel']}", f"gemma-3-270m={pico['metaspace']}"]
    status, found = report(capsys, "smollm2_gemma3", "--member", *pair)
    assert status == 0, found["problems"]
    costs = {cost["task"]: cost for cost in found["tasks"]}
    assert set(costs) == {"deepen_demo_choice", "deepen_demo_short"}
    assert costs["deepen_demo_short"]["written_tokens"] == 12 * costs["deepen_demo_short"]["documents"]
    assert costs["deepen_demo_choice"]["written_tokens"] == 0
    assert found["hours_estimated"] is None  # bandwidth and arithmetic of a GPU say nothing of a CPU


def test_a_member_without_a_chat_template_is_a_problem_where_one_is_applied(inspected) -> None:
    keys = {"harness": {"apply_chat_template": True}}
    status, found = inspected(**keys)
    assert status == 1
    (problem,) = found["problems"]
    assert "member 'metaspace' has no chat template" in problem and "chat_fallback: plain" in problem
    assert inspected(chat_fallback="plain", **keys)[0] == 0


def test_too_few_anchors_and_too_little_memory_are_problems(inspected) -> None:
    status, found = inspected("--no-tasks", "--memory", "0.0001", min_anchors=10_000)
    assert status == 1
    assert "at least 10000 anchors are needed" in found["problems"][0]
    assert "device cpu would hold" in found["problems"][1] or "device cuda:0 would hold" in found["problems"][1]


def test_a_dense_matrix_over_the_limit_is_a_problem_with_the_number_that_fits(inspected, monkeypatch) -> None:
    monkeypatch.setattr("lm_eval_deepen.preflight.ensemble.DENSE_LIMIT_BYTES", 400 * 4 * 100)
    status, found = inspected(compat="reference")
    assert status == 1
    assert "member 'bytelevel': its dense relative matrix (400 pieces" in found["problems"][0]
    assert "Set max_anchors to at most 100." in found["problems"][0]


def test_rows_that_lose_too_much_are_a_problem(inspected) -> None:
    status, found = inspected(rows="embedding", relative_temperature=0.5, top_m=8)
    assert status == 1 and "of their mass to top_m=8" in found["problems"][0]


def test_a_device_that_this_machine_lacks_is_a_problem_unless_another_machine_is_planned_for(inspected) -> None:
    status, found = inspected("--no-tasks", "--device", "cuda:77")
    assert status == 1 and "does not exist on this machine" in found["problems"][0]
    status, found = inspected("--no-tasks", "--device", "cuda:77", "--memory", "80")
    assert status == 0 and found["devices"][0]["device"] == "cuda:77"
    assert found["devices"][0]["available"] == 80e9


def test_a_member_is_spread_by_parallelize_alone_as_the_harness_has_it(pico, inspected) -> None:
    """The harness's model drops `device_map` without `parallelize`, and with it the device that is named."""
    spread = [{"parallelize": True, "device": "cpu"}, {"device_map": "auto"}]
    pair = zip(("bytelevel", "metaspace"), spread, strict=True)
    members = [{"pretrained": str(pico[name]), **keys} for name, keys in pair]
    _, found = inspected("--no-tasks", "--device", "cpu", members=members)
    assert [member["device"] for member in found["members"]] == ["all GPUs", "cpu"]


def test_tasks_without_data_are_a_problem(tmp_path, inspected, monkeypatch) -> None:
    monkeypatch.setenv("LM_EVAL_DEEPEN_DATA", str(tmp_path / "nowhere"))
    status, found = inspected("--device", "cpu", task="deepen_nq")
    assert status == 1
    assert "tasks deepen_nq cannot be loaded: FileNotFoundError: LM_EVAL_DEEPEN_DATA" in found["problems"][0]


@pytest.mark.parametrize(
    ("argv", "message"), [(["--member", "a"], "NAME=WHERE"), (["--tflops", "0"], "a number above 0")]
)
def test_bad_arguments_of_the_command_are_user_errors(capsys, argv, message):
    try:
        assert main(["inspect", "org/a", *argv]) == 2
    except SystemExit as stop:  # of the parser
        assert stop.code == 2
    assert message in capsys.readouterr().err


def test_results_that_are_asked_for_must_be_there(pico, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    member = f"--member=Llama-2-13b-hf={pico['bytelevel']}"
    for content, told in ((None, "reproduction.json cannot be read"), ("[]", "is not a file that `reproduce` wrote")):
        if content is not None:
            (tmp_path / "reproduction.json").write_text(content)
        assert main(["inspect", "deepen_nq_2", member, "--no-tasks", "--results", str(tmp_path)]) == 2
        assert told in capsys.readouterr().err
    assert main(["inspect", "org/a", "--results", str(tmp_path)]) == 2
    assert "has no published score" in capsys.readouterr().err


def test_a_damaged_weight_file_is_a_problem(tmp_path, pico, capsys) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pico["bytelevel"], broken)
    whole = (broken / "model.safetensors").read_bytes()
    path = recipe(tmp_path, {**pico, "broken": broken}, "broken", "metaspace")
    for content in (b"\xff" * 40, whole[:-1]):
        (broken / "model.safetensors").write_bytes(content)
        with pytest.raises(MemberError, match="no complete safetensors file"):
            read_header(broken / "model.safetensors")
        status, found = report(capsys, str(path), "--no-tasks")
        assert status == 1 and "no complete safetensors file" in found["problems"][0]


# --- sizes and hours


@pytest.mark.parametrize(
    ("config", "billions", "active", "kv"),
    [(LLAMA_13B, 13.0, 13.0, 819_200), (MIXTRAL, 46.7, 12.9, 131_072), (QWEN3_30B, 30.5, 3.34, 98_304)],
)
def test_sizes_from_a_configuration_alone(config: dict[str, Any], billions: float, active: float, kv: int) -> None:
    """The models' own names and cards: 13.0B; 46.7B, of which 12.9B act on a token; 30.5B, of which 3.3B do."""
    member = Inspected(MemberConfig(name="m", pretrained="org/m"), "cpu", ModelFiles(None, config))
    assert member.parameters / 1e9 == pytest.approx(billions, abs=0.06)
    assert member.active / 1e9 == pytest.approx(active, abs=0.06)
    assert member.weight_bytes == 2 * member.parameters
    assert member.kv_bytes(1) == kv


@pytest.mark.parametrize(
    ("kind", "billions", "active"),
    [("qwen2_moe", 14.3, 2.69), ("deepseek_v3", 671.0, 37.55), ("llama4_text", 107.8, 17.2), ("glm4_moe", 103.5, 10.1)],
)
def test_experts_that_every_token_passes_through_count(kind: str, billions: float, active: float) -> None:
    """The cards: 14.3B, 2.7B; 671B, 37B; of Llama 4 Scout 109B, 17B with what sees; the last is a class's default."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind).to_dict()
    known = ModelFiles(None, config)
    assert known.parameters[0] / 1e9 == pytest.approx(billions, abs=0.06)
    assert known.active / 1e9 == pytest.approx(active, abs=0.06)
    if kind != "llama4_text":  # whose code alone says that it has one such expert
        unknown = ModelFiles(None, {**config, "model_type": "of_its_own"})
        assert unknown.parameters[0] == pytest.approx(known.parameters[0], rel=0.005)
        assert unknown.active == pytest.approx(known.active, rel=0.08)  # DeepSeek's attention has other sizes


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v2", "llama4_text", "granitemoeshared", "jetmoe", "mixtral"])
def test_a_mixture_of_experts_is_counted_by_its_headers_as_by_its_type(kind: str, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    model = tiny_model(CONFIG_MAPPING[kind], 300)
    model.save_pretrained(tmp_path)
    files = look_up(MemberConfig(name="m", pretrained=str(tmp_path)))
    alone = ModelFiles(None, files.config)
    assert files.parameters == alone.parameters and files.active == alone.active
    assert files.parameters[0] == sum(weight.numel() for weight in model.parameters())
    shared = sum(weight.numel() for name, weight in model.named_parameters() if "shared" in name)
    assert shared < files.active < files.parameters[0]


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_further_tokens_are_stored_and_not_counted(kind: str, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    model = tiny_model(CONFIG_MAPPING[kind], 300, num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    config = MemberConfig(name="m", pretrained=str(tmp_path))
    loaded, stored, layers = look_up(config), tensors(tmp_path), model.config.num_hidden_layers
    last = f"model.layers.{layers - 1}."
    further = {name.replace(last, f"model.layers.{layers}."): x.clone() for name, x in stored.items() if last in name}
    further[f"model.layers.{layers}.eh_proj.weight"] = torch.ones(32, 64)
    save_file({**stored, **further}, tmp_path / "model.safetensors", {"format": "pt"})
    assert len(read_header(tmp_path / "model.safetensors")) > len(loaded.tensors)
    assert look_up(config).tensors == loaded.tensors and look_up(config).parameters == loaded.parameters


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        ({"model_type": "glm4_moe", "num_hidden_layers": 46}, "model.layers.46.eh_proj.weight", True),
        ({"model_type": "glm4_moe", "num_hidden_layers": 92}, "model.layers.46.mlp.gate.weight", False),
        ({"model_type": "glm4_moe", "num_hidden_layers": 92}, "model.layers.92.eh_proj.weight", True),
        ({"model_type": "of_its_own", "num_hidden_layers": 2, "num_nextn_predict_layers": 2}, "h.layers.3.x", True),
        ({"model_type": "of_its_own", "num_hidden_layers": 2, "num_nextn_predict_layers": 2}, "h.layers.4.x", False),
        ({"model_type": "qwen3_next", "num_hidden_layers": 48}, "mtp.layers.0.mlp.gate.weight", True),
        ({"model_type": "gpt_neox", "num_hidden_layers": 44}, "gpt_neox.layers.3.attention.bias", True),
        ({"model_type": "gpt_neox", "num_hidden_layers": 44}, "gpt_neox.layers.3.attention.dense.bias", False),
    ],
)
def test_what_transformers_does_not_load_is_known_by_its_name(config, name, expected):
    assert is_left_out(config)(name) is expected


def test_an_estimate_is_close_to_the_headers(pico: dict[str, Path]) -> None:
    for name in ("bytelevel", "metaspace"):  # gated feed-forward layers
        files = look_up(MemberConfig(name=name, pretrained=str(pico[name])))
        tied = {"tie_word_embeddings": name == "metaspace"}
        exact = sum(header.count for header in files.tensors.values())
        config = {**files.config, **tied}
        assert estimate_parameters(ModelFiles(None, config)) == (pytest.approx(exact, rel=0.02), 0)
        assert ModelFiles(None, config).parameters == (exact, 0)  # of a type that transformers knows
    assert estimate_parameters(ModelFiles(None, {"hidden_size": 8})) is None


def test_dtype_and_quantisation_change_the_bytes() -> None:
    files = ModelFiles(None, {}, tensors={"w": TensorHeader("BF16", (10, 10))})
    assert ModelFiles(None, {"torch_dtype": "float16"}, tensors=files.tensors).dtype == "float16"
    for loading, expected in (({"dtype": "float32"}, 400), ({"dtype": "bfloat16"}, 200), ({"load_in_8bit": True}, 100),
                              ({"load_in_4bit": True}, 50), ({}, 200)):  # fmt: skip
        config = configure({"pretrained": "org/m", **loading}).members[0]
        assert Inspected(config, "cpu", files).weight_bytes == expected


def test_weights_that_are_stored_in_few_bits_stay_so() -> None:
    """As LLAMA_13B by AWQ: eight weights in a number; FP8: one byte each."""
    config = {**LLAMA_13B, "torch_dtype": "float16", "quantization_config": {"quant_method": "x"}}
    awq = ModelFiles(None, config, tensors={"q": TensorHeader("I32", (5120, 640)), "s": TensorHeader("F16", (8, 8))})
    member = Inspected(MemberConfig(name="m", pretrained="org/m"), "cpu", awq)
    assert member.weight_bytes == 4 * 5120 * 640 + 2 * 64
    assert member.parameters / 1e9 == pytest.approx(13, abs=0.06) and member.to_dict()["parameters_from"] != "weights"
    fp8 = ModelFiles(None, config, tensors={"q": TensorHeader("F8_E4M3", (10, 10))})
    member = Inspected(MemberConfig(name="m", pretrained="org/m"), "cpu", fp8)
    assert (member.parameters, member.weight_bytes) == (100, 100)


def test_the_weights_are_those_that_are_loaded(pico: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, folder = AutoModelForCausalLM.from_pretrained(pico["bytelevel"]), tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="60KB")
    config = MemberConfig(name="m", pretrained=str(folder))
    count = sum(p.numel() for p in model.parameters())
    shutil.copy(pico["bytelevel"] / "model.safetensors", folder / "consolidated.safetensors")  # as Mistral's folders
    assert Inspected(config, "cpu", look_up(config)).parameters == count
    sorted(folder.glob("model-*"))[1].unlink()
    with pytest.raises(MemberError, match="lacks model-00002-of-0000..safetensors, which its model.safetensors.index"):
        look_up(config)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(MemberError, match="model.safetensors.index.json is no index of weights"):
        look_up(config)


@pytest.mark.parametrize("spelt", [{"max_gen_toks": 100}, "max_gen_toks=100"])
def test_what_is_asked_of_tasks_is_counted(inspected, spelt) -> None:
    asked = {"task": "deepen_demo_short", "harness": {"gen_kwargs": spelt, "limit": 0.03}}
    [cost] = inspected("--device", "cpu", **asked)[1]["tasks"]
    assert (cost["documents"], cost["written_tokens"]) == (2, 200)  # 1.44 of 48 documents, as the harness rounds


def test_only_the_embedding_is_read(pico: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    for name, folder in pico.items():
        files = look_up(MemberConfig(name=name, pretrained=str(folder)))
        expected = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
        assert torch.equal(files.load_embedding(), expected), files.embedding


@pytest.mark.parametrize("name", ["bytelevel", "metaspace", "padded"])
def test_what_a_configuration_leaves_to_its_type_counts(name: str, pico: dict[str, Path], tmp_path: Path) -> None:
    """As Gemma's files, which do not say that the head is tied."""
    from transformers import AutoConfig

    folder = tmp_path / "thin"
    shutil.copytree(pico[name], folder)
    written = json.loads((folder / "config.json").read_text())
    default = AutoConfig.for_model(written["model_type"]).to_dict()
    same = {key for key, value in written.items() if key != "model_type" and default.get(key) == value}
    thin = {key: value for key, value in written.items() if key not in same}
    (folder / "config.json").write_text(json.dumps(thin))
    whole, found = (look_up(MemberConfig(name="m", pretrained=str(place))) for place in (pico[name], folder))
    assert "tie_word_embeddings" in same
    assert estimate_parameters(found) == estimate_parameters(whole)
    kept = [Inspected(MemberConfig(name="m", pretrained="m"), "cpu", files).kv_bytes(400) for files in (whole, found)]
    assert kept[0] == kept[1]


def test_a_device_has_one_name(pico, inspected) -> None:
    devices = {"bytelevel": "cuda", "metaspace": "cuda:0", "padded": "cpu"}
    members = [{"pretrained": str(pico[name]), "device": device} for name, device in devices.items()]
    _, found = inspected("--memory", "1", members=members)
    assert [need["device"] for need in found["devices"]] == ["cuda:0", "cpu"]
    weights = [member["weight_bytes"] for member in found["members"]]
    assert [need["weights"] for need in found["devices"]] == [weights[0] + weights[1], weights[2]]


def test_a_stored_head_is_the_one_that_is_loaded(pico: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for tie in (False, True):
        folder = configured(pico["bytelevel"], tmp_path / str(tie), tie_word_embeddings=tie)
        files = look_up(MemberConfig(name="m", pretrained=str(folder)))
        expected = AutoModelForCausalLM.from_pretrained(folder).get_output_embeddings().weight
        assert torch.equal(files.load_embedding("output"), expected)


@pytest.mark.parametrize("head", ["embedding", "other"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_stored_head_that_is_tied_is_counted_once(pico, tmp_path: Path, monkeypatch, head: str, tie: bool) -> None:
    from transformers import AutoModelForCausalLM

    table = tensors(pico["bytelevel"])["model.embed_tokens.weight"]
    folder = with_head(
        pico["bytelevel"], tmp_path / "m", table if head == "embedding" else -table, tie_word_embeddings=tie
    )
    config = MemberConfig(name="m", pretrained=str(folder))
    files = look_up(config)
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert Inspected(config, "cpu", files).parameters == count
    assert Inspected(config, "cpu", files).weight_bytes == 4 * count
    expected = table if head == "embedding" else -table
    assert torch.equal(files.load_embedding("output"), expected)
    headers = read_header(folder / "model.safetensors")
    monkeypatch.setattr(inspect_files, "remote_headers", lambda member: (headers, ""))
    monkeypatch.setattr(inspect_files, "_fetch", lambda member, name, **keys: folder / name)
    monkeypatch.setattr(inspect_files, "weight_files", lambda folder: [])
    hub = look_up(MemberConfig(name="m", pretrained="org/m"))  # nobody has its values
    assert estimate_parameters(hub) == estimate_parameters(files)
    assert Inspected(config, "cpu", hub).parameters == count - (table.numel() if tie and head == "other" else 0)


def test_every_copy_of_an_encoder_decoders_embedding_is_counted_once(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    for folder in pico_seq2seq.build(tmp_path).values():
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "model.safetensors")
        config = MemberConfig(name="m", pretrained=str(folder))
        assert len(read_header(folder / "model.safetensors")) > len(look_up(config).tensors)
        assert Inspected(config, "cpu", look_up(config)).parameters == sum(p.numel() for p in model.parameters())


def test_hours_are_reading_by_arithmetic_and_writing_by_bandwidth() -> None:
    files = ModelFiles(None, {}, tensors={"w": TensorHeader("F32", (1000, 1000))})
    members = [Inspected(MemberConfig(name=name, pretrained="org/m", weight=0.5), "cuda:0", files) for name in "ab"]
    costs = [inspect_cost.TaskCost("t", 10, 5_000, 800, 600)]
    machine = inspect_cost.Machine(bandwidth=4e6, flops=1e9)
    # reading: 2 x 2 members x 1e6 x 5,000 / 1e9 = 20 s; writing: 8 MB x 800 / 4 / 4e6 = 400 s
    assert inspect_cost.hours(costs, members, 4, machine) == pytest.approx(420 / 3600)
    unknown = Inspected(MemberConfig(name="c", pretrained="c", weight=0.0), "cpu")
    assert inspect_cost.hours(costs, [*members, unknown], 4, machine) is None


def test_headers_of_a_hub_model_are_asked_for_and_an_estimate_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    member = MemberConfig(name="m", pretrained="org/m")
    found, why_not = inspect_files.remote_headers(member)
    assert found == {} and "no safetensors header of 'org/m'" in why_not


def test_headers_are_those_of_the_model_and_a_hub_that_was_not_reached_is_not_asked(monkeypatch, tmp_path) -> None:
    asked = []
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda *given, **keys: asked.append(given))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_13B))
    monkeypatch.setattr(inspect_files, "_fetch", lambda member, name, **keys: tmp_path / name)
    inner = configure({"pretrained": "org/m", "subfolder": "inner"}).members[0]  # the repository may have another model
    for member, offline in ((MemberConfig(name="m", pretrained="org/m"), True), (inner, False)):
        files = look_up(member, offline)
        assert files.why_not and files.parameters[0] / 1e9 == pytest.approx(13, abs=0.06)
    assert not asked


@pytest.mark.real
def test_the_demo_pair_is_ready_and_its_published_space_is_flat(capsys: pytest.CaptureFixture) -> None:
    from lm_eval_deepen.build.demo_models import DEMO_MODELS, prepare

    pair = [f"{model.name}={prepare(model)}" for model in DEMO_MODELS]
    status, found = report(capsys, "smollm2_gemma3", "--no-tasks", "--member", *pair)
    assert status == 0 and 40_000 < found["anchors"] < 50_000
    assert [member["vocabulary"]["logits"] for member in found["members"]] == [49_152, 262_144]


@pytest.mark.parametrize("folder", ["x" * 300, "file/matrices"])
def test_a_matrix_folder_that_cannot_be_is_a_problem(pico, tmp_path, tmp_path_factory, monkeypatch, capsys, folder):
    here = tmp_path_factory.mktemp("here")  # with results of other runs: an ensemble given inline has none there
    (here / "results").mkdir()
    monkeypatch.chdir(here)
    (tmp_path / "file").write_text("")
    members = f"members={pico['bytelevel']}+{pico['metaspace']},matrix_dir={tmp_path / folder}"
    assert main(["inspect", members, "--no-tasks"]) == 1
    told = capsys.readouterr().out
    assert "1. Matrix folder" in told and "cannot be used" in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_every_member_loses_in_the_pieces_of_every_other(capsys, pico, tmp_path):
    asked = f"members={pico['bytelevel']}+{pico['metaspace']},matrix_dir={tmp_path}"
    assert main(["inspect", asked, "--no-tasks", "--projection-loss", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)["projection_loss"]
    assert [(one["main"], one["member"]) for one in found] == [("bytelevel", "metaspace"), ("metaspace", "bytelevel")]
    assert all({"no_covers", "covers"} <= one.keys() for one in found)
