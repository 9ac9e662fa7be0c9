"""Documents of the six benchmarks of the DeePEn paper (arXiv 2404.12715): from the hub, or from a local folder.

By default they are the public data sets of the hub. The environment variable LM_EVAL_DEEPEN_DATA names a local folder
to read instead (`data_dir` in the metadata does the same for one run). One JSON object a line:

    arc_challenge/{dev,test}.jsonl             question, A, B, ... (option texts), answer (letter)
    piqa/{dev,test}.jsonl                      question, A, B, answer (letter)
    mmlu/SUBJECT/{fewshot,dev,test}.jsonl      question, A, B, C, D, answer (letter); domain (default: SUBJECT in words)
    nq/{dev,test}.jsonl, triviaqa/...          question, answer (string or list of strings)
    gsm8k/{dev,test}.jsonl                     question, answer (reasoning that ends in the result)

nq, triviaqa and gsm8k may have a fewshot.jsonl of their own; the published examples ship beside this file. No document
of `dev` is in `test`, and none of either is an example.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

VARIABLE = "LM_EVAL_DEEPEN_DATA"
LETTERS = "ABCDE"
SUBJECTS = sorted(
    path.stem.removeprefix("deepen_mmlu_") for path in (Path(__file__).parent / "mmlu").glob("deepen_mmlu_*.yaml")
)
# Sizes of the paper's development samples (its released file names); which documents they are is in those files alone.
DEV_SIZES = {"piqa": 2000, "gsm8k": 300, "nq": 1600}
TRIVIAQA_DEV, TRIVIAQA_END = 1900, 6000  # its development file is the beginning of its test file; the rest is the test
MMLU_SHOTS = 5
_REMEDY = f"Set {VARIABLE} to a folder laid out as {Path(__file__).name} describes, or unset it to use the hub."
_log = logging.getLogger(__name__)

Row = dict[str, Any]
Splits = dict[str, list[Row]]


# --- where rows come from


def _folder(data_dir: str | None) -> Path | None:
    """Return the local folder, None for the hub."""
    given = data_dir or os.environ.get(VARIABLE)
    if not given:
        return None
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{VARIABLE}: {folder} is not a folder. {_REMEDY}")
    return folder


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. {_REMEDY}")
    rows = []
    # Not splitlines(): it would also cut at U+2028, which JSON strings may hold unescaped.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not a JSON object ({error}); correct or remove it") from error
        if not isinstance(row, dict) or not {"question", "answer"} <= row.keys():
            raise ValueError(f"{path}, line {number}: fields question and answer are needed, got {line[:80]!r}")
        rows.append(row)
    return rows


def _local(folder: Path, examples: bool) -> Splits:
    names = ["dev", "test", *(["fewshot"] if examples and (folder / "fewshot.jsonl").is_file() else [])]
    return {name: _read(folder / f"{name}.jsonl") for name in names}


def _hub(path: str, name: str | None, split: str) -> list[Row]:
    try:
        return list(datasets.load_dataset(path, name, split=split))
    except Exception as error:
        raise RuntimeError(
            f"{path} ({name or 'default'}, {split}) cannot be loaded from the hub: {type(error).__name__}: {error}. "
            f"Without access, set {VARIABLE} to a local folder laid out as {Path(__file__).name} describes."
        ) from error


def _sample(rows: list[Row], count: int) -> list[Row]:
    """Return `count` rows, the same on every machine: those whose questions have the lowest SHA-256."""
    return sorted(rows, key=lambda row: hashlib.sha256(row["question"].encode()).digest())[:count]


# --- what is made of them


def _letters(rows: list[Row], where: str) -> list[Row]:
    kept = []  # rows with an empty option are dropped
    for row in rows:
        letters = [letter for letter in LETTERS if row.get(letter) is not None]
        if not all(str(row[letter]).strip() for letter in letters):
            continue
        if len(letters) < 2 or row["answer"] not in letters:
            got = f"answer {row['answer']!r} is none of the options {letters} of {row['question']!r}"
            raise ValueError(f"{where}: {got}; correct the row")
        options = "\n".join(f"{letter}. {row[letter]}" for letter in letters)
        plain = {key: row[key] for key in ("question", "answer", "domain") if key in row}
        kept.append({**plain, "options": options})
    if len(kept) < len(rows):
        _log.warning("%s: %d of %d rows dropped, they have an empty option", where, len(rows) - len(kept), len(rows))
    return kept


def _answers(rows: list[Row], where: str) -> list[Row]:
    """`answers` as a list: the few-shot examples hold one string where the others hold a list."""
    found = []
    for row in rows:
        answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
        if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise ValueError(f"{where}: answer of {row['question']!r} must be texts, at least one, got {answers!r}")
        found.append({"question": row["question"], "answers": answers})
    return found


def _solutions(rows: list[Row], where: str) -> list[Row]:
    return [{"question": row["question"], "answer": row["answer"].strip()} for row in rows]


def _apart(splits: Splits, where: str) -> Splits:
    """Return the splits without documents that are examples, and `dev` without what is in `test`."""

    def key(row: Row) -> tuple[str, str]:
        return row["question"], row.get("options", "")

    taken = {key(row) for row in splits.get("fewshot", ())}
    found = dict(splits)
    for name in ("test", "dev"):
        found[name] = [row for row in splits[name] if key(row) not in taken]
        if lost := len(splits[name]) - len(found[name]):
            _log.warning("%s: %d documents of %s dropped, they are in another split", where, lost, name)
        taken |= {key(row) for row in found[name]}
    return found


def _dataset(rows: list[Row], where: str) -> Dataset:
    if not rows:
        raise ValueError(f"{where}: no usable row; at least one is needed")
    return Dataset.from_list(rows)


def _load(
    benchmark: str,
    data_dir: str | None,
    hub: Callable[[], Splits],
    convert: Callable[[list[Row], str], list[Row]],
    examples: bool = False,
) -> dict[str, Dataset]:
    folder = _folder(data_dir)
    splits = hub() if folder is None else _local(folder / benchmark, examples)
    if examples and "fewshot" not in splits:
        splits["fewshot"] = _read(Path(__file__).parent / "fewshot" / f"{benchmark}.jsonl")
    converted = {name: convert(rows, f"{benchmark}, {name}") for name, rows in splits.items()}
    return {name: _dataset(rows, f"{benchmark}, {name}") for name, rows in _apart(converted, benchmark).items()}


# --- the benchmarks


def _arc_row(row: Row) -> Row:
    """One row of the hub's ARC; labels 1 to 5 become letters (the released files lost these rows)."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    options = dict(zip(LETTERS, texts, strict=False))
    return {"question": row["question"], **options, "answer": LETTERS[labels.index(row["answerKey"])]}


