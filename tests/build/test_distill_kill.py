"""A build whose process is killed goes on with the last checkpoint, and ends up as if nothing had happened."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pico as pico_models

from lm_eval_deepen.build import distill
from lm_eval_deepen.build.distill import training

PROGRAM = """
import json, sys
from pathlib import Path
from lm_eval_deepen.build import distill
recipe, out, members = map(json.loads, sys.argv[1:])
distill.build(recipe, Path(out), members)
"""
PATIENCE_S = 300


def test_a_killed_process_loses_nothing_but_time(pico: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(pico_models.CORPUS.replace("\n", "\n\n"), encoding="utf-8")
    recipe = {
        "method": "fusellm", "target": "bytelevel", "sources": ["bytelevel", "metaspace"], "text": str(text),
        "train_tokens": 3000, "context_length": 32, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_steps": 20,
        "device": "cpu", "store": str(tmp_path / "store"),
    }  # fmt: skip
    members, out = {name: str(path) for name, path in pico.items()}, tmp_path / "killed"
    arguments = [json.dumps(value) for value in (recipe, str(out), members)]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    partial, deadline = tmp_path / "killed.partial", time.monotonic() + PATIENCE_S
    while process.poll() is None and not list(partial.glob(f"checkpoint-*/{training.COMPLETE}")):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()[-2000:]
    assert not out.exists() and training.last_checkpoint(partial)

    found = distill.build(recipe, out, members)
    expected = distill.build(recipe, tmp_path / "whole", members)
    assert found["tensors_sha256"] == expected["tensors_sha256"]
    assert found["held_out"] == expected["held_out"]
