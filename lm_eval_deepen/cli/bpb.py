"""``lm-eval-deepen bpb ENSEMBLE --text FILES``: how well an ensemble predicts text, against its members."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lm_eval_deepen.cli.arguments import add_device, add_ensemble, add_json, add_texts, adder

if TYPE_CHECKING:
    from lm_eval_deepen.engine import Ensemble
    from lm_eval_deepen.engine.bits_per_byte import Document
    from lm_eval_deepen.engine.projection_loss import ProjectionLoss
    from lm_eval_deepen.tuning.comparison_table import Line

HELP = (
    "Compare the bits per byte of a text under each member (also at a temperature fitted on other text, which is "
    "fairer), under the ensemble with each member as the main one, and under controls: mixtures of the members' "
    "probabilities between places where all tokenisations end. Intervals are paired over documents, and allow for "
    "the choice of the best member on these documents. Control tokens are never scored."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    add = adder(parser)
    add_ensemble(parser)
    add_texts(parser)
    add("--dev FILE ...", "texts to fit the members' own temperatures on (default: each half of --text on the other "
        "half)")  # fmt: skip
    add_json(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print the table."""
    from lm_eval_deepen.engine import Ensemble
    from lm_eval_deepen.engine.calibration import default_text, digest, load_documents
    from lm_eval_deepen.harness.ensemble_recipe import parse_ensemble
    from lm_eval_deepen.harness.model import configure
    from lm_eval_deepen.tuning.comparison_table import best, facts, level, table

    documents = load_documents(args.text or [default_text()], args.limit)
    dev = load_documents(args.dev, args.limit) if args.dev else None
    ensemble = Ensemble.load(configure(parse_ensemble(args.ensemble)), args.device)
    lines, lost = measure(ensemble, documents, dev)
    num_bytes = sum(document.num_bytes for document in documents)
    reference, each = best(opponents(lines)), level(lines, opponents(lines))
    print(f"{len(documents)} documents, {num_bytes} bytes\n")
    print(table(lines, reference, num_bytes, each))
    print("\nlost between vocabularies: a member in the main member's pieces, against itself in its own")
    for one in lost:
        print(f"  {one}")
    args.facts = {
        "documents": len(documents),
        "bytes": num_bytes,
        "text_sha256": digest(documents),
        "reference": reference.system,
        "systems": [facts(line, reference, num_bytes, each) for line in lines],
        "projection_loss": [one.to_dict() for one in lost],
    }
    return 0


def measure(
    ensemble: Ensemble, documents: Sequence[Document], dev: Sequence[Document] | None
) -> tuple[list[Line], list[ProjectionLoss]]:
    """Return a line per system, and what every member loses in the pieces of every other one.

    The systems are members, members with a fitted temperature, ensembles and controls.
    """
    from lm_eval_deepen.engine.bits_per_byte import Reading, ensemble_bits
    from lm_eval_deepen.engine.projection_loss import projection_losses, read_with_covers
    from lm_eval_deepen.tuning.comparison import controls, orders, own
    from lm_eval_deepen.tuning.comparison_table import Line

    ensembles = orders(ensemble)
    elsewhere = [own(Reading.of(one, dev, members=1)) if dev else None for one in ensembles]
    readings = [read_with_covers(one, documents) for one in ensembles]
    alone = [own(reading) for reading in readings]
    lines = [Line(f"{single.name} alone", single.bits) for single in alone]
    for single, other in zip(alone, elsewhere, strict=True):
        bits, chosen = single.fitted(other)
        note = "temperature " + " and ".join(f"{t:.2f}" for t in dict.fromkeys(chosen))
        lines.append(Line(f"{single.name} alone, fitted", bits, note))
    for one, reading in zip(ensembles, readings, strict=True):
        if ensemble.by_stretches:  # the same in every order
            lines.append(Line("ensemble", ensemble_bits(reading, one), "by stretches"))
            break
        lines.append(Line(f"ensemble, {one.main.name} main", ensemble_bits(reading, one)))
    shared = controls(readings)
    lines.append(Line("linear where all tokenisations end", shared["linear"], "control"))
    lines.append(Line("geometric where all tokenisations end", shared["geometric"], "control, not normalised"))
    natural = {single.name: float(single.bits.sum()) for single in alone}
    return lines, [loss for reading in readings for loss in projection_losses(reading, natural)]


def opponents(lines: Sequence[Line]) -> list[Line]:
    """Return the members at their fitted temperatures; the best of them is what the others are compared with."""
    return [line for line in lines if line.system.endswith("fitted")]
