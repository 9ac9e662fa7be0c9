"""A trace says what every member said at every step, and changes nothing."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import deepen, requests
from lm_eval.api.instance import Instance

from lm_eval_deepen.engine.scoring import score
from lm_eval_deepen.engine.windows import rolling_spans
from lm_eval_deepen.errors import ConfigError, ResultError, StorageError
from lm_eval_deepen.harness.model import DeepenLM
from lm_eval_deepen.harness.tasks import doc_hashes
from lm_eval_deepen.leaderboard.rows import Row
from lm_eval_deepen.results.traces import SCHEMA, documents_of, find_traces, read_trace

PAIRS = [
    ("The dog", " walked away."),
    ("The dog", " did not mind"),
    ("Question: how many", " days?\n7"),
    ("", "café 中"),
]
TEXTS = ["The quick brown fox jumps over the lazy dog. Привет, мир!\n" * 3, "She was walking"]
PROMPTS = [("The dog", {"until": ["\n"], "max_gen_toks": 12}), ("In 1969 the", {"until": [], "max_gen_toks": 9})]
SETTINGS: dict[str, dict[str, Any]] = {
    "deepen": {},
    "several_at_once": {"batch_size": 2, "speculate": "lookup"},
    "gac": {"method": "gac"},
    "learning": {"weighting": "bayes"},
    "skipping": {"skip_when": "confident", "skip_above": 0.3},
    "covers_and_weights_by_prompt": {"covers": "on", "weighting": "perplexity"},
}


def answers(model: Any) -> list[Any]:
    sampled = [("The dog", {"do_sample": True, "temperature": 0.8, "max_gen_toks": 8, "until": []})]
    torch.manual_seed(3)
    return [
        model.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True),
        model.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in TEXTS)), disable_tqdm=True),
        model.generate_until(requests("generate_until", *PROMPTS, *sampled), disable_tqdm=True),
    ]


def records(folder: Path) -> list[dict[str, Any]]:
    return [dict(one) for one in documents_of(find_traces(folder)["task"])]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_numbers_are_those_of_a_run_without_trace(name: str, pico: dict[str, Path], tmp_path: Path) -> None:
    models = [pico[one] for one in ("bytelevel", "metaspace", "padded")]
    plain = deepen(*models, **SETTINGS[name])
    traced = deepen(*models, **SETTINGS[name], trace=True, trace_dir=str(tmp_path))
    found = answers(traced)
    assert found == answers(plain)
    assert traced.ensemble.counters.summary() == plain.ensemble.counters.summary()
    told = records(tmp_path)
    kinds = {kind: [one for one in told if one["type"] == kind] for kind in ("loglikelihood", "loglikelihood_rolling")}
    for answer, one in zip(found[0], kinds["loglikelihood"], strict=True):
        assert sum(step["logp"] for step in one["steps"]) == pytest.approx(answer[0], abs=1e-4)
        assert one["greedy"] == answer[1]
    for answer, one in zip(found[1], kinds["loglikelihood_rolling"], strict=True):
        assert sum(step["logp"] for step in one["steps"]) == pytest.approx(answer, abs=1e-3)
        assert sum(one["windows"]) == len(one["steps"])
    texts = [one for one in told if one["type"] == "generate_until"]
    for answer, one in zip(found[2], texts, strict=True):
        said = b"".join(
            step["piece"].encode() if isinstance(step["piece"], str) else bytes.fromhex(step["piece"].get("bytes", ""))
            for step in one["steps"]
        )
        assert said.decode(errors="replace").lstrip().startswith(answer.strip())
    steps = [step for one in told for step in one["steps"]]
    summary = traced.ensemble.counters.summary()
    assert any(step.get("changed") for step in steps) or summary["argmax_differs_from_main"] == 0
    for step in steps:
        weights = [member.get("weight", 0) for member in step["members"]]
        assert sum(weights) == pytest.approx(1, abs=1e-5) and 0 <= step["entropy"] < math.log(2000)
        for member in step["members"]:
            assert len(member["top"]) == 5 and sum(p for _, p in member["top"]) < 1.001
            assert [p for _, p in member["top"]] == sorted((p for _, p in member["top"]), reverse=True)
            assert member["chosen"] is None or 0 <= member["chosen"] <= 1
    reasons = {step.get("skipped", "") for step in steps}
    assert ("skip_when=confident" in reasons) == (name == "skipping")


def test_a_step_agrees_with_the_members_themselves(pico: dict[str, Path], tmp_path: Path) -> None:
    """At the first place of a text every member's likeliest pieces are those that it has alone."""
    models = [pico["bytelevel"], pico["metaspace"]]
    traced = deepen(*models, trace=True, trace_dir=str(tmp_path))
    traced.generate_until(requests("generate_until", ("The dog", {"max_gen_toks": 1, "until": []})), disable_tqdm=True)
    (one,) = records(tmp_path)
    for m, path in enumerate(models):
        alone = deepen(path)
        logp = alone.ensemble.next_logp("The dog").logp
        vocab = traced.ensemble.members[m].codec.vocab
        best = logp.topk(5).indices.tolist()
        told = one["steps"][0]["members"][m]["top"]
        assert [p for _, p in told] == pytest.approx([float(logp[i].exp()) for i in best], rel=2e-3)
        if vocab.pieces[best[0]].isascii() and vocab.pieces[best[0]]:
            assert told[0][0] == vocab.pieces[best[0]].decode()
    fused = traced.ensemble.next_logp("The dog").logp
    assert one["steps"][0]["logp"] == pytest.approx(float(fused.max()), abs=1e-4)
    assert one["reason"] == "length"


