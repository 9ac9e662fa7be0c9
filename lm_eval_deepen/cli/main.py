"""Entry point of ``lm-eval-deepen``: picks a subcommand and imports only that one's module."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import lm_eval_deepen
from lm_eval_deepen.cli.arguments import PRINTED, Parser
from lm_eval_deepen.cli.ending import STATUSES, ended
from lm_eval_deepen.errors import ConfigError, DeepenError
from lm_eval_deepen.storage import check_place, json_text, write_json

PROG = "lm-eval-deepen"


class Subcommand(Protocol):
    """What the module of a subcommand provides."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the subcommand's own arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the work; returns the exit status."""


# The summaries stand here, not in the modules, so that `--help` imports none of them.
COMMANDS = {
    "demo": ("lm_eval_deepen.cli.demo", "evaluate two small models alone and as an ensemble"),
    "bpb": ("lm_eval_deepen.cli.bpb", "compare members, ensemble and controls by bits per byte of a text"),
    "build": ("lm_eval_deepen.cli.build", "build the relative matrices of an ensemble"),
    "cache": ("lm_eval_deepen.cli.cache", "list what the cache folder keeps; remove some of it"),
    "compare": ("lm_eval_deepen.cli.compare", "compare result folders by document, with significance tests"),
    "gate": ("lm_eval_deepen.cli.gate", "check in CI whether a candidate's evaluation is worse than its baseline's"),
    "inspect": ("lm_eval_deepen.cli.inspect", "report what a recipe needs, before any weight is loaded"),
    "leaderboard": ("lm_eval_deepen.cli.leaderboard", "evaluate members, ensembles and methods on tasks, in one table"),
    "make": ("lm_eval_deepen.cli.make", "build a model: merge weights, or distil models into one"),
    "methods": ("lm_eval_deepen.cli.methods", "list fusion methods, weightings and pooling methods"),
    "path": ("lm_eval_deepen.cli.paths", "print the folder of the shipped tasks or recipes"),
    "reproduce": ("lm_eval_deepen.cli.reproduce", "run a published table again, beside the published scores"),
    "tune": ("lm_eval_deepen.cli.tune", "choose an ensemble's options on unlabelled text"),
    "view": ("lm_eval_deepen.cli.view", "make a page of what every member said at every step"),
    "run": ("lm_eval_deepen.cli.run", "`lm_eval run` that knows `deepen` even without the start-up hook"),
}


# One of each, which its `--help` and docs/commands.md show.
EXAMPLES = {
    "demo": "demo --limit 8",
    "bpb": "bpb ensemble.yaml --text notes.txt",
    "build": "build ensemble.yaml",
    "cache": "cache --keep 5GB",
    "compare": "compare results/alone results/pair --tasks piqa,gsm8k",
    "gate": "gate --baseline results/main --candidate results/change --min-effect 0.01",
    "inspect": "inspect ensemble.yaml",
    "leaderboard": "leaderboard leaderboard.yaml --limit 4",
    "make": "make merge.yaml merged",
    "methods": "methods --all",
    "path": "path tasks",
    "reproduce": "reproduce deepen_nq_2 --miniature",
    "tune": "tune ensemble.yaml --text notes.txt --output tuned.yaml",
    "view": "view results --output trace.html",
    "run": "run --model deepen --model_args pretrained=A,members=A+B --tasks piqa",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's); returns the exit status, as `ending` has it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["run"]:
        # Everything after it belongs to the harness's own parser, `--help` included.
        from lm_eval_deepen.cli.run import run_harness

        return ended(lambda: run_harness(argv[1:]), guest=True)
    return ended(lambda: _dispatch(argv))


def _dispatch(argv: list[str]) -> int:
    completing = "_ARGCOMPLETE" in os.environ  # a shell asks what may follow in COMP_LINE
    if completing:
        argv = os.environ.get("COMP_LINE", "").split()[1:]
    parser = Parser(prog=PROG, description=lm_eval_deepen.__doc__, epilog=STATUSES)
    parser.add_argument("--version", action="version", version=f"{PROG} {lm_eval_deepen.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    module: Subcommand | None = None
    for name, (path, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, epilog=f"Example: {PROG} {EXAMPLES[name]}")
        if name == chosen:
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch and tokenizers, which read these once
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            module = cast(Subcommand, importlib.import_module(path))
            subparser.description = module.HELP
            module.add_arguments(subparser)
    if completing:
        import argcomplete

        argcomplete.autocomplete(parser)
    args = parser.parse_args(argv)
    assert module is not None  # argparse has refused every other word
    # `--json` gives what a command found as JSON: in place of what it prints, or in a file beside it
    place = getattr(args, "json", None)
    asked = "markdown" if getattr(args, "markdown", False) else f"format {getattr(args, 'format', 'json')}"
    if place == PRINTED and asked not in ("format text", "format json"):
        raise ConfigError(f"--json prints JSON, and --{asked} asks for something else; give one of them")
    if place not in (None, PRINTED) and args.command != "gate":  # which says its verdict in any case
        check_place(Path(place))
    try:
        with contextlib.redirect_stdout(io.StringIO()) if place == PRINTED else contextlib.nullcontext():
            status = module.run(args)
    except DeepenError:
        if place is not None and args.facts is not None:  # what was found before, as all cells but one
            _say(args.facts, place)
        raise
    if place == PRINTED or (place is not None and args.facts is not None):
        _say(args.facts, place)
    return status


def _say(facts: Any, place: str) -> None:
    """Print what a command found as JSON, or write it to a file."""
    if place == PRINTED:
        print(json_text(facts))
    else:
        write_json(Path(place), facts)


if __name__ == "__main__":
    sys.exit(main())
