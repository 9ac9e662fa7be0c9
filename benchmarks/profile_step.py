"""Where the time of scoring and decoding goes, by cumulative wall time of parts that exclude each other.

    python benchmarks/profile_step.py [--models A B] [--speculate lookup] [--documents 12] [--tokens 32]

A few documents with few-shots that differ, zero-shot documents, and a batch of texts (without their prompts' forward
passes, which a run of one token measures). Prints a table for each, and one JSON line last. The clock is read at every
part's ends, which on a GPU means to wait for it: shares are right, the sum is slower than without.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from cost import machine, parser_of, settings_of  # noqa: E402
from costs.figures import rounded  # noqa: E402
from costs.sides import Bench, endless  # noqa: E402
from costs.timers import OTHER, Timers, members_of, sections  # noqa: E402
from costs.workloads import generation, prompts, scoring  # noqa: E402

from lm_eval_deepen.harness.model import DeepenLM  # noqa: E402


def profile(bench: Bench, model: DeepenLM, action: Callable[[], Any]) -> tuple[Timers, list[str]]:
    """Run `action` under timers; return them, and what could not be timed."""
    timers = Timers(bench.settle)
    with sections(timers) as missing, timers.forwards(members_of(model)), timers.section(OTHER):
        action()
    return timers, missing


def table(title: str, seconds: Mapping[str, float], calls: Mapping[str, int]) -> str:
    """Return the parts of a run, the largest first."""
    total = sum(seconds.values())
    lines = [f"{title}: {total:.2f} s"]
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        lines.append(f"  {name:44} {value:8.3f} s {100 * value / total:6.1f} % {calls[name]:8d} calls")
    return "\n".join(lines)


def difference(longer: Timers, shorter: Timers) -> tuple[dict[str, float], dict[str, int]]:
    """Return seconds and calls of the steps that one run has more than another."""
    names = longer.seconds.keys()
    seconds = {name: longer.seconds[name] - shorter.seconds.get(name, 0.0) for name in names}
    return seconds, {name: longer.calls[name] - shorter.calls.get(name, 0) for name in names}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Profile, print the tables and the JSON line, and return the latter."""
    parser = parser_of(__doc__ or "")
    parser.add_argument("--documents", type=int, default=12, help="to score (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="to generate (%(default)s)")
    parser.add_argument("--speculate", help="as the ensemble's option")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    bench = Bench(settings_of(args))
    options = {"speculate": args.speculate} if args.speculate else {}
    model = bench.ensemble(tuple(range(len(bench.settings.models))), **options)
    texts = prompts(bench.source, bench.scale.prompts)
    found: dict[str, Any] = {}
    missing: list[str] = []

    def report(name: str, title: str, seconds: Mapping[str, float], calls: Mapping[str, int]) -> None:
        print(table(title, seconds, calls), flush=True)
        found[name] = {part: {"seconds": seconds[part], "calls": calls[part]} for part in seconds}

    model.loglikelihood(scoring(bench.shapes["arc_zero"].documents[:1]), disable_tqdm=True)  # warm-up
    for name in ("arc_differing", "arc_zero"):
        documents = bench.shapes[name].documents[: args.documents]
        asked = scoring(documents)
        timers, missing = profile(bench, model, lambda asked=asked: model.loglikelihood(asked, disable_tqdm=True))
        report(name, f"scoring {name}, {len(documents)} documents", timers.seconds, timers.calls)
    with endless([member.lm for member in model.ensemble.members]):
        runs = []
        for tokens in (1, 1 + args.tokens):
            asked = generation(texts, [tokens] * len(texts))
            run, missing = profile(bench, model, lambda asked=asked: model.generate_until(asked, disable_tqdm=True))
            runs.append(run)
    report("decoding", f"decoding {args.tokens} steps, batch {len(texts)}", *difference(runs[1], runs[0]))
    document = rounded(
        {
            "benchmark": "profile",
            "machine": machine(),
            "dtype": args.dtype,
            "device": args.device,
            "parts": found,
            "not_in_this_version": missing,
        }
    )
    print(json.dumps(document))
    return document


if __name__ == "__main__":
    main()
