"""What fewer common pieces cost, and what a union of pieces gains: part of docs/relative-space.md.

Anchors are pieces that *all* vocabularies have. The members stay two; further vocabularies only take anchors away, as
further members would.
Readings are those of `benchmarks/spaces.py read`. Every line printed is one JSON object.

    python benchmarks/anchors.py --models A B --out DIR --vocabulary NAME=FILE ...

FILE is a list of pieces in base64 (`*.tiktoken`) or a Tekken file (`*.json`).
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from spaces import KINDS, load, own, size, static, take

from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.engine.bits_per_byte import Reading, Variant, quiet
from lm_eval_deepen.engine.ensemble import view
from lm_eval_deepen.fusion import METHODS
from lm_eval_deepen.fusion.base import Fuser
from lm_eval_deepen.fusion.deepen import Deepen, DeepenFuser
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.relative.rows_from_bytes import Tokenizers, anchor_classes, class_matrix
from lm_eval_deepen.relative.rows_from_embeddings import described_rows
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.relative.support import make_side
from lm_eval_deepen.tuning.comparison import orders
from lm_eval_deepen.vocabulary.anchors import AnchorSet, anchor_ids, duplicates, find_anchors

FEW = (4_096, 1_000)  # anchors, spread over the common pieces


def pieces_of(path: Path) -> set[bytes]:
    """The byte strings of a vocabulary file."""
    if path.suffix == ".json":
        return {base64.b64decode(entry["token_bytes"]) for entry in json.loads(path.read_text())["vocab"]}
    return {base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines() if line}


def anchor_sets(ensemble: Ensemble, further: dict[str, set[bytes]]) -> dict[str, AnchorSet]:
    """Common pieces of the members, then of one vocabulary more each; then a part of the first, with all bytes."""
    vocabularies = [member.codec.vocab for member in ensemble.members]
    common = find_anchors(vocabularies, names=[member.name for member in ensemble.members])
    found, left = {f"{len(vocabularies)} vocabularies": common}, set(common.pieces)
    for count, (name, pieces) in enumerate(further.items(), len(vocabularies) + 1):
        left &= pieces
        found[f"{count}: and {name}"] = AnchorSet(tuple(sorted(left)))
    for few in FEW:
        part = find_anchors(vocabularies, max_anchors=few, names=[member.name for member in ensemble.members])
        found[f"{few} of the first"] = part
        found[f"{few} of the first, and single bytes"] = AnchorSet(
            tuple(sorted({*part.pieces, *(piece for piece in common.pieces if len(piece) == 1)}))
        )
    return found


def fusers(ensemble: Ensemble, anchors: AnchorSet) -> Iterator[tuple[str, Fuser]]:
    """The byte spaces over these anchors."""
    views = [view(member) for member in ensemble.members]
    for rows in ("canonical", "prefix"):
        tokenizers = [Tokenizers.of(views)] if rows == "canonical" else []
        sides = []
        for member in views:
            vocabulary = member.vocabulary
            classes = anchor_classes(vocabulary, anchors, *tokenizers)
            matrix = class_matrix(classes, described_rows(vocabulary), len(anchors))
            sides.append(
                make_side(vocabulary, matrix, anchor_ids(vocabulary, anchors), duplicates(vocabulary, anchors), "text")
            )
        options = Deepen(rows=rows, average="linear")
        yield f"{rows}, linear", DeepenFuser(views[0].vocabulary, sides, options, {})


def bits(reading: Reading, fuser: Fuser, weight: float) -> torch.Tensor:
    """Bits per document [D] with a weight of the main member, at the temperatures of `spaces.TEMPERATURES`."""
    ensemble = replace(reading.ensemble, fuser=fuser, weights=torch.tensor([weight, 1 - weight]))
    return reading.bits(reading.logp([Variant(quiet(ensemble), (1.1, 1.1))]))[0]


def study(ensembles: Sequence[Ensemble], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Bits per byte of every anchor set and of the union of pieces, with the better of two weights on dev."""
    further = {name: pieces_of(Path(file)) for name, file in (text.split("=", 1) for text in args.vocabulary)}
    for k, ensemble in enumerate(ensembles):
        readings = {
            kind: [take(load(ensemble, args.out, kind, split, k), 4) for split in ("dev", "test")]
            for kind in args.kinds
        }
        for name, count, space, fuser in candidates(ensemble, further):
            for kind, (dev, test) in readings.items():
                on_dev = {weight: float(bits(dev, fuser, weight).sum()) for weight in (0.5, 0.8)}
                weight = min(on_dev, key=on_dev.__getitem__)
                yield {
                    "main": ensemble.main.name, "anchors": name, "count": count, "space": space, "kind": kind,
                    "weight": weight, "bits_per_byte": float(bits(test, fuser, weight).sum()) / size(test),
                    "alone": float(own(test).by_temperature.sum(1).min()) / size(test),
                }  # fmt: skip


def candidates(ensemble: Ensemble, further: dict[str, set[bytes]]) -> Iterator[tuple[str, int | None, str, Fuser]]:
    """The union of the members' pieces, then every anchor set in every byte space; one at a time in memory."""
    views = [view(member) for member in ensemble.members]
    yield "union of pieces", None, "gac", METHODS["gac"].options().build(views, MatrixStore(None))
    for name, anchors in anchor_sets(ensemble, further).items():
        for space, fuser in fusers(ensemble, anchors):
            yield name, len(anchors), space, fuser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs=2, required=True)
    parser.add_argument("--vocabulary", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--kinds", nargs="+", default=["prose", "nq"], choices=KINDS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    first = Ensemble.load(configure(static(args.models)), "cpu")
    with (args.out / "anchors.jsonl").open("a") as file:
        for line in study(orders(first), args):
            print(json.dumps(line), file=file, flush=True)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
