"""Does the ensemble ever lose to its better member? Bits per byte on nine kinds of text, every main member.

    python benchmarks/never_loses.py --models S=DIR G=DIR [Q=DIR] --data DATA --out DIR [--systems S+G G+S]
    python benchmarks/never_loses_table.py DIR --into

The first command measures what DIR lacks, one (system, kind, split) after the other; the second prints the tables.
What is stored is each expert's log-probability of every token, so that any prior over the experts can be judged later
without the models. A member is compared at the temperature that is best for it on the dev split, the ensemble as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lm_eval_deepen.engine import Ensemble
from lm_eval_deepen.engine.bits_per_byte import Document, Reading, look_up
from lm_eval_deepen.engine.stretches import StretchPrompter, read_stretches
from lm_eval_deepen.harness.model import configure
from lm_eval_deepen.weighting.bayes import Bayes
from lm_eval_deepen.weighting.experts import Experts

KINDS = ("prose", "code", "piqa", "arc", "gsm8k", "nq", "nq, 5 shots", "arc, 5 shots", "gsm8k, 5 shots")
TEMPERATURES = tuple(round(0.7 + 0.05 * n, 2) for n in range(17))
NODES = 512


def lines(data: Path, folder: str, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / folder / f"{split}.jsonl").read_text(encoding="utf8").splitlines()]


def shots(data: Path, folder: str, render: Any) -> str:
    """Five documents: the task's few-shot ones, and as many of the last of its dev split as are missing."""
    path = data / folder / "fewshot.jsonl"
    found = lines(data, folder, "fewshot")[:5] if path.exists() else []
    found += lines(data, folder, "dev")[len(found) - 5 :] if len(found) < 5 else []
    return "".join(render(row)[0] + render(row)[1] + "\n\n" for row in found)


def nq(row: dict[str, Any]) -> tuple[str, str]:
    return f"Question: {row['question']}\nAnswer:", f" {row['answer'][0]}"


def arc(row: dict[str, Any]) -> tuple[str, str]:
    return f"Question: {row['question']}\nAnswer:", f" {row[row['answer']]}"


def gsm8k(row: dict[str, Any]) -> tuple[str, str]:
    return f"Question: {row['question']}\nAnswer:", " " + row["answer"]


def documents(data: Path, kind: str, split: str, count: int) -> list[Document]:
    """At most `count` documents of a kind."""
    if kind == "prose":
        found: Iterator[Document] = prose(split)
    elif kind == "code":
        found = code(split)
    elif kind == "piqa":
        rows = lines(data, "piqa", split)
        found = (Document(" " + row[row["answer"]].strip(), row["question"].strip()) for row in rows)
    elif kind == "arc":
        found = (Document(row["question"].strip()) for row in lines(data, "arc_challenge", split))
    elif kind == "nq":
        found = (Document(f" {r['question']}\nAnswer: {r['answer'][0]}", "Question:") for r in lines(data, "nq", split))
    elif kind == "gsm8k":
        found = (Document(text, context) for context, text in map(gsm8k, lines(data, "gsm8k", split)))
    else:
        folder, render = {"nq": ("nq", nq), "arc": ("arc_challenge", arc), "gsm8k": ("gsm8k", gsm8k)}[
            kind.split(",")[0]
        ]
        before = shots(data, folder, render)
        held = lines(data, folder, split)[: -5 if split == "dev" else None]
        found = (Document(text, before + context) for context, text in map(render, held))
    return list(itertools.islice(found, count))


def half(name: str, split: str) -> bool:
    """Whether a text of this name belongs to a split; half of all do."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 2 == (split == "test")


def prose(split: str) -> Iterator[Document]:
    """Paragraphs of Python's language reference, which every Python has."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if not half(name, split):
            continue
        kept = 0
        for paragraph in topics[name].split("\n\n"):
            marked = any(
                line.startswith((" ", "*", "=", "|", "+", "-")) or "::=" in line for line in paragraph.splitlines()
            )
            text = " ".join(paragraph.split())
            if not marked and 150 <= len(text) <= 400 and kept < 2:
                kept += 1
                yield Document(text)


