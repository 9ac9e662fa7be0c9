"""Runs the missing cells of a leaderboard around members that are loaded once."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lm_eval
from lm_eval.loggers import EvaluationTracker

from lm_eval_deepen.build.architecture import read_config
from lm_eval_deepen.config import MemberConfig
from lm_eval_deepen.config.frozen import thaw
from lm_eval_deepen.engine.self_check import flat_spaces
from lm_eval_deepen.errors import ConfigError, RequestError, ResultError, UnansweredError, blamed
from lm_eval_deepen.fusion.base import Fuser
from lm_eval_deepen.harness.once import said_once
from lm_eval_deepen.harness.requests import share_passes
from lm_eval_deepen.harness.tasks import LoadedTask
from lm_eval_deepen.leaderboard.builds import PREFIX, facts_of, refuse_trained
from lm_eval_deepen.leaderboard.cells import Cell, identity, mark_of, read_cell, write_cell
from lm_eval_deepen.leaderboard.models import RowModel, load_members, share_by_members
from lm_eval_deepen.leaderboard.progress import Progress
from lm_eval_deepen.leaderboard.provenance import versions
from lm_eval_deepen.leaderboard.recipe import LeaderboardRecipe
from lm_eval_deepen.leaderboard.rows import Row
from lm_eval_deepen.leaderboard.tuned import refuse_overlap
from lm_eval_deepen.member import Member
from lm_eval_deepen.member.configuration import is_encoder_decoder
from lm_eval_deepen.member.devices import give_back_freed_memory
from lm_eval_deepen.member.model_files import digests
from lm_eval_deepen.pooling.base import check_request, fused_takes_part
from lm_eval_deepen.storage import locked

Key = tuple[str, str]  # row, task
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What there is to do."""

    recipe: LeaderboardRecipe  # what was asked for
    tasks: Sequence[LoadedTask]  # its tasks, loaded
    out: Path  # where cells lie
    built: Path  # where models that the leaderboard builds are kept
    redo: bool = False  # whether what is damaged is made again
    finished: dict[Key, Cell] = field(default_factory=dict)  # cells that are there
    meaningless: dict[Key, str] = field(default_factory=dict)  # why a row has no answer to a task
    missing: list[Key] = field(default_factory=list)  # cells to evaluate
    # why a cell could not be finished, since some requests have no answer; `execute` fills it
    failed: dict[Key, str] = field(default_factory=dict)

    def identity(self, row: Row, task: LoadedTask) -> dict[str, Any]:
        """Return what decides a cell's results."""
        builds = self.recipe.builds
        built = {name: builds.identity(name) for name in row.members if name in builds.recipes}
        return identity(row, task, self.recipe.seeds, built)

    @property
    def rows(self) -> list[Row]:
        """The rows that miss a cell."""
        wanted = {name for name, _ in self.missing}
        return [row for row in self.recipe.rows if row.name in wanted]

    def make(self, say: Say, device: str | None) -> dict[str, Path]:
        """Build the models that missing cells need, by name; see `Builds.make`."""
        used = dict.fromkeys(name for row in self.rows for name in row.members)
        return self.recipe.builds.make(used, self.built, say, self.redo, device)

    def keep(self, key: Key, outcome: Cell | str) -> None:
        """Put a cell among the finished ones, or why it has no results among the failed."""
        if isinstance(outcome, Cell):
            self.finished[key] = outcome
        else:
            self.failed[key] = outcome


def plan(
    recipe: LeaderboardRecipe, tasks: Sequence[LoadedTask], out: Path, redo: bool = False, built: Path | None = None
) -> Plan:
    """Find out which cells are there, below `out`; no model is loaded.

    With `redo`, cells of other evaluations are evaluated again. Built models are in `built`, by default below `out`.

    Raises:
        ResultError: a cell is of another evaluation.
        ConfigError: a row was tuned, or its model trained, on documents of a task.
    """
    todo = Plan(recipe, tasks, out, built or out / "built", redo)
    for row in recipe.rows:
        different = recipe.builds.incompatible(row.members)
        # before anything is evaluated, the hub need not be asked
        marks = any(mark_of(out, row, task).is_file() for task in tasks)
        files = digests(row.config.members) if marks else {}
        for task in tasks:
            if not row.has(task.name):
                continue
            key = (row.name, task.name)
            if reason := different or no_answer(row, task):
                todo.meaningless[key] = reason
                continue
            if row.tuned is not None:
                for name, hashes in task.documents.items():
                    refuse_overlap(f"row {row.name!r} ({row.tuned.source})", row.tuned.documents, name, hashes)
            refuse_trained(recipe.builds, row.members, task)
            shown = task.few_shots if marks else {}
            cell = read_cell(mark_of(out, row, task), todo.identity(row, task), redo, {**files, **shown})
            if cell is None:
                todo.missing.append(key)
            else:
                todo.finished[key] = cell
    return todo


