"""What an ensemble needs, before any weight is loaded: the report of ``lm-eval-deepen inspect``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lm_eval_deepen.config import EnsembleConfig
from lm_eval_deepen.engine.ensemble import fuses
from lm_eval_deepen.engine.memory import free_bytes
from lm_eval_deepen.errors import ConfigError, DeepenError
from lm_eval_deepen.harness.ensemble_recipe import EnsembleRecipe, find_recipe
from lm_eval_deepen.member.devices import default_device, existing_devices
from lm_eval_deepen.member.loading import check_loading
from lm_eval_deepen.preflight import cost as inspect_cost
from lm_eval_deepen.preflight.cost import Machine, TaskCost
from lm_eval_deepen.preflight.ensemble import (
    DeviceNeed,
    MatrixPlan,
    Overlap,
    device_needs,
    flat_notes,
    overlaps,
    plan_matrices,
    to_json,
    too_small,
)
from lm_eval_deepen.preflight.members import SPREAD, Inspected, inspect_members

DEFAULT_TOKENS = 2048  # length of a text where no task says it


@dataclass
class Report:
    """Everything that was found; `problems` stop an evaluation, `notes` do not."""

    recipe: EnsembleRecipe | None = None
    config: EnsembleConfig | None = None
    members: list[Inspected] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    anchors: int | None = None
    matrices: list[MatrixPlan] = field(default_factory=list)
    devices: list[DeviceNeed] = field(default_factory=list)
    batch: int = 1
    tasks: list[TaskCost] = field(default_factory=list)
    hours: float | None = None
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by task and metric
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        expected = [] if self.recipe is None else [entry.to_dict() for entry in self.recipe.expected]
        return {
            "recipe": self.recipe.name if self.recipe else None,
            "title": self.recipe.title if self.recipe else None,
            "expected": expected,
            "measured": dict(self.measured),
            "config": self.config.to_dict() if self.config else None,
            "members": [member.to_dict() for member in self.members],
            "overlaps": to_json(self.overlaps),
            "anchors": self.anchors,
            "matrices": to_json(self.matrices),
            "devices": to_json(self.devices),
            "batch_size": self.batch,
            "forwards_per_token": len(self.members),
            "tasks": to_json(self.tasks),
            "hours_estimated": self.hours,
            "notes": self.notes,
            "problems": self.problems,
            "ready": not self.problems,
        }


@dataclass(frozen=True)
class Plan:
    """The machine and the run to plan for."""

    device: str | None  # where members load that name no device; None is the first GPU, else the CPU
    memory: float | None  # GB of each device of another machine; None is what is free on this one
    batch_size: int | None  # texts that are decoded together; None is the recipe's
    tasks: bool  # whether the cost of the recipe's tasks is estimated
    machine: Machine  # how fast it reads weights and computes


def inspect(ensemble: str, elsewhere: Mapping[str, str], plan: Plan) -> Report:
    """Return the report on a file, a shipped recipe by its name, or what ``--model_args`` takes.

    `elsewhere` has a folder or hub name from which a member is read, by the member's name.
    """
    report = Report()
    try:
        report.recipe = find_recipe(ensemble)
        report.config = report.recipe.configure(elsewhere)
    except ConfigError as error:
        report.problems += map(str, error.problems)
        return report
    return report_on(report.recipe, report.config, plan)


def report_on(recipe: EnsembleRecipe, config: EnsembleConfig, plan: Plan) -> Report:
    """Return the report on an ensemble that was read."""
    report = Report(recipe=recipe, config=config)
    _members(report, config, plan)
    _together(report, config)
    _demands(report, config, recipe, plan)
    return report


def _members(report: Report, config: EnsembleConfig, plan: Plan) -> None:
    """Look at every member on its own."""
    device = plan.device or default_device()
    if plan.memory is None:  # else the plan is for another machine, whose devices are not known here
        try:
            check_loading(config.members, plan.device)
        except DeepenError as error:
            report.problems.append(str(error))
    report.members = inspect_members(config.members, device, report.problems, report.notes)


def _together(report: Report, config: EnsembleConfig) -> None:
    """Look at what the members have in common."""
    report.overlaps = overlaps(report.members)
    if fuses(config):
        report.anchors, report.matrices = plan_matrices(config, report.members, report.problems, report.notes)
        report.notes += flat_notes(report.matrices, config.compat)
    assert report.recipe is not None
    for member in report.members:
        if member.codec is not None and not member.eos:
            report.problems.append(
                f"member {member.name!r} has no id that ends a text: it never stops by itself. Set eos_token_id in its "
                "generation_config.json."
            )
        chat = report.recipe.harness.apply_chat_template
        if chat and member.chat_template is False and config.chat_fallback == "error":
            report.problems.append(
                f"member {member.name!r} has no chat template, which the recipe applies. Give it a tokenizer that has "
                "one (tokenizer: ...), or the ensemble chat_fallback: plain."
            )


def _demands(report: Report, config: EnsembleConfig, recipe: EnsembleRecipe, plan: Plan) -> None:
    """Estimate memory, and the cost of the recipe's tasks."""
    main = report.members[0]
    given = plan.batch_size or config.batch_size
    report.batch = given if isinstance(given, int) else 1
    readers = [member for member in report.members if member.codec is not None and not member.generates_only]
    if readers and readers[0].codec is not None and plan.tasks:
        report.tasks = inspect_cost.task_costs(recipe, readers[0].codec, report.problems)
    scored = [cost.task for cost in report.tasks if cost.scores]
    for member in report.members:
        if member.generates_only and scored:
            report.problems.append(
                f"member {member.name!r} is an encoder-decoder model, which takes part in generation only, and "
                f"{', '.join(scored)} asks for loglikelihoods. Take tasks that generate, or leave the member out."
            )
    longest = max((cost.longest for cost in report.tasks), default=DEFAULT_TOKENS)
    available = _available(report.members, plan.memory)
    report.devices = device_needs(report.members, report.matrices, report.batch, longest, available)
    report.problems += too_small(report.devices)
    if report.tasks and main.device != "cpu":
        report.hours = inspect_cost.hours(report.tasks, report.members, report.batch, plan.machine)


def _available(members: list[Inspected], memory: float | None) -> dict[str, int]:
    """Return the bytes of the members' devices: as given, else what is free on those of this machine."""
    devices = {member.device for member in members} - {SPREAD}
    if memory is not None:
        return {device: int(memory * 1e9) for device in devices}
    return {device: free_bytes(torch.device(device)) for device in devices if device in existing_devices()}
