"""What a command's exit status says is so, whatever is damaged, full, closed or broken: above all, 1 is "regressed"."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_files import DATE, doctored, gate, synthesised

from lm_eval_deepen.cli import gate as gate_tool
from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.cli.ending import FAULT, INTERRUPTED, ended
from lm_eval_deepen.errors import ConfigError

ENSEMBLE = {
    "fingerprint": "0" * 64,
    "method": "gac",
    "options": {"a": 1},
    "members": [{"pretrained": "m", "weight": 1}],
}
ODD = [None, True, -1, float("nan"), 10**400, "x", [], {}, [None], {"x": {"y": None}}]


@pytest.fixture(autouse=True)
def no_summary(monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture
def pair(tmp_path):
    tasks = {"t": {"acc": [1.0, 0.0, 1.0, 1.0, 0.0], "bleu": [["a", "b"]] * 5}, "u": {"ppl": [[-1.0, 2]] * 5}}
    ways = {"higher_is_better": {"ppl": False}, "aggregations": {"bleu": "bleu", "ppl": "weighted_perplexity"}}
    config = {"model": "deepen", "deepen": ENSEMBLE}
    found = [synthesised(tmp_path / name, tasks, config=config, **ways) for name in "ab"]
    for path in (folder / f"results_{DATE}.json" for folder in found):
        groups = {"groups": {"g": {"alias": "g", "acc,none": 0.6}}, "chat_template_sha": "0", "system_instruction": "s"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **groups}))
    return found


# Inputs ----------------------------------------------------------------------------------------------


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path to everything in JSON data."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple, by: Any) -> Any:
    if not path:
        return by
    found = copy.copy(value)
    found[path[0]] = replaced(value[path[0]], path[1:], by)
    return found


def without(value: Any, path: tuple) -> Any:
    found = copy.deepcopy(value)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return found


@pytest.mark.parametrize("file", ["results", "samples_t", "samples_u"])
def test_whatever_stands_in_a_file_is_a_verdict_or_unreadable(file, pair, capsys):
    """Every value of a results file and of a sample is replaced by all kinds of others, and left out."""
    path = pair[1] / f"{file}_{DATE}.{'json' if file == 'results' else 'jsonl'}"
    first, *rest = path.read_text().splitlines()
    whole = json.loads(first)
    met = set()
    for place in places(whole):
        changed = [replaced(whole, place, odd) for odd in ODD] + ([without(whole, place)] if place else [])
        for one in changed:
            path.write_text("\n".join([json.dumps(one), *rest]))
            status = gate(*pair)
            told = capsys.readouterr()
            assert status in (0, 2, 3) and "Traceback" not in told.err, (place, one, told)
            assert status != 2 or told.err.startswith("error: ") and told.err.count("\n") == 1, told.err
            met.add(status)
            if one is changed[0] or one is changed[4]:
                assert cli.main(["compare", *map(str, pair)]) in (0, 2)
                assert "Traceback" not in capsys.readouterr().err
    assert met == {0, 2, 3}


BYTES = {
    "empty": b"",
    "no UTF-8": b'{"a": "\xff"}\n',
    "binary": bytes(range(256)),
    "cut": b'{"doc_id": 3, "do',
    "a BOM": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "long": b"9" * 10_000,
    "another kind": b"[1, 2]",
}


@pytest.mark.parametrize("content", BYTES)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("command", ["gate", "compare"])
def test_files_that_cannot_be_read_are_2_and_named(command, side, content, pair, capsys):
    for path in pair[side].iterdir():
        whole = path.read_bytes()
        for after in (b"", whole) if path.suffix == ".jsonl" and content != "empty" else (b"",):
            path.write_bytes(after + BYTES[content])
            status = gate(*pair) if command == "gate" else cli.main(["compare", *map(str, pair)])
            told = capsys.readouterr().err
            assert status == 2 and told.startswith("error: ") and told.count("\n") == 1 and path.name in told, told
        path.write_bytes(whole)


def test_the_cases_of_a_gate_that_said_regressed_by_a_crash(pair, tmp_path, capsys):
    for edit in (
        lambda records: records[0].update(doc_id="x"),
        lambda records: records[0].update(acc=float("nan")),
        lambda records: records[0].update(acc="1.0"),
        lambda records: records[0].update(metrics="acc"),
        lambda records: records[0].update(doc_hash=None),
    ):
        assert gate(pair[0], doctored(pair[1], tmp_path / "c", "t", edit)) == 2
        assert capsys.readouterr().err.startswith("error: ")
        shutil.rmtree(tmp_path / "c")


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), OSError(errno.EIO, "broken"), MemoryError()])
def test_a_read_that_fails_is_2(error, pair, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert gate(*pair) == (FAULT if isinstance(error, MemoryError) else 2)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "open", fail)
    assert gate(*pair) == (FAULT if isinstance(error, MemoryError) else 2)


# Outputs ---------------------------------------------------------------------------------------------


def test_outputs_that_cannot_be_written_are_2(pair, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for option in ("--json", "--summary"):
        assert gate(*pair, option, tmp_path / "new" / "folder" / option) == 0
        for place, why in (
            (tmp_path, "ordinary file|Is a directory"),
            (tmp_path / "file" / "x", "Not a directory|File exists"),
            ("/dev/full", "No space left"),
            (tmp_path / ("x" * 300), "too long"),
        ):
            assert gate(*pair, option, place) == 2
            told = capsys.readouterr()
            assert told.out.startswith("PASS") and told.err.count("\n") == 1
            assert told.err.startswith(f"error: {place} cannot be written") or "x" * 300 in told.err
            assert any(part in told.err for part in why.split("|"))
    assert (tmp_path / "file").read_text() == "kept" and not list(tmp_path.glob(".*.tmp"))
    assert cli.main(["compare", *map(str, pair), "--output", "/dev/full"]) == 2
    assert cli.main(["compare", *map(str, pair), "--output", str(tmp_path)]) == 2


def run(*arguments: object, redirect: str = "", **environment: str) -> subprocess.CompletedProcess:
    command = " ".join([sys.executable, "-m", "lm_eval_deepen.cli.main", *map(str, arguments), redirect])
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, env={**os.environ, **environment}, timeout=120, check=False
    )


def test_a_terminal_that_is_full_closed_gone_or_of_another_encoding(pair):
    command = ("gate", "--baseline", pair[0], "--candidate", pair[1])
    full = run(*command, redirect="> /dev/full")
    assert full.returncode == 2 and full.stderr.startswith(b"error: standard output cannot be written (No space left")
    assert full.stderr.count(b"\n") == 1
    gone = run(*command, redirect="| true; exit ${PIPESTATUS[0]}")  # the reader's leaving changes no verdict
    assert (gone.returncode, gone.stderr) == (0, b"")
    assert run(*command, redirect=">&-").returncode == 0
    deaf = run(*command, redirect="2> /dev/full")
    assert deaf.returncode == 0 and deaf.stdout.startswith(b"PASS")
    named = ("compare", *pair, "--names", "a±▲", "ü")
    assert run(*named, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C").returncode == 0
    told = run(*named, PYTHONIOENCODING="ascii")
    assert told.returncode == 0 and b"a+/-^" in told.stdout and b"\\xfc" in told.stdout and told.stderr == b""
    assert "a±▲" in run(*named, PYTHONIOENCODING="utf-8").stdout.decode()
    assert run("--help", redirect="> /dev/full").returncode == 2


def test_streams_spell_as_before_when_a_command_has_ended(monkeypatch):
    streams = {errors: io.TextIOWrapper(io.BytesIO(), "ascii", errors=errors) for errors in ("strict", "replace")}
    monkeypatch.setattr(sys, "stdout", streams["strict"])
    monkeypatch.setattr(sys, "stderr", streams["replace"])
    assert ended(lambda: print("ü▲", end="") or print("ü", end="", file=sys.stderr) or 0) == 0
    assert streams["strict"].buffer.getvalue() == b"\\xfc^" and streams["replace"].buffer.getvalue() == b"?"
    assert {before: stream.errors for before, stream in streams.items()} == {"strict": "strict", "replace": "replace"}
    in_c = io.TextIOWrapper(io.BytesIO(), "ascii", errors="surrogateescape")  # standard output in the locale C
    monkeypatch.setattr(sys, "stdout", in_c)
    assert ended(lambda: print("ü±", end="") or 0) == 0
    assert (in_c.buffer.getvalue(), in_c.errors) == (b"\\xfc+/-", "surrogateescape")


# Ends of any command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RuntimeError("two\nlines"), FAULT, "a fault of lm-eval-deepen, please report it: RuntimeError: two lines\n"),
        (AssertionError(), FAULT, "AssertionError: AssertionError\n"),
        (MemoryError(), FAULT, "MemoryError"),
        (RecursionError("deep"), FAULT, "RecursionError: deep"),
        (ConfigError("x: wrong; correct it"), 2, "error: x: wrong; correct it\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "f"), 2, "error: f: No such file. Correct the path"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device. Free space"),
        (OSError("a library's\n  own"), 2, "error: a library's own\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "error: Broken pipe. Correct"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "error: 'utf-8' codec can't decode"),
        (UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "no"), 2, r"'a\ud800': '\ud800' cannot be written as utf-8"),
        (UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "no"), 2, "Correct that text\n"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "(os error 28). Free space on the disk"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted; what is finished is kept\n"),
    ],
)  # fmt: skip
def test_no_end_of_a_command_looks_like_a_verdict(error, status, message, pair, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(gate_tool, "judge", fail)
    streams = sys.stdout, sys.stderr
    assert gate(*pair) == status
    assert (sys.stdout, sys.stderr) == streams
    told = capsys.readouterr().err
    assert message in told and ("Traceback" in told) == (status == FAULT)


def test_json_gives_no_verdict_beside_a_file_that_could_not_be_written(pair, capsys):
    assert gate(*pair, "--json", "--junit", "/dev/full") == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("given", [{"inverse": "\ud800"}, {"batch_size": "auto\udcff"}])
def test_half_a_surrogate_pair_is_named(given, capsys):
    ensemble = json.dumps({"pretrained": "none", "members": ["none", "nowhere"], **given})
    assert cli.main(["inspect", ensemble, "--no-tasks"]) == 1
    [(key, value)] = given.items()
    assert f"{key} must be" in (told := capsys.readouterr().out) and ascii(value) in told


def test_wrong_usage_is_2(capsys):
    for arguments in (["gate"], ["nothing"], ["gate", "--alpha", "x"], []):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0 and "70 a fault" in " ".join(capsys.readouterr().out.split())


def test_the_documentation_says_what_the_statuses_are():
    text = (Path(__file__).resolve().parents[2] / "docs" / "ci.md").read_text("utf-8")
    for status, words in (
        (2, "cannot be read"),
        (2, "cannot be written"),
        (FAULT, "fault"),
        (INTERRUPTED, "interrupt"),
    ):
        assert [line for line in text.splitlines() if line.startswith(f"| {status} |") and words in line], status
