"""Runs in processes of their own, alone or as the ranks of one launch. See `worker` for what they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from ports import free_port

HERE = Path(__file__).resolve().parent
PATIENCE_S = 600  # a hang fails the test instead of stopping the suite
KEPT = ("doc_id", "arguments", "resps", "filtered_resps", "prompt_hash", "doc_hash", "filter")


def compact(found: dict[str, Any] | None) -> Any:
    """Return metrics and samples of a run as plain JSON data; None where another process has them."""
    if found is None:
        return None
    samples = {
        task: [{key: row[key] for key in KEPT} for row in sorted(rows, key=lambda row: (row["doc_id"], row["filter"]))]
        for task, rows in found["samples"].items()
    }
    data = {"results": found["results"], "samples": samples, "deepen": found["config"]["deepen"]}
    return json.loads(json.dumps(data, default=str))


def job_of(folder: Path, paths: list[Path], tasks: Path, steps: list[list[Any]], **ensemble: Any) -> dict[str, Any]:
    """Return the job of running `steps` (label, method of `worker.Worker`, arguments) with an ensemble."""
    return {
        "members": [str(path) for path in paths],
        "ensemble": {"batch_size": 2, **ensemble},
        "tasks": str(tasks),
        "log": str(folder / "answers.log"),
        "out": str(folder),
        "steps": steps,
    }


def run_worker(job: dict[str, Any], ranks: int = 1, **environment: str) -> list[subprocess.CompletedProcess]:
    """Run a job in one process, or in several that form one launch, and return how each of them ended."""
    port = free_port()
    children = []
    for rank in range(ranks):
        place = {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        children.append(
            subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), json.dumps(job)],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **(place if ranks > 1 else {}), **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [child.communicate(timeout=PATIENCE_S) for child in children]
    finally:
        for child in children:
            child.kill()
    return [
        subprocess.CompletedProcess(child.args, child.returncode, out, err)
        for child, (out, err) in zip(children, outputs, strict=True)
    ]


def reports(folder: Path, ended: list[subprocess.CompletedProcess]) -> list[dict[str, Any]]:
    """Return what every process of a finished job reported."""
    for process in ended:
        assert process.returncode == 0, process.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(ended))]


def note_group(file: Path) -> None:
    """Write what is left of a process group. Register it at exit before anything else, so that it is called last."""
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    left = sorted(name for name in threads if "gloo" in name)
    file.write_text(json.dumps({"group": torch.distributed.is_initialized(), "threads": left}))


def left_of_group(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Return what every process has noted at its end."""
    return [json.loads((folder / f"{rank}.group").read_text()) for rank in range(ranks)]


def log_of(job: dict[str, Any], label: str) -> list[tuple[int, str]]:
    """Return the answers that a step has logged: process and the request's key in the response cache."""
    lines = (line.split() for line in Path(job["log"]).read_text().splitlines())
    return [(int(rank), key) for rank, step, key in lines if step == label]
