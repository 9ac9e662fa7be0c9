"""What work and memory scoring and decoding take: counted, and the memory model behind `batch_size: auto`."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import deepen, requests
from transformers import CONFIG_MAPPING

from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.engine import memory
from lm_eval_deepen.engine.prompts import Prompter
from lm_eval_deepen.engine.scoring import score
from lm_eval_deepen.member import load_member
from lm_eval_deepen.member.runner import NODES_PER_FORWARD
from lm_eval_deepen.member.state_runner import NAMES, OLD_STATES, StateRunner, num_bytes
from lm_eval_deepen.member.tree import TokenTree
from lm_eval_deepen.preflight.files import ModelFiles, look_up
from lm_eval_deepen.preflight.members import Inspected

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from architectures import VARIANTS  # noqa: E402
from tiny_models import byte_level_tokenizer, tiny_model  # noqa: E402

SHOTS = "".join(f"Question: What is {n} and {n}?\nAnswer: {2 * n}\n\n" for n in range(12))
QUESTIONS = [f"Question: {q}?\nAnswer:" for q in ("Where is the moon", "What is café", "Who walked", "1 + 1", "中国")]
CHOICES = [" the moon", " the sun and walking", " two", " the moonlight 🙂"]


@pytest.fixture(scope="module", params=[("bytelevel", "metaspace"), ("metaspace", "padded")], ids="+".join)
def model(request, pico, tmp_path_factory):
    return deepen(*(pico[name] for name in request.param), matrix_dir=str(tmp_path_factory.mktemp("matrices")))


def nodes(paths):
    """Count the distinct prefixes, one by one."""
    return len({path[:n] for path in paths for n in range(1, len(path) + 1)})


@pytest.mark.parametrize("shots", [SHOTS, ""], ids=["few-shot", "zero-shot"])
@pytest.mark.parametrize("size", [16, 10_000])
def test_every_prefix_of_the_requests_is_forwarded_once(model, shots, size):
    """In one round exactly; walks of small chunks and many rounds forward again what rounds split, a few tokens."""
    ensemble = model.ensemble
    prompter = Prompter(ensemble)
    spans = [prompter.span(shots + question, choice) for question, choice in itertools.product(QUESTIONS, CHOICES)]
    for member in ensemble.active:
        member.runner.forwarded = 0
    list(score(ensemble, spans, size))
    for m, member in enumerate(ensemble.active):
        paths = [span.paths(ensemble, at)[m] for span in spans for at in range(len(span.target))]
        if size == 10_000:
            assert member.runner.forwarded == nodes(paths)
        else:
            assert nodes(paths) <= member.runner.forwarded <= 1.05 * nodes(paths)


def test_only_states_that_are_read_meet_the_head(model, monkeypatch):
    """No tensor of all positions times the vocabulary: one row of logits per distinct position read."""
    rows = []
    for member in model.ensemble.active:

        def counted(states, temperature=1.0, original=member.runner.logp, member=member):
            rows.append((member, len(states)))
            return original(states, temperature)

        monkeypatch.setattr(member.runner, "logp", counted)
    batch = requests("loglikelihood", *itertools.product([SHOTS + QUESTIONS[0]], CHOICES))
    model.loglikelihood(batch)
    spans = [model.texts.prompter.span(*request.args) for request in batch]
    for m, member in enumerate(model.ensemble.active):
        paths = {span.paths(model.ensemble, at) for span in spans for at in range(len(span.target))}
        assert sum(count for who, count in rows if who is member) == sum(path[m] is not None for path in paths)


def test_auto_finds_a_batch_from_memory(model, monkeypatch):
    ensemble = model.ensemble
    needed = memory.row_bytes(ensemble, 100)
    assert set(needed) == {torch.device("cpu")}
    expected = sum(150 * memory.kv_bytes(member) + 28 * member.vocab_size for member in ensemble.active)
    assert needed[torch.device("cpu")] == expected
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10 * expected)
    assert memory.safe_batch(ensemble, 100, 64) == 5
    assert memory.safe_batch(ensemble, 100, 3) == 3
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10)
    assert memory.safe_batch(ensemble, 100, 64) == 1


GIB = 2**30
V2, V1 = ("max", "current", "inactive_file"), ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("own", "groups", "free"),
    [
        ("0::/\n", {"": (V2, 8, 5, 2)}, 5),  # a container, which sees its own group as the root
        ("0::/a/b\n", {"": (V2, "max", 50, 0), "a": (V2, 6, 5, 1), "a/b": (V2, "max", 5, 1)}, 2),  # of a group around
        ("0::/docker/xyz\n", {"": (V2, 7, 4, 0)}, 3),  # whose path is that of the host
        ("0::/a\n", {"a": (V2, 4, 6, 1)}, 0),  # more than a limit that was lowered
        ("0::/a\n", {"a": (V2, "max", 6, 1)}, 64),
        ("4:memory:/a\n2:cpu,cpuacct:/\n0::/\n", {"memory/a": (V1, 9, 5, 3), "memory": (V1, 2**33, 5, 0)}, 7),
        ("5:cpu,memory:/elsewhere\n", {"memory": (V1, 9, 5, 3)}, 7),
        ("3:cpuset:/\nodd\n", {"": (V2, 1, 1, 0)}, 64),
        (None, {}, 64),
    ],
)
def test_free_memory_is_bounded_by_a_container(own, groups, free, tmp_path, monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "own")
    if own is not None:
        (tmp_path / "own").write_text(own)
    for name, ((limit, used, cached), *values) in groups.items():
        folder = tmp_path / "cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        most, taken, inactive = (value if value == "max" else str(value * GIB) for value in values)
        (folder / f"memory.{limit}").write_text(f"{most}\n")
        (folder / f"memory.{used}").write_text(f"{taken}\n")
        (folder / "memory.stat").write_text(f"anon 4096\n{cached} {inactive}\nactive_file 8192\n")
    assert memory.free_bytes(torch.device("cpu")) == free * GIB


@pytest.mark.parametrize("kind", ["mamba", "falcon_h1"])
def test_auto_counts_states(kind, pico, tmp_path, monkeypatch):
    """The main member's row has its last state; that of another one, whose words are cut anew, older ones as well."""
    tiny_model(CONFIG_MAPPING[kind], len(byte_level_tokenizer())).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    for pair, states in (((tmp_path, pico["metaspace"]), 1), ((pico["metaspace"], tmp_path), OLD_STATES + 2)):
        ensemble = deepen(*pair, matrix_dir=str(tmp_path)).ensemble
        carrying = next(member for member in ensemble.active if isinstance(member.runner, StateRunner))
        state = carrying.runner.held
        cached = sum(150 * memory.kv_bytes(member) for member in ensemble.active if member is not carrying)
        logits = sum(28 * member.vocab_size for member in ensemble.active)
        expected = cached + logits + (states + 1) * state.num_bytes(100)
        assert state.whole > 0 and memory.row_bytes(ensemble, 100) == {torch.device("cpu"): expected}
        monkeypatch.setattr(memory, "free_bytes", lambda device, expected=expected: 10 * expected)
        assert memory.safe_batch(ensemble, 100, 64) == 5


