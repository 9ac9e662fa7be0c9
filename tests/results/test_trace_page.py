"""The page of traces: one file that needs nothing else, shows any text as text, and answers clicks and keys."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from browser import CHROMIUM, CONTRAST, dumped, measured
from run_files import synthesised

from lm_eval_deepen.cli import main as cli
from lm_eval_deepen.errors import ResultError
from lm_eval_deepen.results.files import find_runs
from lm_eval_deepen.results.trace_page import ALL, NOBODY, agree, script_json, shown, shown_runs, who
from lm_eval_deepen.results.trace_server import server
from lm_eval_deepen.results.traces import SCHEMA

NODE = shutil.which("node")
HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!--", "\u202eabc\u2066", "a\0b",
           "x" * 100_000, "]]>", "{{ 7 * 7 }}", "\u2028", "שלום"]  # fmt: skip


def step(piece: Any, *tops: Any, **facts: Any) -> dict[str, Any]:
    members = [
        {"abstained": True} if top is None else {"weight": 0.5, "top": [[top, 0.6], ["z", 0.1]], "chosen": 0.25}
        for top in tops
    ]
    return {"piece": piece, "logp": -1.25, "entropy": 1.5, "members": members, **facts}


def write_trace(
    folder: Path, documents: list[list[dict[str, Any]]], task: str = "t", members: Any = ("one", "two")
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    head = {"schema": SCHEMA, "task": task, "fingerprint": "f" * 64, "method": "deepen", "started": "2026-01-01",
            "members": [{"name": name, "pretrained": name} for name in members], "lm_eval_deepen": "0"}  # fmt: skip
    lines = [head] + [
        {
            "doc_id": n,
            "doc_hash": f"h{n}",
            "request": 0,
            "repeat": 0,
            "type": "generate_until",
            "reason": "stop",
            "steps": steps,
        }
        for n, steps in enumerate(documents)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"trace_{task}_2026-01-01T00-00-00.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def page(*folders: Path, limit: int | None = None) -> str:
    return shown(folders, limit).html()


def data_of(text: str) -> dict[str, Any]:
    """Return what a page shows, as its script reads it."""
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def rewritten(path: Path, *changes: tuple[str, str]) -> bytes:
    """Return a trace in which other texts stand in the place of some."""
    told = gzip.decompress(path.read_bytes()).decode()
    for before, after in changes:
        told = told.replace(before, after)
    return gzip.compress(told.encode())


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    here = write_trace(
        tmp_path / "here",
        [
            [
                step("The", "The", "The"),
                step(" dog", " cat", " dog", changed=True),
                step({"control": "<eos>"}, {"control": "</s>"}, None),
            ],
            [step({"bytes": "c3"}, {"bytes": "c3"}, "q"), step({"bytes": "a9"}, "a", "b", skipped="skip_when=agree")],
            [step("same", "same", "same")],
        ],
    )  # fmt: skip
    alone = [[step("The", "The"), step(" cat", " cat")], [step("é", "e")], [step("same", "same")]]
    there = write_trace(tmp_path / "there", alone, members=("alone",))
    return here, there


def drive(text: str, folder: Path, *actions: Any, link: str = "") -> list[dict[str, Any]]:
    """Return what the page shows at first and after each action."""
    if NODE is None:
        pytest.skip("no node to run the page's script")
    path = folder / "page.html"
    path.write_text(text, "utf-8")
    script = Path(__file__).with_name("page_in_node.js")
    command = [NODE, str(script), str(path), link]
    found = subprocess.run(command, input=json.dumps(actions), capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_keys_clicks_filters_and_search(folders: tuple[Path, Path], tmp_path: Path) -> None:
    text = page(*folders)
    shown = drive(
        text, tmp_path, ["key", "ArrowRight"], ["key", "ArrowLeft"], ["key", "ArrowRight", "shift"], ["key", "j"],
        ["click", "t0-1"], ["choose", "filter", 3], ["choose", "filter", 5], ["choose", "filter", 0],
        ["choose", "search", "É"], ["key", "k"],
    )  # fmt: skip
    start, right, left, changed, second, clicked, only_changed, differing, everything, searched, kept = shown
    assert start["count"] == "3 of 3 documents" and start["what"] == "Document 0"
    assert start["marked"] == ["t0-1", "t1-1"] and start["here"] == ["t0-1"]  # where the texts part
    assert "The texts part at token 2." in start["strips"][0]
    assert right["step"].startswith("Token 3 of 3: “⟨<eos>⟩”") and "abstained" in right["members"][1]
    assert left["here"] == ["t0-1"] and "fusion changed the main member’s choice" in left["step"]
    assert "fused 28.7 %" in left["step"] and "60.0 %" in left["members"][0]
    assert changed["here"] == left["here"]  # there is no further one
    assert second["what"] == "Document 1" and "not fused: skip_when=agree" in clicked["step"]
    assert second["marked"] == []  # two tokens spell what one does there
    assert only_changed["count"] == "1 of 3 documents" and differing["list"][0].startswith("#0 ")
    assert differing["count"] == "1 of 3 documents" and everything["count"] == start["count"]
    assert searched["count"] == "1 of 3 documents" and searched["what"] == kept["what"] == "Document 1"
    assert "members agree 50 %" in start["list"][0] and "1 of 3 tokens changed" in start["list"][0]


def test_scores_and_right_here_wrong_there(tmp_path: Path) -> None:
    """Samples are joined by document and fingerprint; a folder without traces has its samples."""
    for name, values in (("a", [1.0, 0.0]), ("b", [0.0, 0.0])):
        synthesised(tmp_path / name, {"t": {"acc": values}})
    [results] = (tmp_path / "a").rglob("results_*.json")
    facts = json.loads(results.read_text())
    facts["config"] = {**facts.get("config", {}), "deepen": {"fingerprint": "f" * 64}}
    results.write_text(json.dumps(facts))
    [samples] = (tmp_path / "a").rglob("samples_*.jsonl")
    hashes = [json.loads(line)["doc_hash"] for line in samples.read_text().splitlines()]
    write_trace(tmp_path / "a", [[step("x", "x", "x")], [step("y", "x", "y", changed=True)]])
    [trace] = (tmp_path / "a").rglob("trace_*")
    trace.write_bytes(rewritten(trace, *((f'"h{n}"', json.dumps(found)) for n, found in enumerate(hashes))))
    text = page(tmp_path / "a", tmp_path / "b")
    assert "has no traces" in text and "ffffffffffffffff" in text
    start, gained = drive(text, tmp_path, ["choose", "filter", 6])
    assert start["options"][6] == "right here, wrong in b" and start["scores"].startswith("acc 1")
    assert gained["count"] == "1 of 2 documents" and "right" in gained["list"][0]


def evaluated(folder: Path, ended: str, seconds: float | None, values: list[float], **config: Any) -> Path:
    """Write the results and samples of a run of the traced ensemble; return its samples."""
    said = {"deepen": {"fingerprint": "f" * 64}, **config}
    synthesised(folder, {"t": {"acc": values}}, date=ended, config=said)
    results = folder / f"results_{ended}.json"
    told = json.loads(results.read_text()) | {"total_evaluation_time_seconds": str(seconds)}
    results.write_text(json.dumps(told))
    return folder / f"samples_t_{ended}.jsonl"


def traced(folder: Path, began: str, samples: Path, count: int = 2, task: str = "t", print: str = "f" * 64) -> None:
    """Write the trace of a run that began then, of the documents of some samples."""
    write_trace(folder, [[step(str(n), "x", "x")] for n in range(count)], task=task)
    path = folder / f"trace_{task}_2026-01-01T00-00-00.jsonl.gz"
    hashes = [json.loads(line)["doc_hash"] for line in samples.read_text().splitlines()]
    told = rewritten(path, ("f" * 64, print), *((f'"h{n}"', json.dumps(found)) for n, found in enumerate(hashes)))
    path.unlink()
    (folder / f"trace_{task}_{began}.jsonl.gz").write_bytes(told)


def scores_shown(folder: Path) -> tuple[list[float | None], str]:
    """Return every document's score of a folder, and the notes of its page."""
    [side] = shown([folder]).sides
    return [one["scores"].get("acc") for one in side.tasks.get("t", [])], "; ".join(side.notes)


