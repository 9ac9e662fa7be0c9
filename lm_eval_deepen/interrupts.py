"""Ctrl-C under the harness's own command: one line and status 130, not the stack of everything that was at work."""

from __future__ import annotations

import sys
from types import FrameType, TracebackType

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def tell_interrupts() -> None:
    """Tell a person of Ctrl-C in one line, if the harness's command line runs this process.

    Elsewhere, as in a notebook, KeyboardInterrupt stays what the caller makes of it.
    """
    if _under_command() and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _hook


def _under_command() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "cli_evaluate" and frame.f_globals.get("__package__") == "lm_eval":
            return True
        frame = frame.f_back
    return False


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("interrupted; a response cache (--use_cache) has what was answered", file=sys.stderr, flush=True)
    raise SystemExit(INTERRUPTED)
