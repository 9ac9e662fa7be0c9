"""Make the released harness, which discovers no plugins, know the model ``deepen``."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from lm_eval_deepen._startup import MODELS, OFF_SWITCH

MODEL_NAME = "deepen"
MODEL_PATH = "lm_eval_deepen.harness.model:DeepenLM"


def register() -> None:
    """Register ``deepen`` in the harness now, whatever the off-switch says.

    Raises:
        RuntimeError: The harness is too old to hold a model by its import path.
    """
    # The harness loads its own models only into an empty registry: an entry made earlier would hide them all.
    importlib.import_module(MODELS)
    _add_to_registry()


def _add_to_registry() -> None:
    harness = importlib.import_module("lm_eval.api.registry")
    if hasattr(harness, "load_plugins"):
        return  # this harness reads the entry-point group `lm_eval.models` itself
    registry = getattr(harness, "model_registry", None)
    if registry is None:
        raise RuntimeError("lm_eval_deepen needs lm_eval >= 0.4.12: pip install -U lm_eval")
    if MODEL_NAME not in registry:
        registry.register(MODEL_NAME, target=MODEL_PATH)


def register_or_warn() -> None:
    """Register ``deepen``, or warn: the harness may be in use by somebody who does not want it."""
    try:
        _add_to_registry()
    except Exception as error:
        warnings.warn(
            f"lm_eval_deepen could not register the model {MODEL_NAME!r} with lm_eval: {error}."
            f" Set {OFF_SWITCH}=1 to silence this.",
            RuntimeWarning,
            stacklevel=2,
        )


def spec_that_registers(asking: object, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """Return what the finders other than ``asking`` find for ``lm_eval.models``, set up to register."""
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        if finder is asking or find_spec is None:
            continue
        spec: ModuleSpec | None = find_spec(MODELS, path, target)
        if spec is not None:
            _register_after_execution(spec)
            return spec
    return None


def _register_after_execution(spec: ModuleSpec) -> None:
    loader = spec.loader
    if loader is None:
        return
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ == MODELS:
            register_or_warn()

    # On the loader's instance, not in a wrapper: resource readers and `inspect` look at the loader's type.
    loader.exec_module = exec_module  # type: ignore[method-assign]
