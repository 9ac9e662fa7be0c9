"""``lm-eval-deepen run ...``: the harness's own command with ``deepen`` registered in any case."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lm_eval_deepen._startup import registration


def run_harness(argv: Sequence[str]) -> int:
    """Run ``lm_eval run`` on ``argv``, also where the start-up hook is off or was not installed.

    Returns:
        0; the harness leaves through `SystemExit` or its own exceptions otherwise.
    """
    registration.register()
    from lm_eval.__main__ import cli_evaluate

    saved = sys.argv
    sys.argv = ["lm-eval", "run", *argv]  # the harness parses sys.argv itself
    try:
        cli_evaluate()
    finally:
        sys.argv = saved
    return 0
