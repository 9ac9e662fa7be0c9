"""Item 25, the harness's loggers: what `wandb` and `trackio` are fed with is that of `hf`, with nothing special.

Neither package is needed: both are stood in for by `recording`.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from types import SimpleNamespace

import lm_eval.tasks
import pandas as pd
import pytest
from harness import HARNESS_05
from lm_eval._cli.harness import HarnessCLI
from lm_eval.tasks import TaskManager
from recording import Table, trackio_module, wandb_modules

pytestmark = pytest.mark.skipif(HARNESS_05, reason="0.5.0.dev1 has no trackio")

TASKS = ["conf_group", "conf_cloze", "conf_text", "conf_answer"]
NUMBER = re.compile(r"(-?\d+\.\d+(?:e-?\d+)?)")
RATES = ("perplexity", "bits_per_byte")


@pytest.fixture(scope="module")
def runs(pico, task_folder, tmp_path_factory):
    """What was logged by runs of the command line with `hf`, with one member and with two."""
    folder = tmp_path_factory.mktemp("loggers")
    a, b = str(pico["bytelevel"]), str(pico["metaspace"])
    models = {
        "hf": ("hf", {"pretrained": a, "logits_cache": False}),
        "one": ("deepen", {"pretrained": a}),
        "two": ("deepen", {"pretrained": a, "members": [a, b], "matrix_dir": str(folder / "matrices")}),
    }
    found = {}
    for name, (model, arguments) in models.items():
        modules = {**wandb_modules(), "trackio": trackio_module()}
        command = ["run", "--model", model, "--model_args", json.dumps(arguments), "--device", "cpu"]
        command += ["--tasks", *TASKS, "--limit", "3", "--include_path", str(task_folder), "--log_samples"]
        command += ["--output_path", str(folder / name), "--wandb_args", "project=ours", "name=first"]
        command += ["--wandb_config_args", "note=pico", "--trackio_args", "project=ours"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["lm_eval", *command])
            patch.setattr(lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
            for key, module in modules.items():
                patch.setitem(sys.modules, key, module)
            cli = HarnessCLI()
            cli.execute(cli.parse_args())
        [wandb], [trackio] = modules["wandb"].runs, modules["trackio"].runs
        [written] = (folder / name).rglob("results_*.json")
        found[name] = SimpleNamespace(wandb=wandb, trackio=trackio, results=json.loads(written.read_text()))
    return found


def plain(value):
    """Return what was logged as lists and dicts, with the numbers inside texts as numbers."""
    if isinstance(value, pd.DataFrame):
        return plain(value.to_dict("list"))
    if isinstance(value, (Table, SimpleNamespace)):
        return plain(vars(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, str) and NUMBER.search(value):
        return [float(part) if NUMBER.fullmatch(part) else part for part in NUMBER.split(value)]
    return value.item() if hasattr(value, "item") else value


def agree(got, expected):
    """Compare what `plain` returns, numbers with a tolerance."""
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
    if isinstance(expected, (dict, list)):
        assert len(got) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            agree(got[key], expected[key])
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-4)
    else:
        assert got == expected


def test_metrics_tables_and_samples_are_those_of_hf(runs):
    for package in ("wandb", "trackio"):
        theirs, ours = getattr(runs["hf"], package), getattr(runs["one"], package)
        assert ours.arguments == theirs.arguments and ours.finished and theirs.finished
        assert ours.logged.keys() == theirs.logged.keys()
        agree(plain(ours.logged), plain(theirs.logged))
        assert ours.summary == theirs.summary and ours.artifacts.keys() == theirs.artifacts.keys()
    logged = runs["one"].wandb.logged
    assert {"evaluation/eval_results", "evaluation/group_eval_results", "conf_cloze_eval_results"} <= logged.keys()
    assert len(runs["one"].trackio.logged["conf_text/sample"]) == 3


@pytest.mark.parametrize("name", ["one", "two"])
def test_every_metric_of_the_results_file_is_logged(runs, name):
    """Fused answers too: both packages and the file tell of one evaluation."""
    results = runs[name].results["results"]
    wandb, trackio = runs[name].wandb, runs[name].trackio
    metrics = {
        f"{task}/{metric.removesuffix(',none')}": value
        for task, found in results.items()
        for metric, value in found.items()
        if isinstance(value, float)
    }
    assert len(metrics) > 10
    for key, value in metrics.items():
        assert wandb.logged[key] == trackio.logged[key] == [value]
    dumped = json.loads(wandb.artifacts["eval_results/results"].files["results.json"])
    assert dumped["results"] == results and "samples" not in dumped
    samples = json.loads(wandb.artifacts["samples_by_task/conf_answer"].files["conf_answer_eval_samples.json"])
    assert [sample["doc_id"] for sample in samples] == [0, 1, 2] * 2  # two filters


def test_two_members_log_answers_of_their_own(runs):
    """What is logged of an ensemble is not what is logged of its main member, under the same keys."""
    one, two = (runs[name].trackio.logged for name in ("one", "two"))
    assert one.keys() == two.keys()
    rates = [key for key in one if key.endswith(RATES)]
    assert rates and all(one[key] != two[key] for key in rates)


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_the_ensemble_is_in_the_config_that_is_logged(runs, package):
    theirs = getattr(runs["hf"], package).config
    for name, members in (("one", ["bytelevel"]), ("two", ["bytelevel", "metaspace"])):
        config = getattr(runs[name], package).config
        assert config.keys() == theirs.keys() and config["task_configs"].keys() == theirs["task_configs"].keys()
        assert config["cli_configs"].keys() == {*theirs["cli_configs"], "deepen"}
        described = json.loads(json.dumps(config["cli_configs"]["deepen"], allow_nan=False))
        assert [member["name"] for member in described["members"]] == members
        assert described == runs[name].results["config"]["deepen"]
        assert bool(described["steps_fused"]) is (name == "two")
    assert runs["two"].wandb.config["note"] == "pico"
