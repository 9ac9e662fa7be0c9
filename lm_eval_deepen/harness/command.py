"""Errors of this package end the harness's own command in one line, not in a traceback."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

from lm_eval_deepen.errors import DeepenError

UNUSABLE = 2  # what cannot be used or read, as the commands of this package have it
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def end_in_one_line() -> None:
    """Let errors of this package and Ctrl-C end the process in one line, if the harness's command line runs it.

    With ``--verbosity DEBUG``, or ``LMEVAL_LOG_LEVEL=DEBUG``, the traceback is shown as well. Elsewhere, as in a
    notebook, exceptions stay what the caller makes of them.
    """
    if under_command() and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _hook


def has_failed() -> bool:
    """Tell whether an error ended the command."""
    return hasattr(sys, "last_value")


def under_command() -> bool:
    """Tell whether the harness's command line is what runs this."""
    return locals_of("cli_evaluate") is not None


def locals_of(function: str) -> Mapping[str, Any] | None:
    """Return the variables of a function of the harness that runs this, which it tells nobody; None elsewhere."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__package__") == "lm_eval":
            return frame.f_locals
        frame = frame.f_back
    return None


def is_debugging() -> bool:
    """Tell whether everything is to be shown; newer harnesses take the option, and do nothing with it."""
    asked = " ".join(sys.argv).replace("=", " ").upper()
    return any(f"{option} DEBUG" in asked for option in ("--VERBOSITY", " -V")) or logging.getLogger(
        "lm_eval"
    ).isEnabledFor(logging.DEBUG)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.last_value = error
    ours = issubclass(kind, (DeepenError, KeyboardInterrupt))
    if not ours or is_debugging():
        sys.__excepthook__(kind, error, trace)
    if not ours:
        return
    interrupted = issubclass(kind, KeyboardInterrupt)
    told = "interrupted; a response cache (--use_cache) has what was answered" if interrupted else f"error: {error}"
    print(told, file=sys.stderr, flush=True)
    raise SystemExit(INTERRUPTED if interrupted else UNUSABLE)
