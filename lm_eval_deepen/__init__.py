"""Evaluate ensembles of language models with lm-evaluation-harness."""

# Every start of an interpreter runs this file (see `_hook`): nothing is imported before it is asked for.

__version__ = "0.1.0"

TYPE_CHECKING = False  # what type checkers take for True, without importing typing
if TYPE_CHECKING:
    from typing import Any

_LAZY = {
    "Ensemble": "lm_eval_deepen.engine",
    "configure": "lm_eval_deepen.harness.model",
    "DeepenLM": "lm_eval_deepen.harness.model",
}


def __getattr__(name: str) -> "Any":
    """Return `Ensemble`, `configure` or `DeepenLM`."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
