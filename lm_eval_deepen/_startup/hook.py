"""Every interpreter runs this at its start: it leaves a finder behind that waits for ``lm_eval.models``.

Called from ``lm_eval_deepen_hook.pth`` and, from Python 3.15, ``lm_eval_deepen_hook.start``. Processes that
have nothing to do with the harness pay for this module, so it is small and imports nothing that is not
loaded anyway. The work is in `lm_eval_deepen._startup.registration`.
"""

import os
import sys

from lm_eval_deepen._startup import MODELS, OFF_SWITCH

TYPE_CHECKING = False  # importing `typing`, or even `__future__`, would cost as much as the rest
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def install() -> None:
    """Arrange for ``deepen`` to be registered once ``lm_eval.models`` has been executed.

    Idempotent. Does nothing where ``LM_EVAL_DEEPEN_NO_HOOK`` is set (to anything but ``0`` or nothing).
    """
    if os.environ.get(OFF_SWITCH, "0") not in ("", "0"):
        return
    if MODELS in sys.modules:
        from lm_eval_deepen._startup.registration import register_or_warn

        register_or_warn()
    elif not any(isinstance(finder, ModelsFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ModelsFinder())


class ModelsFinder:
    """Meta-path finder that leaves finding to the others and registers after the execution."""

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec of ``lm_eval.models``, and None for every other module."""
        if fullname != MODELS:
            return None
        from lm_eval_deepen._startup.registration import spec_that_registers

        return spec_that_registers(self, path, target)
