"""The one place that writes, replaces and removes files: a reader sees the old content or the new, never a part.

A file is written beside its place, brought to the disk and moved there; a folder is replaced in two moves, of which
either can be lost. What a killed process leaves behind is cleared away by the next one that holds the lock.

Whatever the system refuses is a StorageError that names the file or folder and the remedy; what was there is there
still. `Raises` of a function names only what else is one.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval_deepen.errors import DeepenError, StorageError

# What the cache folder keeps, by subfolder. Whatever is in REMADE is made again where it is missing.
CACHE_KINDS = {
    "matrices": "relative matrices and maps between vocabularies; made again in minutes",
    "tokenizers": "what reading large tokenizers gives, and what covers found",
    "checks": "which models have passed the checks of their forward passes",
    "texts": "training splits of tasks, as files of text",
    "distributions": "teacher logits of distillations; made again by their sources",
    "models": "the models of `lm-eval-deepen demo`; nothing removes them unless they are named",
}
LEFTOVERS = "leftovers"  # of processes that were killed
REMADE = frozenset(CACHE_KINDS) - {"models"} | {LEFTOVERS}
CACHE_SIZE, DEFAULT_CACHE_SIZE = "LM_EVAL_DEEPEN_CACHE_SIZE", "50GB"
_IN_USE_S = 3600  # what was used so lately may be read still
_since_bounded = math.inf  # bytes that this process has written into the cache folder since it looked through it

_STALE_S = 24 * 3600
_SHOWN = 40  # characters of a file's name in that of its temporary one: names have an end, too
_UNSYNCED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF)  # file systems that bring nothing to a disk
_DESCRIPTORS = ("/dev/std", "/dev/fd/", "/proc/")
_REMEDIES = {
    errno.ENOSPC: "Free space on the disk, or give another place",
    errno.EDQUOT: "Free space in your quota, or give another place",
    errno.EACCES: "Give a place that you may use",
    errno.EPERM: "Give a place that you may use",
    errno.EROFS: "Give a place that can be written",
    errno.EXDEV: "Give a place that is no mount point",
    errno.EBUSY: "Give a place that is no mount point",
    errno.ENAMETOOLONG: "Give a shorter name",
}


def cache_folder() -> Path:
    """Return this project's folder in the user's cache: ``$XDG_CACHE_HOME`` or ``~/.cache``, ours below."""
    root = os.environ.get("XDG_CACHE_HOME")
    if root:
        return Path(root) / "lm_eval_deepen"
    try:
        return Path.home() / ".cache" / "lm_eval_deepen"
    except RuntimeError as error:
        raise StorageError(
            f"there is no home folder for the cache ({error}); set XDG_CACHE_HOME to a folder"
        ) from error


def used(path: Path) -> None:
    """Note that an entry of the cache folder is used now: in a file's time of reading, or a folder's time of change."""
    with contextlib.suppress(OSError):  # of a folder that is only read
        known, now = path.stat(), time.time_ns()
        os.utime(path, ns=(now, now if stat.S_ISDIR(known.st_mode) else known.st_mtime_ns))


@dataclass(frozen=True)
class CacheEntry:
    """A file or a folder that is kept in the cache folder."""

    path: Path  # where it is
    kind: str  # of `CACHE_KINDS`
    size: int  # in bytes
    used: float  # when it was made or used last, in seconds since 1970

    def remove(self) -> None:
        """Remove it, unless another process has done so; a folder is there as a whole or not at all."""
        lock = self.path.with_name(f".{self.path.name}.lock")  # of who makes a folder
        with locked(lock) if lock.exists() else contextlib.nullcontext(), _explained(self.path, "removed"):
            if not self.path.is_dir():
                self.path.unlink(missing_ok=True)
                return
            trash = self.path.with_name(f"{_hidden(self.path)}.{secrets.token_hex(4)}.trash")
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path, trash)
                shutil.rmtree(trash)


def cache_entries() -> list[CacheEntry]:
    """Return what is kept in the cache folder, what was used last at the end."""
    folder, entries = cache_folder(), []
    with _explained(folder, "read"):
        for place in (folder, *(folder / kind for kind in CACHE_KINDS)):
            for path in place.iterdir() if place.is_dir() else ():
                hidden = path.name.startswith(".")
                if path.suffix == ".lock" or (place == folder and not hidden):
                    continue
                size, last = 0, 0.0
                for part in (path, *(path.rglob("*") if path.is_dir() and not path.is_symlink() else ())):
                    with contextlib.suppress(FileNotFoundError):  # another process removes or renames
                        known = part.lstat()
                        size += known.st_size if stat.S_ISREG(known.st_mode) else 0
                        last = max(last, known.st_mtime, 0 if stat.S_ISDIR(known.st_mode) else known.st_atime)
                if last and (not hidden or time.time() - last > _STALE_S):
                    entries.append(CacheEntry(path, LEFTOVERS if hidden else place.name, size, last))
    return sorted(entries, key=lambda entry: entry.used)


def bound_cache(most: int, spared_s: float = -math.inf) -> list[CacheEntry]:
    """Remove what was not used for longest of what can be made again, until it takes at most so many bytes.

    Args:
        most: the bytes.
        spared_s: what was used within so many seconds stays, whatever it takes.

    Returns:
        What was removed; nothing where another process is at it.
    """
    removed: list[CacheEntry] = []
    entries = [entry for entry in cache_entries() if entry.kind in REMADE]
    over = sum(entry.size for entry in entries) - most
    if over <= 0:
        return removed
    at_it = StorageError("another process removes what is in the cache folder")
    try:
        with locked(cache_folder() / ".bound.lock", at_it):
            for entry in entries:
                if over > 0 and time.time() - entry.used >= spared_s:
                    entry.remove()
                    removed.append(entry)
                    over -= entry.size
    except StorageError as error:
        if error is not at_it:
            raise
    return removed


def _bound_cache_after(written: Path) -> None:
    """Keep the cache folder within its bound, where what was written is in it.

    To look through it takes a while where it holds many files. So a process does it for its first file, and after each
    hundredth of the bound that it has written.
    """
    global _since_bounded
    with contextlib.suppress(StorageError, ValueError, OSError):  # no home; not in it; gone; what stays
        if written.relative_to(os.path.realpath(cache_folder())).parts[0] not in REMADE:
            return
        if (most := cache_bound()) is None:
            return
        _since_bounded += written.stat().st_size
        if _since_bounded >= most / 100:
            _since_bounded = 0
            bound_cache(most, _IN_USE_S)


def cache_bound() -> int | None:
    """Return how many bytes of what can be made again the cache folder keeps; None: as many as there are.

    Raises:
        StorageError: ``$LM_EVAL_DEEPEN_CACHE_SIZE`` is no size.
    """
    text = os.environ.get(CACHE_SIZE) or DEFAULT_CACHE_SIZE
    if text.strip().lower() == "unbounded":
        return None
    try:
        return parsed_size(text)
    except ValueError as error:
        raise StorageError(f"{CACHE_SIZE}={text}: {error}, or `unbounded`") from error


def parsed_size(text: str) -> int:
    """Return the bytes of a size such as ``500MB`` or ``2.5 GB``; 0 alone needs no unit.

    Raises:
        ValueError: it is none.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([KMGT]B?|B|)", text.strip().upper())
    if size is None or not (size[2] or float(size[1]) == 0):  # 3 bytes, where 3 GB were meant, would remove all
        raise ValueError("must be a size with its unit, such as 500MB or 20GB")
    return int(float(size[1]) * 1000 ** " KMGT".index(size[2].removesuffix("B") or " "))