# Keys and values of every kind: for all heads or few, or latent; of some layers; with a window, states, an index.
KEEPING = (
    "llama", "opt", "mpt", "bart", "gpt_bigcode", "gpt_bigcode, a key per head", "falcon", "falcon, new decoder",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "longcat_flash", "minicpm3", "dbrx", "jetmoe", "mixtral", "mistral",
    "gemma2", "gemma4_text", "mimo_v2_flash", "llama4_text", "qwen2, window", "llama, dynamic rope", "phi3, longrope",
    "mamba", "mamba2", "rwkv", "falcon_h1", "jamba", "kimi_linear", "lfm2", "nemotron_h", "qwen3_next", "zamba2",
)  # fmt: skip


@pytest.mark.parametrize("name", KEEPING)
def test_the_estimate_of_a_configuration_is_what_a_forward_pass_keeps(name):
    kind, changes = VARIANTS.get(name, (name, {}))
    model = tiny_model(CONFIG_MAPPING[kind], 400, **changes)
    files = ModelFiles(None, model.config.get_text_config().to_dict())
    member = Inspected(MemberConfig(name="m", pretrained="m"), "cpu", files)
    lengths = (4, 7)  # no longer than what layers with a window of 8 keep of a text
    with torch.inference_mode():
        passes = [model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=True) for length in lengths]
    states = [next(filter(None, (getattr(out, name, None) for name in NAMES))) for out in passes]
    kept = [num_bytes(state) for state in states]
    assert [member.kv_bytes(length) for length in lengths] == kept
    assert member.to_dict()["kv_bytes_per_token"] == (kept[1] - kept[0]) / 3


