"""Loaders of the demo tasks: JSONL files that lie beside this module, whatever the working directory is."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

_HERE = Path(__file__).resolve().parent


def _read(name: str) -> Dataset:
    # Built in memory: no hub, and no cache folder that runs side by side could spoil for each other.
    lines = (_HERE / name).read_text(encoding="utf-8").splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])


def load_choice(**_harness_metadata: Any) -> dict[str, Dataset]:
    """Multiple-choice items: `question`, four `choices`, `answer` (index), `category`.

    The harness hands over task metadata merged with model arguments; none of it is used.
    """
    return {"test": _read("choice.jsonl"), "fewshot": _read("choice_fewshot.jsonl")}


def load_short(**_harness_metadata: Any) -> dict[str, Dataset]:
    """Short-answer items: `question`, `answers` (accepted spellings, the usual one first), `category`.

    The harness hands over task metadata merged with model arguments; none of it is used.
    """
    return {"test": _read("short.jsonl"), "fewshot": _read("short_fewshot.jsonl")}
