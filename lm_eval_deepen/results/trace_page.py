"""One self-contained page that shows traces: documents, the text by who decided each token, what every member said.

The page is `templates/trace_page.html.j2`; what it shows is JSON inside it. No ``<`` stands in that, so that
no text can end it.
"""

from __future__ import annotations

import codecs
import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from markupsafe import Markup
from tqdm import tqdm

from lm_eval_deepen.errors import ResultError
from lm_eval_deepen.results.aggregation import to_number
from lm_eval_deepen.results.files import TaskRun, find_runs
from lm_eval_deepen.results.templates import render
from lm_eval_deepen.results.trace_runs import TracedRun, evaluations, traced_run
from lm_eval_deepen.results.traces import Documents, TraceFile, bytes_of, documents_of, find_traces, left_out, text_of

PROMPT = 3000  # characters of a prompt that are shown: its end
ALL, NOBODY = -1, -2  # who would have chosen a token, beside the numbers of the members


@dataclass
class Side:
    """What one folder holds."""

    name: str  # how the page calls it
    facts: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # what was run by task: names and values
    members: list[str] = field(default_factory=list)  # names, the main member first; none where there is no trace
    tasks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # documents by task, in the page's form
    notes: list[str] = field(default_factory=list)  # what is missing, and why

    @property
    def told(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """What was run of all tasks alike, under no heading; then what else was run, under the tasks of which it is."""
        together: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for task, facts in self.facts.items():
            together.setdefault(tuple(facts), []).append(task)
        alike = [fact for fact in next(iter(together), ()) if all(fact in facts for facts in together)]
        apart = [(", ".join(tasks), [fact for fact in facts if fact not in alike]) for facts, tasks in together.items()]
        return [("", alike), *(own for own in apart if own[1])]


class _Strings:
    """The strings of a page, each of which stands there once."""

    def __init__(self) -> None:
        self._at: dict[str, int] = {}
        self.all: list[str] = []

    def __call__(self, text: str) -> int:
        at = self._at.setdefault(text, len(self.all))
        if at == len(self.all):
            self.all.append(text)
        return at


@dataclass
class Shown:
    """What a page shows: systems, and the strings that they share."""

    served: bool = False  # whether a server hands out the steps of a document where they are looked at
    sides: list[Side] = field(default_factory=list)  # the systems; the first two are shown beside each other at first
    texts: _Strings = field(default_factory=_Strings)  # prompts, targets and answers
    pieces: _Strings = field(default_factory=_Strings)  # what the tokens spell
    # of a served page, the steps by number of the system, task, and number of the document, and the pieces that they
    # name: compressed JSON
    packed: dict[tuple[str, str, str], bytes] = field(default_factory=dict)

    def html(self, title: str = "") -> str:
        """Return the page; one that is served asks for the steps of a document where it shows them."""
        first, *others = [one.name for one in self.sides]
        beside = f" beside {others[0] if len(others) == 1 else f'{len(others)} others'}" if others else ""
        systems = [{"name": one.name, "members": one.members, "tasks": one.tasks} for one in self.sides]
        data = {"systems": systems, "texts": self.texts.all, "served": self.served}
        return render(
            "trace_page.html.j2",
            title=title or f"Trace of {first}{beside}",
            sides=self.sides,
            served=self.served,
            data=Markup(script_json({**data, "pieces": {} if self.served else self.pieces.all})),
            made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        )


def shown(
    folders: Sequence[Path],
    limit: int | None = None,
    names: Sequence[str] = (),
    traced: bool = True,
    served: bool = False,
) -> Shown:
    """Return what a page of result folders shows.

    Args:
        folders: what ``--output_path`` or ``trace_dir`` was given; those without traces have their samples shown.
        limit: documents of each task that are shown; None for all.
        names: of the systems; default: the folders'.
        traced: whether it is an error if the first folder has no trace.
        served: whether a server shows the page.
    """
    page = Shown(served)
    for number, folder in enumerate(folders):
        one = side(folder, page, limit, traced and not number)
        if number and not set(one.tasks) & set(page.sides[0].tasks):
            here, there = (", ".join(tasks) for tasks in (page.sides[0].tasks, one.tasks))
            raise ResultError(f"{folder}: has no task of {folders[0]}: {there} there, {here} here")
        page.sides.append(one)
    if names or len({one.name for one in page.sides}) < len(folders):
        for one, name in zip(page.sides, names or map(str, folders), strict=True):
            one.name = name
    return page


def shown_runs(systems: Mapping[str, Mapping[str, TaskRun]], limit: int) -> Shown:
    """Return what a page of evaluated tasks, by system, shows of `limit` documents each: texts and scores, no steps."""
    page = Shown()
    for name, tasks in systems.items():
        one = Side(name)
        for task, run in tasks.items():
            _add(one, task, TracedRun((), run, ()), page, limit)
        one.notes = [f"the first {limit} documents of each task are shown"] if one.notes else []
        page.sides.append(one)
    return page


def script_json(data: Any) -> str:
    """Return JSON that nothing in it can end the script element with."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")


def side(folder: Path, page: Shown, limit: int | None = None, traced: bool = True) -> Side:
    """Return what a folder holds; with `traced`, it is an error if that is no trace."""
    shown = Side(folder.resolve().name)
    traces: dict[str, list[TraceFile]] = {}
    try:
        traces = find_traces(folder, shown.notes)
    except ResultError:
        if traced or not folder.exists():
            raise
        shown.notes.append(f"{folder} has no traces: its texts and scores are shown, not its steps")
    if traces:
        runs = _runs(traces, folder.parent if folder.is_file() else folder, shown.notes)
    else:
        runs = {task: TracedRun((), run, ()) for task, run in _samples(folder, shown).items()}
    if not runs:
        raise ResultError(f"{folder}: holds neither traces nor samples; evaluate with --output_path and --log_samples")
    for task, run in runs.items():
        _add(shown, task, run, page, limit)
    return shown


def _add(side: Side, task: str, run: TracedRun, page: Shown, limit: int | None) -> None:
    """Add a task of a run: what was run, its documents, and what is missing."""
    head = run.files[0].head if run.files else None
    if head is not None:
        side.members = side.members or [str(member.get("name")) for member in head.get("members", [])]
    if any(file.cut for file in run.files):
        side.notes.append(f"{task}: the end of a trace is cut off; its last documents are missing")
    side.facts[task] = [
        *(_traced_facts(head) if head is not None else ()),
        *(_facts(run.samples.results, task) if run.samples is not None else ()),
    ]
    records = documents_of(run.files)
    samples = {} if run.samples is None else samples_by_document(run.samples.samples_path)
    side.tasks[task] = documents(records, samples, page, limit, task)
    count = len({key[:2] for key in records.keys} or samples)
    if limit is not None and count > limit:
        side.notes.append(f"{task}: the first {limit} of {count} documents are shown (--limit)")
    side.notes += run.notes


def _runs(traces: Mapping[str, Sequence[TraceFile]], folder: Path, notes: list[str]) -> dict[str, TracedRun]:
    """Return the latest run that was traced of every task, by the ensemble that was traced last."""
    newest = max((files[0] for files in traces.values()), key=lambda file: file.date)
    every = evaluations(folder, notes)
    runs = {}
    for task, files in traces.items():
        if files[0].head.get("fingerprint") == newest.head.get("fingerprint"):
            runs[task] = traced_run(task, files, every)
        else:
            notes += map(left_out, files)
    return runs


def _samples(folder: Path, shown: Side) -> dict[str, TaskRun]:
    """Return the samples of a folder without traces: those of its first model."""
    try:
        run, *others = find_runs(folder)
    except ResultError:
        return {}
    if others:
        shown.notes.append(f"{folder} has the results of {1 + len(others)} models: those of {run.label} are shown")
    return dict(run.tasks)


Samples = dict[tuple, list[Mapping[str, Any]]]  # by document


def samples_by_document(path: Path) -> Samples:
    """Return the lines of a samples file by number and hash of the document."""
    samples: Samples = {}
    for line in path.read_text("utf-8", "replace").split("\n"):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise ResultError(f"{path}: holds what is no sample ({error}); evaluate the task again") from error
        if not isinstance(record, Mapping):
            continue
        number, doc_hash = record.get("doc_id"), record.get("doc_hash")
        if not isinstance(number, (int, type(None))) or not isinstance(doc_hash, (str, type(None))):
            raise ResultError(f"{path}: holds a sample of no document; the file is damaged, evaluate the task again")
        samples.setdefault((number, doc_hash), []).append(record)
    return samples


def _traced_facts(head: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the head of a trace says of its run."""
    return [
        ("method", str(head.get("method"))),
        ("members", _short(", ".join(f"{one.get('name')} ({one.get('pretrained')})" for one in head["members"]))),
        ("fingerprint", str(head.get("fingerprint"))[:16]),
        ("started", str(head.get("started"))),
        ("lm_eval_deepen", str(head.get("lm_eval_deepen"))),
    ]


def _facts(results: Mapping[str, Any], task: str) -> list[tuple[str, str]]:
    """Return what a results file says of the run of a task."""
    config, shots = results.get("config") or {}, results.get("n-shot")
    try:
        date = datetime.fromtimestamp(results["date"], timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (LookupError, TypeError, ValueError, OverflowError, OSError):  # none is told, or one that is no time
        date = None
    told = {
        "finished": date,
        "model": results.get("model_name"),
        "model_args": config.get("model_args"),
        "limit": config.get("limit"),
        "seeds": [config.get(f"{name}_seed") for name in ("random", "numpy", "torch", "fewshot")],
        "few-shots": shots.get(task) if isinstance(shots, Mapping) else shots,
        "lm_eval": results.get("lm_eval_version"),
        "transformers": results.get("transformers_version"),
    }
    return [(key, _short(value)) for key, value in told.items() if value not in (None, {}, [])]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    text = "".join(chr(0x2400 + ord(c)) if c < " " and c != "\n" else c for c in text)  # pictures of control characters
    return text if len(text) <= 400 else text[:399] + "…"


def documents(
    records: Documents,
    samples: Mapping[tuple, Sequence[Mapping[str, Any]]],
    page: Shown,
    limit: int | None = None,
    task: str = "",
) -> list[dict[str, Any]]:
    """Return the documents of a task in the page's form, from the lines of a trace and of samples.

    `page` gets the strings and, if it is served, the steps, which are those of its next system.
    """
    by_document: dict[tuple, list[int]] = {}
    for at, key in enumerate(records.keys):
        by_document.setdefault(key[:2], []).append(at)
    entries: list[dict[str, Any]] = []
    keys = list(itertools.islice(by_document or samples, limit))
    for key in tqdm(keys, desc=f"documents of {task}", disable=None, delay=2):
        traced = [records[at] for at in by_document.get(key, ())]
        requests = [_request(record, page.pieces) for record in traced]
        steps = [step for request in requests for step in request["steps"]]
        agreed = [same for record in traced for step in record["steps"] if (same := agree(step)) is not None]
        if page.served:
            page.packed[str(len(page.sides)), task, str(len(entries))] = _packed(requests, page.pieces.all)
        scored = list(samples.get(key, ()))
        entries.append(
            {
                "id": key[0],
                "hash": key[1],
                "requests": requests,
                "changed": sum(step["c"] for step in steps),
                "steps": len(steps),
                "agree": sum(agreed) / len(agreed) if agreed else None,
                **_outcome(scored, page.texts),
            }
        )
    return entries


def _packed(requests: Sequence[dict[str, Any]], pieces: Sequence[str]) -> bytes:
    """Take the steps out of a document's requests; return them with the pieces that they name."""
    steps = [request["steps"] for request in requests]
    named = set()
    for step in itertools.chain.from_iterable(steps):
        named |= {step["p"], step["b"]}
        named |= {piece for said in step["m"] if said for piece in said[2][::2]}
    named.discard(None)
    for request in requests:
        request["steps"] = []
    return zlib.compress(json.dumps({"steps": steps, "pieces": {at: pieces[at] for at in named}}).encode(), 1)


def _outcome(scored: Sequence[Mapping[str, Any]], texts: _Strings) -> dict[str, Any]:
    """Return scores, prompt, target and answer of a document, as far as there are samples; texts by their numbers."""
    scores: dict[str, float] = {}
    for record in scored:
        names = record.get("metrics")
        for name in names if isinstance(names, list) else ():
            if isinstance(name, str) and (value := to_number(record.get(name))) is not None:
                flt = record.get("filter")
                scores[name if flt in (None, "none") else f"{name},{flt}"] = value
    first = scored[0] if scored else {}
    given = (first.get("arguments") or {}) if isinstance(first.get("arguments"), Mapping) else {}
    one = given.get("gen_args_0")
    prompt = one.get("arg_0") if isinstance(one, Mapping) else None
    generated = isinstance(one, Mapping) and isinstance(one.get("arg_1"), Mapping)  # how, beside the prompt
    answers = first.get("resps")
    said = [one if isinstance(one, list) else [] for one in answers] if isinstance(answers, list) else []
    filtered = first.get("filtered_resps")
    if isinstance(filtered, list) and len(filtered) == 1:
        filtered = filtered[0]
    pairs = [
        (argument.get("arg_0"), argument["arg_1"])
        for argument in given.values()
        if isinstance(argument, Mapping) and isinstance(argument.get("arg_1"), str)
    ]
    # acc_mutual_info asks for every choice once more, after nothing
    choices = [texts(choice) for context, choice in pairs if context or not prompt]
    return {
        "scores": scores,
        "prompt": texts(prompt if len(prompt) <= PROMPT else "…" + prompt[-PROMPT:])
        if isinstance(prompt, str)
        else None,
        "target": texts(_short(first["target"])) if "target" in first else None,
        # of every request its repeats
        "answers": [[texts(text) for text in own if isinstance(text, str)] for own in said] if generated else [],
        "filtered": texts(_short(filtered)) if generated else None,
        "choices": choices,
        "values": [_value(answer) for answer in said] if choices else [],
    }


def _value(answer: Any) -> float | None:
    """Return the finite log-probability of a choice in a sample: ``[[logp, greedy]]``, numbers as text."""
    try:
        return to_number(float(answer[0][0]))
    except (TypeError, ValueError, LookupError, OverflowError):
        return None


def _request(record: Mapping[str, Any], strings: _Strings) -> dict[str, Any]:
    steps = [_step(step, strings) for step in record["steps"]]
    logp = [step["l"] for step in steps]
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for step, given in zip(steps, record["steps"], strict=True):
        text += decoder.decode(bytes_of(given["piece"]))
        step["n"] = len(text.encode("utf-16-le", "surrogatepass")) // 2  # where it ends, as scripts count
    return {
        "text": text,
        "request": record.get("request"),
        "repeat": record.get("repeat"),
        "type": str(record.get("type")),
        "end": str(record.get("reason") or ""),
        "greedy": record.get("greedy") is True,
        # where weights learn across windows, a text has another one than its steps; none where one step has
        "logp": to_number(record["logp"]) if "logp" in record else None if None in logp else sum(logp),
        "windows": len(windows) if isinstance(windows := record.get("windows"), list) else 1,
        "steps": steps,
    }


def _step(step: Mapping[str, Any], strings: _Strings) -> dict[str, Any]:
    said: list[list[Any] | None] = []
    for one in step["members"]:
        if one.get("abstained"):
            said.append(None)
            continue
        top = [(strings(text_of(piece)), to_number(share)) for piece, share in one.get("top", [])]
        weight, chosen = to_number(one.get("weight")), to_number(one.get("chosen"))
        said.append([weight, chosen, [value for pair in top for value in pair]])
    return {
        "p": strings(text_of(step["piece"])),
        "k": 0 if isinstance(step["piece"], str) else 1,
        "l": to_number(step.get("logp")),
        "e": to_number(step.get("entropy")),
        "b": strings(text_of(step["best"])) if "best" in step else None,
        "c": int(bool(step.get("changed"))),
        "s": str(step.get("skipped") or ""),
        "w": who(step),
        "m": said,
    }


def who(step: Mapping[str, Any]) -> int:
    """Return whose likeliest piece a token is: `ALL`, the first member's number, or `NOBODY`."""
    here = [m for m, one in enumerate(step["members"]) if not one.get("abstained") and one.get("top")]
    would = [m for m in here if _is_first(step["members"][m], step["piece"])]
    if not would:
        return NOBODY
    return ALL if len(would) == len(here) else would[0]


def agree(step: Mapping[str, Any]) -> bool | None:
    """Return whether the members that take part have one likeliest piece; None where fewer than two of them do."""
    firsts = [one["top"][0][0] for one in step["members"] if not one.get("abstained") and one.get("top")]
    if len(firsts) < 2:
        return None
    ends = [isinstance(first, Mapping) and "control" in first for first in firsts]  # with names of their own
    return all(ends) or all(first == firsts[0] for first in firsts)


def _is_first(member: Mapping[str, Any], piece: Any) -> bool:
    first, share = member["top"][0]
    if isinstance(piece, Mapping) and "control" in piece:  # ends of text have a name of their own in each vocabulary
        if not isinstance(first, Mapping) or "control" not in first:
            return False
        said, most = to_number(member.get("chosen")), to_number(share)
        return said is not None and most is not None and said >= 0.999 * most
    return bool(first == piece)
