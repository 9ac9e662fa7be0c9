"""Memory, and the time and space of full matrices: each measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from costs.figures import Figure
from costs.sides import Bench, BenchmarkError, Settings
from lm_eval_deepen.harness.model import DeepenLM

GB, MB = 1e9, 1e6


def probe(settings: Settings, work: str) -> dict[str, Any]:
    """Run `costs.probe` and return what it found.

    Raises:
        BenchmarkError: it failed; with the end of what it wrote.
    """
    given = {**asdict(settings), "data": str(settings.data)}
    task = json.dumps({"work": work, "threads": torch.get_num_threads(), "settings": given})
    command = [sys.executable, "-m", "costs.probe", task]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"the process that measures {work} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(settings: Settings) -> list[Figure]:
    """Measure the peak of resident memory above the weights, scoring and generating at a long context."""
    figures = []
    for work in ("scoring", "generation"):
        found = probe(settings, work)
        value = (found["peak"] - found["weights"]) / GB
        label = f"peak memory above the weights, {work}, context of {settings.scale.long_context} tokens, batch "
        label += str(settings.batch_size)
        details = {
            key: value / GB if key in ("weights", "after_loading", "peak") else value for key, value in found.items()
        }
        figures.append(Figure(f"memory_{work}", label, value, unit="GB", goal=2.0, details=details))
    return figures


def measure_load(bench: Bench) -> list[Figure]:
    """Measure a warm load of all members as an ensemble, over the sum of their loads under `hf`."""
    settings, count = bench.settings, len(bench.settings.models)

    def ours() -> None:
        DeepenLM(device=settings.device, **settings.arguments(range(count)))

    def theirs() -> None:
        for model in settings.models:
            HFLM(pretrained=model, device=settings.device, dtype=settings.dtype, batch_size=1)

    ours(), theirs()  # files are in memory then, and what is kept of tokenizers in its folder
    ratios, by_processor, seconds = [], [], []
    for turn in range(bench.scale.repeats):
        spent = {}
        for action in (ours, theirs) if turn % 2 else (theirs, ours):
            took = bench.seconds(action)
            spent[action] = (took, bench.cpu_seconds)
        ratios.append(spent[ours][0] / spent[theirs][0])
        by_processor.append(spent[ours][1] / spent[theirs][1])
        seconds.append(spent[ours][0])
    details = {"cpu_time_ratio": median(by_processor), "seconds": seconds}
    label = "a warm load of the ensemble / sum of both under hf"
    return [Figure("load", label, median(ratios), min(ratios), max(ratios), goal=1.25, details=details)]


def measure_matrices(settings: Settings) -> list[Figure]:
    """Measure a build of all matrices in an empty folder: time of the whole command, peak memory, files."""
    found = probe(settings, "matrices")
    rows = (
        ("time", "min", found["seconds"] / 60, 6.0),
        ("peak memory", "GB", found["peak"] / GB, 4.0),
        ("size on disk", "MB", found["disk"] / MB, 130.0),
    )
    return [
        Figure(
            f"matrices_{what.split()[0]}",
            f"full matrices from embeddings, built once: {what}",
            value,
            unit=unit,
            goal=goal,
        )
        for what, unit, value, goal in rows
    ]
