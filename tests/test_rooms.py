"""The rooms of the package: who may import whom, and that the check of it can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lm_eval_deepen"


def contracts(checkout: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of a copy of the package, as `make lint` does."""
    code = "from importlinter.cli import lint_imports_command as command; command()"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=checkout,
        env={"PYTHONPATH": str(checkout), "HOME": str(checkout)},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "planted", "contract"),
    [
        ("engine/scoring.py", "import lm_eval_deepen.build.publish", "Rooms import the rooms below them"),
        ("fusion/gac.py", "from lm_eval_deepen.member import Member", "Rooms import the rooms below them"),
        ("results/files.py", "import torch", "results works on anyone's results"),
        ("results/files.py", "from lm_eval_deepen.config import Keys", "results works on anyone's results"),
        ("relative/matrix.py", "from lm_eval_deepen.relative import store", "No circle among the modules of a room"),
        (
            "relative/matrix.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lm_eval_deepen.relative import store",
            "No circle among the modules of a room",
        ),
        (
            "engine/covers.py",
            "def later():\n    from lm_eval_deepen.engine.texts import Texts\n    return Texts",
            "No circle among the modules of a room",
        ),
        ("engine/scoring.py", "import transformers", "know transformers"),
        ("fusion/gac.py", "import lm_eval", "knows lm_eval"),
        ("vocabulary/cuts.py", "import torch", "load without tensors"),
    ],
)
def test_a_planted_import_breaks_its_contract(checkout: Path, module: str, planted: str, contract: str):
    place = checkout / "lm_eval_deepen" / module
    place.write_text(place.read_text("utf-8") + f"\n{planted}\n", "utf-8")
    done = contracts(checkout)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = done.stdout.partition("Broken contracts")[2]
    assert contract in broken and module.rpartition("/")[2].removesuffix(".py") in broken


def test_the_contracts_hold_without_exceptions(checkout: Path):
    done = contracts(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout
    assert "ignore_imports" not in (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_root_holds_what_every_room_needs():
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "errors.py", "storage.py", "py.typed"}