def test_samples_are_those_of_the_run_that_was_traced(tmp_path: Path, capsys: Any) -> None:
    first = evaluated(tmp_path, "2026-01-01T00-01-00.500000", 55, [1.0, 0.0], model_args={"trace": True})
    traced(tmp_path, "2026-01-01T00-00-10.250000", first)
    assert scores_shown(tmp_path) == ([1.0, 0.0], "")
    later = evaluated(tmp_path, "2026-01-02T00-01-00", 55, [0.0, 0.0], model_args={"trace": False})
    assert scores_shown(tmp_path) == ([1.0, 0.0], "")  # of the same ensemble, and of another run
    first.rename(tmp_path / "away")
    values, told = scores_shown(tmp_path)
    assert values == [None, None] and "no samples of this run (--log_samples), those beside it are of other" in told
    assert cli.main(["view", str(tmp_path)]) == 0 and f"note: {tmp_path.name}: {told}" in capsys.readouterr().err
    (tmp_path / "results_2026-01-01T00-01-00.500000.json").unlink()  # it was killed
    assert scores_shown(tmp_path)[0] == [None, None]
    told = json.loads((tmp_path / "results_2026-01-02T00-01-00.json").read_text())
    told["config"]["use_cache"] = "responses"
    (tmp_path / "results_2026-01-02T00-01-00.json").write_text(json.dumps(told))
    values, told = scores_shown(tmp_path)
    assert values == [0.0, 0.0] and "left no samples; those shown are of results_2026-01-02" in told
    traced(tmp_path, "2026-01-02T00-00-30", later, count=1)  # it went on from the killed one, and both have a trace
    assert scores_shown(tmp_path) == ([0.0, 0.0], "")


