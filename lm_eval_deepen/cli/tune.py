"""``lm-eval-deepen tune ENSEMBLE --objective bpb --text FILE``: choose options on unlabelled text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_deepen.cli.arguments import Names, add_device, add_ensemble, add_json, add_texts, adder, natural, positive
from lm_eval_deepen.errors import ConfigError
from lm_eval_deepen.storage import check_place, write_text
from lm_eval_deepen.tuning import by_score as tune_score

if TYPE_CHECKING:
    from lm_eval_deepen.config import EnsembleConfig
    from lm_eval_deepen.engine import Ensemble
    from lm_eval_deepen.engine.bits_per_byte import Document
    from lm_eval_deepen.tuning.search import Chosen

HELP = (
    "Choose the space, average, weights, temperatures and solver of an ensemble by the bits per byte of unlabelled "
    "text, and write an ensemble file with the evidence in it. Options are chosen on every other document and "
    "reported on the rest. Never give it a benchmark's test split."
)

# What one objective has, and the other has no use for.
OF_BPB = ("text", "spaces")
OF_SCORE = (
    "tasks", "evaluated", "include_path", "metadata", "num_fewshot", "gen_kwargs", "metric", "weights", "weight_step",
    "learning_rates",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the subcommand takes."""
    add = adder(parser)
    add_ensemble(parser)
    add("--objective", "what is optimised: bits per byte of text, or the score of a dev split "
        "(default: %(default)s)", choices=["bpb", "score"], default="bpb")  # fmt: skip
    add_texts(parser)
    add("--spaces", "bytes: spaces made from bytes alone; all: also those from embeddings, whose matrices take minutes "
        "to build (default: bytes)", choices=["bytes", "all"])  # fmt: skip
    add("--output FILE", "the ensemble file to write (default: %(default)s)", type=Path, default=Path("tuned.yaml"))
    add_json(parser)
    add_device(parser)
    add = adder(parser.add_argument_group("--objective score"))
    add("--tasks TASK ...", "tasks with a development (validation) split", action=Names)
    add("--evaluated TASK ...", "tasks on which the ensemble will be evaluated; they must share no document "
        "(default: --tasks)", action=Names)  # fmt: skip
    add("--include-path --include_path DIR ...", "folders with more tasks", default=[])
    add("--metadata JSON", "a JSON object for the tasks")
    add("--num-fewshot --num_fewshot N", "number of few-shots, instead of the tasks' own", type=natural)
    add("--gen-kwargs --gen_kwargs KEY=VALUE,...", "generation arguments that replace those of the tasks")
    add("--metric NAME", "metric to optimise, as acc or exact_match,strict-match (default: a task's first)")
    add("--weights", "grid: try all weights on a grid; adaptive: only weights in proportion to the members' own scores "
        "(DeePEn-Adapt); keep: the given weights; both: the best of all these "
        "(default: both)", choices=tune_score.WEIGHTS)  # fmt: skip
    add("--weight-step W", "step of the grid (default: 0.1)", type=positive)
    add("--learning-rates LR ...", "learning rates to try, if the inverse has one (default: 0.05 to "
        "0.3)", type=positive)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Search, report and write the file."""
    for name in OF_BPB if args.objective == "score" else OF_SCORE:
        if getattr(args, name) not in (None, []):
            other = "bpb" if args.objective == "score" else "score"
            raise ConfigError(f"--{name.replace('_', '-')} belongs to --objective {other}; leave it out")
    check_place(args.output)
    if args.objective == "score":
        return tune_score.run(args)
    import yaml

    from lm_eval_deepen.engine import Ensemble
    from lm_eval_deepen.engine.bits_per_byte import Reading
    from lm_eval_deepen.engine.calibration import default_text, load_documents
    from lm_eval_deepen.errors import RequestError
    from lm_eval_deepen.harness.ensemble_recipe import parse_ensemble
    from lm_eval_deepen.tuning.search import constant, search

    given = tune_score.as_given(parse_ensemble(args.ensemble))
    config = constant(given)
    # one that stands twice would be chosen on and reported on
    documents = list(dict.fromkeys(load_documents(args.text or [default_text()], args.limit)))
    if len(documents) < 2:
        raise RequestError("one document cannot be used to choose and to report; give two or more.")
    ensemble = Ensemble.load(config, args.device)
    chosen = search(Reading.of(ensemble, documents[::2]), everything=args.spaces == "all")
    for line in chosen.log:
        print(line)
    keys = tune_score.placed(chosen.config.to_dict())
    args.facts = written = {"kind": "ensemble", **keys, "evidence": evidence(ensemble, chosen, documents, given)}
    write_text(args.output, yaml.safe_dump(written, sort_keys=False, allow_unicode=True))
    print(f"\nwritten to {args.output}")
    return 0


def evidence(ensemble: Ensemble, chosen: Chosen, documents: list[Document], given: EnsembleConfig) -> dict[str, Any]:
    """Return what speaks for the choice, from every second document, which it was not made on; printed, too.

    `ensemble` has constant weights; those of `given`, which was to be tuned, may learn from the text.
    """
    import lm_eval_deepen
    from lm_eval_deepen.engine.bits_per_byte import Reading, ensemble_bits
    from lm_eval_deepen.engine.calibration import digest
    from lm_eval_deepen.tuning.comparison import orders, own
    from lm_eval_deepen.tuning.comparison_table import Line, best, facts, level, table

    dev, rest = documents[::2], documents[1::2]
    ensembles = orders(ensemble)
    fitted = [own(Reading.of(one, dev, members=1)) for one in ensembles]
    readings = [Reading.of(one, rest, members=1) for one in ensembles]
    lines = []
    for reading, other in zip(readings, fitted, strict=True):
        bits, (temperature,) = own(reading).fitted(other)
        lines.append(Line(f"{reading.ensemble.main.name} alone", bits, f"temperature {temperature:.2f}"))
    members, reference = list(lines), best(lines)
    if given.weights_change:
        learning = type(ensemble).assemble(given, ensemble.members, ensemble.fuser)
        lines.append(Line("as given", ensemble_bits(Reading.of(learning, rest), learning), "weights that learn"))
        lines.append(Line("equal weights", chosen.before(rest)))
    else:
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
