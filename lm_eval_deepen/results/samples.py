"""The answers of one task, document by document, and which documents several runs have in common."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval_deepen.errors import NotPairedError, ResultError, did_you_mean
from lm_eval_deepen.storage import reason

_REQUIRED = ("doc_id", "doc_hash", "prompt_hash", "target_hash", "filter")


class Key(NamedTuple):
    """What identifies a document across runs: the hash of its content, and its place among equal documents."""

    doc_hash: str
    occurrence: int


@dataclass(frozen=True)
class Sample:
    """One document's outcome under one filter.

    The harness writes three hashes. `doc_hash`, of the whole document, says that it is the same question.
    `prompt_hash`, of its first request's prompt, says that it was asked alike: same template, description, few-shots.
    `target_hash`, of the expected answer, says that it was judged by the same one.
    """

    doc_id: int  # number of the document in its split
    prompt_hash: str  # see above
    target_hash: str  # see above
    values: Mapping[str, Any]  # what each metric gave, by its name: a number, or what the metric's aggregation needs


@dataclass(frozen=True)
class Samples:
    """All outcomes of one task of one run: by filter, then by document. `source` is for messages."""

    source: str
    by_filter: Mapping[str, Mapping[Key, Sample]]

    def under(self, flt: str) -> Mapping[Key, Sample]:
        """Return the outcomes under one filter; raises ResultError where there is no such filter."""
        if flt not in self.by_filter:
            known = ", ".join(self.by_filter)
            raise ResultError(
                f"{self.source}: no sample of filter {flt!r}; there are: {known}.{did_you_mean(flt, self.by_filter)}"
            )
        return self.by_filter[flt]


def read_samples(path: Path) -> Samples:
    """Read a file ``samples_<task>_<date>.jsonl``."""
    try:
        with path.open("rb") as lines:
            records = ((f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())
            return samples_of(((where, _parsed(line, where)) for where, line in records), str(path))
    except OSError as error:
        raise ResultError(f"{path}: cannot be read ({reason(error)}); evaluate the task again.") from error


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ResultError(
            f"{where}: not a line of JSON ({error.msg} at column {error.colno}); the file is damaged or was cut off, "
            "evaluate the task again."
        ) from error
    except (ValueError, RecursionError) as error:  # no UTF-8; a number that is too long; lists in lists in lists
        raise ResultError(
            f"{where}: not a line of JSON ({error}); the file is damaged, evaluate the task again."
        ) from error


def samples_of(records: Iterable[tuple[str, Any]], source: str) -> Samples:
    """Return samples from the harness's records (``results["samples"][task]``), each with its place for messages.

    Documents with equal content are told apart by the order of their `doc_id`.
    """
    by_filter: dict[str, list[tuple[str, Sample]]] = defaultdict(list)
    for where, record in records:
        missing = [key for key in _REQUIRED if not isinstance(record, Mapping) or key not in record]
        if missing:
            raise ResultError(
                f"{where}: not a sample of the harness, {', '.join(missing)} missing; evaluate again with "
                "--log_samples and lm_eval 0.4.12 or newer."
            )
        doc_id, metrics = record["doc_id"], record.get("metrics", [])
        odd = [key for key in _REQUIRED[1:] if not isinstance(record[key], str)]
        odd += ["doc_id"] if type(doc_id) is not int else []
        odd += ["metrics"] if not (isinstance(metrics, list) and all(isinstance(name, str) for name in metrics)) else []
        if odd:
            raise ResultError(
                f"{where}: not a sample of the harness, {odd[0]} is {record[odd[0]]!r:.40}; the file is damaged, "
                "evaluate the task again."
            )
        values = {name: record[name] for name in metrics if name in record}
        sample = Sample(doc_id, record["prompt_hash"], record["target_hash"], values)
        by_filter[record["filter"]].append((record["doc_hash"], sample))
    if not by_filter:
        raise ResultError(f"{source}: holds no sample; evaluate the task again with --log_samples.")
    tables: dict[str, dict[Key, Sample]] = {flt: {} for flt in by_filter}
    for flt, entries in by_filter.items():
        seen: Counter[str] = Counter()
        [(doc_id, count)] = Counter(sample.doc_id for _, sample in entries).most_common(1)
        if count > 1:
            raise ResultError(
                f"{source}: document {doc_id} stands {count} times under filter {flt!r}, and would count as often; the "
                "file is damaged, evaluate the task again."
            )
        for doc_hash, sample in sorted(entries, key=lambda entry: entry[1].doc_id):
            tables[flt][Key(doc_hash, seen[doc_hash])] = sample
            seen[doc_hash] += 1
    return Samples(source, tables)


def common_keys(runs: Sequence[Samples], flt: str, metric: str) -> list[Key]:
    """Return the documents for which every run has a value of the metric, in the order of the first run.

    Raises:
        NotPairedError: no document, or no value of the metric, is in all of them.
    """
    tables = [run.under(flt) for run in runs]
    shared = [key for key in tables[0] if all(key in table for table in tables[1:])]
    if not shared:
        counted = "; ".join(f"{run.source}: {len(table)}" for run, table in zip(runs, tables, strict=True))
        raise NotPairedError(
            f"no document in common (by doc_hash): {counted}. Other split, limit, data or processing of documents?"
        )
    kept = [key for key in shared if all(metric in table[key].values for table in tables)]
    if not kept:
        known = [dict.fromkeys(name for key in shared for name in table[key].values) for table in tables]
        lacking = [run.source for run, names in zip(runs, known, strict=True) if metric not in names]
        if len(lacking) < len(runs):
            where = " and ".join(map(str, lacking)) or "any sample that the runs have in common"
            raise NotPairedError(
                f"{where}: metric {metric!r} is not there, and another run has it. A run with --predict_only has no "
                "metric; evaluate the task again without it, or with the same metrics."
            )
        there = dict.fromkeys(name for names in known for name in names)
        raise NotPairedError(
            f"{runs[0].source}: metric {metric!r} is in no sample that the runs have in common; there are: "
            f"{', '.join(there)}.{did_you_mean(metric, there)}"
        )
    return kept


@dataclass(frozen=True)
class Mismatch:
    """How two runs' samples of a task differ, in numbers of documents."""

    only_first: int
    only_second: int
    shared: int
    prompts: int
    targets: int


def mismatch(first: Samples, second: Samples) -> Mismatch:
    """Return how many documents one run alone has, and how many common ones were asked or judged otherwise."""
    # Prompt and target are the same under every filter, and every filter covers every document.
    one = next(iter(first.by_filter.values()))
    two = next(iter(second.by_filter.values()))
    shared = [key for key in one if key in two]
    return Mismatch(
        only_first=len(one) - len(shared),
        only_second=len(two) - len(shared),
        shared=len(shared),
        prompts=sum(one[key].prompt_hash != two[key].prompt_hash for key in shared),
        targets=sum(one[key].target_hash != two[key].target_hash for key in shared),
    )
