"""Loaders of the sample tasks: a local folder with one sub-folder of JSONL files for each benchmark.

The folder comes from `data_dir` in the metadata (`--metadata '{"data_dir": "..."}'`) or, without it, from the
environment variable LM_EVAL_DEEPEN_DATA. Expected files, one JSON object a line:

    arc_challenge/{dev,test}.jsonl      question, A, B, ... (option texts), answer (letter)
    piqa/{dev,test}.jsonl               question, A, B, answer (letter)
    mmlu/SUBJECT/{fewshot,dev,test}.jsonl  question, A, B, C, D, answer (letter), domain
    nq/{fewshot,dev,test}.jsonl         question, answer (string or list of strings)
    gsm8k/{fewshot,dev,test}.jsonl      question, answer (reasoning that ends in the result)
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

ENVIRONMENT_VARIABLE = "LM_EVAL_DEEPEN_DATA"
_LETTERS = "ABCDE"
_REMEDY = f'give the folder as --metadata \'{{"data_dir": "..."}}\' or in the variable {ENVIRONMENT_VARIABLE}'
_log = logging.getLogger(__name__)

Row = dict[str, Any]


def _data_folder(data_dir: str | None) -> Path:
    given = data_dir or os.environ.get(ENVIRONMENT_VARIABLE)
    if not given:
        raise ValueError(f"data_dir: the deepen_sample_* tasks read local files and no folder was given; {_REMEDY}")
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"data_dir: {folder} is not a folder; {_REMEDY}")
    return folder


def _read(path: Path) -> list[Row]:
    """Rows of a JSONL file; every object needs at least `question` and `answer`."""
    if not path.is_file():
        raise FileNotFoundError(f"data_dir: {path} does not exist; {_REMEDY}, laid out as {__file__} describes")
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


def _splits(
    benchmark: str,
    names: tuple[str, ...],
    data_dir: str | None,
    convert: Callable[[list[Row], Path], list[Row]],
) -> dict[str, Dataset]:
    folder = _data_folder(data_dir) / benchmark
    paths = {name: folder / f"{name}.jsonl" for name in names}
    return {name: _dataset(convert(_read(path), path), path) for name, path in paths.items()}


def _dataset(rows: list[Row], path: Path) -> Dataset:
    # Built in memory: no hub, and no cache folder that runs side by side could spoil for each other.
    if not rows:
        raise ValueError(f"{path}: no usable row; at least one is needed")
    return Dataset.from_list(rows)


def _choices(rows: list[Row], path: Path) -> list[Row]:
    """Options as a list and the answer as an index; rows with an empty option are dropped."""
    kept = []
    for row in rows:
        letters = [letter for letter in _LETTERS if row.get(letter) is not None]
        options = [str(row[letter]).strip() for letter in letters]
        if not all(options):
            continue
        if len(options) < 2 or row["answer"] not in letters:
            raise ValueError(
                f"{path}: answer {row['answer']!r} is none of the options {letters} of {row['question']!r}"
            )
        kept.append({"question": row["question"], "choices": options, "answer": letters.index(row["answer"])})
    if len(kept) < len(rows):
        _log.warning("%s: %d of %d rows dropped, they have an empty option", path, len(rows) - len(kept), len(rows))
    return kept


def _answer_lists(rows: list[Row], path: Path) -> list[Row]:
    """`answers` as a list: the few-shot file holds one string where the others hold a list."""
    converted = []
    for row in rows:
        answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
        if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise ValueError(f"{path}: answer of {row['question']!r} must be texts, at least one, got {answers!r}")
        converted.append({"question": row["question"], "answers": answers})
    return converted


def _solutions(rows: list[Row], path: Path) -> list[Row]:
    return [{"question": row["question"], "answer": row["answer"].strip()} for row in rows]


def _documents(rows: list[Row], path: Path) -> list[Row]:
    """Running text of several sentences: a word problem followed by its solution."""
    return [{"text": f"{row['question'].strip()}\n{row['answer'].strip()}"} for row in rows]


def load_arc(data_dir: str | None = None, **_harness_metadata: Any) -> dict[str, Dataset]:
    """ARC-Challenge, splits dev and test: `question`, `choices`, `answer` (index)."""
    return _splits("arc_challenge", ("dev", "test"), data_dir, _choices)


def load_piqa(data_dir: str | None = None, **_harness_metadata: Any) -> dict[str, Dataset]:
    """PIQA, splits dev and test: `question`, `choices`, `answer` (index)."""
    return _splits("piqa", ("dev", "test"), data_dir, _choices)


def load_mmlu(data_dir: str | None = None, **_harness_metadata: Any) -> dict[str, Dataset]:
    """MMLU, splits dev and test: `prompt` with the subject's own five examples, `answer` (index).

    Subjects take turns, so that a limit cuts all of them alike.
    """
    folder = _data_folder(data_dir) / "mmlu"
    subjects = sorted(path for path in folder.glob("*") if path.is_dir())
    if not subjects:
        raise FileNotFoundError(f"data_dir: {folder} has no folder of a subject; {_REMEDY}")
    found = {}
    for split in ("dev", "test"):
        columns = [_letter_rows(subject, split) for subject in subjects]
        longest = max(map(len, columns))
        rows = [column[i] for i in range(longest) for column in columns if i < len(column)]
        found[split] = _dataset(rows, folder)
    return found


def _letter_rows(subject: Path, split: str) -> list[Row]:
    """Documents of one MMLU subject, in the published prompt."""
    shots = _read(subject / "fewshot.jsonl")
    rows = [*shots, *_read(subject / f"{split}.jsonl")]
    if odd := [row for row in rows if row["answer"] not in _LETTERS[:4] or not all(map(row.get, "ABCD"))]:
        raise ValueError(f"{subject}: options A to D and a letter among them are needed, got {odd[0]!r}")
    examples = "".join(f"{_letter_prompt(shot)} {shot['answer']}\n\n" for shot in shots)
    return [
        {"prompt": examples + _letter_prompt(row), "answer": _LETTERS.index(row["answer"])}
        for row in rows[len(shots) :]
    ]


def _letter_prompt(row: Row) -> str:
    options = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCD")
    return (
        f"There is a single choice question about {row['domain']}. Answer the question by replying A, B, C or D.\n"
        f"Question: {row['question']}\n{options}\nAnswer:"
    )


def load_nq(data_dir: str | None = None, **_harness_metadata: Any) -> dict[str, Dataset]:
    """Natural Questions, splits fewshot, dev and test: `question`, `answers`."""
    return _splits("nq", ("fewshot", "dev", "test"), data_dir, _answer_lists)


def load_gsm8k(data_dir: str | None = None, **_harness_metadata: Any) -> dict[str, Dataset]:
    """GSM8K, splits fewshot, dev and test: `question`, `answer` (reasoning that ends in the result)."""
    return _splits("gsm8k", ("fewshot", "dev", "test"), data_dir, _solutions)


def load_rolling(data_dir: str | None = None, **_harness_metadata: Any) -> dict[str, Dataset]:
    """GSM8K problems with their solutions as running text, splits dev and test: `text`."""
    return _splits("gsm8k", ("dev", "test"), data_dir, _documents)
