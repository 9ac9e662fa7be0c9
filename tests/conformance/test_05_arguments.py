"""Items 5, 6 and 8: spellings of one configuration, device and batch size, unknown arguments, the output folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from harness import deepen, hf, requests
from lm_eval._cli.harness import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.loggers import EvaluationTracker

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.model import DeepenLM, configure


def command_line(monkeypatch, *arguments: str) -> dict:
    """Return `model_args` as the harness's own command line reads them."""
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--tasks", "x", *arguments])
    return EvaluatorConfig.from_cli(HarnessCLI().parse_args()).model_args


def test_05_every_spelling_gives_one_configuration(pico, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # none of the spellings names a folder for matrices
    a, b = str(pico["bytelevel"]), str(pico["metaspace"])
    inline = (
        f"pretrained={a},members={a}+{b},weights=0.6+0.4,method=deepen,inverse=em,steps=7,dtype=float32,max_length=64"
    )
    nested = {
        "pretrained": a,
        "members": [{"pretrained": a, "weight": 0.6}, {"pretrained": b, "weight": 0.4}],
        "method": "deepen",
        "inverse": "em",
        "steps": 7,
        "dtype": "float32",
        "max_length": 64,
    }
    file = tmp_path / "ensemble.yaml"
    file.write_text(json.dumps(nested))
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps({"model": "deepen", "model_args": nested, "tasks": ["x"]}))
    spelled = {
        "inline": command_line(monkeypatch, "--model_args", inline),
        "spaced": command_line(monkeypatch, "--model_args", *inline.split(",")),
        "json": command_line(monkeypatch, "--model_args", json.dumps(nested)),
        "file": command_line(monkeypatch, "--model_args", f"pretrained={file}"),
        "yaml": command_line(monkeypatch, "--config", str(run)),
    }
    configs = {name: configure(arguments) for name, arguments in spelled.items()}
    configs["api string"] = DeepenLM.create_from_arg_string(inline).ensemble_config
    configs["api json"] = DeepenLM.create_from_arg_string(json.dumps(nested)).ensemble_config
    configs["api dict"] = DeepenLM.create_from_arg_obj(nested).ensemble_config
    first = configs.pop("inline")
    assert first.weights == (0.6, 0.4) and first.options_dict()["steps"] == 7
    for name, config in configs.items():
        assert config == first, name
        assert config.fingerprint() == first.fingerprint(), name


def test_05_the_limits_of_an_api_string_are_errors(pico):
    """A comma ends a value there, so lists and mappings need JSON, a dict or a file."""
    path = pico["bytelevel"]
    with pytest.raises(ConfigError, match="unknown key"):
        DeepenLM.create_from_arg_string(f"pretrained={path},members=[{path},{path}]")


@pytest.mark.parametrize("size", [4, "4", "auto", "auto:2", None])
def test_06_batch_sizes_as_hf_takes_them(pico, evaluate, size):
    model_args = f"pretrained={pico['bytelevel']}"
    expected = evaluate("hf", "conf_blank", model_args=model_args, device="cpu")["results"]["conf_blank"]
    found = evaluate("deepen", "conf_blank", model_args=model_args, batch_size=size)["results"]["conf_blank"]
    assert found["acc,none"] == expected["acc,none"]


def test_06_device_and_batch_size_inside_model_args_win(pico, evaluate):
    path = str(pico["bytelevel"])
    for model_args in (
        f"pretrained={path},device=cpu,batch_size=3",
        {"pretrained": path, "device": "cpu", "batch_size": 3},
    ):
        found = evaluate("deepen", "conf_blank", model_args=model_args, batch_size="auto:2", device="cpu")
        assert found["config"]["model_args"] == model_args
    model = DeepenLM.create_from_arg_obj({"pretrained": path, "batch_size": 3}, {"batch_size": "auto", "device": None})
    assert model.batch_size == 3
    assert DeepenLM.create_from_arg_string(f"pretrained={path}", {"batch_size": "auto:4"}).batch_size == "auto:4"
    with pytest.raises(ConfigError, match="batch_size must be a whole number .*auto:N; got 'many'"):
        DeepenLM(path, batch_size="many")


def test_08_unknown_arguments_are_rejected(pico, evaluate):
    path = pico["bytelevel"]
    with pytest.raises(ConfigError, match="unknown key 'dytpe'. Did you mean 'dtype'?"):
        evaluate("deepen", "conf_blank", model_args=f"pretrained={path},dytpe=float32")
    with pytest.raises(ConfigError, match="unknown key 'wieght'. Did you mean 'weight'?"):
        DeepenLM(str(path), members=[{"pretrained": str(path), "wieght": 1.0}])
    with pytest.raises(ConfigError, match="unknown key 'version'"):
        deepen(path, version=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softmax_dtype": "float16"}, "member 'm1': softmax_dtype='float16' cannot be honoured"),
        ({"truncation": True}, "member 'm1': truncation=True cuts each member's prompt"),
        ({"think_end_token": "</think>"}, "member 'm1': think_end_token='</think>', but the main member has None"),
        ({"backend": "seq2seq"}, "member 'm1': .*"),
    ],
)
def test_08_arguments_without_a_meaning_for_an_ensemble_are_refused(pico, arguments, message):
    names = ("bytelevel", "metaspace")
    members = [{"name": f"m{i}", "pretrained": str(pico[name])} for i, name in enumerate(names)]
    members[1] |= arguments
    with pytest.raises(ValueError, match=message):
        DeepenLM(members[0]["pretrained"], members=members, device="cpu")


def test_08_the_main_member_must_be_named(pico):
    """Without it the harness would give the output folder a random name."""
    with pytest.raises(ConfigError, match="pretrained is missing.*output folder"):
        DeepenLM.create_from_arg_string(f"members={pico['bytelevel']}+{pico['metaspace']}")


def test_08_the_output_folder_is_stable_and_named_after_pretrained(pico, evaluate, tmp_path):
    path = str(pico["bytelevel"])
    file = tmp_path / "pair.yaml"
    file.write_text(json.dumps({"members": [path, str(pico["metaspace"])], "matrix_dir": str(tmp_path / "matrices")}))
    written = []
    for model, pretrained in (("hf", path), ("deepen", path), ("deepen", path), ("deepen", str(file))):
        tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
        arguments = {"pretrained": pretrained} | ({"device": "cpu"} if model == "hf" else {})
        found = evaluate(model, "conf_blank", model_args=arguments, evaluation_tracker=tracker)
        tracker.save_results_aggregated(found, found["samples"])
        written.append({p.parent.name for p in Path(tmp_path / "out").rglob("results_*.json")})
    assert written[0] == written[1] == written[2] == {path.replace("/", "__")}
    assert written[3] == {path.replace("/", "__"), str(file).replace("/", "__")}


def test_08_arguments_that_change_nothing_here_are_accepted(pico):
    """`logits_cache` is about speed: answers never depend on it (see item 12)."""
    batch = requests("loglikelihood", ("The fox", " jumps"), ("The fox", " walks"))
    expected = hf(pico["bytelevel"]).loglikelihood(batch)
    for arguments in (
        {"logits_cache": True},
        {"logits_cache": False},
        {"softmax_dtype": "float32"},
        {"backend": "causal"},
    ):
        for got, wanted in zip(deepen(pico["bytelevel"], **arguments).loglikelihood(batch), expected, strict=True):
            assert got[0] == pytest.approx(wanted[0], abs=1e-4)
