"""Texts to train on, by name: files, or the training or validation split of a task."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.storage import cache_folder, sha256, used, write_bytes

TASK = "task:"  # task:NAME is a task's training split, or its validation split where it has none


@dataclass(frozen=True)
class TaskSource:
    """Where tasks are found beside the harness's and ours, and what they are told."""

    include_path: tuple[str, ...] = ()  # folders
    metadata: str = "{}"  # a JSON object, as ``--metadata`` of the harness

    def under(self, other: TaskSource) -> TaskSource:
        """Return this source with what another one has beside it; what both say, this one decides."""
        return TaskSource(
            tuple(dict.fromkeys((*self.include_path, *other.include_path))),
            json.dumps({**json.loads(other.metadata), **json.loads(self.metadata)}, sort_keys=True),
        )


ANYWHERE = TaskSource()


def files(names: Iterable[str], folder: Path, where: str, tasks: TaskSource = ANYWHERE) -> list[Path]:
    """Return the files of texts, made first where they are no files but ``task:NAME``.

    Relative paths are read in `folder`, and environment variables filled in. `where` begins the errors.

    Raises:
        ConfigError: a text that is not there.
    """
    paths = []
    for name in names:
        if name.startswith(TASK):
            paths.append(_kept(name.replace(":", "-"), task_texts(name.removeprefix(TASK), tasks)))
            continue
        path = folder / Path(os.path.expandvars(name)).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"{where}: {path} is no file; relative paths are read beside the recipe. Give a file, or "
                f"{TASK}NAME for a task's training split"
            )
        paths.append(path.absolute())
    return paths


def task_folders(names: Iterable[str], folder: Path) -> tuple[str, ...]:
    """Return the folders of a recipe's ``include_path``, beside the recipe; ConfigError for what is no folder."""
    folders = []
    for name in names:
        place = folder / Path(name).expanduser()
        if not place.is_dir():
            raise ConfigError(f"include_path: {place} is not a folder; relative paths are read beside the recipe")
        folders.append(str(place))
    return tuple(folders)


def _kept(name: str, documents: Sequence[str]) -> Path:
    """Return a file with these documents in the user's cache, written if need be; its name holds their digest."""
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents if text.strip())
    digest = hashlib.sha256(content.encode()).hexdigest()
    path = cache_folder() / "texts" / f"{name}-{digest[:12]}.jsonl"
    if not path.is_file() or sha256(path) != digest:
        write_bytes(path, content.encode())
    used(path)
    return path


def task_texts(name: str, tasks: TaskSource = ANYWHERE) -> list[str]:
    """Return what a task asks, each with its answer, from the split that may be trained on; never its test split.

    Raises:
        ConfigError: an unknown task, one with several tasks in it, or one without such a split.
    """
    return [text for text, _ in _examples(name, tasks)]


@lru_cache(maxsize=16)
def task_hashes(name: str, tasks: TaskSource = ANYWHERE) -> tuple[str, ...]:
    """Return the harness's ``doc_hash`` of the documents of `task_texts`."""
    from lm_eval_deepen.harness.tasks import doc_hashes

    return tuple(doc_hashes([document for _, document in _examples(name, tasks)]))


def _examples(name: str, tasks: TaskSource) -> list[tuple[str, Any]]:
    from lm_eval_deepen.harness.tasks import TaskSpec, load_tasks

    [loaded] = load_tasks([TaskSpec(task=name)], tasks.include_path, json.loads(tasks.metadata))
    if list(loaded.leaves) != [name]:
        raise ConfigError(f"text {TASK}{name} is a group; name one of its tasks: {', '.join(loaded.leaves)}")
    task = loaded.leaves[name]
    if task.has_training_docs():
        documents = list(task.training_docs())
    elif task.has_validation_docs() and task.has_test_docs():
        documents = list(task.validation_docs())
    else:
        raise ConfigError(
            f"text {TASK}{name}: the task has no training split, nor a validation split beside its test split, so that "
            "a model trained on it would have seen what it is evaluated on; choose another text"
        )
    examples = []
    for document in documents:  # as the task's few-shots spell it: what is asked, and the answer
        asked, answer = task.doc_to_text(document), task.doc_to_target(document)
        if isinstance(answer, list):
            answer = answer[0]
        if isinstance(answer, int) and task.OUTPUT_TYPE == "multiple_choice":
            answer = task.doc_to_choice(document)[answer]
        if isinstance(asked, int):  # the number of the right one of several texts before one answer, as in Winogrande
            asked = task.doc_to_choice(document)[asked]
        delimiter = task.config.target_delimiter
        if prefix := task.doc_to_prefix(document):  # what every answer begins with
            apart = asked and not (asked[-1].isspace() or prefix[0].isspace())
            asked = f"{asked}{delimiter if apart else ''}{prefix}"
            delimiter = "" if prefix[-1].isspace() or str(answer)[:1].isspace() else " "
        examples.append((f"{asked}{delimiter}{answer}", document))
    return examples
