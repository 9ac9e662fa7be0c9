"""Tasks of the harness, loaded once, identified by what decides their requests and scores."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, hash_string, simple_parse_args_string
from pydantic import Field

from lm_eval_deepen.config import FrozenDict, Names
from lm_eval_deepen.config.frozen import thaw
from lm_eval_deepen.config.recipes import Asked, data_folder
from lm_eval_deepen.errors import ConfigError, DeepenError, did_you_mean

# Of a task's configuration, what says where its data lie: the documents themselves are hashed.
_PLACES = ("metadata", "dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class Asking(Asked):
    """What may be said of one task, or beside `tasks` of all of them."""

    metric: Names = Field(
        (), description="The metrics to show, such as `acc` or `exact_match,strict-match`; by default all."
    )
    system_instruction: str | None = Field(None, description="The text before every prompt.")
    gen_kwargs: FrozenDict = Field(FrozenDict(), description="Generation arguments that replace those of the tasks.")


class TaskSpec(Asking):
    """Keys of one task, or group of tasks."""

    task: str = Field(min_length=1, description="The name of a task, or of a group of tasks.")
    whole: bool = Field(
        False, description="For a group of tasks: one column for the whole group, and none for its tasks."
    )
    miniature: str | None = Field(
        None, description="The task of this package that replaces it in a miniature. It has no effect on an evaluation."
    )
    split: Literal["test", "validation"] | None = Field(
        None, description="`validation` evaluates the development split, although the task also has a test split."
    )

    @property
    def slug(self) -> str:
        """The name as part of a file's."""
        return re.sub(r"[^\w.-]+", "_", self.task)


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """One column of a recipe: a task, or the tasks of a group or tag."""

    spec: TaskSpec  # what the recipe says
    objects: list[Any]  # what ``simple_evaluate`` takes as `tasks`: the group, or the tasks
    leaves: Mapping[str, Any]  # the harness's tasks by name
    manager: Any  # where they come from

    @property
    def name(self) -> str:
        """The name in the recipe."""
        return self.spec.task

    @cached_property
    def documents(self) -> dict[str, list[str]]:
        """The harness's ``doc_hash`` of every document that is evaluated, by task."""
        hashes = {}
        for name, leaf in self.leaves.items():
            evaluated = leaf.doc_iterator(limit=get_sample_size(leaf, self.spec.limit))
            hashes[name] = doc_hashes([document for _, document in evaluated])
        return hashes

    @cached_property
    def few_shots(self) -> dict[str, str]:
        """A digest of the documents that few-shots are drawn from, for every task that shows some."""
        given = self.spec.num_fewshot
        shown = {
            name: leaf for name, leaf in self.leaves.items() if (leaf.config.num_fewshot if given is None else given)
        }
        return {
            f"the few-shots of {name}": hash_string("\n".join(doc_hashes(list(leaf.fewshot_docs()))))[:16]
            for name, leaf in shown.items()
        }

    @property
    def request_types(self) -> list[str]:
        """The types of requests that the tasks make."""
        kinds = {"multiple_choice": "loglikelihood"}
        return list(dict.fromkeys(kinds.get(leaf.OUTPUT_TYPE, leaf.OUTPUT_TYPE) for leaf in self.leaves.values()))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the requests and how answers are scored, as JSON data."""
        spec = self.spec
        return {
            "task": spec.task,
            "limit": spec.limit,
            "num_fewshot": spec.num_fewshot,
            "split": spec.split,
            "apply_chat_template": spec.apply_chat_template,
            "system_instruction": spec.system_instruction,
            "fewshot_as_multiturn": spec.fewshot_as_multiturn,
            "gen_kwargs": thaw(spec.gen_kwargs),
            "tasks": {
                name: {
                    "version": leaf.VERSION,
                    "config": _config_digest(leaf),
                    "documents": hash_string("\n".join(self.documents[name]))[:16],
                }
                for name, leaf in self.leaves.items()
            },
        }


def _config_digest(leaf: Any) -> str:
    config = {key: value for key, value in leaf.dump_config().items() if key not in _PLACES}
    text = _ADDRESS.sub("", json.dumps(config, sort_keys=True, default=str, ensure_ascii=True))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def generation_arguments(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Return generation arguments as a mapping, of which ``key=value,...`` is another spelling."""
    return dict(simple_parse_args_string(given) if isinstance(given, str) else thaw(given or {}))


def doc_hashes(documents: Sequence[Any]) -> list[str]:
    """Return what the harness writes as ``doc_hash`` of each document."""
    return [
        hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)) for doc in documents
    ]


def load_tasks(
    specs: Sequence[TaskSpec], include_path: Sequence[str] = (), metadata: Mapping[str, Any] | None = None
) -> list[LoadedTask]:
    """Load tasks with the harness; ours are found too.

    Raises:
        ConfigError: an unknown task with the nearest name, two columns with one task, or a split it lacks.
    """
    manager = _manager([spec.task for spec in specs], [*include_path, str(data_folder("tasks"))], metadata)
    tasks: list[LoadedTask] = []
    owners: dict[str, str] = {}
    for spec in specs:
        try:
            loaded = manager.load([spec.task])
            leaves = loaded["tasks"]
            objects = [loaded["groups"][spec.task]] if spec.task in loaded["groups"] else list(leaves.values())
            for name, leaf in leaves.items():
                if owners.setdefault(name, spec.task) != spec.task:
                    raise ConfigError(f"task {name!r} is in {owners[name]!r} and in {spec.task!r}; keep one of them")
                if spec.split == "validation":
                    if not leaf.has_validation_docs():
                        raise ConfigError(
                            f"task {name!r} has no validation split; leave split out, or choose another task"
                        )
                    leaf.set_config("test_split", None)
            tasks.append(LoadedTask(spec, objects, leaves, manager))
            assert tasks[-1].identity  # its digests are taken now: an evaluation changes a task's configuration
        except DeepenError:
            raise
        except Exception as error:  # whatever a task's own code raises, or the hub
            raise ConfigError(
                f"task {spec.task!r} cannot be loaded: {type(error).__name__}: {error}. Give what the task "
                "needs under metadata, in a recipe or on the command line"
            ) from error
    return tasks


def _manager(names: Sequence[str], folders: list[str], metadata: Mapping[str, Any] | None) -> Any:
    """Return a task manager that knows the tasks; reading the harness's own thousands takes a while."""
    for defaults in (False, True):
        manager = TaskManager(include_path=folders, include_defaults=defaults, metadata=dict(metadata or {}))
        missing = [name for name in names if name not in manager.all_tasks]
        if not missing:
            return manager
    raise ConfigError(
        f"task {missing[0]!r} is unknown.{did_you_mean(missing[0], manager.all_tasks)} Tasks of your own are found in "
        "the folders of include_path; `lm_eval ls tasks` lists the harness's"
    )
