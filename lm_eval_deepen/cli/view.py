"""``lm-eval-deepen view DIR [DIR_B]``: a page that shows what the members of an ensemble said, step by step."""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_eval_deepen.cli.arguments import count
from lm_eval_deepen.results.trace_page import page
from lm_eval_deepen.storage import write_text

HELP = (
    "Write one HTML page of the traces in a result folder (`trace=true` of an ensemble writes them): the documents, "
    "the texts coloured by whose choice each token is, every member's distribution at each step. With "
    "another folder, where the two part. The page needs no network."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="result folder with traces")
    parser.add_argument(
        "other", type=Path, nargs="?", metavar="DIR_B", help="another result folder; one without traces has its samples"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the page (default: DIR/view.html)")
    parser.add_argument("--limit", type=count, metavar="N", help="documents of each task (default: all)")


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is."""
    text = page(args.folder, args.other, args.limit)
    place = args.output or (args.folder.parent if args.folder.is_file() else args.folder) / "view.html"
    write_text(place, text)
    print(f"{place} ({len(text) / 1e6:.2g} MB)")
    return 0
