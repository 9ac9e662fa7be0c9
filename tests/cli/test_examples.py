"""The examples that a newcomer copies: every file is understood, and the script runs."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lm_eval_deepen import configure

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_an_ensemble(path: Path) -> None:
    config = configure({"pretrained": str(path)})
    assert len(config.members) == 2 and sum(config.weights) == pytest.approx(1)


def test_the_script_runs(pico) -> None:
    command = [sys.executable, str(EXAMPLES / "from_python.py"), str(pico["bytelevel"]), str(pico["metaspace"])]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    assert "most likely next piece: b" in found.stdout


def test_the_notebook_runs(pico, monkeypatch, capsys) -> None:
    """In this process: that an example runs in one of its own, the script's test shows."""
    script = EXAMPLES / "notebook.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(pico["bytelevel"]), str(pico["metaspace"])])
    runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr().out
    assert "likeliest: " in told and "score of the text: -" in told and "changed: True" in told
