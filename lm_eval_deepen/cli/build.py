"""``lm-eval-deepen build ENSEMBLE``: build an ensemble's relative matrices or maps ahead of its evaluation."""

from __future__ import annotations

import argparse
from typing import Any

from lm_eval_deepen.cli.arguments import add_device, add_ensemble, add_json, adder
from lm_eval_deepen.harness.ensemble_recipe import parse_ensemble

HELP = "Build the relative matrices or maps of vocabularies that an ensemble needs; evaluation builds missing ones."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    add = adder(parser)
    add_ensemble(parser)
    add_device(parser)
    add("--matrix-dir DIR", "folder for the matrices (default: the user's cache folder)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Build what is missing and print one line per file."""
    from lm_eval_deepen.engine import Ensemble
    from lm_eval_deepen.harness.model import configure
    from lm_eval_deepen.relative.store import MatrixStore

    arguments = parse_ensemble(args.ensemble)
    if args.matrix_dir:
        arguments["matrix_dir"] = args.matrix_dir
    config = configure(arguments)
    ensemble = Ensemble.load(config, args.device)
    facts: dict[str, Any] = getattr(ensemble.fuser, "facts", {})
    folder = MatrixStore(config.matrix_dir).folder
    made_files = [*facts.get("matrices", ()), *facts.get("maps", ())]
    args.facts = {"method": config.method, "folder": str(folder), "anchors": facts.get("anchors"), "files": made_files}
    if facts.get("matrices"):
        print(f"{facts['anchors']} anchors common to {len(ensemble.members)} members, matrices in {folder}")
    elif facts.get("maps"):
        print(f"maps between {len(ensemble.members)} vocabularies, in {folder}")
    else:
        print(f"nothing to build: method {config.method} keeps no file for these members")
    for made in made_files:
        dropped = f", mean dropped mass {made['mean_dropped_mass']:.4f}" if "mean_dropped_mass" in made else ""
        print(f"  {made['member']}: {made['bytes'] / 1e6:.1f} MB{dropped}, {made['file']}")
    return 0
