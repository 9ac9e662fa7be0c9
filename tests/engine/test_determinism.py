"""The same run twice, in fresh processes and under two hash seeds, gives the same results file apart from times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
import lm_eval
import torch.utils.collect_env as collect_env
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from lm_eval_deepen.harness.model import DeepenLM
collect_env.get_pretty_env_info = str  # which would take seconds, and is not kept
model = DeepenLM.create_from_arg_obj(json.loads(sys.argv[1]), {"batch_size": 4, "device": "cpu"})
results = lm_eval.simple_evaluate(
    model=model, tasks=["deepen_demo"], limit=3, bootstrap_iters=10,
    task_manager=TaskManager(include_path=sys.argv[2], include_defaults=False),
)
kept = {key: results[key] for key in ("results", "samples", "configs", "n-shot")}
kept["deepen"] = results["config"]["deepen"]
print("RESULT" + json.dumps(kept, default=handle_non_serializable, sort_keys=True))
"""
ROOT = Path(__file__).resolve().parents[2]


def run(arguments: dict, seed: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments), str(ROOT / "task_configs")],
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))


def test_two_runs_agree_to_the_last_digit(pico, tmp_path):
    arguments = {
        "pretrained": str(pico["bytelevel"]),
        "members": [str(pico[name]) for name in ("bytelevel", "metaspace", "padded")],
        "max_anchors": 64,
    }
    first = run({**arguments, "matrix_dir": str(tmp_path / "a")}, "1")
    second = run({**arguments, "matrix_dir": str(tmp_path / "b")}, "2")
    assert first == second
    deepen = json.loads(first.removeprefix("RESULT"))["deepen"]
    assert deepen["steps_fused"] > 0 and deepen["anchors"] == 64
    assert [member["name"] for member in deepen["members"]] == ["bytelevel", "metaspace", "padded"]
