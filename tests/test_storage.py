"""Files are written whole or not at all, whatever fails in between; folders and locks likewise."""

from __future__ import annotations

import ast
import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm_eval_deepen import storage
from lm_eval_deepen.errors import ConfigError, StorageError

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder: Path) -> dict[str, bytes]:
    """Return everything below a folder: what is left behind shows."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failing(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


# Files -----------------------------------------------------------------------------------------------

WRITERS = {
    "text": lambda path: storage.write_text(path, "new ± \ud800\n"),
    "bytes": lambda path: storage.write_bytes(path, b"new"),
    "json": lambda path: storage.write_json(path, {"new": "±"}),
    "tensors": lambda path: storage.write_tensors(path, {"new": torch.arange(3)}, {"a": "b"}, sole=True),
    "append": lambda path: storage.append_text(path, "new\n"),
}


STEPS = ("open", "write", "fsync", "replace", "interrupt")
CASES = [(w, s) for w in WRITERS for s in STEPS if w != "append" or s not in ("fsync", "replace")]  # it does neither


@pytest.mark.parametrize(("writer", "step"), CASES)
@pytest.mark.parametrize("there", [True, False])
def test_a_write_that_fails_at_any_step_leaves_what_was_there_and_nothing_else(
    writer, step, there, tmp_path, monkeypatch
):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    if there:
        path.write_bytes(b"old\n")
    before = contents(tmp_path)
    error = KeyboardInterrupt() if step == "interrupt" else FULL
    if step == "open":
        monkeypatch.setattr(os, "open", failing(error))
        monkeypatch.setattr("builtins.open", failing(error))
    elif step in ("write", "interrupt"):
        monkeypatch.setattr(os, "write", failing(error))
        monkeypatch.setattr("builtins.open", _open_that_fills_up(error))
        monkeypatch.setattr("safetensors.torch.save_file", _half_saved(error))
    else:
        monkeypatch.setattr(os, step, failing(error))
    with pytest.raises(KeyboardInterrupt if step == "interrupt" else StorageError) as found:
        WRITERS[writer](path)
    monkeypatch.undo()
    if step == "open" and writer == "append" and not there:
        before = contents(tmp_path)
    assert contents(tmp_path) in (before, before | ({"folder/file": b""} if writer == "append" else {}))
    if step != "interrupt":
        assert str(found.value).startswith(f"{path} cannot be written (No space left on device)")
        assert "Free space on the disk" in str(found.value)


def _open_that_fills_up(error):
    """Return an `open` whose files take half of what is written, then raise."""
    real = open

    def opened(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        if "w" not in mode:
            return file

        class Half:
            def __enter__(self):
                return self

            def __exit__(self, *exception):
                file.close()

            def write(self, data):
                file.write(data[: len(data) // 2])
                raise error

        return Half()

    return opened


def _half_saved(error):
    def save(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise error

    return save


def test_what_is_written_is_read_back(tmp_path):
    for name, writer in WRITERS.items():
        writer(tmp_path / "a" / "b" / name)  # folders are made
    assert (tmp_path / "a/b/text").read_text("utf-8") == "new ± \\ud800\n"
    assert storage.read_json(tmp_path / "a/b/json") == {"new": "±"}
    assert load_file(tmp_path / "a/b/tensors")["new"].tolist() == [0, 1, 2]
    storage.append_text(tmp_path / "a/b/append", "more")
    assert storage.read_text(tmp_path / "a/b/append") == "new\nmore"
    storage.write_json(tmp_path / "half", {"name": "\udc80"})
    assert json.loads((tmp_path / "half").read_text("utf-8")) == {"name": "\udc80"}


def test_mode_and_links_stay(tmp_path):
    plain, umask = tmp_path / "new", os.umask(0o027)
    try:
        storage.write_text(plain, "x")
        storage.write_tensors(tmp_path / "weights", {"a": torch.zeros(1)}, {})
        storage.make_folder(tmp_path / "new model")
        save_file({"a": torch.zeros(1)}, tmp_path / "new model" / "weights")  # by others: may be its user's alone
        storage.publish_folder(tmp_path / "new model", tmp_path / "model")
    finally:
        os.umask(umask)
    for path in (plain, tmp_path / "weights", tmp_path / "model" / "weights"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
    plain.chmod(0o604)
    link, ring = tmp_path / "link", tmp_path / "ring"
    (tmp_path / "far").mkdir()
    link.symlink_to("new")
    storage.write_text(link, "y")
    assert link.is_symlink() and plain.read_text() == "y" and stat.S_IMODE(plain.stat().st_mode) == 0o604
    dangling = tmp_path / "dangling"
    dangling.symlink_to("far/target")
    storage.write_text(dangling, "z")
    assert dangling.is_symlink() and (tmp_path / "far/target").read_text() == "z"
    ring.symlink_to("ring")
    with pytest.raises(StorageError, match="ring cannot be written"):
        storage.write_text(ring, "z")


def test_what_is_no_file_is_refused_or_written_as_it_is(tmp_path, capfd):
    with pytest.raises(StorageError, match=r"cannot be written .*no ordinary file"):
        storage.write_text(tmp_path, "x")
    with pytest.raises(StorageError, match="cannot be written .*null"):
        storage.write_text(tmp_path / "a\0b", "x")
    with pytest.raises(StorageError, match=r"cannot be written .File name too long.. Give a shorter name"):
        storage.write_text(tmp_path / ("x" * 300), "x")
    with pytest.raises(StorageError, match="Not a directory|File exists"):
        storage.write_text(Path(__file__) / "x", "x")
    storage.write_text(tmp_path / ("ü" * 120), "x")  # 240 bytes: the temporary name must be no longer
    storage.write_text(Path("/dev/stdout"), "shown\n")
    storage.write_text(Path("/dev/null"), "x")
    storage.append_text(Path("/dev/stderr"), "told\n")
    assert capfd.readouterr() == ("shown\n", "told\n") and not Path("/dev/null").is_file()
    with pytest.raises(StorageError, match="/dev/full cannot be written .No space left"):
        storage.write_text(Path("/dev/full"), "x")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    storage.write_text(pipe, "through")
    assert os.read(reader, 100) == b"through" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


def test_whoever_writes_alone_clears_what_killed_writers_left(tmp_path):
    long = "x" * 60
    for name in ("a.json", f"{long}-1", f"{long}-2"):
        with storage.replacing(tmp_path / name) as temporary:
            os.link(temporary, tmp_path / f"kept-{name}")
            os.rename(tmp_path / f"kept-{name}", temporary.with_name(temporary.name.replace(".tmp", "9.tmp")))
    left = {path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")}
    assert len(left) == 3
    with storage.replacing(tmp_path / f"{long}-1", sole=True):
        pass
    kept = [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    assert len(kept) == 2  # of that file alone
    storage.write_text(tmp_path / "a.json", "x")
    assert len([path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]) == 2  # another process may write it
    for path in kept:
        os.utime(path, (0, 0))
    storage.write_text(tmp_path / "a.json", "x")
    assert len([path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ok\n\n\xff", r"f:3: byte 0xff is not UTF-8"),
        (b'{"a":\n{', r"f:2: not JSON \(.* at column 2\); the file is damaged or was cut off"),
        (b"", "f:1: not JSON"),
        (b"[" * 100_000, "f: not JSON that can be read"),
        (b"9" * 5000, "f: not JSON that can be read"),
    ],
)
def test_what_is_no_json_is_named_by_line(content, message, tmp_path):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(StorageError, match=message):
        storage.read_json(tmp_path / "f")


def test_the_cache_is_in_one_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.cache_folder() == tmp_path / "lm_eval_deepen"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert storage.cache_folder() == Path.home() / ".cache" / "lm_eval_deepen"
    monkeypatch.setattr(Path, "home", failing(RuntimeError("no home")))
    with pytest.raises(StorageError, match="no home.; set XDG_CACHE_HOME"):
        storage.cache_folder()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Makes an entry of the cache folder, last used so many hours ago."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def make(name: str, size: int, hours: float) -> Path:
        path = storage.cache_folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
        for place in (path, path.parent):
            os.utime(place, (time.time() - 3600 * hours,) * 2)
        return path

    return make


def test_what_is_written_into_the_cache_keeps_it_within_its_bound(cache, monkeypatch, tmp_path):
    """The least recently used goes first; models, locks, what is read now, and other folders stay."""
    stays = [
        cache("models/demo/weights", 9000, 900), cache("matrices/.a.lock", 10, 900), cache("matrices/busy", 900, 0.5),
        cache("other/mine", 9000, 900), cache(".cells-running/cell", 9000, 23),
    ]  # fmt: skip
    old, older = cache("tokenizers/text-1", 400, 5), cache("distributions/source-1/000000.safetensors", 400, 50)
    (killed := cache(".cells-killed/cell", 400, 48)), (temporary := cache("matrices/.m-1.tmp", 400, 49))
    found = {entry.path.name: (entry.kind, entry.size) for entry in storage.cache_entries()}
    assert found == {
        "demo": ("models", 9000), "busy": ("matrices", 900), "text-1": ("tokenizers", 400),
        "source-1": ("distributions", 400), ".cells-killed": ("leftovers", 400), ".m-1.tmp": ("leftovers", 400),
    }  # fmt: skip
    monkeypatch.setenv(storage.CACHE_SIZE, "1.8kB")
    storage.write_bytes(tmp_path / "elsewhere", b"x" * 5000)
    assert old.exists() and older.exists() and killed.exists() and temporary.exists()
    storage.write_bytes(storage.cache_folder() / "texts" / "new", b"x" * 500)
    assert old.exists() and not any(map(Path.exists, (older.parent, killed.parent, temporary)))
    storage.used(old)  # it was read
    storage.write_bytes(storage.cache_folder() / "texts" / "newer", b"x" * 5000)
    assert old.exists() and all(map(Path.exists, stays))
    assert {entry.path.name for entry in storage.bound_cache(5000)} == {"busy", "text-1", "new"}
    assert (storage.cache_folder() / "texts" / "newer").exists() and storage.bound_cache(5000) == []


def test_the_cache_is_looked_through_now_and_then(cache, monkeypatch):
    """Not for each of thousands of files: that would take a time with the square of their number."""
    looked = []
    monkeypatch.setattr(storage, "bound_cache", lambda *given: looked.append(given))
    monkeypatch.setattr(storage, "_since_bounded", math.inf)
    monkeypatch.setenv(storage.CACHE_SIZE, "100kB")
    counts = []
    for n in range(25):
        storage.write_bytes(storage.cache_folder() / "texts" / str(n), b"x" * 100)
        counts.append(len(looked))
    assert counts == [1 + n // 10 for n in range(25)]


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("7B", 7), ("500MB", 5e8), ("2.5 gb", 2.5e9), ("1k", 1000), ("1TB", 1e12), ("unbounded", None)],
)
def test_sizes(text, size, monkeypatch):
    monkeypatch.setenv(storage.CACHE_SIZE, text)
    assert storage.cache_bound() == size


@pytest.mark.parametrize("text", ["many", "-1", "1e3", "5XB", "nan", "GB", "3", "50000000000"])
def test_a_bound_that_is_no_size_is_an_error(text, monkeypatch):
    monkeypatch.setenv(storage.CACHE_SIZE, text)
    with pytest.raises(StorageError, match=f"{storage.CACHE_SIZE}={text}: must be a size with its unit, such as 500MB"):
        storage.cache_bound()


WRITING = """
from lm_eval_deepen import storage
storage._IN_USE_S = 0
for n in range(40):
    storage.write_bytes(storage.cache_folder() / "texts" / f"{n}-{'%s'}", b"x" * 1000)
