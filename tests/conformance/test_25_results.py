"""Items 25 and 26 within one process: what results hold, progress bars, instances, groups, tags, few-shots."""

from __future__ import annotations

import json

import pytest
from harness import deepen, hf, requests
from lm_eval.utils import handle_non_serializable

from lm_eval_deepen.harness.distributed import Ranks

REQUESTS = {
    "loglikelihood": ("The fox", " jumps"),
    "loglikelihood_rolling": ("The fox jumps",),
    "generate_until": ("The fox", {"until": [], "max_gen_toks": 2}),
}


@pytest.fixture(scope="module")
def pair(pico, tmp_path_factory):
    matrices = str(tmp_path_factory.mktemp("matrices"))
    return deepen(pico["bytelevel"], pico["padded"], matrix_dir=matrices, weights=[0.7, 0.3], batch_size=4)


def test_25_model_info_holds_what_hf_reports_and_every_member(pico, pair):
    theirs = hf(pico["bytelevel"]).get_model_info()
    ours = pair.get_model_info()
    assert {key: ours[key] for key in theirs} == theirs
    members = ours["deepen"]["members"]
    assert [(m["name"], m["weight"]) for m in members] == [("m0", 0.7), ("m1", 0.3)]
    for described, member in zip(members, pair.ensemble.members, strict=True):
        assert described["parameters"] == member.lm.model.num_parameters()
        assert (described["dtype"], described["revision"]) == ("float32", "main")
    assert ours["deepen"]["fingerprint"] == pair.ensemble_config.fingerprint()
    assert set(deepen(pico["bytelevel"]).get_model_info()) == {*theirs, "deepen"}


def test_25_results_are_json_as_the_harness_writes_it(pico, evaluate, tmp_path):
    arguments = {
        "pretrained": str(pico["bytelevel"]),
        "members": [{"pretrained": str(pico["bytelevel"])}, {"pretrained": str(pico["metaspace"])}],
        "matrix_dir": str(tmp_path),
    }
    found = evaluate("deepen", "conf_answer", model_args=arguments, limit=2)
    again = json.loads(json.dumps(found, default=handle_non_serializable))
    assert again["config"]["deepen"]["steps_fused"] > 0
    assert again["config"]["model_args"] == arguments
    assert len(again["samples"]["conf_answer"]) == 2 * 2


def test_25_without_samples_and_with_predict_only(pair, evaluate):
    assert "samples" not in evaluate(pair, "conf_blank", log_samples=False)
    found = evaluate(pair, "conf_blank", predict_only=True)
    assert len(found["samples"]["conf_blank"]) == 3
    assert not [key for key in found["results"]["conf_blank"] if key.startswith("acc")]


@pytest.mark.parametrize("kind", REQUESTS)
def test_26_progress_bars_honour_disable_tqdm_and_the_rank(pair, capsys, monkeypatch, kind):
    def bar(**arguments):
        getattr(pair, kind)(requests(kind, REQUESTS[kind]), **arguments)
        return capsys.readouterr().err

    bar()  # matrices and checks are behind us
    assert f"Running {kind} requests" in bar(disable_tqdm=False)
    assert bar(disable_tqdm=True) == ""
    monkeypatch.setattr(pair, "ranks", Ranks(index=1, count=1))
    assert bar() == ""


def test_26_a_prebuilt_instance_gives_the_results_of_its_arguments(pico, evaluate):
    path = str(pico["metaspace"])
    instance = evaluate(deepen(path), "conf_choice", "conf_answer")
    named = evaluate("deepen", "conf_choice", "conf_answer", model_args={"pretrained": path}, device="cpu")
    for task in ("conf_choice", "conf_answer"):
        assert instance["results"][task] == named["results"][task]


def test_26_groups_tags_and_few_shots_are_unchanged(pico, evaluate):
    arguments = {"num_fewshot": 2, "limit": 4}
    theirs = evaluate(hf(pico["padded"]), "conf_group", "conf_tag", **arguments)
    ours = evaluate(deepen(pico["padded"], batch_size=4), "conf_group", "conf_tag", **arguments)
    assert ours["groups"].keys() == theirs["groups"].keys() == {"conf_group"}
    assert ours["groups"]["conf_group"]["acc,none"] == theirs["groups"]["conf_group"]["acc,none"]
    assert ours["n-shot"] == theirs["n-shot"] and ours["n-shot"]["conf_choice"] == 2
    assert ours["group_subtasks"] == theirs["group_subtasks"]
    assert set(ours["samples"]) == {"conf_choice", "conf_blank", "conf_cloze", "conf_text"}
    for task, samples in theirs["samples"].items():
        asked = [[sample["arguments"] for sample in run] for run in (ours["samples"][task], samples)]
        assert asked[0] == asked[1]
        for name, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-4)
