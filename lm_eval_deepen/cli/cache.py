"""``lm-eval-deepen cache``: what the cache folder keeps, and removing it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from lm_eval_deepen.cli.arguments import Names, add_json, adder
from lm_eval_deepen.results.tables import aligned
from lm_eval_deepen.storage import (
    CACHE_KINDS,
    CACHE_SIZE,
    DEFAULT_CACHE_SIZE,
    LEFTOVERS,
    REMADE,
    CacheEntry,
    bound_cache,
    cache_bound,
    cache_entries,
    cache_folder,
    parsed_size,
)

HELP = (
    "List what the cache folder keeps, by kind, or remove some of it. If what can be made again takes more than "
    f"${CACHE_SIZE} (default: {DEFAULT_CACHE_SIZE}), the least recently used of it is removed automatically."
)
KINDS = {**CACHE_KINDS, LEFTOVERS: "what processes that were killed over a day ago left"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    add = adder(parser.add_mutually_exclusive_group())
    what = f"remove everything of these kinds ({', '.join(KINDS)}; default: all but models)"
    add("--clear KIND", what, action=_Kinds, nargs="*")
    add("--keep SIZE", "of what can be made again, keep only this much, such as 5GB: what was used last; models are "
        "not counted", type=_size)  # fmt: skip
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Remove what is asked for, and print what is left."""
    removed: Sequence[CacheEntry] = ()
    if args.clear is not None:
        removed = [entry for entry in cache_entries() if entry.kind in args.clear]
        for entry in removed:
            entry.remove()
    elif args.keep is not None:
        removed = bound_cache(args.keep)
    entries, bound = cache_entries(), cache_bound()
    kinds = {kind: _facts([entry for entry in entries if entry.kind == kind]) for kind in KINDS}
    freed = sum(entry.size for entry in removed)
    args.facts = {
        "folder": str(cache_folder()),
        "bound": bound,
        "kinds": kinds,
        "removed": {"entries": len(removed), "bytes": freed},
    }
    table = [["kind", "entries", "size", "last use", "what"]]
    table += [
        [kind, str(facts["entries"]), _shown(facts["bytes"]), _day(facts["last_use"]), KINDS[kind]]
        for kind, facts in kinds.items()
        if facts["entries"]
    ]
    if args.clear is not None or args.keep is not None:
        print(f"removed: {len(removed)} entries, {_shown(freed)}")
    print(f"{cache_folder()}: {_shown(sum(facts['bytes'] for facts in kinds.values()))}")
    if entries:
        print(aligned(table, left=5))
    again = sum(kinds[kind]["bytes"] for kind in REMADE)
    of = "without a bound" if bound is None else f"of at most {_shown(bound)}"
    print(f"{_shown(again)} {of} can be made again ({CACHE_SIZE})")
    return 0


class _Kinds(Names):
    """Kinds of the cache folder; without any, all but the models."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        """Keep the kinds."""
        if not values:
            setattr(namespace, self.dest, sorted(REMADE))
            return
        super().__call__(parser, namespace, values, option)
        for kind in getattr(namespace, self.dest):
            if kind not in KINDS:
                raise argparse.ArgumentError(self, f"invalid choice: {kind!r} (choose from {', '.join(KINDS)})")


def _size(text: str) -> int:
    try:
        return parsed_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def _facts(entries: Sequence[CacheEntry]) -> dict[str, Any]:
    last = max((entry.used for entry in entries), default=None)
    return {"entries": len(entries), "bytes": sum(entry.size for entry in entries), "last_use": last}


def _shown(size: int) -> str:
    unit, name = next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= pair[0]), (1, "B"))
    return f"{size / unit:.3g} {name}"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
