"""One member against `--model hf` on the sample tasks: largest difference per scored token, and texts that differ.

    python benchmarks/parity.py --data DIR [--limit 4] [--tasks ...]
    python benchmarks/parity.py --architectures [MODEL_TYPE ...] [--into docs/conformance.md]

The second form compares tiny random models of every architecture that transformers can make, on all three types.
DIR holds the JSONL samples that `task_configs/samples` reads. Prints a line per model and task, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager

from lm_eval_deepen.build.demo_models import GEMMA3, SMOLLM2, prepare
from lm_eval_deepen.cli.paths import data_folder

BEGIN, END = "<!-- architectures -->", "<!-- end of architectures -->"


def samples(model: str, arguments: dict[str, Any], args: argparse.Namespace) -> dict[str, list[Any]]:
    """Return every task's responses in order of documents."""
    manager = TaskManager(include_path=str(data_folder("tasks")), metadata={"data_dir": args.data})
    results = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=args.tasks,
        limit=args.limit,
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
        task_manager=manager,
    )
    return {task: [(s["arguments"], s["resps"]) for s in found] for task, found in results["samples"].items()}


def compare(tokenizer: Any, ours: list[Any], theirs: list[Any]) -> dict[str, float]:
    """Return the largest difference per scored token (nats), differing texts and differing is_greedy flags."""
    worst, texts, greedy = 0.0, 0, 0
    for (asked, got), (_, expected) in zip(ours, theirs, strict=True):
        for arguments, (a,), (b,) in zip(asked, got, expected, strict=True):
            if isinstance(a, str):
                texts += a != b
                continue
            (a, flag), (b, other) = (a, b) if isinstance(a, (list, tuple)) else ((a, None), (b, None))
            greedy += flag != other
            tokens = len(tokenizer.encode(arguments[-1] if flag is not None else arguments[0]))
            worst = max(worst, abs(a - b) / max(tokens, 1))
    return {"nats_per_token": worst, "texts": texts, "greedy": greedy}


def of_architectures(names: Sequence[str], page: Path | None) -> None:
    """Compare tiny models of some architectures, or of all, with `hf`; write their rows between a page's markers."""
    import architectures

    found = []
    for row in architectures.rows(names):
        found.append(row)
        print(f"{row.name:28} {row.path:12} {dict(row.outcomes) or row.why}", flush=True)
    table = architectures.table(found)
    if page is not None:
        before, rest = page.read_text(encoding="utf8").split(BEGIN)
        inside, after = rest.split(END)
        table = architectures.merged(inside, found) if names else table
        page.write_text(
            f"{before}{BEGIN}\n\n{architectures.summary(table)}\n\n{table}\n\n{END}{after}", encoding="utf8"
        )
    print(json.dumps({"transformers": version("transformers"), "summary": architectures.summary(table)}))


def main() -> None:
    """Compare both models of the demo, alone and with all weight on the main member of a pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder of the benchmarks' samples")
    parser.add_argument("--architectures", nargs="*", metavar="MODEL_TYPE", help="compare tiny models of these; of all")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="with --architectures: write the table into a page")
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--tasks", nargs="+", default=["deepen_samples"])
    args = parser.parse_args()
    if args.architectures is not None:
        of_architectures(args.architectures, args.into)
        return
    if args.data is None:
        parser.error("--data is missing: the folder of the benchmarks' samples")
    folders = {model.name: str(prepare(model)) for model in (SMOLLM2, GEMMA3)}
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        other = next(path for key, path in folders.items() if key != name)
        theirs = samples("hf", {"pretrained": folder, "dtype": "float32"}, args)
        tokenizer = lm_eval.models.huggingface.transformers.AutoTokenizer.from_pretrained(folder)
        alone = {"pretrained": folder, "dtype": "float32"}
        for label, arguments in (
            ("alone", alone),
            ("weights 1+0", {**alone, "members": [folder, other], "weights": [1.0, 0.0]}),
        ):
            ours = samples("deepen", arguments, args)
            for task in theirs:
                result = compare(tokenizer, ours[task], theirs[task])
                found[f"{name} {label} {task}"] = result
                print(f"{name:24} {label:12} {task:24} {result}", flush=True)
    versions = {package: version(package) for package in ("torch", "transformers", "lm_eval")}
    print(json.dumps({"limit": args.limit, "threads": torch.get_num_threads(), **versions, "parity": found}))


if __name__ == "__main__":
    main()
