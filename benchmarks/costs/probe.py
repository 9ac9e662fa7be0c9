"""A process of its own for what needs one: peak memory, and building matrices in an empty folder.

    python -m costs.probe '{"work": "scoring" | "generation" | "matrices", ...}'

prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORKS = ("scoring", "generation", "matrices")
FEW_TOKENS = 4  # of a text: its memory is that of its prompt


def peak_bytes(device: str) -> int:
    """Return this process's peak resident memory, or what a GPU held at most.

    Linux's own count starts anew with a program; `ru_maxrss` begins with what the parent process held.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory(settings: Any, work: str) -> dict[str, Any]:
    """Score or generate at a long context; return bytes of the weights, after loading, and at the peak."""
    from costs.sides import Bench
    from costs.workloads import Document, fill, generation, scoring

    bench = Bench(settings)
    weights = sum(
        p.numel() * p.element_size() for member in bench.pair.ensemble.members for p in member.lm.model.parameters()
    )
    loaded = peak_bytes(settings.device)
    draw, source = random.Random(0), bench.source
    scale, texts = bench.scale, work == "generation"
    new_tokens = min(scale.new_tokens, FEW_TOKENS)
    room = scale.long_context - scale.new_tokens
    items = source.arc[: settings.batch_size if texts else scale.long_documents]
    contexts = [fill(source, bench.length, room - bench.length(i.prompt), draw) + i.prompt for i in items]
    if not texts:
        choices = [tuple(f" {choice}" for choice in item.choices) for item in items]
        asked = scoring([Document(*pair) for pair in zip(contexts, choices, strict=True)])
        bench.pair.loglikelihood(asked, disable_tqdm=True)
    else:
        asked = generation(contexts, [new_tokens] * len(contexts))
        bench.pair.generate_until(asked, disable_tqdm=True)
    return {
        "weights": weights,
        "after_loading": loaded,
        "peak": peak_bytes(settings.device),
        "documents": len(contexts),
        "context_tokens": [bench.length(context) for context in contexts],
        "requests": len(asked),
    }


def matrices(settings: Any) -> dict[str, Any]:
    """Build the pair's matrices by the product's command; return seconds, bytes on disk and peak memory."""
    from lm_eval_deepen.cli import build

    with tempfile.TemporaryDirectory() as folder:
        ensemble = json.dumps(settings.arguments(range(len(settings.models)), rows="embedding"))
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            build.run(argparse.Namespace(ensemble=ensemble, device=settings.device, matrix_dir=folder))
        taken = time.perf_counter() - start
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {"seconds": taken, "disk": disk, "peak": peak_bytes("cpu")}


def main() -> None:
    """Do one piece of work as the JSON argument says."""
    task = json.loads(sys.argv[1])
    if task["work"] not in WORKS:
        sys.exit(f"work {task['work']!r} is none of {', '.join(WORKS)}")
    import torch

    from costs.sides import Settings
    from costs.workloads import Scale

    torch.set_num_threads(task["threads"])
    given = task["settings"]
    scale, data = Scale(**given.pop("scale")), Path(given.pop("data"))
    settings = Settings(**{**given, "models": tuple(given["models"])}, scale=scale, data=data)
    found = matrices(settings) if task["work"] == "matrices" else memory(settings, task["work"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