def no_answer(row: Row, task: LoadedTask) -> str | None:
    """Return why a row cannot answer a task's requests; None where it can."""
    if any(kind.startswith("loglikelihood") for kind in task.request_types):
        for member in row.config.members:
            if generates_only(member):
                return f"{member.name} is an encoder-decoder model, which takes part in generation only"
        if row.config.writes_by_words and (row.config.pooling is None or row.config.fuses_steps):
            return f"{row.config.method} writes texts, and scores none that is given"
    if row.config.pooling is None:
        return None
    method = row.config.pooling_options
    for kind in task.request_types:
        try:
            check_request(row.config.pooling, method, kind)
        except RequestError:
            return f"{row.config.pooling} combines answers to {' and '.join(sorted(method.REQUESTS))}, not to {kind}"
    return None


@cache
def generates_only(member: MemberConfig) -> bool:
    """Tell whether a member is an encoder-decoder model, from its configuration alone."""
    if member.pretrained.startswith(PREFIX):  # what is built here is a causal language model
        return False
    try:
        return is_encoder_decoder(member.loading, read_config(member.name, member.pretrained))
    except ConfigError:
        return False  # loading it says what is wrong


def execute(todo: Plan, device: str | None, say: Say) -> dict[Key, Cell]:
    """Evaluate the missing cells; each is on disk as soon as it is finished. Returns all finished ones.

    A cell with requests that have no answer is left out, and why stands in ``todo.failed``.

    Raises:
        DeepenError: by row and task; what is finished is kept.
    """
    if not todo.missing:
        return todo.finished
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a leaderboard runs in one process; start it without torchrun or accelerate launch")
    with sole_writer(todo), said_once():
        execution = Execution(todo, device, say)
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        with Progress(len(todo.missing), say) as progress:
            for key, outcome in execution.outcomes():
                todo.keep(key, outcome)
                progress.finished(*key, outcome if isinstance(outcome, str) else None)
    return todo.finished


def sole_writer(todo: Plan) -> AbstractContextManager[None]:
    """Return the lock of a leaderboard's folder; entering it is a ResultError where another process has it."""
    busy = ResultError(f"{todo.out}: another process writes this leaderboard; wait for it, or kill it")
    return locked(todo.out / ".lock", busy)


