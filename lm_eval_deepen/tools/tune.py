"""``lm-eval-deepen tune ENSEMBLE --objective bpb --text FILE``: choose options on unlabelled text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_deepen.storage import check_place, write_text
from lm_eval_deepen.tools import tune_score
from lm_eval_deepen.tools.arguments import count
from lm_eval_deepen.tools.build import add_ensemble

if TYPE_CHECKING:
    from lm_eval_deepen.engine import Ensemble
    from lm_eval_deepen.engine.reading import Document
    from lm_eval_deepen.tools.search import Chosen

HELP = (
    "Choose space, average, weights, temperatures and solver of an ensemble by the bits per byte of unlabelled text, "
    "and write an ensemble file with the evidence in it. Options are chosen on every other document and reported on "
    "the rest. Never give it a benchmark's test split."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    add_ensemble(parser)
    parser.add_argument(
        "--objective", choices=["bpb", "score"], default="bpb",
        help="bits per byte of text, or the score of a dev split (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--text", nargs="+", metavar="FILE",
        help="texts: documents separated by blank lines, or .jsonl with text and context (default: a text that ships)",
    )  # fmt: skip
    parser.add_argument("--limit", type=count, metavar="N", help="documents taken of each file (default: all)")
    parser.add_argument(
        "--spaces", choices=["bytes", "all"], default="bytes",
        help="bytes: spaces made from bytes alone; all: those from embeddings too, whose matrices take minutes to "
        "build (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("tuned.yaml"), metavar="FILE", help="where it goes (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="where members load (default: %(default)s)")
    tune_score.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Search, report and write the file."""
    check_place(args.output)
    if args.objective == "score":
        return tune_score.run(args)
    import yaml

    from lm_eval_deepen.engine import Ensemble
    from lm_eval_deepen.engine.texts import default_text, load_documents
    from lm_eval_deepen.errors import RequestError
    from lm_eval_deepen.tools.build import parse_ensemble
    from lm_eval_deepen.tools.search import search

    config = tune_score.checked(parse_ensemble(args.ensemble))
    documents = load_documents(args.text or [default_text()], args.limit)
    if len(documents) < 2:
        raise RequestError("one document cannot be used to choose and to report; give two or more.")
    ensemble = Ensemble.load(config, args.device)
    chosen = search(ensemble, documents[::2], everything=args.spaces == "all")
    for line in chosen.log:
        print(line)
    keys = tune_score.placed(chosen.config.to_dict())
    written = {"kind": "ensemble", **keys, "evidence": evidence(ensemble, chosen, documents)}
    write_text(args.output, yaml.safe_dump(written, sort_keys=False, allow_unicode=True))
    print(f"\nwritten to {args.output}")
    return 0


def evidence(ensemble: Ensemble, chosen: Chosen, documents: list[Document]) -> dict[str, Any]:
    """Return what speaks for the choice, from the documents it was not made on; printed, too."""
    import lm_eval_deepen
    from lm_eval_deepen.engine.texts import digest
    from lm_eval_deepen.tools.bits import orders, own, read_orders
    from lm_eval_deepen.tools.bits_table import Line, best, facts, level, table

    dev, rest = documents[::2], documents[1::2]
    ensembles = orders(ensemble)
    fitted = [own(reading) for reading in read_orders(ensembles, dev, members=1)]
    readings = read_orders(ensembles, rest, members=1)
    lines = []
    for reading, other in zip(readings, fitted, strict=True):
        bits, (temperature,) = own(reading).fitted(other)
        lines.append(Line(f"{reading.ensemble.main.name} alone", bits, f"temperature {temperature:.2f}"))
    members, reference = list(lines), best(lines)
    lines.append(Line("as given", chosen.before(rest)))
    lines.append(Line("as chosen", chosen.after(rest)))
    each = level(lines, members)
    num_bytes = sum(document.num_bytes for document in rest)
    print(f"\n{len(rest)} documents that nothing was chosen on, {num_bytes} bytes\n")
    print(table(lines, reference, num_bytes, each))
    return {
        "objective": "bpb",
        "version": lm_eval_deepen.__version__,
        "text_sha256": digest(documents),
        "documents": {"chosen_on": len(dev), "reported_on": len(rest)},
        "bytes_reported_on": num_bytes,
        "reference": reference.system,
        "systems": [facts(line, reference, num_bytes, each) for line in lines],
        "search": list(chosen.log),
    }
