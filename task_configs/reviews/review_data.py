"""Reviews with their sentiment: drugs (Drugs.com), Yelp, Android apps. From the hub, or from a local folder.

The environment variable LM_EVAL_DEEPEN_DATA (or `data_dir` in the metadata) names a local folder:
reviews/{drugs,yelp,apps}/{dev,test}.jsonl, one JSON object a line with `text` and `rating`.
`benchmarks/make_reviews.py FOLDER` writes synthetic ones there.

A rating becomes a label so: of 1 to 5 stars, 1 and 2 are negative, 3 is neutral, 4 and 5 are positive; of 1 to 10
points (drugs), 1 to 4, 5 and 6, 7 to 10. Models may be trained on `dev`; no text of it is in `test`. From the hub
both are drawn with a fixed seed, from the training and the test split, or both from the only one (apps).

The hub itself was not read. Names, columns and splits were compared with public code: the former loading scripts
`app_reviews.py` (review, star 1 to 5; train alone) and `yelp_review_full.py` (text, label 0 to 4 for 1 to 5 stars;
train and test) of huggingface/datasets, and for the drugs (review, rating 1 to 10; train and test)
`drug_experiment/merge_eval.py` of alt2177/mllm, the code of the merged GPT-2 siblings. That code predicts the rating
itself, one of ten, with a classification head; here one of three labels is scored.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

VARIABLE = "LM_EVAL_DEEPEN_DATA"
LABELS = ("negative", "neutral", "positive")
DEV, TEST = 3000, 1000  # reviews that are drawn from the hub
LONGEST = 1000  # characters of a review; the rest is cut off
SOURCES: dict[str, tuple[str, str, str, str, int, int]] = {
    # -> hub data set, text column, rating column, test split, added to the rating, largest rating
    "drugs": ("lewtun/drug-reviews", "review", "rating", "test", 0, 10),
    "yelp": ("Yelp/yelp_review_full", "text", "label", "test", 1, 5),
    "apps": ("sealuzh/app_reviews", "review", "star", "train", 0, 5),
}


def label_of(rating: float, largest: int) -> int:
    """Return the label's index in `LABELS`.

    Raises:
        ValueError: a rating that is none from 1 to `largest`.
    """
    if isinstance(rating, bool) or not isinstance(rating, (int, float)) or not 1 <= rating <= largest:
        raise ValueError(f"rating must be a number from 1 to {largest}; got {rating!r}")
    low, high = (4, 6) if largest == 10 else (2, 3)
    return 0 if rating <= low else 1 if rating <= high else 2


def _local(name: str, folder: Path, largest: int) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for split in ("dev", "test"):
        path = folder / "reviews" / name / f"{split}.jsonl"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist. Put reviews there, as {Path(__file__).name} describes, or unset {VARIABLE} to "
                "use the hub."
            )
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not {"text", "rating"} <= row.keys():
                raise ValueError(f"{path}, line {number}: fields text and rating are needed; got {str(row)[:80]}")
        found[split] = [_row(row["text"], row["rating"], largest) for row in rows]
    return found


def _hub(name: str) -> dict[str, list[dict[str, Any]]]:
    hub, text, rating, test, offset, largest = SOURCES[name]
    try:
        splits = {split: datasets.load_dataset(hub, split=split).shuffle(seed=0) for split in {"train", test}}
    except Exception as error:
        raise RuntimeError(
            f"{hub} cannot be loaded from the hub: {type(error).__name__}: {error}. Without access, set {VARIABLE} to "
            f"a local folder laid out as {Path(__file__).name} describes."
        ) from error
    first = DEV if test == "train" else 0  # reviews that are spare: those that occur twice are left out
    places = {"dev": ("train", 0, DEV), "test": (test, first, first + 2 * TEST)}
    found = {}
    for split, (source, start, end) in places.items():
        drawn = splits[source].select(range(start, min(end, len(splits[source]))))
        found[split] = [_row(row[text], row[rating] + offset, largest) for row in drawn]
    return found


def _row(text: str, rating: float, largest: int) -> dict[str, Any]:
    return {"text": " ".join(str(text).split())[:LONGEST], "label": label_of(rating, largest)}


def _distinct(rows: Iterable[Mapping[str, Any]], seen: set[str]) -> list[dict[str, Any]]:
    kept = []
    for row in rows:
        if row["text"] and row["text"] not in seen:
            seen.add(row["text"])
            kept.append(dict(row))
    return kept


def _load(name: str, data_dir: str | None) -> dict[str, Dataset]:
    given = data_dir or os.environ.get(VARIABLE)
    rows = _local(name, Path(given).expanduser(), SOURCES[name][-1]) if given else _hub(name)
    seen: set[str] = set()
    splits = {split: _distinct(rows[split], seen) for split in ("dev", "test")}
    for split, kept in splits.items():
        if not kept:
            raise ValueError(f"reviews, {name}, {split}: no usable review; at least one is needed")
    if not given:
        splits["test"] = splits["test"][:TEST]
    return {split: Dataset.from_list(kept) for split, kept in splits.items()}


def load_drugs(data_dir: str | None = None, **_metadata: Any) -> dict[str, Dataset]:
    """Reviews of drugs, splits dev and test: `text`, `label`."""
    return _load("drugs", data_dir)


def load_yelp(data_dir: str | None = None, **_metadata: Any) -> dict[str, Dataset]:
    """Reviews of businesses, splits dev and test: `text`, `label`."""
    return _load("yelp", data_dir)


def load_apps(data_dir: str | None = None, **_metadata: Any) -> dict[str, Dataset]:
    """Reviews of Android apps, splits dev and test: `text`, `label`."""
    return _load("apps", data_dir)
