"""``lm-eval-deepen view DIR [DIR ...]``: a page that shows what the members of an ensemble said, step by step."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lm_eval_deepen.cli.arguments import adder, count, whole
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.results.trace_page import shown
from lm_eval_deepen.results.trace_server import server
from lm_eval_deepen.storage import check_place, reason, write_text

HELP = (
    "Write one HTML page of the traces in a result folder (an ensemble with `trace=true` writes traces). The page "
    "shows the documents, their texts with a colour for whose choice each token is, and every member's distribution "
    "at each step. With more folders, it also shows where two texts begin to differ. The page needs no network. "
    "`--serve` shows the page without writing it, and sends the steps of a document only when it is looked at: for "
    "runs that are too large for one page."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    add = adder(parser)
    parser.add_argument("folder", type=Path, metavar="DIR", help="result folder with traces")
    parser.add_argument(
        "others",
        type=Path,
        nargs="*",
        metavar="DIR_B",
        help="more result folders; those without traces show their samples",
    )
    add("--output FILE", "file to write the page to (default: DIR/view.html)", type=Path)
    add("--limit N", "show only the first N documents of each task (default: all)", type=count)
    add("--serve", "show the page on 127.0.0.1 until Ctrl-C")
    add("--port N", "port for --serve (default: a free one)", type=whole(1, 65535))


def run(args: argparse.Namespace) -> int:
    """Write the page and say where it is, or serve it."""
    if args.serve and args.output is not None:
        raise ConfigError("--serve writes no file; leave --output out")
    if args.port is not None and not args.serve:
        raise ConfigError("--port belongs to --serve; give both, or neither")
    if args.output is not None:
        check_place(args.output)
    pages = shown([args.folder, *args.others], args.limit, served=args.serve)
    for one in pages.sides:
        for note in one.notes:
            print(f"note: {one.name}: {note}", file=sys.stderr)
    if args.serve:
        try:
            listening = server(pages, args.port or 0)
        except OSError as error:
            port = "127.0.0.1" if args.port is None else f"--port {args.port}"
            raise ConfigError(f"{port} cannot be listened on ({reason(error)}); give another --port") from error
        with listening as serving:
            print(f"http://127.0.0.1:{serving.server_port}/ (Ctrl-C ends it)", flush=True)
            try:
                serving.serve_forever()
            except KeyboardInterrupt:
                print(file=sys.stderr)
        return 0
    text = pages.html()
    place = args.output or (args.folder.parent if args.folder.is_file() else args.folder) / "view.html"
    write_text(place, text)
    print(f"{place} ({len(text) / 1e6:.2g} MB)")
    return 0
