"""What an ensemble costs beside its members under the harness's own `hf`: every figure of docs/performance.md.

    python benchmarks/cost.py                                    # the demo pair on the CPU, fp32
    python benchmarks/cost.py --device cuda --dtype bfloat16     # the same on a GPU
    python benchmarks/cost.py --only arc_zero,fusion             # single measures
    python benchmarks/cost.py --out cost                         # keeps finished parts; run again, it goes on
    python benchmarks/cost.py --quick --models A B               # a small run, to see that it works

Prints a table, and one JSON line last. Progress goes to stderr.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import platform  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from dataclasses import asdict, replace  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from costs.decoding import measure_fusion, measure_generation, measure_sampling, measure_third, measure_unequal  # noqa: E402
from costs.figures import Figure, plain, rounded  # noqa: E402
from costs.parts import Parts  # noqa: E402
from costs.resources import measure_load, measure_matrices, measure_memory  # noqa: E402
from costs.scoring import measure_nodes, measure_shape  # noqa: E402
from costs.sides import Bench, Settings, cores, head_share, parameters  # noqa: E402
from costs.workloads import QUICK, Scale  # noqa: E402

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

MEASURES: dict[str, Callable[[Bench], list[Figure]]] = {
    "memory": lambda bench: measure_memory(bench.settings),
    "matrices": lambda bench: measure_matrices(bench.settings),
    "load": measure_load,
    "arc_differing": lambda bench: measure_shape(bench, "arc_differing"),
    "arc_fixed": lambda bench: measure_shape(bench, "arc_fixed"),
    "arc_zero": lambda bench: measure_shape(bench, "arc_zero"),
    "piqa": lambda bench: measure_shape(bench, "piqa"),
    "nodes": measure_nodes,
    "generation": measure_generation,
    "unequal": measure_unequal,
    "fusion": measure_fusion,
    "third": measure_third,
    "sampling": measure_sampling,
}
OWN_PROCESS = ("memory", "matrices")
QUIET_LOAD = 0.7  # above it, a run's times say more about the other processes


def parser_of(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that say what is run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="FOLDER", help="members, the main one first (the demo's pair)")
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA,
        help="folder of JSONL samples (%(default)s); without it, questions of the same lengths are made up",
    )
    parser.add_argument("--quick", action="store_true", help="a few short documents: shows that it works, no more")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8, help="of the ensemble (%(default)s)")
    parser.add_argument("--threads", type=int, default=cores(), help="of both sides (all cores: %(default)s)")
    parser.add_argument("--matrix-dir", help="where relative matrices are (the user's cache)")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = parser_of(__doc__ or "")
    parser.add_argument("--only", metavar="NAME,...", help=f"of {', '.join(MEASURES)}")
    parser.add_argument("--full", action="store_true", help="time hf on all documents, nothing scaled (CUDA: always)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="keep every finished part there; what is there "
        "already, from the same settings, machine and code, is not measured again",
    )
    parser.add_argument("--repeats", type=int, help="of every timed comparison")
    args = parser.parse_args(argv)
    args.only = args.only.split(",") if args.only else list(MEASURES)
    if unknown := sorted(set(args.only) - set(MEASURES)):
        parser.error(f"--only {', '.join(unknown)}: choose from {', '.join(MEASURES)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no GPU here")
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    """Return what is compared; converts the demo's models where none are given."""
    models = args.models
    if not models:
        from lm_eval_deepen.build.demo_models import DEMO_MODELS, prepare

        models = [str(prepare(model)) for model in DEMO_MODELS]
    scale = QUICK if args.quick else Scale()
    if getattr(args, "full", False) or args.device.startswith("cuda"):
        scale = scale.full()
    if getattr(args, "repeats", None):
        scale = replace(scale, repeats=args.repeats)
    return Settings(
        models=tuple(models),
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch_size,
        scale=scale,
        data=args.data.resolve(),
        matrix_dir=args.matrix_dir,
        judged=not args.quick,
    )


def machine() -> dict[str, Any]:
    """Return what figures depend on beside the code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": cores(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Return what software a run uses."""
    packages = ("torch", "transformers", "lm_eval", "lm_eval_deepen")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def sources() -> str:
    """Return a digest of the package's and the benchmark's own files."""
    import lm_eval_deepen

    files = [*Path(lm_eval_deepen.__file__).parent.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(files))).hexdigest()


def run(settings: Settings, only: Sequence[str], kept: Parts) -> tuple[Bench, list[Figure], float]:
    """Take the measures, those that need a process of their own before anything is loaded here.

    Returns:
        What was run, the figures, and the seconds that they took, those of earlier runs included.
    """
    bench, figures, warm, start, earlier = Bench(settings), [], False, time.perf_counter(), 0.0
    for name in sorted(only, key=list(MEASURES).index):
        found = kept.read(name)
        if found is not None:
            earlier += sum(figure.seconds for figure in found)
            say(start, f"{name}: measured before")
        else:
            say(start, f"{name} ...")
            if name not in OWN_PROCESS and not warm:
                bench.warm_up()
                warm = True
            begin = time.perf_counter()
            measured = MEASURES[name](bench)
            taken = time.perf_counter() - begin
            found = [
                replace(figure, seconds=taken / len(measured), goal=figure.goal if settings.judged else None)
                for figure in measured
            ]
            kept.write(name, found)
            say(start, f"{name}, {taken:.0f} s: " + ", ".join(f"{f.name} {f.value}" for f in found))
        figures += found
    return bench, figures, earlier + time.perf_counter() - start


def say(start: float, text: str) -> None:
    """Print progress with the time since `start`."""
    passed = round(time.perf_counter() - start)
    print(f"[{passed // 60:2d}:{passed % 60:02d}] {text}", file=sys.stderr, flush=True)


def document(bench: Bench, figures: Sequence[Figure], seconds: float, load: float) -> dict[str, Any]:
    """Return the JSON line's content.

    Args:
        bench: what was run.
        figures: what was found.
        seconds: of the whole run.
        load: the machine's load average at its start, which is what others did.
    """
    settings = bench.settings
    loaded = "hf" in vars(bench)
    members = [
        {
            "name": name,
            "parameters": parameters(member.lm.model),
            "head_share": head_share(member.lm.model),
            "runner": type(member.runner).__name__,
        }
        for name, member in zip(settings.names, bench.pair.ensemble.members if loaded else (), strict=loaded)
    ]
    return rounded(
        {
            "benchmark": "cost",
            "machine": {**machine(), "load_average_before": load},
            "versions": versions(),
            "device": settings.device,
            "dtype": settings.dtype,
            "batch_size": settings.batch_size,
            "hf_batch_sizes": "the faster of 1 and 8",
            "members": members or list(settings.names),
            "data": bench.source.kind,
            "scale": vars(settings.scale),
            "seconds": seconds,
            "figures": [figure.as_dict() for figure in figures],
        }
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print the table and the JSON line, and return the latter."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        print(f"load average {load:.1f}: others are using this machine, ratios of times will be wrong", file=sys.stderr)
    settings = settings_of(args)
    about = {
        **asdict(settings),
        "data": str(settings.data),
        "machine": machine(),
        "versions": versions(),
        "code": sources(),
    }
    bench, figures, seconds = run(settings, args.only, Parts(args.out, rounded(about)))
    found = document(bench, figures, seconds, load)
    print(plain(found["figures"]))
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
