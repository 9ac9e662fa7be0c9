"""A leaderboard past one machine, on Ray: groups of cells are tasks, and finished cells come back one by one.

A group is the rows with the same members in the same order: what one machine would evaluate together, around members
that are loaded once. A worker loads the members, evaluates its group cell by cell and sends the files of every finished
cell to this process, which writes them. So a worker that dies costs the cells that it had not finished: they are given
to another one. Workers and this process need the same models and task data by the same names or paths.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lm_eval_deepen.errors import ConfigError, ResultError
from lm_eval_deepen.harness.tasks import load_tasks
from lm_eval_deepen.leaderboard.cells import Cell, mark_of, packed, read_cell, unpack
from lm_eval_deepen.leaderboard.execution import Execution, Key, Plan, Say, plan, sole_writer
from lm_eval_deepen.leaderboard.progress import Progress
from lm_eval_deepen.leaderboard.recipe import LeaderboardRecipe
from lm_eval_deepen.member.devices import parse_device
from lm_eval_deepen.storage import cache_folder, working_folder

LOCAL = "local"  # an address: workers on this machine alone
ATTEMPTS = 3  # of a group whose workers die
Outcome = dict[str, bytes] | str  # the files of a finished cell, or why it has no results


@dataclass(frozen=True)
class Group:
    """The missing cells of the rows with the same members in the same order."""

    members: tuple[str, ...]  # their names
    keys: tuple[Key, ...]  # the cells
    attempt: int = 1  # how often it was given to a worker

    def without(self, finished: Mapping[Key, Any]) -> Group:
        """Return what is left of the group, for another worker."""
        return Group(self.members, tuple(key for key in self.keys if key not in finished), self.attempt + 1)


def groups_of(todo: Plan) -> list[Group]:
    """Return the missing cells by the members that they need."""
    members = {row.name: row.members for row in todo.recipe.rows}
    orders = dict.fromkeys(members[name] for name, _ in todo.missing)
    return [Group(order, tuple(key for key in todo.missing if members[key[0]] == order)) for order in orders]


def evaluate_group(
    recipe: LeaderboardRecipe, group: Group, built: str, device: str | None, threads: int
) -> Iterator[tuple[Key, Outcome]]:
    """Evaluate a group in a worker; yields every cell's files as soon as they are written.

    torch takes as many `threads` as in the process that asks: sums then come out alike.
    """
    torch.set_num_threads(threads)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    tasks = load_tasks(recipe.tasks, recipe.include_path, recipe.metadata)
    with working_folder(cache_folder(), ".cells-") as folder:
        todo = replace(plan(recipe, tasks, folder, built=Path(built)), missing=list(group.keys))
        for key, outcome in Execution(todo, device, lambda text: None).outcomes():
            yield key, packed(outcome) if isinstance(outcome, Cell) else outcome


def execute_on_ray(todo: Plan, address: str, device: str | None, say: Say) -> dict[Key, Cell]:
    """Evaluate the missing cells on a Ray cluster; each is on disk here as soon as it is finished.

    Args:
        todo: what there is to do.
        address: ``local``, or what ``ray.init`` takes: ``auto``, ``HOST:PORT``, ``ray://HOST:PORT``.
        device: where members load that name no device; None: the first GPU of a worker, where the cluster has any.
        say: tells how far it is.

    Raises:
        ConfigError: Ray is not installed, or the cluster lacks what a group needs.
        ResultError: the workers of a group died again and again. What is finished is kept.
    """
    if not todo.missing:
        return todo.finished
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("--ray needs Ray; pip install 'lm_eval_deepen[ray]'") from error
    todo.make(say, device)  # here, once: workers find them built
    started = not ray.is_initialized()
    if started:
        where = {"include_dashboard": False} if address == LOCAL else {"address": address}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
    try:
        with sole_writer(todo):
            return _Driver(ray, todo, device, say).run()
    finally:
        if started:
            ray.shutdown()


class _Driver:
    """The process that gives groups to workers, and writes what comes back."""

    def __init__(self, ray: Any, todo: Plan, device: str | None, say: Say) -> None:
        self.ray, self.todo, self.say = ray, todo, say
        self.rows = {row.name: row for row in todo.recipe.rows}
        self.tasks = {task.name: task for task in todo.tasks}
        self.threads = torch.get_num_threads()
        self.resources = ray.cluster_resources()
        self.device = device or ("cuda:0" if self.resources.get("GPU") else "cpu")
        self.recipe = ray.put(todo.recipe)

    def run(self) -> dict[Key, Cell]:
        waiting = {self._start(group): group for group in groups_of(self.todo)}
        self.say(f"{len(self.todo.missing)} cells in {len(waiting)} groups, on {self.resources.get('CPU', 0):g} cores")
        with Progress(len(self.todo.missing), self.say) as progress:
            self.say = progress.say
            while waiting:
                [ready], _ = self.ray.wait(list(waiting), num_returns=1)
                group = waiting[ready]
                try:
                    key, outcome = self.ray.get(next(ready))
                except StopIteration:
                    del waiting[ready]
                except self.ray.exceptions.RayTaskError as error:  # an error of ours, raised in the worker
                    raise (error.cause or error) from None
                except self.ray.exceptions.RayError as error:
                    del waiting[ready]
                    left = group.without({**self.todo.finished, **self.todo.failed})
                    if left.keys:
                        names = "+".join(left.members)
                        if left.attempt > ATTEMPTS:
                            raise ResultError(
                                f"--ray: the workers of {names} died {ATTEMPTS} times ({type(error).__name__}); what "
                                "is finished is kept. Is a member too large for a node's memory?"
                            ) from error
                        self.say(
                            f"a worker of {names} died ({type(error).__name__}): its {len(left.keys)} cells go to "
                            "another one"
                        )
                        waiting[self._start(left)] = left
                else:
                    self.todo.keep(key, outcome if isinstance(outcome, str) else self._written(key, outcome))
                    progress.finished(key[0], key[1], outcome if isinstance(outcome, str) else None)
        return self.todo.finished

    def _start(self, group: Group) -> Any:
        """Give a group to the next worker that has what it needs; returns the stream of its cells."""
        needs = {"num_cpus": self.threads, "num_gpus": self._gpus(group)}
        for kind, count in (("CPU", needs["num_cpus"]), ("GPU", needs["num_gpus"])):
            if count > self.resources.get(kind, 0):
                raise ConfigError(
                    f"--ray: {'+'.join(group.members)} needs {count} {kind}s, and the cluster has "
                    f"{self.resources.get(kind, 0):g}. Add nodes, or ask for less: OMP_NUM_THREADS is the number of "
                    "CPUs of a group, and its members' devices are its GPUs"
                )
        # No worker is far ahead of what is written here, so that its end costs little.
        worker = self.ray.remote(
            max_retries=0, num_returns="streaming", _generator_backpressure_num_objects=1, **needs
        )(evaluate_group)
        return worker.remote(self.recipe, group, str(self.todo.built.absolute()), self.device, self.threads)

    def _gpus(self, group: Group) -> int:
        """Return how many GPUs a group's members name."""
        members = {member.name: member for member in self.todo.recipe.members}
        count = 0
        for name in group.members:
            asked = members[name].loading.get("device", self.device) if name in members else self.device
            device = parse_device(asked, f"member {name!r}:")
            count = max(count, (device.index or 0) + 1 if device.type == "cuda" else 0)
        return count

    def _written(self, key: Key, files: Mapping[str, bytes]) -> Cell:
        """Write a finished cell, and read it back as any other process would."""
        row, task = self.rows[key[0]], self.tasks[key[1]]
        mark = mark_of(self.todo.out, row, task)
        unpack(files, mark)
        cell = read_cell(mark, self.todo.identity(row, task), redo=False)
        assert cell is not None  # its files have just been written
        return cell
