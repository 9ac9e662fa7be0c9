"""Miniatures: the rows and columns of any leaderboard with small models and a few documents.

A miniature runs every line of a recipe. Its data are local samples where there are some, and otherwise synthetic
documents in the same layout, which say nothing: its scores are no results.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_deepen.config.keys import given, to_number
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.harness.model import catalogue
from lm_eval_deepen.storage import link_folder, make_folder, remove_folder, write_text

MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "google/gemma-3-270m")
DOCUMENTS = 8  # synthetic ones of every split
MOST_ANCHORS = 2000  # dense matrices of the large vocabularies of small models would not fit
_LITTLE = {"train_tokens": 200, "context_length": 64, "batch_size": 2}  # of a training
_TOKENS = 16  # that a long answer may have
_LONG = ("gsm8k", "flores")
_OWN = ("name", "pretrained", "tasks", "build", "temperature")  # of a member; the rest is about its model
_SUBJECTS = ("anatomy", "high_school_physics")
_REVIEWS = ("drugs", "yelp", "apps")
_GOOD, _FAIR, _BAD = ("great", "works well", "very happy"), ("it is okay", "average"), ("terrible", "broken", "a waste")
_PAIRS = ("eng_Latn-deu_Latn", "deu_Latn-eng_Latn", "eng_Latn-ron_Latn", "ron_Latn-eng_Latn")


def miniature(raw: Mapping[str, Any], models: Sequence[str], limit: int) -> dict[str, Any]:
    """Return the keys of a leaderboard with `models` for members in turn, few documents and small matrices.

    Raises:
        ConfigError: no model is given, or the recipe of a member that is built is in a file of its own.
    """
    if not models:
        raise ConfigError("--models: give at least one model")
    members: list[dict[str, Any]] = []
    for at, entry in enumerate(raw.get("members") or []):
        keys: dict[str, Any] = {"pretrained": entry} if isinstance(entry, str) else given(entry)
        kept = {key: value for key, value in keys.items() if key in _OWN}
        if "build" in keys:
            recipe = keys["build"]
            if not isinstance(recipe, Mapping) or "models" not in recipe:
                raise ConfigError(
                    f"a member is built by {recipe!r}: a miniature takes members whose recipe stands in the "
                    "leaderboard, with `models`; run this one with `lm-eval-deepen leaderboard`"
                )
            kept["build"] = {**recipe, **_LITTLE, "models": dict.fromkeys(recipe["models"], models[0])}
        else:
            kept["pretrained"] = models[at % len(models)]
        members.append({"name": str(keys.get("name") or keys["pretrained"].rpartition("/")[2]), **kept})
    loading = catalogue().loading_keys | {"hf_kwargs"}
    alike = {key: value for key, value in (raw.get("common") or {}).items() if key not in loading}
    tasks, names = _tasks(raw, limit)
    for one in members:
        if "tasks" in one:
            listed = one["tasks"] if isinstance(one["tasks"], list) else [one["tasks"]]
            one["tasks"] = [names[task] for task in listed]
    expected = []  # without the tasks that others stand in for
    for table in raw.get("expected") or []:
        if scores := {task: rows for task, rows in table["scores"].items() if names[task] == task}:
            expected.append({**table, "scores": scores})
    small = {
        **raw,
        "members": members,
        "common": {**alike, "dtype": "float32", "batch_size": 4, "chat_fallback": "plain"},  # may be base models
        "rows": [_row(row, alike, names) for row in raw.get("rows") or []] or None,
        "tasks": tasks,
        "expected": expected,
    }
    return {key: value for key, value in small.items() if value is not None and key != "limit"}


def _row(row: Mapping[str, Any], common: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a row whose dense matrices are small, and whose model is trained on little text."""
    small: dict[str, Any] = given(row)
    if isinstance(build := small.get("build"), Mapping) and "method" in build:
        small["build"] = {**build, **_LITTLE}
    if "by_task" in small:
        small["by_task"] = {names.get(task, task): dict(own or {}) for task, own in small["by_task"].items()}
    dense = {**common, **small}.get("compat") == "reference"
    for keys in (small, *small.get("by_task", {}).values()):
        if "max_anchors" in keys:
            keys["max_anchors"] = min(to_number(keys["max_anchors"]) or MOST_ANCHORS, MOST_ANCHORS)
    if dense:
        small.setdefault("max_anchors", MOST_ANCHORS)
    return small