def test_one_member_and_one_that_abstains_are_told(pico: dict[str, Path], tmp_path: Path) -> None:
    alone = deepen(pico["bytelevel"], trace=True, trace_dir=str(tmp_path / "alone"))
    alone.loglikelihood(requests("loglikelihood", PAIRS[0]), disable_tqdm=True)
    (one,) = records(tmp_path / "alone")
    assert {step["skipped"] for step in one["steps"]} == {"one member"}
    assert "".join(step["piece"] for step in one["steps"]) == PAIRS[0][1]
    short = {"name": "short", "pretrained": str(pico["metaspace"]), "max_length": 12}
    members = [{"name": "long", "pretrained": str(pico["bytelevel"])}, short]
    model = DeepenLM(
        str(pico["bytelevel"]),
        members=members,
        trace=True,
        trace_dir=str(tmp_path / "pair"),
        self_check=False,
        device="cpu",
    )
    model.generate_until(
        requests("generate_until", ("The quick", {"max_gen_toks": 20, "until": []})), disable_tqdm=True
    )
    (one,) = records(tmp_path / "pair")
    late = one["steps"][-1]
    assert late["members"][1] == {"abstained": True} and late["skipped"] == "all weight on the main member"
    assert late["members"][0]["weight"] == 1 and not late.get("changed")
    weights = [member["weight"] for member in one["steps"][0]["members"]]
    assert "skipped" not in one["steps"][0] and min(weights) > 0 and sum(weights) == pytest.approx(1)


def test_documents_are_joined_to_the_samples_and_counted(pico: dict[str, Path], tmp_path: Path, caplog: Any) -> None:
    docs = [{"q": f"the {n}"} for n in range(5)]
    asked = [
        Instance("loglikelihood", doc, ("The dog", f" {choice}"), choice, ("task", n, 1))
        for n, doc in enumerate(docs)
        for choice in range(2)
    ]
    model = deepen(pico["bytelevel"], pico["metaspace"], trace=3, trace_dir=str(tmp_path))
    model.loglikelihood(asked, disable_tqdm=True)
    told = records(tmp_path)
    assert [(one["doc_id"], one["request"]) for one in told] == [(n, c) for n in range(3) for c in range(2)]
    assert [one["doc_hash"] for one in told[::2]] == doc_hashes(docs[:3])
    assert "compressed, and never more than" in caplog.text
    (file,) = find_traces(tmp_path)["task"]
    assert file.head["schema"] == SCHEMA and [m["name"] for m in file.head["members"]] == ["m0", "m1"]
    assert file.head["fingerprint"] == model.ensemble_config.fingerprint()
    assert set("".join(step["piece"] for one in told for step in one["steps"])) <= set(" 01")


