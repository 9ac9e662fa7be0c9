"""``lm-eval-deepen make RECIPE OUT``: an ordinary model folder, merged or distilled from other models."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lm_eval_deepen.cli.arguments import add_members, adder, pairs
from lm_eval_deepen.errors import ConfigError, did_you_mean

HELP = (
    "Build a model from other models, as a recipe says: merge weights (merge_method: a configuration of mergekit), "
    "continue training (method: clm) or distil several models into one (method: fusellm). Writes a model folder, "
    "which `--model hf --model_args pretrained=OUT` evaluates, and provenance.json in it."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    add = adder(parser)
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("out", type=Path, help="folder for the model")
    add_members(parser, "take the recipe's model")
    add("--set KEY=VALUE ...", "replace keys of the recipe; values as in YAML: --set seed=1 "
        "'shard=[0, 3]'", default=[], dest="changes")  # fmt: skip
    add("--redo", "build again, although OUT has a model or an unfinished one")


def run(args: argparse.Namespace) -> int:
    """Build the model and say what it is."""
    from lm_eval_deepen.build import build, read_build
    from lm_eval_deepen.config.yaml_files import parse_yaml

    members = pairs(args.member, "--member", "NAME=WHERE")
    given = pairs(args.changes, "--set", "KEY=VALUE")
    changes = {key: parse_yaml(text, f"--set {key}") for key, text in given.items()}
    recipe = read_build(args.recipe, changes)
    for name in members:
        if name not in recipe.models:
            near = did_you_mean(name, recipe.models)
            raise ConfigError(f"--member {name}: unknown.{near} Models of the recipe: {', '.join(recipe.models)}")
    provenance = build(
        recipe, args.out, members, redo=args.redo, say=lambda text: print(text, file=sys.stderr, flush=True)
    )
    if not provenance:  # another process of this launch says it
        return 0
    tokens = sum(provenance["trained"].values())
    print(f"{args.out}: {provenance['method']} of {', '.join(provenance['models'])}, seed {provenance['seed']}")
    print(f"  weights {provenance['weights_sha256'][:12]}, {tokens} tokens in all trainings that it descends from")
    print(f"  {provenance['bits_per_byte']['value']:.4f} bits per byte of {provenance['bits_per_byte']['text']}")
    return 0
