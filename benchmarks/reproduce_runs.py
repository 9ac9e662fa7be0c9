"""The paper's six benchmarks on the small pair: both orders, uniform and adaptive weights, with standard errors.

    python benchmarks/reproduce_runs.py --data DIR --out DIR [--limit 50] [--dev-limit 50] [--tasks nq piqa ...] \
        [--into docs/reproduce.md]

DIR of --data holds the JSONL samples that `task_configs/deepen_paper/paper_data.py` describes. For every benchmark,
`lm-eval-deepen tune --objective score` scores the members on its development split, then `lm-eval-deepen leaderboard`
evaluates on its test split: members alone, both orders with equal weights, and both with weights in proportion to the
development scores (DeePEn-Adapt). Both commands are as a user runs them; what is finished is kept, and the same command
goes on from there. --into puts the table between a file's markers. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lm_eval_deepen.build.demo_models import GEMMA3, SMOLLM2, prepare
from lm_eval_deepen.leaderboard.table import check_markers, write_into
from lm_eval_deepen.results.aggregation import mean_scores
from lm_eval_deepen.results.rows import Measured
from lm_eval_deepen.results.rows import rows_of as rows_against_the_best

TASKS = ("mmlu", "arc_challenge", "gsm8k", "piqa", "triviaqa", "nq")
MEMBERS = {"SmolLM2": (SMOLLM2, "HuggingFaceTB/SmolLM2-135M-Instruct"), "Gemma3": (GEMMA3, "google/gemma-3-270m")}
ORDERS = (("SmolLM2", "Gemma3"), ("Gemma3", "SmolLM2"))
TOKENS = {"gsm8k": 256}  # instead of the task's 512
METRIC = "exact_match"


def run(command: str, *arguments: str) -> None:
    """Run a subcommand of ``lm-eval-deepen``; a failure ends the run."""
    words = [sys.executable, "-m", "lm_eval_deepen.cli.main", command, *arguments]
    print(f"$ lm-eval-deepen {command} {' '.join(arguments)}", file=sys.stderr, flush=True)
    subprocess.run(words, check=True, stdout=sys.stderr)


def generation(task: str) -> dict[str, int]:
    """Return the generation arguments over a task's own."""
    return {"max_gen_toks": TOKENS[task]} if task in TOKENS else {}


