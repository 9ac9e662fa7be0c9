"""``lm-eval-deepen path``: where the task configurations and the ensemble recipes lie."""

from __future__ import annotations

import argparse

from lm_eval_deepen.config.recipes import FOLDERS, data_folder

HELP = "Print the folder of the task configurations (for --include_path) or of the ensemble recipes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``kind``."""
    parser.add_argument("kind", choices=sorted(FOLDERS), help="what to locate")


def run(args: argparse.Namespace) -> int:
    """Print the folder."""
    print(data_folder(args.kind))
    return 0