def test_what_was_run_is_told_of_every_task(tmp_path: Path) -> None:
    """Once what is alike; of a trace, its own beginning, too."""
    folder = tmp_path / "m"
    for shots, tasks in ((0, ["a"]), (5, ["b", "c"])):
        date = f"2026-01-0{1 + shots}T00-01-00"
        synthesised(folder, dict.fromkeys(tasks, {"acc": [1.0]}), date=date, config={"limit": shots})
        results = folder / f"results_{date}.json"
        told = {"n-shot": dict.fromkeys(tasks, shots), "date": 86400.0 * shots}
        results.write_text(json.dumps(json.loads(results.read_text()) | told))
    for seen in (shown([folder], traced=False), shown_runs({"m": find_runs(folder)[0].tasks}, 9)):
        (_, alike), *others = seen.sides[0].told
        assert dict(alike)["model_args"] == '{"pretrained": "m"}' and "few-shots" not in dict(alike)
        assert dict(others) == {
            "a": [("finished", "1970-01-01 00:00 UTC"), ("limit", "0"), ("few-shots", "0")],
            "b, c": [("finished", "1970-01-06 00:00 UTC"), ("limit", "5"), ("few-shots", "5")],
        }
        assert "<h3>a</h3>" in seen.html() and "<h3>b, c</h3>" in seen.html()
    write_trace(tmp_path / "t", [[step("x", "x", "x")]], task="a")
    write_trace(tmp_path / "t", [[step("x", "x", "x")]], task="b")
    for name in "ab":
        path = tmp_path / "t" / f"trace_{name}_2026-01-01T00-00-00.jsonl.gz"
        path.write_bytes(rewritten(path, ('"2026-01-01"', f'"2026-01-0{1 + (name == "b")}"')))
    [(_, alike), *others] = shown([tmp_path / "t"]).sides[0].told
    assert dict(alike)["method"] == "deepen"
    assert dict(others) == {"a": [("started", "2026-01-01")], "b": [("started", "2026-01-02")]}


def test_documents_that_another_run_traced_are_left_out(tmp_path: Path) -> None:
    whole = evaluated(tmp_path, "2026-01-01T00-01-00", 55, [1.0, 0.0, 1.0], model_args={"trace": True})
    traced(tmp_path, "2026-01-01T00-00-10", whole, count=3)
    part = evaluated(tmp_path, "2026-01-02T00-01-00", 55, [0.0, 1.0], model_args={"trace": True})
    traced(tmp_path, "2026-01-02T00-00-10", part)
    assert scores_shown(tmp_path) == ([0.0, 1.0], "t: 1 older traces of other runs are left out")
    traced(tmp_path, "2026-01-01T12-00-00", part, task="u", print="e" * 64)
    [side] = shown([tmp_path]).sides  # its members are others, or other options were set
    assert list(side.tasks) == ["t"] and "00.jsonl.gz: left out, it was traced with other options" in side.notes[0]
    assert list(shown([next(tmp_path.glob("trace_u_*"))]).sides[0].tasks) == ["u"]
    traced(tmp_path, "2026-01-01T13-00-00", part, print="e" * 64)
    assert scores_shown(tmp_path)[0] == [0.0, 1.0] and len(shown([tmp_path]).sides[0].notes) == 3
    (tmp_path / "results_2026-01-02T00-01-00.json").write_text("{")
    values, told = scores_shown(tmp_path)
    assert values == [None, None] and "not JSON" in told