def test_repeats_are_numbered_as_they_are_asked(pico: dict[str, Path], tmp_path: Path) -> None:
    """However early a repeat ends, its number is its place among the answers."""
    arguments = {"do_sample": True, "temperature": 1.0, "until": ["e"], "max_gen_toks": 12}
    one, other = (Instance("generate_until", {}, (f"The dog {n}", arguments), 0, ("task", n, 6)) for n in range(2))
    model = deepen(pico["bytelevel"], pico["metaspace"], trace=True, trace_dir=str(tmp_path), batch_size=3)
    texts = model.generate_until([one] * 6 + [other] * 6, disable_tqdm=True)
    told = records(tmp_path)
    assert [(record["doc_id"], record["repeat"]) for record in told] == [(n, r) for n in range(2) for r in range(6)]
    for record, text in zip(told, texts, strict=True):
        pieces = [step["piece"] for step in record["steps"]]
        data = b"".join(one.encode() if isinstance(one, str) else bytes.fromhex(one.get("bytes", "")) for one in pieces)
        assert data.decode(errors="replace").partition("e")[0] == text
    (file,) = find_traces(tmp_path)["task"]
    assert [key[3] for key in file.documents.keys] != [*range(6), *range(6)]  # they did not end in this order


def test_windows_have_their_own_numbers_and_their_text_what_the_harness_gets(
    pico: dict[str, Path], tmp_path: Path
) -> None:
    text = "The quick brown fox jumps over the lazy dog.\n" * 30
    model = deepen(pico["bytelevel"], pico["metaspace"], weighting="bayes", trace=True, trace_dir=str(tmp_path))
    [answer] = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    (one,) = records(tmp_path)
    spans = rolling_spans(model.ensemble, text)
    windows = [windowed for _, windowed in sorted(score(model.ensemble, spans, 512))]
    assert one["windows"] == [len(span.target) for span in spans] and len(spans) > 1
    logp = [step["logp"] for step in one["steps"]]
    for length, window in zip(one["windows"], windows, strict=True):
        own, logp = logp[:length], logp[length:]
        assert sum(own) == pytest.approx(window.total, abs=1e-3)
    assert one["logp"] == pytest.approx(answer, abs=1e-6) and answer != pytest.approx(sum(w.total for w in windows))