def _tasks(raw: Mapping[str, Any], limit: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the columns, and the names that they have now by the names that they had."""
    specs, names = [], {}
    for entry in raw.get("tasks") or []:
        keys = {"task": entry} if isinstance(entry, str) else dict(entry)
        name = keys["task"]
        if stand_in := keys.pop("miniature", None):
            keys = {"task": stand_in}
        names[name] = keys["task"]
        keys["limit"] = min(limit, to_number(keys.get("limit")) or limit)
        if any(word in keys["task"] for word in _LONG):
            keys["gen_kwargs"] = {"max_gen_toks": _TOKENS}
        specs.append(keys)
    return specs, names


# --- data


def sample_data(folder: Path, given: Path | None) -> list[str]:
    """Make a data folder for the tasks of ``task_configs``: samples where `given` has some, else synthetic documents.

    Returns:
        The benchmarks with synthetic documents.
    """
    made = []
    make_folder(folder)
    for name, files in synthetic().items():
        place, own = folder / name, None if given is None else given / name
        if own is not None and own.is_dir():
            if not (place.exists() and place.samefile(own)):
                remove_folder(place)  # of an earlier run: a link, or synthetic documents
                link_folder(place, own)
            continue
        if place.is_symlink():  # what it leads to is somebody's data
            remove_folder(place)
        made.append(name)
        for path, rows in files.items():
            target = place / path
            make_folder(target.parent)
            write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return made


def synthetic() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return made-up documents of every benchmark: by benchmark, then by file. They test nothing but the machinery."""
    files: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(dict)
    numbers = range(DOCUMENTS)
    for split in ("fewshot", "dev", "test"):
        path = f"{split}.jsonl"
        for subject in _SUBJECTS:
            letters = _letters(f"{subject} {split}", "ABCD")
            files["mmlu"][f"{subject}/{path}"] = [{**row, "domain": subject.replace("_", " ")} for row in letters]
        for name in ("nq", "triviaqa"):
            answers = [f"{n + 1}" if split == "fewshot" else [f"{n + 1}"] for n in numbers]
            files[name][path] = [
                {"question": f"{name} {split}: what follows {n}", "answer": answers[n]} for n in numbers
            ]
        files["gsm8k"][path] = [
            {"question": f"{split}: {n} birds and one more?", "answer": f"{n} + 1 = {n + 1}.\nThe answer is {n + 1}"}
            for n in numbers
        ]
        if split == "fewshot":  # the others have none
            continue
        files["arc_challenge"][path] = list(_letters(split, "ABCD"))
        files["piqa"][path] = list(_letters(split, "AB"))
        for pair in _PAIRS:
            files["flores"][f"{pair}/{path}"] = [
                {"source": f"{split}: bird {n}.", "target": f"{split}: bird number {n}."} for n in numbers
            ]
        for kind in _REVIEWS:
            files["reviews"][f"{kind}/{path}"] = synthetic_reviews(kind, split, 3 * DOCUMENTS)
    return files


def synthetic_reviews(kind: str, split: str, count: int) -> list[dict[str, Any]]:
    """Return made-up reviews with ratings: short sentences of a few words, told apart by those of praise and blame.

    Those of `drugs` are rated 1 to 10, of `yelp` and `apps` 1 to 5. Their split is part of their text: none is in two.
    """
    things = {"drugs": "pills", "yelp": "restaurant", "apps": "app"}
    top = 10 if kind == "drugs" else 5
    reviews = []
    for n in range(count):
        words, rating = ((_BAD, 1), (_FAIR, (top + 1) // 2), (_GOOD, top))[n % 3]
        said = words[n // 3 % len(words)]
        reviews.append({"text": f"{split} {n}: this {things[kind]} was {said}, visit {n}.", "rating": rating})
    return reviews


def _letters(what: str, letters: str) -> Iterable[dict[str, Any]]:
    for n in range(DOCUMENTS):
        options = {letter: f"{n + at}" for at, letter in enumerate(letters)}
        yield {"question": f"{what}: which is {n + n % len(letters)}?", **options, "answer": letters[n % len(letters)]}