def dev_scores(task: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Return the members' own scores on the development split, from the file that `tune` writes."""
    tuned = folder / "tuned.yaml"
    if tuned.is_file():
        evidence = yaml.safe_load(tuned.read_text("utf-8"))["evidence"]
        if evidence["limit"] != args.dev_limit:
            raise SystemExit(f"{tuned} is of {evidence['limit']} documents, not {args.dev_limit}; remove it")
    else:
        members = [{"name": name, "pretrained": str(prepare(model))} for name, (model, _) in MEMBERS.items()]
        ensemble = {"pretrained": members[0]["pretrained"], "members": members, **common(args)}
        given = [f"--gen-kwargs={key}={value}" for key, value in generation(task).items()]
        name = f"deepen_{task}"
        run("tune", json.dumps(ensemble), "--objective", "score", "--tasks", f"{name}_dev", "--evaluated", name,
            "--weights", args.fit, "--metric", METRIC, "--limit", str(args.dev_limit), "--output", str(tuned),
            *given)  # fmt: skip
        evidence = yaml.safe_load(tuned.read_text("utf-8"))["evidence"]
    return {name: float(next(iter(scores.values()))) for name, scores in evidence["members"].items()}


def common(args: argparse.Namespace) -> dict[str, Any]:
    """Return what all ensembles have alike."""
    return {"dtype": "float32", "batch_size": args.batch_size, "self_check": False}


def recipe(task: str, scores: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """Return the leaderboard of one benchmark: four ensembles beside the members."""
    rows: list[dict[str, Any]] = []
    for order in ORDERS:
        rows.append({"members": list(order), "name": f"{'+'.join(order)}, uniform", "weighting": "uniform"})
        if any(scores.values()):
            adaptive = {"weighting": "adaptive", "dev_scores": scores}
            rows.append({"members": list(order), "name": f"{'+'.join(order)}, adaptive", **adaptive})
    limit = math.ceil(args.limit / subjects(args.data)) if task == "mmlu" else args.limit
    column = {"task": f"deepen_{task}", "metric": METRIC, "limit": limit}
    if generation(task):
        column["gen_kwargs"] = generation(task)
    return {
        "title": f"deepen_{task}",
        "members": [{"name": name, "pretrained": hub} for name, (_, hub) in MEMBERS.items()],
        "common": common(args),
        "rows": rows,
        "tasks": [column],
    }


def subjects(data: Path) -> int:
    """Return how many subjects of MMLU there are; a limit of the group holds for each of them."""
    return sum(path.is_dir() for path in (data / "mmlu").iterdir())


def evaluate(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what is known of one benchmark: development scores, the table's rows, seconds."""
    folder = args.out / task
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    scores = dev_scores(task, folder, args)
    tuned_s = time.perf_counter() - start
    file = folder / "leaderboard.yaml"
    file.write_text(yaml.safe_dump(recipe(task, scores, args), sort_keys=False), "utf-8")
    places = [f"{name}={prepare(model)}" for name, (model, _) in MEMBERS.items()]
    run("leaderboard", str(file), "--out", str(folder / "board"), "--member", *places)
    board_s = time.perf_counter() - start - tuned_s
    rows = rows_of(folder / "board")
    return {"task": task, "dev_scores": scores, "tune_s": tuned_s, "board_s": board_s, "rows": rows}


def rows_of(board: Path) -> list[dict[str, Any]]:
    """Return what every system of a leaderboard scored over all documents, from its samples; MMLU's subjects together.

    The reference is the best member alone, the first of equals.
    """
    values, seconds = {}, {}
    for mark in sorted(board.glob("*/*.cell.json")):
        cell = json.loads(mark.read_text("utf-8"))
        samples = [mark.parent / cell["samples"][name] for name in sorted(cell["samples"])]
        values[cell["row"]] = mean_scores([score for file in samples for score in scores_of(file)])
        seconds[cell["row"]] = cell["cost"]["seconds"] / cell["documents"]
    measured = Measured(board.name, METRIC, "none", True, values)
    kept = ("system", "documents", "score", "stderr", "low", "high")
    found = []
    for row in rows_against_the_best(measured, list(MEMBERS)):
        compared = row.comparison and {key: getattr(row.comparison, key) for key in ("difference", "low", "high")}
        own = {key: getattr(row, key) for key in kept}
        found.append({**own, "comparison": compared, "seconds": seconds[row.system]})
    return found


def scores_of(samples: Path) -> list[float]:
    """Return the scores in a file of samples, in the order of the documents."""
    rows = [json.loads(line) for line in samples.read_text("utf-8").split("\n") if line.strip()]
    return [float(row[METRIC]) for row in sorted(rows, key=lambda row: row["doc_id"])]


# --- the table


def cell(row: dict[str, Any] | None) -> str:
    """Return a score in per cent and its difference to the best member, both with their intervals."""
    if row is None:
        return "none"
    shown = f"{100 * row['score']:.1f}"
    if row["low"] is not None:
        shown += f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    found = row.get("comparison")
    if not found or found["low"] is None:
        return f"{shown} (reference)"
    return f"{shown} ({100 * found['difference']:+.1f}: {100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def table(found: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Return the Markdown that goes into the documentation."""
    names = [*MEMBERS, *(f"{'+'.join(order)}, {kind}" for order in ORDERS for kind in ("uniform", "adaptive"))]
    head = ["system", *(f"`deepen_{one['task']}`, {one['rows'][0]['documents']}" for one in found)]
    lines = [head, ["---"] * len(head)]
    for name in names:
        rows = [next((row for row in one["rows"] if row["system"] == name), None) for one in found]
        lines.append([name, *map(cell, rows)])
    shares = []
    for one in found:
        scores, total = one["dev_scores"], sum(one["dev_scores"].values())
        weight = f", weights {' / '.join(f'{score / total:.2f}' for score in scores.values())}" if total else ""
        shares.append(f"{one['task']} {' / '.join(f'{100 * score:.1f}' for score in scores.values())}{weight}")
    costs = [["benchmark", *names], ["---"] * (len(names) + 1)]
    for one in found:
        seconds = {row["system"]: row["seconds"] for row in one["rows"]}
        costs.append([one["task"], *(f"{seconds[name]:.2f}" if name in seconds else "" for name in names)])
    told = (
        "Per cent with 95 % intervals; in brackets the difference to the best member, paired by document, with its "
        "95 % interval (not corrected over the table). The first documents of the test splits"
        f"{', GSM8K with 256 tokens' if any(one['task'] == 'gsm8k' for one in found) else ''}; batch size "
        f"{args.batch_size}, fp32. The main member is named first."
    )
    weights = (
        f"Adaptive weights, from at most {args.dev_limit} documents of the development splits. {' / '.join(MEMBERS)} "
        f"alone there, in per cent: {'; '.join(shares)}."
    )
    cost = "Seconds per document on two CPU cores with other jobs running:"
    parts = [lines, costs]
    first, second = ("\n".join(f"| {' | '.join(line)} |" for line in part) for part in parts)
    return "\n\n".join([first, told, weights, cost, second])


def main() -> None:
    """Tune and evaluate every benchmark, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the samples of the benchmarks")
    parser.add_argument("--out", type=Path, required=True, help="where results go, and are looked for")
    parser.add_argument("--limit", type=int, default=50, help="documents of every test split")
    parser.add_argument("--dev-limit", type=int, default=50, help="documents of every development split")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--fit", choices=["keep", "adaptive"], default="keep",
        help="what tune scores beside the members alone: equal weights, or adaptive ones too (slower; same weights)",
    )  # fmt: skip
    parser.add_argument("--into", type=Path, help="Markdown file with the markers of a leaderboard")
    args = parser.parse_args()
    if args.into is not None:
        check_markers(args.into)
    os.environ["LM_EVAL_DEEPEN_DATA"] = str(args.data.absolute())
    found = []
    for task in args.tasks:
        found.append(evaluate(task, args))
        print(f"{task}: tune {found[-1]['tune_s']:.0f} s, leaderboard {found[-1]['board_s']:.0f} s", flush=True)
    text = table(found, args)
    print(text)
    if args.into is not None:
        write_into(args.into, text)
    versions = {package: version(package) for package in ("torch", "transformers", "lm_eval")}
    print(json.dumps({"limit": args.limit, "dev_limit": args.dev_limit, **versions, "benchmarks": found}))


if __name__ == "__main__":
    main()