def test_a_probability_of_0_is_null(pico: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    def no_json(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    model = deepen(pico["bytelevel"], pico["metaspace"], trace=True, trace_dir=str(tmp_path))
    fuse = model.ensemble.fuser.fuse

    def without(logp: Any, weights: Any) -> Any:
        fused = fuse(logp, weights)
        fused.logp[:, model.ensemble.main.codec.encode(" walked")] = -math.inf
        fused.logp[:] = torch.log_softmax(fused.logp, dim=1)
        return fused

    monkeypatch.setattr(model.ensemble.fuser, "fuse", without)
    [(answer, _)] = model.loglikelihood(requests("loglikelihood", PAIRS[0]), disable_tqdm=True)
    (file,) = find_traces(tmp_path)["task"]
    lines = gzip.decompress(file.path.read_bytes()).decode().splitlines()
    one = json.loads(lines[1], parse_constant=no_json)
    assert answer == -math.inf and one["logp"] is None and None in [step["logp"] for step in one["steps"]]


def test_tasks_of_like_names_have_files_of_their_own(pico: dict[str, Path], tmp_path: Path) -> None:
    names = ["a/b", "a_b", "a%2Fb", "100%"]
    asked = [Instance("loglikelihood", {}, PAIRS[0], 0, (name, 0, 1)) for name in names]
    model = deepen(pico["bytelevel"], trace=True, trace_dir=str(tmp_path))
    model.loglikelihood(asked, disable_tqdm=True)
    assert find_traces(tmp_path).keys() == set(names)


def test_a_full_disk_leaves_no_document_twice(pico: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """What was written before the error is not written again where the run ends."""
    from lm_eval_deepen.harness import step_files as module

    append = module.append_bytes

    def full(path: Path, data: bytes) -> None:
        if "_b_" in path.name:
            raise StorageError(f"{path} cannot be written (no space left)")
        append(path, data)

    monkeypatch.setattr(module, "append_bytes", full)
    asked = [Instance("loglikelihood", {}, PAIRS[0], 0, (name, 0, 1)) for name in ("a", "b")]
    model = deepen(pico["bytelevel"], trace=True, trace_dir=str(tmp_path))
    monkeypatch.setattr(module, "AT_ONCE", 1 << 30)
    with pytest.raises(StorageError):
        model.loglikelihood(asked, disable_tqdm=True)
    with pytest.raises(StorageError):
        model.step_files.flush()
    (file,) = find_traces(tmp_path)["a"]
    assert len(file.documents) == 1


def test_the_size_that_is_said_is_a_bound(pico: dict[str, Path], tmp_path: Path) -> None:
    from lm_eval_deepen.harness import step_files as module

    model = deepen(pico["bytelevel"], pico["metaspace"], pico["padded"], trace=True, trace_dir=str(tmp_path))
    model.loglikelihood(requests("loglikelihood", *PAIRS * 4), disable_tqdm=True)
    (file,) = find_traces(tmp_path)["task"]
    steps = sum(len(one["steps"]) for one in file.documents)
    raw = len(gzip.decompress(file.path.read_bytes()))
    usual = steps * (module.STEP_BYTES + 3 * (module.MEMBER_BYTES + module.TOP * module.PIECE_BYTES))
    assert raw < 1.1 * usual and file.path.stat().st_size < raw / 3


def test_traces_have_a_place_or_an_error_before_anything_loads(pico: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trace=true has no place to write to: give --output_path"):
        deepen("no/such/model", trace=True)
    with pytest.raises(ConfigError, match="trace_dir"):
        deepen("no/such/model", trace=True, trace_dir=str(Path(__file__) / "below"))
    with pytest.raises(ConfigError, match="trace is not set"):
        deepen("no/such/model", trace_dir=str(tmp_path))
    for wrong in (-1, 2.5, "some"):
        with pytest.raises(ConfigError, match="trace must be true, false or a number of documents"):
            deepen("no/such/model", trace=wrong, trace_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="combines whole answers"):
        deepen("a", "b", trace=True, trace_dir=str(tmp_path), pooling="vote")
    config = deepen(pico["bytelevel"], trace=False).ensemble_config
    assert config.trace is None and "trace" not in config.to_dict()
    with pytest.raises(ConfigError, match="leaderboard does not write"):
        Row("row", config.replace(trace=True), ("m0",))


def test_a_cut_off_file_is_read_as_far_as_it_goes_and_others_are_refused(tmp_path: Path) -> None:
    head = {"schema": SCHEMA, "task": "t", "fingerprint": "f", "members": [{"name": "a"}]}
    step = {"piece": "x", "logp": -1.0, "entropy": 1.0, "members": [{"weight": 1, "top": [["x", 0.3]], "chosen": 0.3}]}
    lines = [head, *({"doc_id": n, "doc_hash": "h", "request": 0, "repeat": 0, "steps": [step]} for n in range(3))]
    parts = [gzip.compress((json.dumps(line) + "\n").encode()) for line in lines]
    path = tmp_path / "trace_t_2026-01-01T00-00-00.5.jsonl.gz"
    path.write_bytes(b"".join(parts)[:-9])
    found = read_trace(path)
    assert [one["doc_id"] for one in found.documents] in ([0, 1], [0, 1, 2]) and found.cut
    later = tmp_path / "trace_t_2026-01-02T00-00-00.jsonl.gz"
    later.write_bytes(parts[0] + parts[3])
    assert [one["doc_id"] for one in documents_of(find_traces(tmp_path)["t"])] == [0, 1, 2]
    for content, said in [
        (b"no gzip", "holds no trace"),
        (gzip.compress(b'{"schema": "lm_eval_deepen trace 9"}\n'), "schema"),
        (gzip.compress(b"[]\n"), "not a line of a trace"),
        (gzip.compress(b"{\n"), "not a line of JSON"),
        (parts[0] + gzip.compress(b'{"doc_id": 1, "steps": [{"members": []}]}\n'), "not 1 members"),
    ]:
        later.write_bytes(content)
        with pytest.raises(ResultError, match=said):
            read_trace(later)
    with pytest.raises(ResultError, match="no such folder"):
        find_traces(tmp_path / "nowhere")
