"""Types of command-line arguments, and errors in one line that name the nearest spelling."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lm_eval_deepen.errors import ConfigError, did_you_mean

PRINTED = "-"  # the place of JSON that is printed


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong, with the nearest name and where the others are listed."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit status 2."""
        if refused := re.match(r"(?:argument (\S+): )?invalid choice: '(.*)' \(choose from (.*)\)$", message):
            where, got, listed = refused.groups()
            choices = re.findall(r"[\w.-]+", listed)
            what = "no such command" if where in (None, "COMMAND") else f"argument {where} takes {', '.join(choices)}"
            message = f"{got}: {what}.{did_you_mean(got, choices)}"
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments; those that this parser does not know are an error here, where its options are known."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            what = "no such option" if unknown[0].startswith("-") else "one argument too many"
            self.error(f"{unknown[0]}: {what}.{did_you_mean(unknown[0].partition('=')[0], options)}")
        return parsed, unknown


def number(kind: Callable[[str], Any], fits: Callable[[float], bool], wanted: str) -> Callable[[str], Any]:
    """Return a parser of numbers of a kind that fit; `wanted` ends the sentence of the error, "must be ..."."""

    def parsed(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text}: must be {wanted}")

    return parsed


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """Return a parser of whole numbers from `least`, to `most` where that is given."""
    wanted = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
    return number(int, lambda value: least <= value <= most, f"a whole number {wanted}")


def _documents(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


count, natural = whole(1), whole(0)
positive = number(float, lambda value: 0 < value < math.inf, "a number above 0")
nonnegative = number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
share = number(float, lambda value: 0 < value < 1, "a number between 0 and 1")
limit = number(
    _documents,
    lambda value: value > 0 and (value < 1 or isinstance(value, int)),
    "a number of documents, or a share below 1",
)


class Names(argparse.Action):
    """One list of the names given, whether commas or spaces stand between them."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Keep the names."""
        names = [name.strip() for text in values for name in text.split(",") if name.strip()]
        if not names:
            raise argparse.ArgumentError(self, "names nothing")
        setattr(namespace, self.dest, names)


def pairs(given: Sequence[str], option: str, form: str) -> dict[str, str]:
    """Return values by name of arguments like ``NAME=WHERE``."""
    values: dict[str, str] = {}
    for text in given:
        name, _, value = text.partition("=")
        if not (name and value):
            raise ConfigError(f"{option} takes {form}; got {text!r}")
        if name in values:
            raise ConfigError(f"{option} has {name!r} twice ({values[name]!r} and {value!r}); give it once")
        values[name] = value
    return values


def adder(parser: argparse._ActionsContainer) -> Callable[..., None]:
    """Return a function that adds an option to a parser as its usage spells it: ``add("--tasks TASK ...", HELP)``.

    An option without a value and choices is a switch; ``...`` stands for several values, ``[FILE]`` for one at most.
    Whatever else it is given is an argument of `add_argument`.
    """

    def add(usage: str, help: str, **more: Any) -> None:
        names = [word for word in usage.split() if word.startswith("-")]
        value = usage.split()[len(names) :]
        if value:
            more["metavar"] = value[0].strip("[]")
            nargs = "+" if value[-1] == "..." else "?" if value[0].startswith("[") else None
            more |= {"nargs": nargs} if nargs else {}
        elif "choices" not in more:
            more["action"] = "store_true"
        parser.add_argument(*names, help=help, **more)

    return add


def add_json(parser: argparse.ArgumentParser, file: bool = True) -> None:
    """Add ``--json``, for a command whose `run` leaves in ``args.facts`` what its table says (see `cli.main`).

    Without `file`, as where folders may follow it, it takes none and only prints.
    """
    if file:
        told = "print JSON in place of the table; with FILE, write the JSON there and print the table"
        adder(parser)("--json [FILE]", told, const=PRINTED)
    else:
        parser.add_argument("--json", action="store_const", const=PRINTED, help="print JSON in place of the table")
    parser.set_defaults(facts=None)


def add_members(parser: argparse.ArgumentParser, does: str = "load the member") -> None:
    """Add ``--member``, which says where the models are that a recipe names; `does` begins its help."""
    where = f"{does} NAME from WHERE: a folder, or a hub name"
    adder(parser)("--member NAME=WHERE ...", where, default=[])


def add_ensemble(parser: argparse.ArgumentParser) -> None:
    """Add the argument that `harness.ensemble_recipe.parse_ensemble` reads."""
    parser.add_argument(
        "ensemble", help="an ensemble's YAML file, or what --model_args takes: key=value,... or a JSON object"
    )


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Add ``--text`` and ``--limit``, which `engine.calibration.load_documents` takes."""
    add = adder(parser)
    add("--text FILE ...", "files of texts: documents separated by blank lines, or .jsonl with text and context "
        "(default: a text that ships)")  # fmt: skip
    add("--limit N", "number of documents to take from each file (default: all)", type=count)


def add_table(parser: argparse.ArgumentParser) -> None:
    """Add what says where the cells and tables of a leaderboard go, and how they are evaluated."""
    add = adder(parser)
    add("--out DIR", "where cells and tables go (default: results/NAME_OF_RECIPE)", type=Path)
    add("--redo", "evaluate again what belongs to another evaluation or is damaged")
    add_members(parser)
    add_json(parser)
    add_device(parser)


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add ``--seed``, of the permutation test."""
    from lm_eval_deepen.results.statistics.paired import LARGEST_SEED

    seeds = whole(0, LARGEST_SEED)
    adder(parser)("--seed N", "seed of the resampling (default: %(default)s)", type=seeds, default=0)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, which means the same to every command, and what it means to ``lm_eval run``."""
    adder(parser)("--device DEVICE", "the device of members that name none (default: the first GPU, else cpu)")