def load_arc(data_dir: str | None = None, **_metadata: Any) -> dict[str, Dataset]:
    """ARC-Challenge: `question`, `options`, `answer` (letter); dev is the hub's train split, as in the paper."""

    def rows(split: str) -> list[Row]:
        return [_arc_row(row) for row in _hub("allenai/ai2_arc", "ARC-Challenge", split)]

    return _load("arc_challenge", data_dir, lambda: {"dev": rows("train"), "test": rows("test")}, _letters)


def load_piqa(data_dir: str | None = None, **_metadata: Any) -> dict[str, Dataset]:
    """PIQA: `question`, `options`, `answer` (letter); test is the hub's validation split, dev a part of train."""

    def rows(split: str) -> list[Row]:
        return [
            {"question": row["goal"], "A": row["sol1"], "B": row["sol2"], "answer": "AB"[int(row["label"])]}
            for row in _hub("baber/piqa", None, split)
        ]

    def hub() -> Splits:
        return {"dev": _sample(rows("train"), DEV_SIZES["piqa"]), "test": rows("validation")}

    return _load("piqa", data_dir, hub, _letters)


def load_gsm8k(data_dir: str | None = None, **_metadata: Any) -> dict[str, Dataset]:
    """GSM8K: `question`, `answer` (reasoning that ends in the result); dev is a part of the hub's train split."""

    def hub() -> Splits:
        train, test = _hub("openai/gsm8k", "main", "train"), _hub("openai/gsm8k", "main", "test")
        return {"dev": _sample(train, DEV_SIZES["gsm8k"]), "test": test}

    return _load("gsm8k", data_dir, hub, _solutions, examples=True)


