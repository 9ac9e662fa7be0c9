"""What fusion gains from two members that are equally good: part of docs/relative-space.md.

    python benchmarks/copies.py perturb --model DIR --out DIR [--noise 0.08]
    python benchmarks/copies.py measure --models A B --data DIR [--kinds prose piqa]
    python benchmarks/copies.py permute --model DIR --data DIR

`perturb` writes two copies of a model, noise added to every matrix but the embeddings, in proportion to its standard
deviation. `measure` takes any two models with equal weights, both averages, on half of the test documents of
`spaces.py`: as they are, and with the temperatures of the ensemble and of the better member fitted, for each half of
the documents on the other. `permute`
fuses a model with itself under permuted ids, which must change nothing. Every line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from spaces import KINDS, documents, fitting, size
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_deepen.config import FrozenDict
from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.engine.bits_per_byte import Reading
from lm_eval_deepen.engine.ensemble import view
from lm_eval_deepen.fusion.base import MemberView, Spelling
from lm_eval_deepen.fusion.deepen import Deepen
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.tuning.comparison import TEMPERATURES, Own, orders, own
from lm_eval_deepen.tuning.comparison_table import compare
from lm_eval_deepen.tuning.search import Candidate, Fusers
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

AVERAGES = ("linear", "geometric")
NEVER = -80.0  # nats; what is less likely is not compared


def perturb(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Write two copies of a model with noise of different seeds."""
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 2 and "embed" not in name:
                    weight += args.noise * weight.std() * torch.randn(weight.shape, generator=generator)
        place = args.out / f"copy{seed}"
        model.save_pretrained(place)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(place)
        yield {"copy": place.name, "seed": seed, "noise": args.noise}


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compare both averages at equal weights with the better member at its own fitted temperature."""
    first = ensemble_of(*args.models)
    both = orders(first)
    for kind in args.kinds:
        found = fitting(both, documents(args.data, kind, "test"))[::2]
        reading = Reading.of(first, found)
        alone = [own(reading if k == 0 else Reading.of(both[1], found, members=1)) for k in range(2)]
        fitted = [one.fitted()[0] for one in alone]
        best, num_bytes = int(torch.stack(fitted).sum(1).argmin()), size(reading)
        fusers = Fusers(first)
        yield {"kind": kind, "documents": len(found), "bytes": num_bytes,
               "alone": [float(one.bits.sum()) / num_bytes for one in alone],
               "fitted": [float(bits.sum()) / num_bytes for bits in fitted]}  # fmt: skip
        for average in AVERAGES:
            options = FrozenDict({**first.config.options_dict(), "average": average})
            variants = [fusers.variant(Candidate(options, (0.5, 0.5), (t, t))) for t in TEMPERATURES]
            bits = reading.bits(reading.logp(variants))  # [T, D]
            ensemble = Own("ensemble", bits[TEMPERATURES.index(1)], bits)
            yield {"kind": kind, "average": average, "as it is": str(compare(ensemble.bits, alone[best].bits)),
                   "fitted": str(compare(ensemble.fitted()[0], fitted[best])),
                   "bits_per_byte": float(ensemble.fitted()[0].sum()) / num_bytes}  # fmt: skip


def permute(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Fuse real distributions with themselves under permuted ids."""
    ensemble = ensemble_of(args.model, args.model)
    reading = Reading.of(ensemble, fitting([ensemble], documents(args.data, args.kinds[0], "test"))[:8])
    member = view(ensemble.main)
    order = torch.randperm(len(member.vocabulary), generator=torch.Generator().manual_seed(0))
    logp = ensemble.main.logp(reading.states[0])  # [n, V]
    unused = torch.tensor(sorted(member.vocabulary.unused), dtype=torch.int64)
    expected = torch.log_softmax(logp.index_fill(1, unused, float("-inf")), dim=1)
    weights = torch.tensor([[0.3, 0.7]]).expand(len(logp), 2)
    for options in ({}, {"average": "geometric"}, {"rows": "prefix"}):
        fuser = Deepen(**options).build([member, permuted(member, order)], MatrixStore(args.out, progress=False))
        found = fuser.fuse([logp, logp[:, order]], weights).logp
        kept = expected > NEVER
        yield {"options": options, "rows": len(logp), "largest_change": float((found - expected)[kept].abs().max())}


def permuted(member: MemberView, order: torch.Tensor) -> MemberView:
    """The member with other ids: new id n is the old id order[n]."""
    old, place = member.vocabulary, torch.argsort(order)

    def moved(ids) -> frozenset[int]:
        return frozenset(int(place[i]) for i in ids)

    vocabulary = ByteVocab(
        tuple(old.pieces[i] for i in order.tolist()), moved(old.control), moved(old.unused),
        tuple(int(place[i]) for i in old.eos), moved(old.byte_fallback),
    )  # fmt: skip
    assert member.spelling is not None
    encode = member.spelling.encode

    def spelt(data: bytes) -> list[int] | None:
        ids = encode(data)
        return None if ids is None else [int(place[i]) for i in ids]

    rows = member.load_embeddings()[order]
    return MemberView("permuted", vocabulary, lambda: rows, lambda: "permuted", spelling=Spelling(spelt, "permuted"))


def ensemble_of(*models: str) -> Ensemble:
    """Two models, or one twice, with equal weights."""
    members = [{"name": f"{Path(model).name}-{k}", "pretrained": model} for k, model in enumerate(models)]
    config = configure({"members": members, "weighting": "uniform", "covers": "off"})
    return Ensemble.load(config.replace(self_check=False), "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"perturb": perturb, "measure": measure, "permute": permute}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--model")
    parser.add_argument("--models", nargs=2)
    parser.add_argument("--data", type=Path, help="folder of the samples")
    parser.add_argument("--out", type=Path, help="where copies, and the matrices of permuted ids, go")
    parser.add_argument("--noise", type=float, default=0.08)
    parser.add_argument("--kinds", nargs="+", default=["prose", "piqa"], choices=KINDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for line in parts[args.part](args):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