def test_a_choice_without_probability_is_shown(tmp_path: Path) -> None:
    synthesised(tmp_path / "a", {"t": {"acc": [1.0]}})
    [samples] = (tmp_path / "a").rglob("samples_*.jsonl")
    record = json.loads(samples.read_text())
    asked = {f"gen_args_{n}": {"arg_0": "Why?", "arg_1": f" {n}"} for n in range(3)}
    answers = [[["-inf", "False"]], [["nan", "False"]], [["-1.5", "True"]]]
    samples.write_text(json.dumps({**record, "arguments": asked, "resps": answers}) + "\n")
    text = shown([tmp_path / "a"], traced=False).html()
    [document] = data_of(text)["systems"][0]["tasks"]["t"]
    assert document["values"] == [None, None, -1.5]
    for damage in ({"metrics": True}, {"metrics": [[]]}, {"acc": 10**400}, {"resps": [[[10**400, "False"]]]}):
        samples.write_text(json.dumps({**record, "arguments": asked, **damage}) + "\n")
        text = shown([tmp_path / "a"], traced=False).html()
        [document] = data_of(text)["systems"][0]["tasks"]["t"]
        assert document["scores"] == ({"acc": 1.0} if "resps" in damage else {}) and not any(document["values"])


def test_answers_of_repeats_and_choices_are_those_of_the_samples(tmp_path: Path) -> None:
    """A folder without traces beside one with them: every repeat has its own text, and no choice is chosen by none."""
    asked = {"gen_args_0": {"arg_0": "Why?", "arg_1": {"until": ["x"]}}}
    choices = {f"gen_args_{n}": {"arg_0": "Why?" * (n < 2), "arg_1": f" {n % 2}"} for n in range(4)}
    none, conditional = [[["-inf", "False"]]] * 4, [[[str(-n), "False"]] for n in (3, 2, 1, 0)]
    for name, arguments, answers in (
        ("texts", asked, [["first", "second"]]), ("none", choices, none), ("mutual", choices, conditional),
    ):  # fmt: skip
        synthesised(tmp_path / name, {"t": {"acc": [1.0]}})
        [samples] = (tmp_path / name).rglob("samples_*.jsonl")
        record = json.loads(samples.read_text())
        samples.write_text(json.dumps({**record, "arguments": arguments, "resps": answers}) + "\n")
        hashed = record["doc_hash"]
    for name, answer in (("none", "1 documents"), ("mutual", "choice 1")):
        [start] = drive(shown([tmp_path / name], traced=False).html(), tmp_path)
        assert "choice -1" not in str(start) and answer in start["count"] + start["list"][0]
    write_trace(tmp_path / "here", [[step("a", "a", "a")], [step("b", "b", "b")]])
    [trace] = (tmp_path / "here").rglob("trace_*")
    again = '"doc_id": {}, "doc_hash": "{}", "request": 0, "repeat": {}'
    changes = ('"h0"', f'"{hashed}"'), (again.format(1, "h1", 0), again.format(0, hashed, 1))
    trace.write_bytes(rewritten(trace, *changes))
    [start] = drive(page(tmp_path / "here", tmp_path / "texts"), tmp_path)
    mine, first, mine_again, second = start["strips"]
    assert "first" in first and "second" in second and "repeat 1" in mine_again and "repeat" not in mine


