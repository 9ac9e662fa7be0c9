"""Put what benchmarks/never_loses.py measured into docs/relative-space.md.

    python benchmarks/never_loses_table.py DIR [--systems S+G G+S | --all] [--into]

A member is compared at the temperature that is best for it on the dev split of the same kind of text; the ensembles are
the defaults, on the test split. --into changes only the text between `<!-- never loses -->` and `<!-- end never loses
-->`; with --all, between `<!-- twos and threes -->` and `<!-- end twos and threes -->`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from never_loses import KINDS, TEMPERATURES
from torch import Tensor

from lm_eval_deepen.engine.stretches import StretchReading, weigh
from lm_eval_deepen.tuning.comparison_table import Change, compare
from lm_eval_deepen.weighting.bayes import Bayes
from lm_eval_deepen.weighting.experts import Experts

PAGE = Path(__file__).resolve().parents[1] / "docs" / "relative-space.md"
Found = dict[str, Any]


def load(folder: Path, system: str, kind: str, split: str) -> Found | None:
    path = folder / f"{system}.{kind}.{split}.pt"
    return torch.load(path, weights_only=False) if path.exists() else None


def per_document(found: Found, logp: Tensor) -> Tensor:
    """Bits per document [..., D] from natural logs of the tokens [..., n]."""
    bits = torch.zeros(*logp.shape[:-1], len(found["bytes"]), dtype=torch.float64)
    return bits.index_add_(-1, found["owner"], -logp.double() / math.log(2))


def member_bits(folder: Path, system: str, kind: str) -> tuple[Tensor, float] | None:
    """The main member of a system alone, at the temperature that its dev text asks for: bits per test document."""
    dev, test = (load(folder, system, kind, split) for split in ("dev", "test"))
    if dev is None or test is None:
        return None
    best = int(per_document(dev, dev["own"]).sum(1).argmin())
    return per_document(test, test["own"][best]), TEMPERATURES[best]


def learned(found: Found, experts: Experts) -> Tensor:
    """Bits per document of the mixture of some of the experts that were measured."""
    kinds = zip(experts.weights, *zip(*experts.kinds(), strict=True), strict=True)
    index = [place(found, *kind) for kind in kinds]
    by_expert = -per_document(found, found["on"].T[index]) * math.log(2)  # nats [K, D]
    start = [
        experts.begun(torch.logsumexp(experts.weights.log()[:, :, None] + logp[0, :, :evidence], dim=1))
        for logp, evidence in found["stretches"]
    ]
    return -(by_expert + torch.stack(start, dim=1)).logsumexp(0) / math.log(2)


def static(found: Found, covers: str, weights: Sequence[float]) -> Tensor:
    """Bits per document of constant weights and the linear average."""
    wanted = torch.tensor(weights, dtype=torch.float64)
    if covers == "on":
        return per_document(found, found["on"][:, place(found, wanted, False)])
    index = int(((found["off_weights"] - wanted).abs().amax(1) < 1e-9).nonzero()[0])
    return per_document(found, found["off"][:, index])


def place(found: Found, weights: Tensor, pools: bool, power: float = 1.0) -> int:
    same = ((found["weights"] - weights).abs().amax(1) < 1e-9) & (found["geometric"] == pools)
    same &= (found["power"] - power).abs() < 1e-9
    return int(same.nonzero()[0])


def stretches(found: Found, experts: Experts) -> Tensor:
    """Bits per document of `method: mixture` with learning weights."""
    bits = []
    for logp, evidence in found["stretches"]:
        count = logp.shape[1]
        reading = StretchReading(
            logp, torch.zeros(logp.shape[1:], dtype=torch.bool), torch.ones(count).bool(), evidence
        )
        bits.append(-weigh(experts, reading).total / math.log(2))
    return torch.tensor(bits, dtype=torch.float64)


def row(folder: Path, kind: str, systems: Sequence[str]) -> dict[str, Any] | None:
    """Every figure of a kind of text, for all orders of the same members."""
    tests = {system: load(folder, system, kind, "test") for system in systems}
    names = sorted(systems[0].split("+"), key=systems[0].split("+").index)
    mains = {name: next((s for s in all_systems(folder) if s.startswith(f"{name}+")), "") for name in names}
    alone = {name: member_bits(folder, system, kind) for name, system in mains.items()}
    if any(value is None for value in (*tests.values(), *alone.values())):
        return None
    own = {name: value for name, value in alone.items() if value is not None}
    best = min(own, key=lambda name: float(own[name][0].sum()))
    reference = own[best][0]
    default, prompted = (Bayes(learn_from=start) for start in ("continuation", "prompt"))
    found: dict[str, Any] = {"kind": kind, "best": best, "temperature": own[best][1], "documents": len(reference)}
    size = int(next(iter(tests.values()))["bytes"].sum())
    found |= {"bytes": size, "bits_per_byte": float(reference.sum()) / size}
    for system, test in tests.items():
        equal = [1 / len(names)] * len(names)
        found[system] = {
            "default": compare(bits := learned(test, default.of_steps(len(names), geometric=True)), reference),
            "from prompt": compare(learned(test, prompted.of_steps(len(names), geometric=True)), reference),
            "equal, no covers": compare(static(test, "off", equal), reference),
            "bits": bits,
        }
        if len(names) == 2:
            other = system.split("+")[1]
            theirs = next(load(folder, s, kind, "test") for s in all_systems(folder) if s.startswith(f"{other}+"))
            natural = per_document(theirs, theirs["own"][TEMPERATURES.index(1.0)])
            found[system]["lost"] = {c: compare(static(test, c, (0.0, 1.0)), natural) for c in ("off", "on")}
    for name, weigher in (("mixture", default), ("mixture, from prompt", prompted)):
        own_bits = [stretches(test, weigher.of_stretches(len(names))) for test in tests.values()]
        found[name] = compare(own_bits[0], reference)
        found[f"{name}, orders"] = max(
            float((a - b).abs().max()) * math.log(2) for a, b in itertools.product(own_bits, own_bits)
        )
    bits = [float(found[system]["bits"].sum()) for system in systems]
    found["orders"] = max(bits) / min(bits) - 1
    return found


def all_systems(folder: Path) -> list[str]:
    return sorted({path.name.split(".")[0] for path in folder.glob("*.pt")}, key=lambda name: (name.count("+"), name))


def twos_and_threes(folder: Path) -> list[str]:
    """Every set of members, with every main member: the defaults and `mixture` against the set's best member.

    The second table compares sets of three with the best set of two, each at its best: with the main member, or the
    `mixture`, that suits the very documents best.
    """
    weigher = Bayes()
    systems = [system for system in all_systems(folder) if "+" in system]
    names = list(dict.fromkeys(name for system in systems for name in system.split("+")))
    sets: dict[str, list[str]] = {}  # the systems of the same members
    for system in systems:
        sets.setdefault("".join(sorted(system.split("+"), key=names.index)), []).append(system)
    out = [["text (documents)", "members", "best, fitted", *(f"defaults, main {name}" for name in names), "mixture"]]
    against = [["text", "three", "the best two", "defaults", "mixture"]]
    for kind in KINDS:
        found = ((s.split("+")[0], member_bits(folder, s, kind)) for s in systems)
        alone = {name: own[0] for name, own in found if own is not None}
        bits: dict[str, dict[str, Tensor]] = {}
        for label, orders in sets.items():
            tests = {system: found for system in orders if (found := load(folder, system, kind, "test"))}
            members = orders[0].split("+")
            if not tests or set(members) - alone.keys():
                continue
            experts = weigher.of_steps(len(members), geometric=True)
            bits[label] = {system.split("+")[0]: learned(test, experts) for system, test in tests.items()}
            bits[label]["mixture"] = stretches(next(iter(tests.values())), weigher.of_stretches(len(members)))
            best = min(members, key=lambda name: float(alone[name].sum()))
            compared = {column: shown(compare(own, alone[best])) for column, own in bits[label].items()}
            cells = [compared.get(column, "") for column in (*names, "mixture")]
            out.append([f"{kind} ({len(alone[best])})", label, best, *cells])
        two = {f"{x} {c}": own for x in bits if sets[x][0].count("+") == 1 for c, own in bits[x].items()}
        for label in (label for label in bits if two and sets[label][0].count("+") == 2):
            best = min(two, key=lambda key: float(two[key].sum()))
            mixture = shown(compare(bits[label].pop("mixture"), two[best]))
            main, own = min(bits[label].items(), key=lambda pair: float(pair[1].sum()))
            against.append([kind, label, best, f"{shown(compare(own, two[best]))} (main {main})", mixture])
    lines: list[str] = []
    for rows in (out, against):
        rows.insert(1, ["---"] * len(rows[0]))
        lines += ["| " + " | ".join(line) + " |" for line in rows] + [""]
    return lines[:-1]


def shown(change: Change) -> str:
    return f"**{change}**" if change.worse else str(change)


def tables(folder: Path, systems: Sequence[str]) -> list[str]:
    rows = [found for kind in KINDS if (found := row(folder, kind, systems)) is not None]
    head = ["text (documents, bytes)", "best member, fitted"]
    head += [f"{system}, defaults" for system in systems] + ["orders differ by", "mixture"]
    out = [head, ["---"] * len(head)]
    for r in rows:
        out.append(
            [f"{r['kind']} ({r['documents']}, {r['bytes']:,})", f"{r['best']} {r['bits_per_byte']:.4f}"]
            + [shown(r[system]["default"]) for system in systems]
            + [f"{100 * r['orders']:.2f} %", shown(r["mixture"])]
        )
    lines = ["| " + " | ".join(line) + " |" for line in out]
    head = ["text"] + ["mixture, from the prompt"]
    for system in systems:
        head += [f"{system}: from the prompt", f"{system}: equal weights, no covers"]
        head += [f"{system}: lost, no covers", f"{system}: lost, covers"] if system.count("+") == 1 else []
    out = [head, ["---"] * len(head)]
    for r in rows:
        line = [r["kind"], shown(r["mixture, from prompt"])]
        for system in systems:
            own = r[system]
            line += [shown(own["from prompt"]), shown(own["equal, no covers"])]
            line += [f"{100 * own['lost'][c].share:+.1f} %" for c in ("off", "on")] if "lost" in own else []
        out.append(line)
    return [*lines, "", *("| " + " | ".join(line) + " |" for line in out)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--systems", nargs="+", default=["S+G", "G+S"])
    parser.add_argument("--into", action="store_true", help="write the tables into the page")
    parser.add_argument("--all", action="store_true", help="every set of members that was measured, in twos and threes")
    arguments = parser.parse_args()
    text = "\n".join(
        twos_and_threes(arguments.folder) if arguments.all else tables(arguments.folder, arguments.systems)
    )
    if arguments.into:
        name = "twos and threes" if arguments.all else "never loses"
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        page = PAGE.read_text(encoding="utf8")
        if begin not in page:
            parser.error(f"{PAGE.name} has no place for this table; put {begin} and {end} there")
        before, rest = page.split(begin)
        PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}", encoding="utf8")
    print(text)
    print(json.dumps({"cells": len(text.splitlines())}))