# Reading ---------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        StorageError: it cannot be read, or is not UTF-8; by file and line.
    """
    with _explained(path, "read"):
        raw = path.read_bytes()
    return decoded(raw, str(path))


def decoded(raw: bytes, where: str, first_line: int = 1) -> str:
    """Return the text that bytes spell, which begin at `first_line` of the file `where`.

    Raises:
        StorageError: they are not UTF-8; by file and line.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise StorageError(
            f"{where}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; the file is damaged, or no text"
        ) from error


def read_json(path: Path) -> Any:
    """Return what a file of JSON holds.

    Raises:
        StorageError: it cannot be read, or is no JSON; by file and line.
    """
    return parsed(read_text(path), str(path))


def sha256(path: Path) -> str:
    """Return the SHA-256 hex digest of a file."""
    digest = hashlib.sha256()
    with _explained(path, "read"), open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def parsed(text: str, where: str) -> Any:
    """Return what a text of JSON holds, of our own or the harness's files: configurations are stricter.

    Raises:
        StorageError: it is no JSON; by file and line.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise StorageError(
            f"{where}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); the file is damaged or was cut "
            "off"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of more digits than Python reads
        raise StorageError(f"{where}: not JSON that can be read ({error}); the file is damaged") from error


# Files -----------------------------------------------------------------------------------------------


def check_place(path: Path) -> None:
    """Refuse a place where no file can be written, before the work whose result goes there; its folder is made.

    Raises:
        StorageError: it is a folder, or its folder cannot be made or written.
    """
    target = Path(os.path.realpath(path))
    with _explained(path, "written"):
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if _is_stream(path):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        os.stat(target) if target.exists() else None  # a name that is too long


def write_text(path: Path, text: str) -> None:
    """Write a text, UTF-8, in one step. What UTF-8 cannot spell, half of a surrogate pair, is written as its escape."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def json_text(data: Any, indent: int | None = 2) -> str:
    """Return data as a text of JSON, which has no word for a number that is not finite: that is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(data), indent=indent, ensure_ascii=False)


def write_json(path: Path, data: Any, indent: int | None = 2, sole: bool = False) -> None:
    """Write data as JSON, in one step."""
    write_bytes(path, (json_text(data, indent) + "\n").encode("utf-8", "backslashreplace"), sole)


def write_bytes(path: Path, data: bytes, sole: bool = False) -> None:
    """Write bytes in one step; its folder is made if need be. A device or a pipe is written as it is."""
    with _explained(path, "written"):
        if _is_stream(path):
            with open(path, "ab", buffering=0) as stream:
                _write_all(stream.fileno(), data)
            return
    with replacing(path, sole) as temporary, _explained(path, "written"), open(temporary, "wb") as file:
        file.write(data)


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str], sole: bool = False) -> None:
    """Write a safetensors file in one step: `tensors` of torch by name, contiguous and on the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path, sole) as temporary, _explained(path, "written"):
        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata))
        except SafetensorError as error:  # what the system said is in its text
            raise StorageError(f"{path} cannot be written ({error}). Is the disk full? Give another place") from error


