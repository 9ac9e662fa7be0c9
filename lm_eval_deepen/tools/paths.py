"""``lm-eval-deepen path``: where the task configurations and the ensemble recipes lie."""

from __future__ import annotations

import argparse
from pathlib import Path

import lm_eval_deepen
from lm_eval_deepen.errors import ConfigError, did_you_mean

HELP = "Print the folder of the task configurations (for --include_path) or of the ensemble recipes."

FOLDERS = {"tasks": "task_configs", "recipes": "matrices"}


def data_folder(kind: str) -> Path:
    """Return the folder of ``"tasks"`` or ``"recipes"``, in a wheel as in a checkout.

    Raises:
        ConfigError: Unknown kind, or an installation without that folder.
    """
    if kind not in FOLDERS:
        known = ", ".join(FOLDERS)
        raise ConfigError(f"path {kind!r}: expected one of {known}.{did_you_mean(kind, FOLDERS)}")
    package = Path(lm_eval_deepen.__file__).resolve().parent
    places = [package / "_data" / FOLDERS[kind], package.parent / FOLDERS[kind]]
    for place in places:
        if place.is_dir():
            return place
    tried = " or ".join(map(str, places))
    raise ConfigError(
        f"path {kind!r}: found neither {tried}; the installation is incomplete,"
        " reinstall with: pip install --force-reinstall --no-deps lm_eval_deepen"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``kind``."""
    parser.add_argument("kind", choices=sorted(FOLDERS), help="what to locate")


def run(args: argparse.Namespace) -> int:
    """Print the folder."""
    print(data_folder(args.kind))
    return 0