@pytest.mark.parametrize("kind", ["deepseek_v3", "falcon", "mistral", "llama4_text", "qwen3_next"])
def test_a_loaded_member_counts_as_its_configuration(kind, tmp_path):
    tiny_model(CONFIG_MAPPING[kind], len(byte_level_tokenizer())).save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    config = MemberConfig(name="m", pretrained=str(tmp_path))
    member, inspected = load_member(config, "cpu"), Inspected(config, "cpu", look_up(config))
    counted = [memory.kv_bytes(member, length) for length in (1, 100, 200, 300)]
    assert [inspected.kv_bytes(length) for length in (1, 100, 200, 300)] == counted and all(counted)
    assert (counted[3] == counted[2]) == (kind == "mistral")  # whose layers all have a window


@pytest.mark.parametrize("length", [3, 400])
def test_the_model_of_keys_and_values_is_what_a_cache_holds(model, length):
    """A window and some tokens before it, in layers that have one."""
    for member in model.ensemble.active:
        ((held,), _) = member.runner.walker().prefill(*TokenTree.of([[5, 6, 7, 8] * (length // 4) or [5, 6, 7]]))
        assert memory.kv_bytes(member, length) == sum(k.nbytes + v.nbytes for k, v in held.kv)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, {}),
        ({"speculate": "lookup"}, {}),
        ({"covers": "on"}, {"do_sample": True, "temperature": 1.0}),
        ({"sampling": "member", "average": "linear"}, {"do_sample": True, "temperature": 1.0, "top_k": 0}),
    ],
    ids=["greedy", "drafts", "covers", "turns"],
)
def test_texts_do_not_depend_on_what_layers_with_a_window_keep(pico, tmp_path, monkeypatch, options, chosen):
    """A window of 16 tokens and 4 more, or all tokens; a place in the batch goes from one text to the next."""
    members = [pico[name] for name in ("bytelevel", "metaspace", "padded")]
    model = deepen(*members, batch_size=2, matrix_dir=str(tmp_path), **options)
    prompts = [SHOTS[:300] + QUESTIONS[0], *QUESTIONS[1:]]
    batch = requests("generate_until", *((q, {"until": [], "max_gen_toks": 24, **chosen}) for q in prompts))
    masks = model.ensemble.active[1].runner.masks
    texts = []
    for slack in (4, 10_000):
        monkeypatch.setattr(masks, "slack", slack)
        torch.manual_seed(0)
        texts.append(model.generate_until(batch))
    assert masks.spans == [10_016, 0] and texts[0] == texts[1]


def test_auto_runs_and_changes_nothing(pico, tmp_path):
    pair = [pico["bytelevel"], pico["metaspace"]]
    batch = requests("generate_until", *((q, {"until": [], "max_gen_toks": 6}) for q in QUESTIONS))
    auto = deepen(*pair, batch_size="auto", matrix_dir=str(tmp_path))
    assert auto.texts.batch(50) == 64
    assert auto.generate_until(batch) == deepen(*pair, matrix_dir=str(tmp_path)).generate_until(batch)


def test_longer_passes_are_for_accelerators(model, monkeypatch):
    assert memory.nodes_per_forward(model.ensemble, 100_000) == NODES_PER_FORWARD
    for member in model.ensemble.active:
        monkeypatch.setattr(member.runner, "device", torch.device("cuda"))
    assert memory.nodes_per_forward(model.ensemble, 10) == NODES_PER_FORWARD
    assert memory.nodes_per_forward(model.ensemble, 3_000) == 3_000
    assert memory.nodes_per_forward(model.ensemble, 1_000_000) == memory.NODES_ON_ACCELERATOR
