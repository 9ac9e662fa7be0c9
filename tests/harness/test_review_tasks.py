"""The tasks on reviews: labels from ratings, local folders, the hub, and no review in two splits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "task_configs" / "reviews"
VARIABLE = "LM_EVAL_DEEPEN_DATA"
KINDS = ("drugs", "yelp", "apps")
sys.path.insert(0, str(ROOT / "benchmarks"))

import make_reviews  # noqa: E402

review_data: Any = sys.modules[load_yaml(FOLDER / "deepen_reviews_yelp.yaml")["custom_dataset"].__module__]


def load(kind: str, **metadata: Any) -> Any:
    name = f"deepen_reviews_{kind}"
    return TaskManager(include_path=FOLDER, include_defaults=False, metadata=metadata).load(name)["tasks"][name]


@pytest.mark.parametrize(
    ("largest", "labels"), [(5, [0, 0, 1, 2, 2]), (10, [0, 0, 0, 0, 1, 1, 2, 2, 2, 2])], ids=["stars", "points"]
)
def test_a_rating_becomes_a_label(largest: int, labels: list[int]) -> None:
    assert [review_data.label_of(rating, largest) for rating in range(1, largest + 1)] == labels
    for wrong in (0, largest + 1, "3", None, True, float("nan")):
        with pytest.raises(ValueError, match=f"rating must be a number from 1 to {largest}"):
            review_data.label_of(wrong, largest)


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_reviews_are_read_and_labels_are_scored(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    assert make_reviews.main([str(tmp_path), "--count", "12"]) == 72
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    task = load(kind)
    dev, test = list(task.validation_docs()), list(task.eval_docs)
    assert len(dev) == len(test) == 12 and {doc["label"] for doc in test} == {0, 1, 2}
    assert not {doc["text"] for doc in dev} & {doc["text"] for doc in test}
    task.build_all_requests(limit=1)
    asked = [request.args for request in task.instances]
    text = f"Review: {test[0]['text']}\nSentiment:"
    assert asked == [(text, f" {label}") for label in ("negative", "neutral", "positive")]


def test_a_review_of_both_splits_stays_where_models_are_trained(tmp_path: Path) -> None:
    folder = tmp_path / "reviews" / "yelp"
    folder.mkdir(parents=True)
    rows = {"dev": [("a b", 1), ("c", 3)], "test": [("a  b", 1), ("d", 5)]}
    for split, listed in rows.items():
        lines = [json.dumps({"text": text, "rating": rating}) for text, rating in listed]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    task = load("yelp", data_dir=str(tmp_path))
    assert [doc["text"] for doc in task.eval_docs] == ["d"]
    (folder / "test.jsonl").write_text('{"text": "a b", "rating": 1}\n')
    with pytest.raises(ValueError, match="reviews, yelp, test: no usable review"):
        load("yelp", data_dir=str(tmp_path))
    (folder / "test.jsonl").write_text('{"text": "a b"}\n')
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: fields text and rating are needed"):
        load("yelp", data_dir=str(tmp_path))
    (folder / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=rf"test\.jsonl does not exist.*unset {VARIABLE}"):
        load("yelp", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "hub", "row", "label"),
    [
        ("drugs", "lewtun/drug-reviews", {"review": "{}", "rating": 6.0}, 1),
        ("yelp", "Yelp/yelp_review_full", {"text": "{}", "label": 0}, 0),
        ("apps", "sealuzh/app_reviews", {"review": "{}", "star": 5}, 2),
    ],
)
def test_the_hub_is_the_default(kind: str, hub: str, row: dict[str, Any], label: int, monkeypatch: Any) -> None:
    def load_dataset(path: str, *, split: str) -> Any:
        assert path == hub and (split == "train" or kind != "apps")
        rows = [{k: f"{split} {n}" if v == "{}" else v for k, v in row.items()} for n in range(3010)]
        return review_data.Dataset.from_list(rows)

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(review_data.datasets, "load_dataset", load_dataset)
    task = load(kind)
    dev = {doc["text"] for doc in task.validation_docs()}
    assert len(dev) == 3000 and not dev & {doc["text"] for doc in task.eval_docs}
    assert len(task.eval_docs) == (10 if kind == "apps" else 1000)
    assert {doc["label"] for doc in task.eval_docs} == {label}

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(review_data.datasets, "load_dataset", unreachable)
    with pytest.raises(RuntimeError, match=rf"{hub} cannot be loaded.*no route.*set {VARIABLE}"):
        load(kind)