"""


def test_processes_that_write_at_once_keep_the_bound_together(cache):
    folder = cache("texts/first", 1000, 1).parent
    given = {**os.environ, storage.CACHE_SIZE: "5kB"}
    writers = [subprocess.Popen([sys.executable, "-c", WRITING % name], env=given) for name in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    storage.bound_cache(5000)
    assert len([path for path in folder.iterdir() if not path.name.startswith(".")]) == 5


# Folders ---------------------------------------------------------------------------------------------


def folder(place: Path, content: str) -> Path:
    place.mkdir()
    (place / "model").write_text(content)
    (place / "more").write_text(content)
    return place


class Killed(BaseException):
    """Stands for SIGKILL: nothing that is below may handle it."""


@pytest.mark.parametrize("kill", range(9))
def test_a_folder_that_is_replaced_is_never_lost(kill, tmp_path, monkeypatch):
    """A kill before any of the system calls: old and new are there after the recovery, or the new one alone."""
    new, place = folder(tmp_path / "new", "new"), folder(tmp_path / "place", "old")
    calls = iter(range(1000))

    def counted(real, dead=lambda: None):
        def call(*args, **kwargs):
            if next(calls) >= kill:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in ("rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    killed = False
    try:
        storage.publish_folder(new, place)
    except Killed:
        killed = True
    monkeypatch.undo()
    storage.recover_folder(place)
    found = contents(tmp_path)
    old = {"place/model": b"old", "place/more": b"old", "new/model": b"new", "new/more": b"new"}
    assert found in (old, {"place/model": b"new", "place/more": b"new"})
    assert killed == (kill < 6) and (found == old) == (kill < 2)  # two moves, one aside, then it is removed


def test_a_folder_that_cannot_be_moved_leaves_the_old_one(tmp_path, monkeypatch):
    new, place = folder(tmp_path / "new", "new"), folder(tmp_path / "place", "old")
    before, real = contents(tmp_path), os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: failing(FULL)() if Path(a) == new else real(a, b))
    with pytest.raises(StorageError, match="place cannot be replaced .No space left"):
        storage.publish_folder(new, place)
    assert contents(tmp_path) == before
    monkeypatch.undo()
    storage.publish_folder(new, place)
    storage.publish_folder(folder(tmp_path / "new", "first"), tmp_path / "other")
    assert contents(tmp_path)["other/model"] == b"first"


def test_a_working_folder_is_gone_at_the_end(tmp_path):
    (tmp_path / ".work-left").mkdir()
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), storage.working_folder(tmp_path / "in", ".work-") as work:
            (work / "file").write_text("x")
            raise error
    with storage.working_folder(tmp_path, ".work-", sole=True):
        assert not (tmp_path / ".work-left").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["in"] and not list((tmp_path / "in").iterdir())


def test_removing_takes_links_alone_and_what_is_not_there(tmp_path):
    folder(tmp_path / "real", "kept")
    (tmp_path / "link").symlink_to("real")
    storage.remove_folder(tmp_path / "link")
    storage.remove_folder(tmp_path / "gone")
    storage.remove_file(tmp_path / "gone")
    with pytest.raises(StorageError, match="real cannot be removed"):
        storage.remove_file(tmp_path / "real")
    assert contents(tmp_path)["real/model"] == b"kept"


# Locks -----------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from lm_eval_deepen import storage
with storage.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_process_and_dies_with_it(tmp_path):
    path, busy = tmp_path / "in" / "x.lock", ConfigError("busy")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="busy"), storage.locked(path, busy=busy):
            pass
        process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    with storage.locked(path), pytest.raises(ConfigError, match="busy"), storage.locked(path, busy=busy):
        pass
    with pytest.raises(KeyError), storage.locked(path):
        raise KeyError  # whatever the body raises is its own
    with storage.locked(path, busy=busy):
        assert time.monotonic() - began < 5
    with pytest.raises(StorageError, match="Not a directory|File exists"), storage.locked(Path(__file__) / "x.lock"):
        pass


# Nobody else -----------------------------------------------------------------------------------------

WRITES = set(
    "write_text write_bytes touch mkdir makedirs unlink rmdir removedirs rename replace rmtree move copy copy2 "
    "copyfile copytree save_file savez tofile to_csv savefig NamedTemporaryFile TemporaryDirectory mkstemp mkdtemp "
    "FileLock SoftFileLock truncate symlink symlink_to link hardlink_to fdopen".split()
)
OF_MODULES = {"os", "shutil", "tempfile", "json", "pickle", "torch", "np", "numpy", "yaml", "fcntl", "safetensors"}
HARMLESS = {"replace", "copy", "rename", "move", "link", "truncate"}  # texts, tensors and dataclasses have these, too


def writing_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the calls by which a module would write, move or remove files itself."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = getattr(getattr(function, "value", None), "id", "")
        if name == "open":
            mode = [a.value for a in [*node.args[:2], *(k.value for k in node.keywords if k.arg == "mode")]
                    if isinstance(a, ast.Constant) and isinstance(a.value, str)]  # fmt: skip
            if owner == "os" or any(set("wax+") & set(word) and len(word) < 4 for word in mode):
                yield node.lineno, name
        elif name in ("dump", "save", "remove") and owner in OF_MODULES:
            yield node.lineno, f"{owner}.{name}"
        elif name in WRITES and (name not in HARMLESS or owner in OF_MODULES) and owner not in ("storage",):
            if isinstance(function, ast.Name) and name in ("write_text", "write_bytes"):
                continue  # imported from `storage`: these take the file as an argument
            yield node.lineno, name


def test_no_other_module_writes_by_itself():
    package = Path(storage.__file__).parent
    found = {
        f"{path.relative_to(package)}:{line}: {name}"
        for path in package.rglob("*.py")
        if path.name != "storage.py"
        for line, name in writing_calls(ast.parse(path.read_text("utf-8")))
    }
    assert not found


def test_the_search_for_writes_finds_them():
    source = Path(storage.__file__).read_text("utf-8")
    named = {name for _, name in writing_calls(ast.parse(source))}
    assert set("open mkdir unlink rename replace rmtree save_file TemporaryDirectory FileLock".split()) <= named
    for text in ("Path(p).write_text('')", "p.open('a')", "open(p, mode='wb')", "torch.save(x, p)", "json.dump(x, f)",
                 "os.remove(p)", "shutil.move(a, b)", "np.save(p, x)", "os.open(p, 1)", "yaml.dump(x, f)"):  # fmt: skip
        assert list(writing_calls(ast.parse(text))), text
    for text in ("a.replace('x', 'y')", "dataclasses.replace(a)", "open(p)", "open(p, 'rb')", "write_text(p, 'x')"):
        assert not list(writing_calls(ast.parse(text))), text


def test_a_folder_is_checked_without_being_made(tmp_path):
    (tmp_path / "file").write_text("")
    places = {"file": "Not a directory", "file/x": "Not a directory", "x" * 300: "File name too long"}
    for name, why in places.items():
        place = tmp_path / name
        with pytest.raises(StorageError, match=f"cannot be used .*{why}"):
            storage.check_folder(place)
    storage.check_folder(tmp_path)
    storage.check_folder(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_is_checked_before_the_work(tmp_path):
    places = {".": "Is a directory", "/dev/null/x": "Not a directory|File exists", "x" * 300: "File name too long"}
    for name, why in places.items():
        place = tmp_path / name
        with pytest.raises(StorageError, match=f"cannot be written .*({why})"):
            storage.check_place(place)
    storage.check_place(tmp_path / "a" / "b")
    storage.check_place(Path("/dev/stdout"))
    assert (tmp_path / "a").is_dir() and not (tmp_path / "a" / "b").exists()


def test_a_folder_is_linked_once_and_a_place_that_is_taken_stays(tmp_path):
    target, other, place = tmp_path / "data", tmp_path / "other", tmp_path / "place"
    for folder in (target, other):
        folder.mkdir()
    (target / "a").write_text("x")
    storage.link_folder(place, target)
    storage.link_folder(place, other)
    assert (place / "a").read_text() == "x"
    with pytest.raises(storage.StorageError, match="nowhere"):
        storage.link_folder(tmp_path / "nowhere" / "place", target)
