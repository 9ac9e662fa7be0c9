"""The objective ``score`` of ``lm-eval-deepen tune``: weights and learning rate from a development split of tasks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lm_eval_deepen.config.yaml_files import parse_json, refuse_repeated
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.storage import write_text

if TYPE_CHECKING:
    from lm_eval_deepen.config import EnsembleConfig
    from lm_eval_deepen.harness.tasks import LoadedTask
    from lm_eval_deepen.leaderboard.fitting import ScoredCandidate, Search

WEIGHTS = ("both", "grid", "adaptive", "keep")
PLACES = ("pretrained", "tokenizer", "peft", "delta")  # keys of a member that may name a folder


def run(args: argparse.Namespace) -> int:
    """Fit, report and write the ensemble file: what ``tune --objective score`` does."""
    import yaml

    from lm_eval_deepen.harness.ensemble_recipe import parse_ensemble
    from lm_eval_deepen.harness.once import said_once
    from lm_eval_deepen.harness.tasks import load_tasks
    from lm_eval_deepen.leaderboard.fitting import Search, simplex
    from lm_eval_deepen.tuning.search import constant

    given = as_given(parse_ensemble(args.ensemble))
    config = constant(given)
    metadata = {} if args.metadata is None else parse_json(args.metadata, "--metadata")
    if not isinstance(metadata, dict):
        raise ConfigError(f"--metadata must be a JSON object; got {args.metadata}")
    weights, step = args.weights or "both", args.weight_step or 0.1
    if weights in ("both", "grid"):
        simplex(len(config.members), step)  # refuses a step that makes no grid, before anything loads
    if not args.tasks:
        raise ConfigError("--objective score needs --tasks: what is scored on the development split")
    development = load_tasks([spec_of(args, name, "validation") for name in args.tasks], args.include_path, metadata)
    evaluated = [spec_of(args, name, None) for name in args.evaluated or args.tasks]
    refuse_evaluated(development, load_tasks(evaluated, args.include_path, metadata))
    search = Search(config, development, args.metric, args.device, print)
    with said_once():
        first = "equal weights" if given.weights_change else "as given"  # those that learn begin as equal ones
        chosen = search.run(weights, step, args.learning_rates, first)
    args.facts = written = tuned_file(chosen, search, args)
    write_text(args.output, yaml.safe_dump(written, sort_keys=False, allow_unicode=True))
    print(f"\n{chosen.what} written to {args.output}")
    return 0


def as_given(arguments: Mapping[str, Any]) -> EnsembleConfig:
    """Return the configuration to tune as it is given; ConfigError for a member alone, or one that fuses no steps."""
    from lm_eval_deepen.harness.model import configure

    config = configure(dict(arguments))
    if len(config.members) < 2:
        raise ConfigError("tune: a member alone has no weights to fit; give an ensemble of two or more")
    if config.pooling is not None and not config.fuses_steps:
        raise ConfigError(f"tune: pooling={config.pooling} alone fuses no steps; remove it, tune, and put it back")
    return config


def spec_of(args: argparse.Namespace, task: str, split: Literal["validation"] | None) -> Any:
    """Return a task as the arguments ask for it."""
    from lm_eval.utils import simple_parse_args_string

    from lm_eval_deepen.harness.tasks import TaskSpec

    refuse_repeated(args.gen_kwargs or "", "--gen-kwargs")
    given = simple_parse_args_string(args.gen_kwargs)
    limit = args.limit if split else None  # whatever is evaluated must be disjoint, all of it
    return TaskSpec(task=task, limit=limit, num_fewshot=args.num_fewshot, gen_kwargs=given, split=split)


def refuse_evaluated(development: Sequence[LoadedTask], evaluated: Sequence[LoadedTask]) -> None:
    """Raise ConfigError where the development documents are among those that will be evaluated."""
    from lm_eval_deepen.leaderboard.tuned import refuse_overlap

    hashes = [digest for task in development for own in task.documents.values() for digest in own]
    for task in evaluated:
        for name, digests in task.documents.items():
            try:
                refuse_overlap("an ensemble tuned on these development splits", hashes, name, digests)
            except ConfigError as error:
                raise ConfigError(
                    f"tune: {error}. --tasks takes the task that will be evaluated, whose validation split is scored "
                    "here; or say with --evaluated what will be"
                ) from error


def tuned_file(chosen: ScoredCandidate, search: Search, args: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of the ensemble file: the best candidate, and as `evidence` how it was found and on what."""
    import lm_eval_deepen
    from lm_eval_deepen.harness.model import configure
    from lm_eval_deepen.leaderboard.tuned import record

    def measured(scores: Mapping[str, float]) -> dict[str, float]:
        """Return scores as the harness has them, off those that are maximised."""
        return {task: round(search.signs[task] * score, 6) for task, score in scores.items()}

    keys = placed(chosen.config.to_dict())
    keys.pop("evidence", None)
    hashes = [digest for task in search.tasks for own in task.documents.values() for digest in own]
    about = {
        "objective": "score",
        "version": lm_eval_deepen.__version__,
        "split": "validation",
        "tasks": {
            name: {"metric": search.columns[name], "documents": len(own), "score": measured(chosen.scores)[name]}
            for task in search.tasks
            for name, own in task.documents.items()
        },
        "limit": args.limit,
        "num_fewshot": args.num_fewshot,
        "gen_kwargs": args.gen_kwargs,
        "members": {name: measured(own) for name, own in search.alone.items()},
        "search": [f"{one.what}: {one.mean:.6f}" for one in search.log],
    }
    return {"kind": "ensemble", **keys, "evidence": record(configure(keys), hashes, about)}


def placed(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of an ensemble file that can be read from anywhere: folders by their whole paths.

    What exists here is a folder; anything else is a hub name. `matrix_dir` is a folder in any case, made when needed.
    """
    members = [
        {key: _place(value) if key in PLACES else value for key, value in member.items()} for member in keys["members"]
    ]
    shown = {**keys, "pretrained": members[0]["pretrained"], "members": members}
    if "matrix_dir" in keys:
        shown["matrix_dir"] = str(Path(keys["matrix_dir"]).expanduser().absolute())
    return shown


def _place(name: Any) -> Any:
    """Return a model's name; a folder that is relative to here by its whole path."""
    place = Path(name).expanduser() if isinstance(name, str) else None
    return str(place.absolute()) if place is not None and place.exists() else name