def code(split: str) -> Iterator[Document]:
    """The first function of modules of Python's standard library."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if not half(path.name, split):
            continue
        source = path.read_text(encoding="utf8").splitlines(keepends=True)
        start = next((n for n, line in enumerate(source) if line.startswith("def ")), None)
        if start is None:
            continue
        stop = next(
            (n for n in range(start + 1, len(source)) if source[n].strip() and source[n][0] not in " #\n"), len(source)
        )
        text = "".join(source[start:stop]).rstrip() + "\n"
        if 150 <= len(text) <= 800:
            yield Document(text)


def grid(members: int) -> Experts:
    """All experts whose priors are to be compared: for a pair a finer grid and more powers than those that ship."""
    if members > 2:
        return Experts.of_steps(members, geometric=True)
    shares = sorted({n / 10 for n in range(11)} | {0.25, 0.75})
    found = [((share, 1 - share), False, 1.0) for share in shares]
    quarters = (0.0, 0.25, 0.5, 0.75, 1.0)
    found += [((share, 1 - share), True, power) for power in (1.0, 0.92, 0.85, 0.8) for share in quarters]
    return Experts.of(found)


def measure_own(ensemble: Ensemble, found: list[Document]) -> dict[str, Any]:
    """What the main member alone gives to the tokens, at every temperature."""
    reading = Reading.of(replace(ensemble, config=ensemble.config.replace(covers="off")), found, members=1)
    return {
        "bytes": torch.tensor([document.num_bytes for document in found]),
        "owner": torch.tensor([position.document for position in reading.positions]),
        "own": reading.own_logp(TEMPERATURES),
    }


def measure(ensemble: Ensemble, found: list[Document], states: Sequence[str]) -> dict[str, Any]:
    """What every system that is compared gives to the tokens of some documents, in nats, with covers on or off."""
    reading = Reading.of(ensemble, found)
    experts = grid(len(ensemble.members))
    out: dict[str, Any] = {
        "bytes": torch.tensor([document.num_bytes for document in found]),
        "owner": torch.tensor([position.document for position in reading.positions]),
        "own": reading.own_logp(TEMPERATURES),
        "weights": experts.weights,
        "geometric": experts.geometric,
        "power": experts.power,
    }
    alone = Experts.of_steps(len(ensemble.members), geometric=False)  # members alone and equal weights are enough there
    out["off_weights"] = alone.weights
    for covers in states:
        some = experts if covers == "on" else alone
        parts: list[torch.Tensor] = []
        for part, raw, index, present, target in reading._chunks():
            logp = [rows[: len(part)] for rows in raw]
            for m, reader in ensemble.covers.items() if covers == "on" else ():
                plans = [reading.positions[i].plans[m] for i in part]
                logp[m] = reader.rows(logp[m], plans, partial(look_up, raw[m], index[m]))
            with torch.inference_mode():
                rows = ensemble.fuser.experts(logp, some.among(present), some)
                parts.append(rows.at(torch.arange(len(part)), target).cpu())
        out[covers] = torch.cat(parts)  # [n, K]
    return out


def measure_stretches(ensemble: Ensemble, found: list[Document]) -> dict[str, Any]:
    prompter = StretchPrompter(ensemble)
    spans = [prompter.span(d.context, d.text) if d.context else prompter.rolling(d.text)[0] for d in found]
    powers = ensemble.weigher.of_stretches(len(ensemble.active)).powers
    read = dict(read_stretches(ensemble.active, spans, NODES, powers))
    return {"stretches": [(read[n].logp, read[n].evidence) for n in range(len(found))],
            "bytes": torch.tensor([document.num_bytes for document in found])}  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    models = dict(pair.split("=", 1) for pair in arguments.models)
    arguments.out.mkdir(parents=True, exist_ok=True)
    systems = arguments.systems or ["+".join(order) for order in itertools.permutations(models, 2)]
    loaded: dict[str, Any] = {}
    for system in systems:
        names = system.split("+")
        config = configure(
            {
                "pretrained": models[names[0]],
                "members": [{"name": name, "pretrained": models[name]} for name in names],
                "dtype": "float32",
                "covers": "on",
                "weighting": "bayes",
            }
        )
        todo = [
            (split, kind, arguments.out / f"{system}.{kind}.{split}.pt")
            for split in arguments.splits
            for kind in arguments.kinds
        ]
        if all(path.exists() for _, _, path in todo):
            continue
        for name, member in zip(names, config.members, strict=True):
            if name not in loaded:
                from lm_eval_deepen.member import load_member

                loaded[name] = load_member(member, "cpu")
        ensemble = Ensemble.assemble(config, [loaded[name] for name in names])
        assert isinstance(ensemble.weigher, Bayes)
        for split, kind, path in todo:
            if path.exists():
                continue
            started = time.time()
            found = documents(arguments.data, kind, split, arguments.documents)
            if split == "dev" and not arguments.whole_dev:
                result = measure_own(ensemble, found)
            else:
                states = ["on"] if arguments.covers_alone else ["on", "off"]
                result = measure(ensemble, found, states) | measure_stretches(ensemble, found)
            torch.save(result, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
            print(json.dumps({"system": system, "kind": kind, "split": split, "documents": len(found),
                              "seconds": round(time.time() - started, 1)}), flush=True)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME=DIR")
    parser.add_argument("--systems", nargs="+", metavar="A+B")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--whole-dev", action="store_true", help="measure ensembles on the dev split, too")
    parser.add_argument("--covers-alone", action="store_true", help="no ensembles without covers: enough for --all")
    parser.add_argument("--splits", nargs="+", default=["dev", "test"], choices=["dev", "test"])
    run(parser.parse_args())