def test_what_no_json_has_and_a_probability_of_0(tmp_path: Path) -> None:
    steps = [step("a", "a", "a"), {**step("b", "b", "b"), "logp": None}]
    steps[0]["members"][0] |= {"weight": float("nan"), "chosen": float("inf"), "top": [["a", float("nan")]]}
    write_trace(tmp_path, [steps, [step("c", "c", "c")]])
    [trace] = tmp_path.rglob("trace_*")
    trace.write_bytes(rewritten(trace, ('"h1",', '"h1", "logp": -7.5, "windows": [1, 0],')))
    start, last, text = drive(page(tmp_path), tmp_path, ["key", "End"], ["key", "j"])
    assert "probability 0" in start["strips"][0] and "fused 0.0 %" in last["step"]
    assert "log-probability -7.50" in text["strips"][0] and "in 2 windows" in text["strips"][0]
    odd = step({"control": "<eos>"}, {"control": "</s>"}, {"control": "</s>"})
    odd["members"][0] |= {"chosen": "x", "top": [[{"control": "</s>"}, None]]}
    write_trace(tmp_path, [[odd]], members=("one", "half of a pair: \ud800"))
    with server(shown([tmp_path], served=True)):  # the command writes the escape of what is no text; so does this
        assert who(odd) == NOBODY
    for top in ([["a"]], ["a"], [["a", 1, 2]]):
        write_trace(tmp_path, [[{**step("a"), "members": [{"top": top}, {"abstained": True}]}]])
        with pytest.raises(ResultError, match="a member that is none"):
            page(tmp_path)


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    steps = [step(text, text, {"control": text}) for text in HOSTILE]
    folder = write_trace(tmp_path / '<b>&"x', [steps], task="t<i>", members=("<u>one", "two\0"))
    text = page(folder)
    tags = Tags(text).found
    assert [tag for tag, _ in tags].count("script") == 2 and not {"img", "b", "i", "u"} & {tag for tag, _ in tags}
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert not re.search(r"""(src|href)=|url\(|https?://""", re.sub(r"(?s)<script type=.*?</script>", "", text))
    assert "default-src 'none'" in text and "\0" not in text
    data = text.split('id="data">')[1].split("</script>")[0]
    assert "<" not in data and set(HOSTILE) <= set(json.loads(data)["pieces"])
    [shown] = drive(text, tmp_path)
    assert not {"IMG", "B<", "I", "U"} & set(shown["tags"]) and shown["tags"].count("SCRIPT") == 1
    strip = shown["strips"][0]
    assert HOSTILE[0] in strip and HOSTILE[1] in strip and "a\u2400b" in strip and "\0" not in strip
    assert "\u202e" not in strip and "<U+202E>abc" in strip and "x" * 100_000 in strip and "{{ 7 * 7 }}" in strip
    assert script_json({"a": "</script>"}) == '{"a":"\\u003c/script\\u003e"}'


def test_who_decided() -> None:
    assert who(step("a", "a", "a")) == ALL and who(step("a", "a", None)) == ALL
    assert who(step("a", "a", "b")) == 0 and who(step("a", "b", "a")) == 1 and who(step("a", "b", "b")) == NOBODY
    end = step({"control": "<eos>"}, {"control": "</s>"}, "a")
    assert who(end) == NOBODY  # its likeliest control piece is not what ended the text
    end["members"][0]["chosen"] = 0.6
    assert who(end) == 0


def test_members_agree_where_several_have_one_likeliest_piece() -> None:
    assert agree(step("a", "b", "b")) is True and agree(step("a", "a", "b")) is False
    assert agree(step("a", "a")) is None and agree(step("a", "a", None)) is None
    assert agree(step("a", {"control": "<eos>"}, {"control": "</s>"})) is True
    assert agree(step("a", {"control": "<eos>"}, "a")) is False and agree(step("a", "b", None, "c")) is False


def test_ten_thousand_steps_and_a_limit(tmp_path: Path) -> None:
    write_trace(tmp_path, [[step(f" {n}", f" {n % 7}", f" {n % 5}") for n in range(10_000)], [step("b", "b", "b")]])
    text = page(tmp_path, limit=1)
    assert "the first 1 of 2 documents are shown" in text and len(text) < 4_000_000
    [_, last] = drive(text, tmp_path, ["key", "End"])
    assert last["step"].startswith("Token 10000 of 10000")


def test_the_command_says_where_the_page_is(folders: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["view", *map(str, folders)]) == 0
    assert (folders[0] / "view.html").is_file() and str(folders[0] / "view.html") in capsys.readouterr().out
    assert cli.main(["view", str(folders[0]), "--output", str(tmp_path / "b.html")]) == 0
    for wrong, said in (["nowhere", "no such folder"], [str(tmp_path / "empty"), "holds no trace"]):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert cli.main(["view", wrong]) == 2 and said in capsys.readouterr().err
    write_trace(tmp_path / "other", [[step("x", "x")]], task="u", members=("one",))
    with pytest.raises(ResultError, match="has no task of"):
        page(folders[0], tmp_path / "other")
    for wrong, said in ((["--serve", "--output", "x"], "--output"), (["--port", "80"], "--serve")):
        assert cli.main(["view", str(folders[0]), *wrong]) == 2 and said in capsys.readouterr().err


