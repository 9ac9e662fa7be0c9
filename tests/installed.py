"""An environment of its own with the built distribution, as a user installs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import lm_eval
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[1]


def copy_harness(folder: Path) -> None:
    """Put the harness into a folder of `sys.path` without its thousands of task files, which every run indexes."""
    harness = Path(lm_eval.__file__).parent
    tasks = {entry.name for entry in (harness / "tasks").iterdir() if entry.is_dir()}
    shutil.copytree(harness, folder / "lm_eval", ignore=lambda _, names: tasks.intersection(names))
    without_packages(folder)


def without_packages(folder: Path) -> Path:
    """Put a `pip` into a folder of `sys.path` that lists nothing: the harness asks it for every results file."""
    (folder / "pip.py").write_text("")
    return folder


class Install:
    """One environment with the built distribution; everything else comes from the running one."""

    def __init__(self, folder: Path, kind: str, dist: Path) -> None:
        # Symbolic links, no pip: a tenth of a second.
        venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(folder)
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = folder / "lib" / name / "site-packages"
        self.python = folder / "bin" / "python"
        [wheel] = WheelBuilder(str(ROOT)).build(directory=str(dist), versions=[kind])
        with zipfile.ZipFile(wheel) as archive:
            self.files = archive.namelist()
            archive.extractall(self.site)
        # A folder added this way does not have its own .pth files processed.
        (self.site / "zz_base.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LM_EVAL_DEEPEN_NO_HOOK")}
        return subprocess.run(
            [str(self.python), *args],
            env={**clean, "HF_HUB_OFFLINE": "1", **env},
            cwd=self.site.parent,  # not the checkout, which would be importable by itself
            capture_output=True,
            text=True,
        )

    def json(self, code: str, **env: str):
        done = self.run("-c", code, **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])