class Execution:
    """One run: the loaded members, the models built around them so far."""

    def __init__(self, todo: Plan, device: str | None, say: Say) -> None:
        self.todo, self.device = todo, device
        self.rows = rows = todo.rows
        used = {name for row in rows for name in row.members}
        self.places = todo.make(say, device)
        members = [member for member in todo.recipe.members if member.name in used]
        say(f"loading {', '.join(member.name for member in members) or 'nothing yet'}")
        here = {member.name for member in members}
        self.members: dict[str, Member] = self._load(members, [row for row in rows if here.issuperset(row.members)])
        self.fusers: WeakValueDictionary[tuple, Fuser] = WeakValueDictionary()  # of the models that are there
        self.alone = {row.name: self._model(row) for row in todo.recipe.alone if row.members[0] in used}

    def _load(self, members: Sequence[MemberConfig], rows: Sequence[Row]) -> dict[str, Member]:
        """Load members; those that were built, from where they are now."""
        placed = [m.replace(pretrained=str(self.places.get(m.name, m.pretrained))) for m in members]
        return load_members(placed, [(row.config, row.members) for row in rows], self.device)

    def outcomes(self) -> Iterator[tuple[Key, Cell | str]]:
        """Yield every cell as soon as it is on disk, or why it has no results."""
        for order in dict.fromkeys(row.members for row in self.rows):
            group = [row for row in self.rows if row.members == order]
            passing = [row.config.members[0] for row in group if row.members[0] not in self.members]
            self.members |= self._load(passing, group) if passing else {}
            yield from self._run_group(group)
            if passing:  # a built model is a row alone: the next one takes its memory
                del self.members[order[0]]
                _release()

    def _run_group(self, group: Sequence[Row]) -> Iterator[tuple[Key, Cell | str]]:
        """Evaluate the rows with the same members in the same order, task by task, then forget their models."""
        models: dict[str, RowModel] = {}
        for row in group:
            with blamed(f"row {row.name!r}"):
                models[row.name] = self.alone[row.name] if row.alone and row.name in self.alone else self._model(row)
        named = {row.config.fingerprint(): row.name for row in group if row.config.pooling is None}
        for row in group:
            if row.config.pooling is not None:
                same = named.get(row.config.replace(pooling_options=None).fingerprint(), row.name)
                fused = [same] if fused_takes_part(row.config.pooling_options) else []
                own = models[row.name].answerers
                alone = [
                    other if other.ensemble_config.seed == row.config.seed else mine  # others draw other texts
                    for mine, other in zip(own, (self.alone[name] for name in row.members), strict=False)
                ]
                models[row.name].pool_from([*alone, *(models[n] for n in fused)])
        for at, task in enumerate(self.todo.tasks):
            here = [row for row in group if (row.name, task.name) in self.todo.missing]
            steps = [row for row in here if row.config.pooling is None]
            for row in steps:
                models[row.name].begin(task.name)
            share_by_members([models[row.name] for row in steps])
            for row in [*steps, *(row for row in here if row not in steps)]:
                if row not in steps:
                    models[row.name].begin(task.name)
                yield (row.name, task.name), self._evaluated(row, task, models[row.name])
            for name in models:
                share_passes([models[name]])
            to_come = {task.name for task in self.todo.tasks[at + 1 :]}
            left = {name for name, other in self.todo.missing if other in to_come}
            if models.keys() - left:
                models = {name: model for name, model in models.items() if name in left}
                _release()

    def _model(self, row: Row) -> RowModel:
        return RowModel.build(row.config, [self.members[name] for name in row.members], self.fusers)

    def _evaluated(self, row: Row, task: LoadedTask, model: RowModel) -> Cell | str:
        with blamed(f"row {row.name!r}, task {task.name!r}"):
            tracker = EvaluationTracker()
            try:
                results = evaluate(model, task, self.todo.recipe.seeds, tracker)
            except UnansweredError as error:
                return str(error)
            results["config"] |= {"model": "deepen", "model_args": row.config.to_dict()}
            facts = facts_of([self.members[name] for name in row.members])
            facts["files"] = {**digests(row.config.members), **task.few_shots}
            if built := facts.pop("built"):
                results["config"]["built"] = built
            if model.ensemble.fuser is not None:  # what a single evaluation warns of; the rest stands in the table
                warned = flat_spaces(getattr(model.ensemble.fuser, "facts", {}))
                facts |= {"warnings": [warning.message for warning in warned]} if warned else {}
            wanted, cost = self.todo.identity(row, task), model.cost(task.name)
            return write_cell(mark_of(self.todo.out, row, task), row, tracker, results, wanted, cost, facts)


def evaluate(
    model: RowModel, task: LoadedTask, seeds: Sequence[int], tracker: EvaluationTracker | None = None
) -> dict[str, Any]:
    """Return what ``simple_evaluate`` returns for a model and a task of a recipe."""
    spec = task.spec
    a, b, c, d = seeds
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(task.objects),
        num_fewshot=spec.num_fewshot,
        batch_size=model.batch_size,
        limit=spec.limit,
        apply_chat_template=spec.apply_chat_template,
        system_instruction=spec.system_instruction,
        fewshot_as_multiturn=spec.fewshot_as_multiturn,
        gen_kwargs=thaw(spec.gen_kwargs) or None,
        log_samples=True,
        evaluation_tracker=tracker,
        task_manager=task.manager,
        random_seed=a,
        numpy_random_seed=b,
        torch_random_seed=c,
        fewshot_random_seed=d,
    )
    assert results is not None  # there is one process
    return {**versions(), **results}


def _release() -> None:
    """Give back the memory of models that nothing refers to any more, with their matrices and maps."""
    gc.collect()
    give_back_freed_memory()