def append_text(path: Path, text: str) -> None:
    """Append a text to a file that others append to as well, such as a job's summary; all of it or nothing."""
    append_bytes(path, text.encode("utf-8", "backslashreplace"))


def append_bytes(path: Path, data: bytes) -> None:
    """Append bytes, as a text is appended."""
    with _explained(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _explained(path, "written"), open(path, "ab", buffering=0) as file:
        end = None if _is_stream(path) else os.fstat(file.fileno()).st_size
        try:
            _write_all(file.fileno(), data)
        except BaseException:
            if end is not None:
                os.ftruncate(file.fileno(), end)
            raise


@contextlib.contextmanager
def replacing(path: Path, sole: bool = False) -> Iterator[Path]:
    """Give a temporary file to be filled, which replaces `path` where nothing is raised, and is removed where it is.

    The new file has the mode of the old one, else that of any new file. Of a link it is the file behind it that is
    replaced.

    Args:
        path: the file; its folder is made if need be.
        sole: whether a lock says that nobody else writes it: what killed writers left is removed then, and else where
            it is older than any write takes.
    """
    target = Path(os.path.realpath(path))
    start = f".{target.name[:_SHOWN]}-{zlib.crc32(os.fsencode(target.name)):08x}."  # of no other file in the folder
    with _explained(path, "written"):
        if target.is_symlink():  # what leads to itself
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if target.exists() and not target.is_file():
            raise OSError(errno.EISDIR if target.is_dir() else errno.EINVAL, "it is no ordinary file", str(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f"{glob.escape(start)}*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # its writer has finished
                if sole or time.time() - stale.stat().st_mtime > _STALE_S:
                    stale.unlink()
    temporary = target.with_name(f"{start}{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with _explained(path, "written"):
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        with _explained(path, "written"):
            if target.exists():
                _copy_owner(target, temporary)
            else:
                _set_mode(temporary, mode)  # safetensors makes a file of its own, for its user alone
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _bound_cache_after(target)


def discard(descriptor: int) -> None:
    """Let whatever is written to an open file from now on vanish."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there."""
    with _explained(path, "removed"):
        path.unlink(missing_ok=True)


def move_file(source: Path, target: Path) -> None:
    """Move a file to another name on the same disk, in one step."""
    with _explained(target, "written"):
        _sync(source)
        os.replace(source, target)


# Folders ---------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing."""
    with _explained(path, "used"):
        path.mkdir(parents=True, exist_ok=True)


def link_folder(path: Path, target: Path) -> None:
    """Make `path` a link to the folder `target`, where nothing stands at `path` yet."""
    with _explained(path, "used"):
        if not path.exists():
            path.symlink_to(target.resolve(), target_is_directory=True)


def remove_folder(path: Path) -> None:
    """Remove a folder with what is in it; a link to one is removed alone."""
    with _explained(path, "removed"):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)


def check_folder(path: Path) -> None:
    """Refuse a folder that is none, or that cannot be made; nothing is made. One that is only read is none of these."""
    place = Path(os.path.abspath(path))
    with _explained(path, "used"):
        for folder in (place, *place.parents):
            try:
                is_folder = stat.S_ISDIR(os.stat(folder).st_mode)
            except FileNotFoundError:
                continue
            if not is_folder:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if folder != place and not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return


@contextlib.contextmanager
def working_folder(parent: Path, prefix: str, sole: bool = False) -> Iterator[Path]:
    """Give an empty folder in `parent` that is removed at the end, whatever happens.

    `sole` as for `replacing`: what killed processes left is removed then.
    """
    make_folder(parent)
    with _explained(parent, "used"):
        if sole:
            for leftover in parent.glob(f"{glob.escape(prefix)}*"):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
        folder = tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
    with folder as name:
        yield Path(name)


def publish_folder(new: Path, place: Path) -> None:
    """Replace the folder at `place`, if there is one, by a finished one beside it.

    Whoever may read it may read its files.

    The old one is moved away, the new one in, then the old one is removed. A process that is killed in between leaves
    both, and `recover_folder` puts the old one back.
    """
    recover_folder(place)
    with _explained(place, "replaced"):
        mode = stat.S_IMODE(new.stat().st_mode)
        for path in new.rglob("*"):
            if path.is_file():
                _set_mode(path, stat.S_IMODE(path.stat().st_mode) | mode & 0o444)  # weights are their user's alone
                _sync(path)
        old = _old(place)
        if place.exists():
            os.rename(place, old)
        try:
            os.rename(new, place)
        except BaseException:
            if old.exists() and not place.exists():
                os.rename(old, place)
            raise
        _sync(place.parent)
    recover_folder(place)


def recover_folder(place: Path) -> None:
    """Put back the folder that a killed `publish_folder` had moved away, or remove it where the new one is there.

    Whoever replaces a folder calls it first, under the lock of the folder.
    """
    old = _old(place)
    with _explained(place, "replaced"):
        if old.exists() and not place.exists():
            os.rename(old, place)
        elif old.exists():  # under another name first: half of a folder must not be taken for the old one
            os.rename(old, place.with_name(f"{_hidden(place)}.{secrets.token_hex(4)}.trash"))
    for trash in _trash(place):
        with contextlib.suppress(StorageError):  # the new one is there; the next time tries again
            remove_folder(trash)


def is_settled(place: Path) -> bool:
    """Return whether nothing is left of a `publish_folder` that was killed, or goes on in another process."""
    return not _old(place).exists() and not _trash(place)


def _trash(place: Path) -> list[Path]:
    return list(place.parent.glob(f"{glob.escape(_hidden(place))}.*.trash"))


def _hidden(place: Path) -> str:
    return f".{place.name}"


def _old(place: Path) -> Path:
    return place.with_name(f"{_hidden(place)}.old")


# Locks -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, busy: DeepenError | None = None) -> Iterator[None]:
    """Hold the lock file `path` against other processes; the system releases it when its holder dies.

    Where another process holds it, `busy` is raised; None waits. The file stays: removing it would let two processes
    hold locks of one name.
    """
    from filelock import FileLock, Timeout  # no command needs it only to print its help

    make_folder(path.parent)
    lock = FileLock(path)
    with _explained(path, "locked"):
        try:
            lock.acquire(timeout=-1 if busy is None else 0)
        except Timeout as error:
            assert busy is not None  # else it waits
            raise busy from error
    try:
        yield
    finally:
        lock.release()


# What the others share -------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    """Turn what the system refuses into an error that names the file."""
    try:
        yield
    except DeepenError:
        raise
    except OSError as error:
        raise StorageError(f"{path} cannot be {what} ({reason(error)}). {remedy(error)}") from error
    except ValueError as error:  # a NUL in a name
        raise StorageError(f"{str(path)!r} cannot be {what} ({error}). Correct the name") from error


def reason(error: BaseException) -> str:
    """Return what the system says, without the name of a temporary file."""
    if isinstance(error, StorageError) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    return (isinstance(error, OSError) and error.strerror) or str(error)


def remedy(error: OSError) -> str:
    """Return what helps against an error of the system."""
    return _REMEDIES.get(error.errno or 0, "Correct the path, or give another")


def _is_stream(path: Path) -> bool:
    """Tell whether it is a device or a pipe, which is written as it is: nothing may take its place."""
    if os.path.abspath(path).startswith(_DESCRIPTORS):  # may lead to an ordinary file that is open already
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _write_all(descriptor: int, data: bytes) -> None:
    for stream in (sys.stdout, sys.stderr):  # it may be one of these
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _copy_owner(target: Path, temporary: Path) -> None:
    """Give the new file mode and owner of the old one, as far as that is allowed."""
    before = target.stat()
    with contextlib.suppress(OSError, AttributeError):
        if (before.st_uid, before.st_gid) != (os.getuid(), os.getgid()):
            os.chown(temporary, before.st_uid, before.st_gid)
    _set_mode(temporary, stat.S_IMODE(before.st_mode))


def _set_mode(path: Path, mode: int) -> None:
    """Set a file's mode, where its file system has modes and it is ours."""
    with contextlib.suppress(OSError):
        os.chmod(path, mode)


def _sync(path: Path) -> None:
    """Bring a file or a folder to the disk: a full disk may say so here only."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # a folder that may be written, not read; a system that opens no folders
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise
    finally:
        os.close(descriptor)