def test_a_place_that_cannot_be_had_is_told_before_the_traces_are_read(folders, tmp_path, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["view", str(folders[0]), "--serve", "--port", port]) == 2
    told = capsys.readouterr().err
    assert f"--port {port} cannot be listened on" in told and "give another --port" in told
    monkeypatch.setattr("lm_eval_deepen.cli.view.shown", None)
    assert cli.main(["view", str(folders[0]), "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} cannot be written" in capsys.readouterr().err


def test_a_browser_that_leaves_ends_its_own_request_alone(tmp_path: Path, capfd: Any) -> None:
    write_trace(tmp_path, [[step(f"{n} {'long ' * 9}", "a", "b") for n in range(20_000)]])
    with server(shown([tmp_path], served=True)) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address = ("127.0.0.1", serving.server_port)
        for _ in range(3):
            with socket.create_connection(address) as browser:
                browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves at once
                browser.sendall(
                    f"GET /steps?system=0&task=t&at=0 HTTP/1.0\r\nHost: {address[0]}:{address[1]}\r\n\r\n".encode()
                )
                browser.recv(1)
        serving.shutdown()
        thread.join()
    assert "Traceback" not in capfd.readouterr().err


def test_another_page_leads_to_a_system_a_filter_and_a_document(folders: tuple[Path, Path], tmp_path: Path) -> None:
    text = page(folders[1], *folders[::-1])
    [start] = drive(text, tmp_path, link="#system=2&beside=0&task=t&show=5&document=0")
    assert start["count"] == "1 of 3 documents" and start["what"] == "Document 0"
    assert start["options"][5].startswith("differs from ") and start["chosen"] == {"system": "2", "beside": "1"}
    [odd, same] = drive(text, tmp_path, ["choose", "beside", 1], link="#system=99&beside=x&task=no&show=-1&document=9")
    assert odd["count"] == same["count"] == "3 of 3 documents" and odd["chosen"]["system"] == "0"
    assert len(same["options"]) == 5  # a system is not beside itself


@pytest.fixture
def address(folders: tuple[Path, Path]) -> Iterator[str]:
    with server(shown(folders, served=True)) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_a_served_page_asks_for_the_steps_of_a_document(address: str) -> None:
    def got(path: str, **headers: str) -> tuple[int, str]:
        try:
            with urlopen(Request(address + path, headers=headers), timeout=30) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    status, text = got("/")
    data = data_of(text)
    asked = [one["requests"][0] for one in data["systems"][0]["tasks"]["t"]]
    assert status == 200 and [one["steps"] for one in asked] == [[], [], []] and asked[0]["text"] == "The dog"
    status, text = got("/steps?system=0&task=t&at=0")
    found = json.loads(text)
    assert status == 200 and [found["pieces"][str(step["p"])] for step in found["steps"][0]] == [
        "The",
        " dog",
        "⟨<eos>⟩",
    ]
    refused = ["/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/view.html", "/?x", "/steps"]
    for path in [*refused, "/steps?system=0&task=t&at=-1", "/steps?system=0&task=../t&at=0"]:
        assert got(path)[0] == 404, path
    assert got("/", Host="elsewhere.example")[0] == 403  # a name of someone else's that leads here
    with pytest.raises(HTTPError, match="501"):
        urlopen(Request(address, data=b"x"), timeout=30)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_a_served_page(address: str) -> None:
    found, console = dumped(f"{address}/#document=0")
    assert "The texts part at token 2." in found and "Token 2 of 3" in found and not console


def test_colours_are_readable_in_light_and_dark(folders: tuple[Path, Path]) -> None:
    """The contrast of text on whatever it stands on is 4.5 at least, as WCAG 2 asks."""
    style = page(folders[0]).split("<style>")[1].split("</style>")[0]
    blocks = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)
    ]  # of every page and of this one, each by day and by night
    themes = [blocks[0] | blocks[2], blocks[1] | blocks[3]]
    assert len(blocks) == 4 and themes[0].keys() == themes[1].keys()
    for theme in themes:
        for ground in ("paper", "raised", "all", "w0", "w1", "w2", "w3", "w4", "none"):
            assert contrast(theme["ink"], theme[ground]) >= 4.5, ground
        for ground in ("paper", "raised"):
            assert contrast(theme["soft"], theme[ground]) >= 4.5


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 400, 1280])
def test_a_browser_shows_it_without_an_error_and_without_scrolling_sideways(folders, tmp_path, width, dark):
    shown = f"[page.document.documentElement.scrollWidth, page.innerWidth, page.document.body.innerText, {CONTRAST}]"
    (needed, there, text, (contrast, least)), console = measured(page(*folders), width, shown, tmp_path, dark)
    assert needed <= there == width and "Token 2 of 3" in text and not console
    assert contrast >= 4.5, least
