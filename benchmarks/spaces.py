"""The study of relative spaces in docs/relative-space.md: bits per byte on five kinds of text, both main members.

Run one part after another; every line printed is one JSON object, and a part skips what its file holds already.

    python benchmarks/spaces.py read --models A B --data DATA --out DIR
    python benchmarks/spaces.py {defaults,tuned,spaces,solvers} --models A B --out DIR
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.engine.bits_per_byte import Document, Reading, quiet
from lm_eval_deepen.engine.calibration import digest
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.tuning import search as stages
from lm_eval_deepen.tuning.comparison import controls, orders, own
from lm_eval_deepen.tuning.comparison_table import compare

KINDS = ("piqa", "arc", "gsm8k", "nq", "prose")
POSITIONS = 1_500  # at most, per kind, split and main member
TEMPERATURES = (1.1, 1.1)  # of both members where spaces are compared: what dev texts ask for, by and large
EMBEDDING = {"rows": "embedding", "average": "linear", "inverse": "em", "support": 512, "max_truncated": 1.0}
FEWER = {**EMBEDDING, "max_anchors": 4096}  # what takes minutes to build for all anchors, and hours on a busy machine
FULL = {"support": "full", "max_truncated": None}
DENSE = {**EMBEDDING, **FULL, "normalization": "reference", "top_m": 0, "max_anchors": 1000}
SPACES: dict[str, dict[str, Any]] = {
    "canonical, geometric": {"rows": "canonical", "average": "geometric"},
    "canonical, linear": {"rows": "canonical", "average": "linear"},
    "canonical, linear, mirror": {"rows": "canonical", "average": "linear", "inverse": "mirror"},
    "canonical, linear, adamw": {"rows": "canonical", "average": "linear", "inverse": "adamw"},
    "prefix, geometric": {"rows": "prefix", "average": "geometric"},
    "prefix, linear": {"rows": "prefix", "average": "linear"},
    "centered, linear": EMBEDDING,
    "centered, geometric": {**EMBEDDING, "average": "geometric"},
    "centered, linear, mirror": {**EMBEDDING, "inverse": "mirror"},
    "centered, linear, adamw": {**EMBEDDING, "inverse": "adamw"},
    "centered, linear, trust region 0.05": {**EMBEDDING, "trust_region": 0.05},
    "4,096: prefix, linear": {**FEWER, "rows": "prefix", "inverse": None, **FULL},
    "4,096: exact + centered, linear": {**FEWER, "rows": "exact"},
    "4,096: exact + centered, geometric": {**FEWER, "rows": "exact", "average": "geometric"},
    "4,096: centered, linear": FEWER,
    "4,096: centered of entropy 0.5, linear": {**FEWER, "row_entropy": 0.5},
    "4,096: decorrelated, linear": {**FEWER, "normalization": "decorrelated"},
    "4,096: cosine, linear": {**FEWER, "normalization": "cosine", "top_m": 128},
    "1,000: reference, em": DENSE,
    "1,000: reference, adamw (the paper)": {**DENSE, "inverse": "adamw", "eos": "reference"},
}


def static(models: Sequence[str]) -> dict[str, Any]:
    """Return the ensemble whose spaces are compared: equal weights, no covers."""
    return {"pretrained": models[0], "members": list(models), "weighting": "uniform", "covers": "off"}


def documents(data: Path, kind: str, split: str) -> list[Document]:
    """One kind of text; prose is split by a hash of the topic."""
    if kind == "prose":
        return list(_prose(split))
    folder = {"arc": "arc_challenge"}.get(kind, kind)
    rows = [json.loads(line) for line in (data / folder / f"{split}.jsonl").read_text().splitlines()]
    make = {
        "piqa": lambda d: Document(" " + d[d["answer"]].strip(), d["question"].strip()),
        "arc": lambda d: Document(d["question"].strip()),
        "gsm8k": lambda d: Document(
            " " + "\n".join(d["answer"].splitlines()[:2]),
            f"Question: {d['question']}\nLet's think step by step\nAnswer:",
        ),
        "nq": lambda d: Document(f" {d['question']}\nAnswer: {d['answer'][0]}", "Question:"),
    }[kind]
    return [make(row) for row in rows]


def _prose(split: str) -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 2 != (split == "test"):
            continue
        found = 0
        for paragraph in topics[name].split("\n\n"):
            lines = paragraph.splitlines()
            marked = any(line.startswith((" ", "*", "=", "|", "+", "-")) or "::=" in line for line in lines)
            text = " ".join(paragraph.split())
            if not marked and 150 <= len(text) <= 400 and found < 2:
                found += 1
                yield Document(text)


def fitting(ensembles: Sequence[Ensemble], found: Sequence[Document]) -> list[Document]:
    """Documents in their order, as many as fit into `POSITIONS` for every main member."""
    chosen, used = [], [0] * len(ensembles)
    for document in found:
        cost = [len(e.main.codec.encode(document.text)) + 1 for e in ensembles]
        if all(a + b <= POSITIONS for a, b in zip(used, cost, strict=True)):
            used = [a + b for a, b in zip(used, cost, strict=True)]
            chosen.append(document)
    return chosen


def save(reading: Reading, path: Path) -> None:
    torch.save({key: getattr(reading, key) for key in ("documents", "positions", "trees", "states", "rows")}, path)


def load(ensemble: Ensemble, out: Path, kind: str, split: str, k: int) -> Reading:
    return Reading(ensemble, **torch.load(out / f"{kind}.{split}.{k}.pt", weights_only=False))


def take(reading: Reading, step: int) -> Reading:
    """Every step-th document of a reading."""
    keep = [i for i, p in enumerate(reading.positions) if p.document % step == 0]
    positions = tuple(replace(reading.positions[i], document=reading.positions[i].document // step) for i in keep)
    return replace(reading, documents=reading.documents[::step], positions=positions)


def size(reading: Reading) -> int:
    return sum(document.num_bytes for document in reading.documents)


def fitted(ensembles, out: Path, kind: str) -> dict[str, torch.Tensor]:
    """Bits per test document of every member at the temperature that its dev text asks for; kept in a file."""
    path = out / f"{kind}.fitted.pt"
    if not path.exists():
        found = {}
        for k, ensemble in enumerate(ensembles):
            dev, test = (own(load(ensemble, out, kind, split, k)) for split in ("dev", "test"))
            found[ensemble.main.name] = test.fitted(dev)[0]
        torch.save(found, path)
    return torch.load(path)


def read(ensembles, args) -> Iterator[dict[str, Any]]:
    for kind in args.kinds:
        for split in ("dev", "test"):
            chosen = fitting(ensembles, documents(args.data, kind, split))
            for k, ensemble in enumerate(ensembles):
                if not (args.out / f"{kind}.{split}.{k}.pt").exists():
                    reading = Reading.of(ensemble, chosen)
                    save(reading, args.out / f"{kind}.{split}.{k}.pt")
                    yield {
                        "kind": kind, "split": split, "main": ensemble.main.name, "documents": len(chosen),
                        "positions": len(reading.positions), "bytes": size(reading), "sha256": digest(chosen),
                    }  # fmt: skip


def tuned(ensembles, args) -> Iterator[dict[str, Any]]:
    """The staged search of `lm-eval-deepen tune` on dev, per kind and main member, reported on test."""
    for kind in args.kinds:
        alone = fitted(ensembles, args.out, kind)
        best = min(alone, key=lambda name: float(alone[name].sum()))
        readings = [load(e, args.out, kind, "test", k) for k, e in enumerate(ensembles)]
        mixed = controls(readings)
        for k, ensemble in enumerate(ensembles):
            if (kind, ensemble.main.name) in args.found:
                continue
            started, test = time.process_time(), readings[k]
            dev = load(ensemble, args.out, kind, "dev", k)
            chosen = stages.search(take(dev, 2))
            variants = [chosen.fusers.variant(chosen.first), chosen.fusers.variant(chosen.best)]
            first, last = test.bits(test.logp(variants))
            yield {"kind": kind, "main": ensemble.main.name, "best_member": best, "bytes": size(test),
                   "alone_fitted": {n: float(b.sum()) / size(test) for n, b in alone.items()},
                   "controls": {n: str(compare(b, alone[best])) for n, b in mixed.items()},
                   "default": str(compare(first, alone[best])), "tuned": str(compare(last, alone[best])),
                   "bits_per_byte": float(last.sum()) / size(test), "bits": last.tolist(),
                   "chosen": stages._say(chosen.best, chosen.first), "log": chosen.log,
                   "seconds": time.process_time() - started}  # fmt: skip


def defaults(ensembles, args) -> Iterator[dict[str, Any]]:
    """Nothing tuned: both averages with equal weights and temperatures 1, on test."""
    for kind in args.kinds:
        alone = fitted(ensembles, args.out, kind)
        best = min(alone, key=lambda name: float(alone[name].sum()))
        for k, ensemble in enumerate(ensembles):
            if (kind, ensemble.main.name) in args.found:
                continue
            fusers, test = stages.Fusers(ensemble), load(ensemble, args.out, kind, "test", k)
            averages = ("linear", "geometric")
            points = [stages.FrozenDict({**ensemble.config.options_dict(), "average": average}) for average in averages]
            variants = [fusers.variant(stages.Candidate(point, (0.5, 0.5), (1.0, 1.0))) for point in points]
            bits = zip(averages, test.bits(test.logp(variants)), strict=True)
            found = {average: str(compare(each, alone[best])) for average, each in bits}
            yield {"kind": kind, "main": ensemble.main.name, "best_member": best, **found}


def spaces(ensembles, args) -> Iterator[dict[str, Any]]:
    """Every space with weights chosen on an eighth of dev, reported on a quarter of test; one pass for all of them."""
    for kind in args.kinds:
        alone = fitted(ensembles, args.out, kind)
        best = min(alone.values(), key=lambda bits: float(bits.sum()))
        for k, ensemble in enumerate(ensembles):
            if (kind, ensemble.main.name) in args.found:
                continue
            fusers, config = stages.Fusers(ensemble), ensemble.config
            dev = take(load(ensemble, args.out, kind, "dev", k), 8)
            test = take(load(ensemble, args.out, kind, "test", k), 4)
            points = {}
            for name, options in SPACES.items():
                at = stages.FrozenDict({**config.options_dict(), **stages.FREE, **options})
                grid = [0.5] if options.get("support") == "full" and options["rows"] == "embedding" else [0.2, 0.5, 0.8]
                points[name] = [stages.Candidate(at, (1 - w, w), TEMPERATURES) for w in grid]
            flat = [point for found in points.values() for point in found]
            bits = dict(zip(flat, dev.bits(dev.logp([fusers.variant(p) for p in flat])).sum(1).tolist(), strict=True))
            chosen = {name: min(found, key=lambda p: bits[p]) for name, found in points.items()}
            uniform = {name: next(p for p in found if p.weights[0] == 0.5) for name, found in points.items()}
            scored = list(dict.fromkeys([*chosen.values(), *uniform.values()]))
            found = dict(zip(scored, test.bits(test.logp([fusers.variant(p) for p in scored])), strict=True))
            for name in SPACES:
                yield {
                    "kind": kind, "main": ensemble.main.name, "space": name, "weights": chosen[name].weights,
                    "uniform": str(compare(found[uniform[name]], best[::4])),
                    "chosen": str(compare(found[chosen[name]], best[::4])),
                }  # fmt: skip


def solvers(ensembles, args) -> Iterator[dict[str, Any]]:
    """Residual KL and time of every solver at equal numbers of products with R, rows from embeddings."""
    for k, ensemble in enumerate(ensembles):
        reading = take(load(ensemble, args.out, "nq", "dev", k), 12)
        for inverse, steps, rate in [("em", n, None) for n in (1, 3, 5, 10, 50)] + [
            ("mirror", n, r) for n in (3, 5, 10) for r in (1.4, 1.7, 2.0)
        ] + [("adamw", 5, 0.15), ("adamw", 10, 0.15), ("adamw", 10, 0.5)]:  # fmt: skip
            changes = {**EMBEDDING, "inverse": inverse, "steps": steps, "learning_rate": rate}
            options = stages.FrozenDict({**ensemble.config.options_dict(), **changes})
            candidate = stages.Candidate(options, (0.5, 0.5), (1.0, 1.0))
            variant = stages.Fusers(ensemble).variant(candidate)
            _, raw, _, present, _ = next(reading._chunks())
            raw, present = [x[:48] for x in raw], present[:48]
            variant.ensemble.fuse(raw, present)
            variant = replace(variant, ensemble=quiet(variant.ensemble))
            started = time.process_time()
            variant.ensemble.fuse(raw, present)
            yield {"main": ensemble.main.name, "inverse": inverse, "steps": steps, "learning_rate": rate,
                   "residual_kl": variant.ensemble.counters.summary()["mean_residual_kl"],
                   "ms_per_row": 1000 * (time.process_time() - started) / len(present)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"read": read, "defaults": defaults, "tuned": tuned, "spaces": spaces, "solvers": solvers}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--models", nargs=2, required=True)
    parser.add_argument("--data", type=Path, help="folder of the samples")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    first = Ensemble.load(configure(static(args.models)), "cpu")
    path = args.out / f"{args.part}.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    args.found = {(line.get("kind"), line["main"]) for line in before}
    with path.open("a") as file:
        for line in parts[args.part](orders(first), args):
            print(json.dumps(line), file=file, flush=True)
            print(json.dumps({key: value for key, value in line.items() if key not in ("bits", "log")}), flush=True)


if __name__ == "__main__":
    main()
