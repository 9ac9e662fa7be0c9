"""Sentence pairs of FLORES-200: from the hub (facebook/flores), or from a local folder.

The environment variable LM_EVAL_DEEPEN_DATA names a local folder, as for the other benchmarks (see paper_data.py):
flores/SOURCE-TARGET/{dev,test}.jsonl, such as flores/eng_Latn-deu_Latn/test.jsonl, with `source` and `target`.
The first pairs of `dev` are the examples; the others are the development split.
"""

import json
import os
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

VARIABLE = "LM_EVAL_DEEPEN_DATA"
HUB = "facebook/flores"
SHOTS = 4
_SPLITS = {"dev": "dev", "test": "devtest"}  # here -> on the hub


def _hub(language: str, split: str) -> dict[int, str]:
    """Return the hub's sentences of a language by their number."""
    try:
        return {row["id"]: row["sentence"] for row in datasets.load_dataset(HUB, language, split=split)}
    except Exception as error:
        raise RuntimeError(
            f"{HUB} ({language}, {split}) cannot be loaded from the hub: {type(error).__name__}: {error}. Without "
            f"access, set {VARIABLE} to a local folder laid out as {Path(__file__).name} describes."
        ) from error


def _pairs(source: str, target: str, split: str, folder: Path | None) -> list[dict[str, str]]:
    if folder is None:
        mine, theirs = (_hub(language, _SPLITS[split]) for language in (source, target))
        return [{"source": mine[n], "target": theirs[n]} for n in sorted(mine.keys() & theirs.keys())]
    path = folder / "flores" / f"{source}-{target}" / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Put sentence pairs there, as {Path(__file__).name} describes, or unset {VARIABLE} "
            "to use the hub."
        )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if wrong := [row for row in rows if not (isinstance(row, dict) and {"source", "target"} <= row.keys())]:
        raise ValueError(f"{path}: fields source and target are needed, got {wrong[0]!r}; correct the row")
    return rows


def load_flores(source: str, target: str, data_dir: str | None = None, **_metadata: Any) -> dict[str, Dataset]:
    """Pairs of sentences, `source` and `target`: `fewshot`, `dev` and `test`."""
    given = data_dir or os.environ.get(VARIABLE)
    folder = Path(given).expanduser() if given else None
    dev, test = (_pairs(source, target, split, folder) for split in ("dev", "test"))
    if len(dev) <= SHOTS or not test:
        raise ValueError(
            f"flores, {source}-{target}: {len(dev)} pairs in dev and {len(test)} in test; dev needs more than {SHOTS}, "
            "test one. Add some"
        )
    splits = {"fewshot": dev[:SHOTS], "dev": dev[SHOTS:], "test": test}
    return {name: Dataset.from_list(rows) for name, rows in splits.items()}
