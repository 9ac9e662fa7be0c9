"""``lm-eval-deepen inspect RECIPE``: what an ensemble needs, before any weight is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_deepen.cli.arguments import add_device, add_json, add_members, adder, count, pairs, positive
from lm_eval_deepen.errors import ConfigError, ResultError
from lm_eval_deepen.results.aggregation import to_number
from lm_eval_deepen.storage import read_json

if TYPE_CHECKING:
    from lm_eval_deepen.config import EnsembleConfig
    from lm_eval_deepen.engine.projection_loss import ProjectionLoss

HELP = (
    "Report what an ensemble needs: anchors and overlap of the vocabularies, relative matrices, memory per device, "
    "where texts begin and end, round trip of the tokenizers, cost of the recipe's tasks. It reads tokenizers, "
    "configurations and headers; of the weights it reads only embeddings, and only if rows are made from them. The "
    "report ends in 'ready' (exit status 0) or in numbered problems (1)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    add = adder(parser)
    parser.add_argument("recipe", help="a YAML file, the name of a shipped recipe, or what --model_args takes")
    add_members(parser, "read the member")
    add_device(parser)
    add("--memory GB", "memory of each device, to plan for another machine (default: what is free)", type=positive)
    add("--batch-size N", "number of texts decoded together (default: the recipe's)", type=count)
    add("--no-tasks", "do not look at the recipe's tasks: no cost, no data")
    add("--bandwidth GB/S", "speed at which weights are read, to estimate the hours (default: %(default)s, the peak of "
        "one 80 GB A100)", type=positive, default=2000)  # fmt: skip
    add("--tflops N", "TFLOPS that are reached, to estimate the hours (default: %(default)s, half the peak of one "
        "A100)", type=positive, default=150)  # fmt: skip
    add("--results DIR", "results of `reproduce`; their scores are shown beside the published ones "
        "(default: results/NAME_OF_RECIPE)", type=Path)  # fmt: skip
    add("--projection-loss", "load the weights, and say how many more bits every member needs in the pieces of every "
        "other one, with and without covers, on the calibration text")  # fmt: skip
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from lm_eval_deepen.preflight.cost import Machine
    from lm_eval_deepen.preflight.report import Plan, inspect
    from lm_eval_deepen.preflight.text import rendered

    machine = Machine(args.bandwidth * 1e9, args.tflops * 1e12)
    plan = Plan(args.device, args.memory, args.batch_size, not args.no_tasks, machine)
    report = inspect(args.recipe, pairs(args.member, "--member", "NAME=WHERE"), plan)
    if args.results is not None and report.recipe is not None and not report.recipe.expected:
        raise ConfigError(f"--results: {args.recipe} has no published score to compare with; leave it out")
    if report.recipe is not None and report.recipe.expected:  # nothing is published of an ensemble that is given inline
        report.measured = _measured(
            args.results or Path("results") / Path(report.recipe.name).stem, args.results is None
        )
    args.facts = report.to_dict()
    print(rendered(report))
    if args.projection_loss and report.config is not None and not report.problems:
        lost = _projection_losses(report.config, args.device)
        args.facts["projection_loss"] = [one.to_dict() for one in lost]
        print("\nProjection loss, how many more bits a member needs in the pieces of another one:")
        print("\n".join(f"  {one}" for one in lost))
    return 1 if report.problems else 0


def _projection_losses(config: EnsembleConfig, device: str | None) -> list[ProjectionLoss]:
    """Return what every member loses in the pieces of every other one."""
    from lm_eval_deepen.engine.calibration import default_text, load_documents
    from lm_eval_deepen.engine.ensemble import Ensemble
    from lm_eval_deepen.engine.projection_loss import projection_losses, read_with_covers
    from lm_eval_deepen.engine.self_check import DOCUMENTS
    from lm_eval_deepen.member.devices import default_device
    from lm_eval_deepen.tuning.comparison import orders, own

    documents = load_documents([default_text()], DOCUMENTS)
    readings = [read_with_covers(one, documents) for one in orders(Ensemble.load(config, device or default_device()))]
    natural = {single.name: float(single.bits.sum()) for single in map(own, readings)}
    return [loss for reading in readings for loss in projection_losses(reading, natural)]


def _measured(folder: Path, guessed: bool) -> dict[str, dict[str, Any]]:
    """Return what `reproduce` measured of the ensemble, by task and metric; nothing where it did not run."""
    from lm_eval_deepen.cli.reproduce import JSON
    from lm_eval_deepen.leaderboard.reproduction import ENSEMBLE

    path = folder / JSON
    if guessed and not path.is_file():
        return {}
    data = read_json(path)
    try:
        rows = [] if data["miniature"] else [row for row in data["rows"] if row["row"] == ENSEMBLE]
        return {row["column"]: row for row in rows if None not in (to_number(row["measured"]), row["verdict"])}
    except (LookupError, TypeError) as error:
        raise ResultError(
            f"{path} is not a file that `reproduce` wrote ({error!r}); run it again, or give another --results"
        ) from error
