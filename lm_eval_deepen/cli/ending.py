"""The one place where a command ends: every error becomes the exit status that the documentation gives."""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from lm_eval_deepen.errors import DeepenError, one_line
from lm_eval_deepen.harness.command import INTERRUPTED, UNUSABLE, is_debugging
from lm_eval_deepen.storage import discard, reason, remedy

FAULT = 70  # a fault of this program (EX_SOFTWARE of sysexits.h); no command gives it another meaning
STATUSES = (
    f"Every command: {UNUSABLE} wrong usage, an input that cannot be read, an output that cannot be written; {FAULT} a "
    f"fault of the program itself; {INTERRUPTED} interrupted."
)
_SPELLINGS = {"±": "+/-", "▲": "^", "▼": "v"}  # for a terminal without these characters
_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "PytorchStreamWriter failed writing")
_ERRORS = "lm_eval_deepen.spelt"
_SHOWN = 100  # characters of a text


def ended(command: Callable[[], int], guest: bool = False) -> int:
    """Run a command to its end and return its exit status.

    What the command says goes to standard output as far as that takes it: a reader who leaves (``| head``) ends the
    printing, not the command, and what the terminal cannot show is spelt otherwise. Exceptions of a `guest`, another
    program's command, go on.
    """
    with _printing() as output:
        try:
            status = command()
        except SystemExit as stop:  # of the argument parser
            if output.flush() is None:
                raise
            status = stop.code if isinstance(stop.code, int) else UNUSABLE
        except KeyboardInterrupt:
            _tell("interrupted; what is finished is kept")
            return INTERRUPTED
        except DeepenError as error:
            if guest and is_debugging():
                traceback.print_exception(error)
            _tell(f"error: {error}")
            return UNUSABLE
        except (OSError, UnicodeError) as error:
            _tell(f"error: {explained(error)}")
            return UNUSABLE
        except Exception as error:
            if guest:
                raise
            if _is_full(error):
                _tell(f"error: {one_line(error)}. {remedy(OSError(errno.ENOSPC, ''))}")
                return UNUSABLE
            _tell("".join(traceback.format_exception(error)).rstrip())
            _tell(f"error: a fault of lm-eval-deepen, please report it: {type(error).__name__}: {one_line(error)}")
            return FAULT
        if (failure := output.flush()) is not None:
            _tell(f"error: standard output cannot be written ({reason(failure)}). {remedy(failure)}")
            return UNUSABLE
    return status


def _is_full(error: BaseException | None) -> bool:
    """Tell whether a library's error is that of a full disk, which it puts into words of its own."""
    while error is not None:
        if any(words in str(error) for words in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def explained(error: BaseException) -> str:
    """Return what a person is told of an error: ours says it all, the system's lacks the file and the remedy."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{reason(error)}. {remedy(error)}"
    if isinstance(error, UnicodeEncodeError):  # half of a surrogate pair: what a command line or JSON can hold
        text, character = ascii(error.object), ascii(error.object[error.start])
        text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        return f"{text}: {character} cannot be written as {error.encoding} ({error.reason}). Correct that text"
    return str(error) if isinstance(error, DeepenError) else one_line(error)


class Output:
    """A standard stream that never stops the command: after a failure it takes the rest, and drops it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write, as far as the stream still takes anything."""
        if self._failure is None:
            try:
                return int(self._stream.write(text))
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> OSError | None:
        """Flush; return why something could not be written, None where nothing is missing, or its reader left."""
        if self._failure is None and self._stream is not None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)
        return None if isinstance(self._failure, BrokenPipeError) else self._failure

    def _fail(self, error: OSError) -> None:
        self._failure = error
        with contextlib.suppress(OSError, ValueError):  # what is still buffered must not fail again at the exit
            discard(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _printing() -> Iterator[Output]:
    """Put an `Output` before standard output and standard error; the former is given."""
    streams: tuple[Any, Any] = (sys.stdout, sys.stderr)
    output, errors = map(Output, streams)
    before = [(stream, handler) for stream in streams if (handler := _respelt(stream)) is not None]
    sys.stdout, sys.stderr = (
        stream if real is not None else None for stream, real in zip((output, errors), streams, strict=True)
    )  # type: ignore[assignment]
    try:
        yield output
    finally:
        output.flush()
        errors.flush()
        sys.stdout, sys.stderr = streams
        for stream, handler in before:
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=handler)


def _respelt(stream: Any) -> str | None:
    """Let a stream spell otherwise what its encoding lacks; return what it did before, None where it is not changed.

    Python makes standard output `surrogateescape` instead of strict in the locale ``C``, which is an error as well.
    """
    before: str | None = getattr(stream, "errors", None)
    if not hasattr(stream, "reconfigure") or before not in ("strict", "surrogateescape"):
        return None
    stream.reconfigure(errors=_ERRORS)
    return before


def _spelt(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    if (spelling := _SPELLINGS.get(error.object[error.start])) is not None:
        return spelling, error.start + 1
    error.end = error.start + 1  # one character at a time
    return codecs.backslashreplace_errors(error)


codecs.register_error(_ERRORS, _spelt)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
