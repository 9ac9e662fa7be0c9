"""Answers do not depend on where the members are; a device that is emulated on the CPU finds tensors left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

CASES = {
    "defaults": {},
    "learning from prompts, members by turns": {"learn_from": "prompt", "sampling": "member"},
    "mixture": {"method": "mixture"},
    "words": {"method": "adafuse"},
    "support": {"weights": "0.5+0.5", "support": 64, "max_truncated": 0.5, "skip_when": "safe"},
}
APART = ["defaults"]  # with a member on each device, too


@pytest.fixture(scope="module")
def found(pico):
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} cannot register a device from Python")
    job = {"models": [str(pico["bytelevel"]), str(pico["metaspace"])], "cases": CASES, "apart": APART}
    worker = Path(__file__).with_name("device_worker.py")
    ran = subprocess.run([sys.executable, str(worker), json.dumps(job)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_emulated_device_refuses_tensors_of_two_devices(found):
    assert "same device" in found["mixed"]


def test_a_member_that_lands_elsewhere_is_an_error(found):
    assert "loaded on the CPU, not on device='npu:0'" in found["unseen"]


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_cpu(found, case):
    expected, *others = found["cases"][case].values()
    assert others
    for got in others:
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name] == (value if name in ("texts", "sampled") else pytest.approx(value, abs=1e-4)), name
