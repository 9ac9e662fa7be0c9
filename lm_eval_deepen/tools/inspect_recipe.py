"""``lm-eval-deepen inspect RECIPE``: what an ensemble needs, before any weight is loaded."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lm_eval_deepen.errors import ConfigError, DeepenError
from lm_eval_deepen.tools.arguments import count, pairs, positive

if TYPE_CHECKING:
    from lm_eval_deepen.config import EnsembleConfig
    from lm_eval_deepen.tools.inspect_cost import TaskCost
    from lm_eval_deepen.tools.inspect_ensemble import DeviceNeed, MatrixPlan, Overlap
    from lm_eval_deepen.tools.inspect_members import Inspected
    from lm_eval_deepen.tools.recipes import Recipe

HELP = (
    "Pre-flight report of an ensemble: anchors and overlap, relative matrices, memory per device, where texts begin "
    "and end, round trip of the tokenizers, cost of the recipe's tasks. Reads tokenizers, configurations and headers, "
    "and of the weights only embeddings, where rows are made from them. Ends in 'ready' (exit status 0) or in numbered "
    "problems (1)."
)
DEFAULT_TOKENS = 2048  # length of a text where no task says it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    parser.add_argument("recipe", help="a YAML file, the name of a shipped recipe, or what --model_args takes")
    parser.add_argument(
        "--member", nargs="+", default=[], metavar="NAME=WHERE", help="read a member from there: a folder, a hub name"
    )
    parser.add_argument("--device", help="where members load that name no device (default: the first GPU, else cpu)")
    parser.add_argument(
        "--memory",
        type=positive,
        metavar="GB",
        help="of each device, to plan for another machine (default: what is free)",
    )
    parser.add_argument("--batch-size", type=count, metavar="N", help="texts decoded together (default: the recipe's)")
    parser.add_argument("--no-tasks", action="store_true", help="leave the recipe's tasks alone: no cost, no data")
    parser.add_argument(
        "--bandwidth", type=positive, default=2000, metavar="GB/S",
        help="at which weights are read, for the hours (default: %(default)s, the peak of one 80 GB A100)",
    )  # fmt: skip
    parser.add_argument(
        "--tflops", type=positive, default=150, metavar="N",
        help="that are reached, for the hours (default: %(default)s, half the peak of one A100)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


@dataclass
class Report:
    """Everything that was found; `problems` stop an evaluation, `notes` do not."""

    recipe: Recipe | None = None
    config: EnsembleConfig | None = None
    members: list[Inspected] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    anchors: int | None = None
    matrices: list[MatrixPlan] = field(default_factory=list)
    devices: list[DeviceNeed] = field(default_factory=list)
    batch: int = 1
    tasks: list[TaskCost] = field(default_factory=list)
    hours: float | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        from lm_eval_deepen.tools.inspect_ensemble import to_json

        expected = [] if self.recipe is None else [entry.to_dict() for entry in self.recipe.expected]
        return {
            "recipe": self.recipe.name if self.recipe else None,
            "title": self.recipe.title if self.recipe else None,
            "expected": expected,
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


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from lm_eval_deepen.tools.inspect_text import rendered

    report = inspect(args)
    print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) if args.json else rendered(report))
    return 1 if report.problems else 0


def inspect(args: argparse.Namespace) -> Report:
    """Return the report on what the command line names.

    Raises:
        ConfigError: an argument of the command line itself that cannot be honoured.
    """
    from lm_eval_deepen.tools.recipes import find_recipe

    members = pairs(args.member, "--member", "NAME=WHERE")
    report = Report()
    try:
        report.recipe = find_recipe(args.recipe)
        report.config = report.recipe.configure(members)
    except ConfigError as error:
        report.problems += map(str, error.problems)
        return report
    _members(report, report.config, args)
    _together(report, report.config)
    _demands(report, report.config, report.recipe, args)
    return report


def _members(report: Report, config: EnsembleConfig, args: argparse.Namespace) -> None:
    """Look at every member on its own."""
    from lm_eval_deepen.member.arguments import check_loading
    from lm_eval_deepen.tools.inspect_members import inspect_members

    device = args.device or _default_device()
    if args.memory is None:  # else the plan is for another machine, whose devices are not known here
        try:
            check_loading(config.members, args.device)
        except DeepenError as error:
            report.problems.append(str(error))
    report.members = inspect_members(config.members, device, report.problems, report.notes)


def _together(report: Report, config: EnsembleConfig) -> None:
    """Look at what the members have in common."""
    from lm_eval_deepen.engine.ensemble import fuses
    from lm_eval_deepen.tools.inspect_ensemble import flat_notes, overlaps, plan_matrices

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


def _demands(report: Report, config: EnsembleConfig, recipe: Recipe, args: argparse.Namespace) -> None:
    """Estimate memory, and the cost of the recipe's tasks."""
    from lm_eval_deepen.tools import inspect_cost
    from lm_eval_deepen.tools.inspect_ensemble import device_needs, too_small

    main = report.members[0]
    given = args.batch_size or config.batch_size
    report.batch = given if isinstance(given, int) else 1
    readers = [member for member in report.members if member.codec is not None and not member.generates_only]
    if readers and readers[0].codec is not None and not args.no_tasks:
        report.tasks = inspect_cost.task_costs(recipe, readers[0].codec, report.problems)
    scored = [cost.task for cost in report.tasks if cost.scores]
    for member in report.members:
        if member.generates_only and scored:
            report.problems.append(
                f"member {member.name!r} is an encoder-decoder model, which takes part in generation only, and "
                f"{', '.join(scored)} asks for loglikelihoods. Take tasks that generate, or leave the member out."
            )
    longest = max((cost.longest for cost in report.tasks), default=DEFAULT_TOKENS)
    available = _available(report.members, args.memory)
    report.devices = device_needs(report.members, report.matrices, report.batch, longest, available)
    report.problems += too_small(report.devices)
    if report.tasks and main.device != "cpu":
        machine = inspect_cost.Machine(args.bandwidth * 1e9, args.tflops * 1e12)
        report.hours = inspect_cost.hours(report.tasks, report.members, report.batch, machine)


def _default_device() -> str:
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _available(members: list[Inspected], memory: float | None) -> dict[str, int]:
    """Return the bytes of the members' devices: as given, else what is free on those of this machine."""
    import torch

    from lm_eval_deepen.engine.memory import free_bytes
    from lm_eval_deepen.member.devices import existing_devices
    from lm_eval_deepen.tools.inspect_members import SPREAD

    devices = {member.device for member in members} - {SPREAD}
    if memory is not None:
        return {device: int(memory * 1e9) for device in devices}
    numbered = {device: f"{device}:0" if device in ("cuda", "xpu") else device for device in devices}
    return {device: free_bytes(torch.device(name)) for device, name in numbered.items() if name in existing_devices()}
