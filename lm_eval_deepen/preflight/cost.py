"""The cost of a recipe's tasks: documents and tokens, from the tasks themselves, and hours on a stated machine."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_deepen.config.recipes import data_folder
from lm_eval_deepen.errors import VocabularyError
from lm_eval_deepen.preflight.files import first_line
from lm_eval_deepen.preflight.members import Inspected

if TYPE_CHECKING:
    from lm_eval_deepen.harness.ensemble_recipe import EnsembleRecipe
    from lm_eval_deepen.member.text import TextCodec

SAMPLE_DOCUMENTS = 16  # per task, evenly spaced


@dataclass(frozen=True)
class TaskCost:
    """What one task asks for, in tokens of the main member, extrapolated from a sample of its documents."""

    task: str  # its name
    documents: int  # how many it has
    read_tokens: int  # that are read, prompts with their few-shots; text that documents share counts every time
    written_tokens: int  # that are generated at most
    longest: int  # tokens of the longest document of the sample, with what is generated
    scores: bool = False  # whether it asks for the probability of given texts


@dataclass(frozen=True)
class Machine:
    """Assumptions about the machine."""

    bandwidth: float  # bytes per second at which weights are read
    flops: float  # floating-point operations per second


def task_costs(recipe: EnsembleRecipe, codec: TextCodec, problems: list[str]) -> list[TaskCost]:
    """Return what the recipe's tasks ask for; a task that cannot be loaded is added to `problems`."""
    if not recipe.task:
        return []
    with _quiet():
        try:
            from lm_eval.tasks import TaskManager

            from lm_eval_deepen.harness.tasks import generation_arguments

            manager = TaskManager(include_path=str(data_folder("tasks")), include_defaults=False)
            if not set(recipe.task) <= set(manager.all_tasks):
                manager = TaskManager(include_path=str(data_folder("tasks")))
            loaded = manager.load(list(recipe.task))["tasks"]
        except Exception as error:  # whatever a task's data raises: it would stop the evaluation as well
            problems.append(f"tasks {', '.join(recipe.task)} cannot be loaded: {first_line(error)}")
            return []
        costs = []
        for name, task in loaded.items():
            try:
                total = len(task.eval_docs)
                sample = sorted(
                    {i * total // min(SAMPLE_DOCUMENTS, total) for i in range(min(SAMPLE_DOCUMENTS, total))}
                )
                if (shots := recipe.harness.num_fewshot) is not None:
                    task.set_config(key="num_fewshot", value=shots)
                asked = generation_arguments(recipe.harness.gen_kwargs)
                if asked and task.OUTPUT_TYPE == "generate_until":
                    task.set_config(key="generation_kwargs", value=asked, update=True)
                task.set_fewshot_seed(seed=1234)
                task.build_all_requests(samples=sample)
                read, written, longest = 0, 0, 0
                for request in task.instances:
                    text, new = _text(request)
                    tokens = len(codec.encode(text))
                    read, written, longest = read + tokens, written + new, max(longest, tokens + new)
                limit = recipe.harness.limit
                documents = total if limit is None else math.ceil(limit * total if limit < 1 else min(limit, total))
                scores = any(request.request_type != "generate_until" for request in task.instances)
                read, written = (round(tokens * documents / len(sample)) for tokens in (read, written))
                costs.append(TaskCost(name, documents, read, written, longest, scores))
            except VocabularyError as error:
                problems.append(f"task {name!r} has a text that the main member's tokenizer cannot spell: {error}")
        return costs


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's remarks and progress bars for every task out of the report."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def _text(request: Any) -> tuple[str, int]:
    """Return the text that a request makes members read, and how many tokens it may generate."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if request.request_type == "generate_until":
        context, given = request.args
        return str(context), int(normalize_gen_kwargs(given)["max_gen_toks"])
    return "".join(map(str, request.args)), 0


def hours(costs: Sequence[TaskCost], members: Sequence[Inspected], batch: int, machine: Machine) -> float | None:
    """Return an estimate of the hours that the tasks take; None where a member's size is unknown.

    Reading is bound by arithmetic: two operations per parameter and token. Writing is bound by the weights, which every
    step of a batch reads once from every member; members take turns. Loading and fusing are left out.
    """
    if any(member.active is None or member.weight_bytes is None for member in members):
        return None
    active = sum(member.active or 0 for member in members)
    stored = sum(member.weight_bytes or 0 for member in members)
    read = sum(cost.read_tokens for cost in costs)
    written = sum(cost.written_tokens for cost in costs)
    return (2 * active * read / machine.flops + stored * written / batch / machine.bandwidth) / 3600
