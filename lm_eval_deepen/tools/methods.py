"""``lm-eval-deepen methods``: the fusion methods, weightings and pooling methods there are, with their options."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

HELP = "List what the keys method, weighting and pooling of an ensemble can be, and the options of each."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes; its help ends with the list itself."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = listing().replace("%", "%%")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    print(json.dumps(catalogue(), indent=2) if args.json else listing())
    return 0


def catalogue() -> dict[str, dict[str, Any]]:
    """Return, by key and name: paper, what it is, and every option's type and default.

    Raises:
        ConfigError: a method's file that cannot be imported.
    """
    from lm_eval_deepen.fusion import METHODS
    from lm_eval_deepen.pooling import POOLINGS
    from lm_eval_deepen.weighting import WEIGHTINGS

    seams: dict[str, Any] = {"method": METHODS, "weighting": WEIGHTINGS, "pooling": POOLINGS}
    return {seam: {name: _entry(entry) for name, entry in found.items()} for seam, found in seams.items()}


def _entry(entry: Any) -> dict[str, Any]:
    from lm_eval_deepen.config.describe import allowed, default

    module = inspect.getmodule(entry.options)
    about = (inspect.getdoc(module) or inspect.getdoc(entry.options) or "").splitlines() or [""]
    options = {}
    for name, field in entry.options.model_fields.items():
        options[name] = {"type": allowed(field), "required": field.is_required(), "default": default(field)}
    return {"paper": entry.paper, "about": about[0], "options": options}


def listing() -> str:
    """Return the catalogue as text."""
    lines = []
    for seam, found in catalogue().items():
        lines.append(f"{seam}:")
        for name, entry in found.items():
            source = "" if entry["paper"] == "none" else f" [{entry['paper']}]"
            lines.append(f"  {name}: {entry['about']}{source}")
            for option, facts in entry["options"].items():
                default = "required" if facts["required"] else f"default {facts.get('default')}"
                lines.append(f"      {option}: {facts['type']} ({default})")
    return "\n".join(lines)
