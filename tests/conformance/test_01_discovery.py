"""Items 1 to 4, and 25 from the command line: installed as a wheel and as an editable checkout.

Every run is a fresh process with nothing but the released harness and the built distribution; the
three of them spell one ensemble in three ways and must agree.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import lm_eval.api.registry
import pytest
from harness import deepen
from installed import Install, copy_harness
from lm_eval.models.dummy import DummyLM
from lm_eval.models.huggingface import HFLM

from lm_eval_deepen.harness.model import DeepenLM

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the layout of the throw-away environment is POSIX")
SCRIPT = Path(sys.executable).with_name("lm_eval")


@pytest.fixture(scope="module")
def installs(tmp_path_factory):
    """The distribution in throw-away environments: its wheel, and its editable wheel."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("standard", "editable")}
    found = {kind: Install(folder / "env", kind, folder / "dist") for kind, folder in folders.items()}
    for install in found.values():
        copy_harness(install.site)
    return found


@pytest.fixture(scope="module")
def runs(installs, pico, task_folder, tmp_path_factory):
    """Three runs: command, arguments inline; `accelerate launch`, JSON; `python -m lm_eval`, YAML."""
    out = tmp_path_factory.mktemp("out")
    a, b = str(pico["bytelevel"]), str(pico["metaspace"])
    nested = {"pretrained": a, "members": [a, {"pretrained": b, "dtype": "float32"}], "matrix_dir": str(out / "m")}
    tasks = ["conf_choice", "conf_answer"]
    common = ["--tasks", *tasks, "--include_path", str(task_folder), "--limit", "3"]
    config = out / "run.yaml"
    config.write_text(
        json.dumps(
            {
                "model": "deepen",
                "model_args": nested,
                "tasks": tasks,
                "include_path": str(task_folder),
                "limit": 3,
                "predict_only": True,
                "write_out": True,
                "output_path": str(out / "yaml"),
            }
        )
    )
    accelerate = ["-m", "accelerate.commands.launch", "--num_processes=1", "--cpu", "-m", "lm_eval"]
    inline = f"pretrained={a},members={a}+{b},matrix_dir={out / 'm'}"
    start = ["run", "--model", "deepen", "--model_args"]
    inline_run = [str(SCRIPT), *start, inline, *common, "--log_samples", "--output_path", str(out / "inline")]
    json_run = [*accelerate, *start, json.dumps(nested), *common, "--output_path", str(out / "json")]
    json_run += ["--batch_size", "4"]
    yaml_run = ["-m", "lm_eval", "run", "--config", str(config)]
    done = {
        "inline": installs["standard"].run(*inline_run),
        "json": installs["standard"].run(*json_run),
        "yaml": installs["editable"].run(*yaml_run),
    }
    for name, process in done.items():
        assert process.returncode == 0, f"{name}: {process.stderr[-3000:]}"
    return out, done


@pytest.mark.parametrize("run", ["inline", "json", "yaml"])
def test_01_every_command_line_finds_deepen_with_no_extra_flag(runs, read_results, run):
    results, _ = read_results(runs[0] / run)
    assert results["config"]["model"] == "deepen"
    assert [member["name"] for member in results["config"]["deepen"]["members"]] == ["bytelevel", "metaspace"]


def test_01_the_api_finds_deepen(pico, evaluate):
    found = evaluate("deepen", "conf_blank", model_args=f"pretrained={pico['bytelevel']}")
    assert found["results"]["conf_blank"]["acc,none"] >= 0
    assert lm_eval.api.registry.get_model("deepen") is DeepenLM


@pytest.mark.parametrize("kind", ["standard", "editable"])
def test_02_a_wheel_and_an_editable_install_register_alike(installs, kind):
    install = installs[kind]
    assert {"lm_eval_deepen_hook.pth", "lm_eval_deepen_hook.start"} <= set(install.files)
    assert (install.site / "lm_eval_deepen").is_dir() is (kind == "standard")
    [entries] = [name for name in install.files if name.endswith("entry_points.txt")]
    text = (install.site / entries).read_text()
    assert "[lm_eval.models]" in text and "deepen = lm_eval_deepen.harness.model:DeepenLM" in text


def test_02_both_installs_give_the_same_answers(runs, read_results):
    found = [read_results(runs[0] / run) for run in ("inline", "yaml")]
    texts = [
        {(s["doc_id"], s["filter"]): s["resps"] for s in samples if "Answer in one word" in str(s["arguments"])}
        for _, samples in found
    ]
    assert texts[0].keys() & texts[1].keys()
    assert all(texts[1][key] == text for key, text in texts[0].items() if key in texts[1])
    described = [results["config"]["deepen"]["members"] for results, _ in found]
    assert described[0] == described[1]


def test_03_built_in_models_still_resolve():
    """Our module was imported before any of them was asked for."""
    found = [lm_eval.api.registry.get_model(name) for name in ("hf", "hf-auto", "huggingface", "dummy")]
    assert found == [HFLM, HFLM, HFLM, DummyLM]


def test_04_start_up_imports_neither_torch_nor_the_harness(installs):
    """Nor anything else but the hook."""
    code = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    for install in installs.values():
        with_hook = set(install.json(code))
        hook = install.site / "lm_eval_deepen_hook.pth"
        hook.rename(hook.with_suffix(".off"))
        try:
            own = with_hook - set(install.json(code))
        finally:
            hook.with_suffix(".off").rename(hook)
        assert own == {"lm_eval_deepen", "lm_eval_deepen._startup", "lm_eval_deepen._startup.hook"}
        assert not with_hook & {"torch", "lm_eval", "transformers", "numpy", "yaml"}


def test_04_a_failing_hook_breaks_no_other_process(installs):
    hook = installs["standard"].site / "lm_eval_deepen" / "_startup" / "hook.py"
    text = hook.read_text()
    hook.write_text("raise RuntimeError('broken hook')\n")
    try:
        done = installs["standard"].run("-c", "print('fine')")
    finally:
        hook.write_text(text)
    assert (done.returncode, done.stdout) == (0, "fine\n")


def test_25_results_of_the_command_line_list_every_member(runs, read_results, pico):
    results, _ = read_results(runs[0] / "inline")
    members = results["config"]["deepen"]["members"]
    models = [deepen(pico[name]).model for name in ("bytelevel", "metaspace")]
    for member, model in zip(members, models, strict=True):
        assert (member["dtype"], member["revision"]) == ("float32", "main")
        assert member["parameters"] == sum(p.numel() for p in model.parameters())
    assert results["config"]["model_num_parameters"] == members[0]["parameters"]
    assert results["config"]["deepen"]["steps_fused"] > 0
    assert results["model_name"] == str(pico["bytelevel"])


def test_25_log_samples_saves_every_sample(runs, read_results):
    _, samples = read_results(runs[0] / "inline")
    assert len(samples) == 3 + 2 * 3  # one filter, and two
    assert all(sample["resps"] and sample["doc_hash"] for sample in samples)
    assert not list((runs[0] / "json").rglob("samples_*"))


def test_25_predict_only_and_write_out(runs, read_results):
    results, samples = read_results(runs[0] / "yaml")
    assert not [key for key in results["results"]["conf_choice"] if key.startswith("acc")]
    assert len(samples) >= 6
    process = runs[1]["yaml"]
    assert "Question: What is the capital of France?" in process.stdout + process.stderr