def load_nq(data_dir: str | None = None, **_metadata: Any) -> dict[str, Dataset]:
    """Natural Questions (open): `question`, `answers`; test is the hub's validation split, dev a part of train."""

    def hub() -> Splits:
        path = "google-research-datasets/nq_open"
        return {"dev": _sample(_hub(path, None, "train"), DEV_SIZES["nq"]), "test": _hub(path, None, "validation")}

    return _load("nq", data_dir, hub, _answers, examples=True)


def load_triviaqa(data_dir: str | None = None, **_metadata: Any) -> dict[str, Dataset]:
    """TriviaQA: `question`, `answers`; both splits are of the hub's validation split for Wikipedia, in its order."""

    def hub() -> Splits:
        rows = [
            {"question": row["question"], "answer": list(row["answer"]["aliases"]) or [row["answer"]["value"]]}
            for row in _hub("mandarjoshi/trivia_qa", "rc.wikipedia.nocontext", f"validation[:{TRIVIAQA_END}]")
        ]
        return {"dev": rows[:TRIVIAQA_DEV], "test": rows[TRIVIAQA_DEV:]}

    return _load("triviaqa", data_dir, hub, _answers, examples=True)


def _mmlu_rows(rows: list[Row], subject: str) -> list[Row]:
    """Rows with a domain, from the hub's columns or the local ones."""
    found = []
    for row in rows:
        if "choices" in row:
            options = dict(zip(LETTERS, row["choices"], strict=False))
            row = {"question": row["question"], **options, "answer": LETTERS[row["answer"]]}
        found.append({"domain": subject.replace("_", " "), **row})
    return found


def load_mmlu(subject: str, data_dir: str | None = None, **_metadata: Any) -> dict[str, Dataset]:
    """One subject of MMLU: `question`, `options`, `answer` (letter), `domain`; five examples of its own."""
    folder = _folder(data_dir)
    if folder is not None and not (folder / "mmlu" / subject).is_dir():
        there = ", ".join(sorted(path.name for path in (folder / "mmlu").glob("*") if path.is_dir())) or "none"
        raise FileNotFoundError(
            f"{folder} has no MMLU subject {subject!r}; there are: {there}. Ask for these tasks alone, or name the "
            f"folder in {VARIABLE}: the group deepen_mmlu then takes the subjects that are there."
        )

    def hub() -> Splits:
        found = {"fewshot": "dev", "dev": "validation", "test": "test"}
        return {name: _hub("cais/mmlu", subject, split) for name, split in found.items()}

    return _load(
        f"mmlu/{subject}", data_dir, hub, lambda rows, where: _letters(_mmlu_rows(rows, subject), where), examples=True
    )


def load_mmlu_dev(data_dir: str | None = None, **_metadata: Any) -> dict[str, Dataset]:
    """The development split of all subjects: `prompt` with the subject's examples, `answer` (letter).

    Subjects take turns, so that a limit cuts all of them alike.
    """
    columns = []
    for splits in (load_mmlu(subject, data_dir) for subject in available_subjects(data_dir)):
        examples = "".join(f"{mmlu_prompt(row)} {row['answer']}\n" for row in list(splits["fewshot"])[:MMLU_SHOTS])
        columns.append([{"prompt": examples + mmlu_prompt(row), "answer": row["answer"]} for row in splits["dev"]])
    turns = chain.from_iterable(zip_longest(*columns))
    return {"dev": _dataset([row for row in turns if row is not None], "mmlu, dev")}


def mmlu_prompt(doc: Row) -> str:
    """Return the published prompt of one MMLU question."""
    return (
        f"There is a single choice question about {doc['domain']}. Answer the question by replying A, B, C or D.\n"
        f"Question: {doc['question']}\n{doc['options']}\nAnswer:"
    )


def available_subjects(data_dir: str | None = None) -> list[str]:
    """Return the subjects that can be loaded: those of a local folder that has some, else all 57."""
    folder = _folder(data_dir)
    found = [] if folder is None else [name for name in SUBJECTS if (folder / "mmlu" / name).is_dir()]
    return found or list(SUBJECTS)


class _SubjectTasks(list):
    """The group's tasks, listed anew whenever it is built: a local folder may hold some subjects alone."""

    def __iter__(self) -> Iterator[str]:
        return iter([f"deepen_mmlu_{subject}" for subject in available_subjects()])


SUBJECT_TASKS = _SubjectTasks()
