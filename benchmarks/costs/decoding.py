"""Generation: equal and unequal lengths against `hf`, the share of fusion in a step, a third member."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from lm_eval.api.instance import Instance

from costs.figures import Figure, spread
from costs.scoring import alternate
from costs.sides import HF_BATCH_SIZES, Bench, BenchmarkError, endless, rows_read
from costs.timers import Timers, members_of
from costs.workloads import generation, prompts, scoring, unequal_lengths
from lm_eval_deepen.harness.model import DeepenLM

GOALS = {"off": 1.1, "lookup": 0.8, "draft": 0.8}


def _all_models(bench: Bench, *others: DeepenLM) -> list[Any]:
    """Return every loaded model, each once: ensembles of one benchmark share members."""
    ensembles = (bench.pair, *others)
    found = [*bench.hf, *(member.lm for model in ensembles for member in model.ensemble.members)]
    return list({id(lm): lm for lm in found}.values())


def measure_generation(bench: Bench) -> list[Figure]:
    """Time greedy generation of equal lengths, one batch, with every kind of speculation there is."""
    scale = bench.scale
    lengths = [scale.new_tokens] * scale.prompts
    asked = generation(prompts(bench.source, scale.prompts), lengths)
    speculates = bench.accepts(speculate="off")
    whole = tuple(range(len(bench.settings.models)))
    modes = {mode: bench.ensemble(whole, speculate=mode) for mode in GOALS} if speculates else {"off": bench.pair}
    ours: dict[str, list[float]] = {mode: [] for mode in modes}
    texts: dict[str, list[str]] = {}
    theirs: list[list[float]] = [[] for _ in bench.hf]
    sizes = [0] * len(bench.hf)

    def generate(mode: str) -> None:
        if mode != "off" and len(ours[mode]) == scale.drafted:
            return
        taken, texts[mode] = _checked(bench, modes[mode], asked, exact=mode == "off")
        ours[mode].append(taken)

    def hf() -> None:
        for m in range(len(bench.hf)):
            tried = (sizes[m],) if sizes[m] else HF_BATCH_SIZES
            taken = {size: _hf_seconds(bench, m, size, asked) for size in tried}
            sizes[m] = min(taken, key=lambda size: taken[size])
            theirs[m].append(taken[sizes[m]])

    with endless(_all_models(bench, *modes.values())):
        for model in modes.values():  # first runs of this size are up to twice as slow: memory grows
            bench.generate(model, generation(prompts(bench.source, scale.prompts), [8] * scale.prompts))
        alternate(bench, "generation", [hf, *(lambda mode=mode: generate(mode) for mode in modes)])
    sums = [sum(times) for times in zip(*theirs, strict=True)]
    named = dict(zip(bench.settings.names, theirs, strict=True))
    figures = []
    for mode, goal in GOALS.items():
        name, label = f"generation_{mode}", _label(scale.new_tokens, scale.prompts, mode)
        if mode not in modes:
            figures.append(Figure(name, label, None, goal=goal, details={"reason": "no option `speculate`"}))
            continue
        details = {
            "ours_seconds": ours[mode],
            "hf_seconds": named,
            "hf_batch_sizes": sizes,
            "texts_as_without_speculation": sum(a == b for a, b in zip(texts[mode], texts["off"], strict=True)),
            "texts": len(lengths),
            "ratio_of_medians": median(ours[mode]) / median(sums),
            "counts": _speculation(modes[mode]),
        }
        ratios = [a / b for a, b in zip(ours[mode], sums, strict=False)]  # speculation has fewer repeats
        figures.append(Figure(name, label, goal=goal, details=details, **spread(ratios)))
    return figures


def _hf_seconds(bench: Bench, m: int, size: int, asked: list[Instance]) -> float:
    """Return the seconds of texts of equal lengths under `hf`; one by one, some of them stand for all."""
    timed = asked if size > 1 else asked[: bench.scale.hf_single]
    return bench.hf_generate(m, size, timed) * len(asked) / len(timed)


def _label(tokens: int, rows: int, mode: str) -> str:
    kind = "" if mode == "off" else f", speculate={mode}"
    return f"greedy generation, {tokens} new tokens, batch {rows}{kind}: ensemble / sum of both under hf"


def _speculation(model: DeepenLM) -> dict[str, Any]:
    found = model.get_model_info()["deepen"]
    return {key: value for key, value in found.items() if any(w in key for w in ("specul", "draft", "accept"))}


def _checked(bench: Bench, model: DeepenLM, asked: list[Instance], exact: bool) -> tuple[float, list[str]]:
    """Generate and return seconds and texts; where `exact`, one distribution per token must have been read."""
    before = rows_read(model)
    taken, texts = bench.generate(model, asked)
    rows, wanted = rows_read(model) - before, sum(request.args[1]["max_gen_toks"] for request in asked)
    if rows < wanted or (exact and rows != wanted):
        raise BenchmarkError(f"{rows} steps of the ensemble for {wanted} tokens: lengths are not those asked for")
    return taken, texts


def measure_unequal(bench: Bench) -> list[Figure]:
    """Time texts of 2 to 64 tokens, against `hf` on the same requests and on ones that it can batch."""
    scale, batch = bench.scale, max(HF_BATCH_SIZES)
    lengths = unequal_lengths(scale)
    texts = prompts(bench.source, scale.unequal)
    asked = generation(texts, lengths)
    by_length = sorted(range(len(lengths)), key=lambda i: lengths[i])
    count = min(scale.hf_unequal, len(lengths))
    chosen = [by_length[(2 * i + 1) * len(lengths) // (2 * count)] for i in range(count)]
    timed = [asked[i] for i in chosen]
    factor = sum(lengths) / sum(lengths[i] for i in chosen)
    batched, batched_factor = _batched(texts, lengths, batch, count)
    ours: list[float] = []
    theirs: list[list[float]] = [[] for _ in bench.hf]
    together: list[list[float]] = [[] for _ in bench.hf]

    def generate() -> None:
        ours.append(_checked(bench, bench.pair, asked, exact=False)[0])

    def hf() -> None:
        for m in range(len(bench.hf)):
            theirs[m].append(factor * bench.hf_generate(m, batch, timed))
            if len(together[m]) < scale.drafted:
                together[m].append(batched_factor * bench.hf_generate(m, batch, batched))

    with endless(_all_models(bench)):
        alternate(bench, "unequal", [generate, hf])
    common = f"{len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens"
    return [
        _unequal_figure(bench, "unequal", f"{common}: ensemble / sum of both under hf", 0.8, ours, theirs, factor),
        _unequal_figure(
            bench,
            "unequal_batched",
            f"{common}: the same, if hf could batch requests of different lengths",
            None,
            ours,
            together,
            batched_factor,
        ),
    ]


def _batched(texts: Sequence[str], lengths: Sequence[int], batch: int, count: int) -> tuple[list[Instance], float]:
    """Return what `hf` would do if it batched unequal texts: every row runs as long as its batch's longest.

    Also returns the factor from the batches that are timed to all of them.
    """
    groups = [list(range(start, min(start + batch, len(lengths)))) for start in range(0, len(lengths), batch)]
    longest = [max(lengths[i] for i in group) for group in groups]
    kept = groups if count >= len(lengths) else groups[: max(1, len(groups) // 2)]
    rows = [i for group in kept for i in group]
    padded = [steps for group, steps in zip(kept, longest, strict=False) for _ in group]
    work = sum(steps * len(group) for group, steps in zip(groups, longest, strict=True))
    return generation([texts[i] for i in rows], padded), work / sum(padded)


def _unequal_figure(
    bench: Bench, name: str, label: str, goal: float | None, ours: list[float], theirs: list[list[float]], factor: float
) -> Figure:
    sums = [sum(times) for times in zip(*theirs, strict=True)]
    details = {
        "ours_seconds": ours,
        "hf_seconds": dict(zip(bench.settings.names, theirs, strict=True)),
        "hf_scaled_by": factor,
        "ratio_of_medians": median(ours) / median(sums),
        "hf_batch_size": "8; requests whose arguments differ are never batched by hf",
    }
    return Figure(name, label, goal=goal, details=details, **spread([a / b for a, b in zip(ours, sums, strict=False)]))


def measure_fusion(bench: Bench) -> list[Figure]:
    """Measure the share of a decoding step that is not spent in members' bodies and heads.

    Once with a truncated support, which is the goal's, and once with the default. The prompt's forward pass is taken
    out: a run of one token is subtracted from a longer one.
    """
    which = tuple(range(len(bench.settings.models)))
    truncated = bench.ensemble(which, support=512)
    return [
        _fusion(bench, truncated, "fusion", "support of 512 pieces", 5.0),
        _fusion(bench, bench.pair, "fusion_default", "default options", None),
    ]


def _fusion(bench: Bench, model: DeepenLM, name: str, what: str, goal: float | None) -> Figure:
    scale = bench.scale
    texts = prompts(bench.source, scale.prompts)
    shares, steps, inside = [], [], []
    with endless(_all_models(bench, model)):
        bench.generate(model, generation(texts, [8] * len(texts)))
        for _ in range(max(3, scale.repeats)):
            walls, forwards = [], []
            for tokens in (1, 1 + scale.steps):
                timers = Timers(bench.settle)
                with timers.forwards(members_of(model)):
                    asked = generation(texts, [tokens] * len(texts))
                    walls.append(_checked(bench, model, asked, exact=False)[0])
                forwards.append(timers.inside("body", "head"))
            wall, forward = walls[1] - walls[0], forwards[1] - forwards[0]
            shares.append(100 * (wall - forward) / wall)
            steps.append(1000 * wall / scale.steps)
            inside.append(1000 * forward / scale.steps)
    details = {"step_ms": steps, "forward_ms": inside, "rows": len(texts)}
    label = f"share of a decoding step that is no member's forward pass, batch {len(texts)}, {what}"
    return Figure(name, label, unit="%", goal=goal, details=details, **spread(shares))


def measure_sampling(bench: Bench) -> list[Figure]:
    """Time sampled texts of equal lengths by turns and from the fused distribution, against each member alone here."""
    scale, which = bench.scale, tuple(range(len(bench.settings.models)))
    linear = {"average": "linear", "weighting": "uniform", "covers": "off"}
    ways = {"member": {"sampling": "member"}, "fused": {}, "covers": {"sampling": "member", "covers": "on"}}
    models = {
        **{way: bench.ensemble(which, **{**linear, **options}) for way, options in ways.items()},
        **{name: bench.ensemble((m,)) for m, name in enumerate(bench.settings.names)},
    }
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    asked = generation(prompts(bench.source, scale.prompts), [scale.new_tokens] * scale.prompts, **drawn)
    times: dict[str, list[float]] = {name: [] for name in models}
    cpu: dict[str, list[float]] = {name: [] for name in models}

    def run(name: str) -> None:
        times[name].append(bench.generate(models[name], asked)[0])
        cpu[name].append(bench.cpu_seconds)

    with endless(_all_models(bench, *models.values())):
        for model in models.values():
            bench.generate(model, asked)
        alternate(bench, "sampling", [lambda name=name: run(name) for name in models])
    sums, cpu_sums = ([sum(own) for own in zip(*map(of.get, bench.settings.names), strict=True)] for of in (times, cpu))
    figures = []
    named = {"member": "sampling by turns", "fused": "sampling", "covers": "sampling by turns with covers"}
    for how, goal in (("member", 0.65), ("fused", None), ("covers", None)):
        label = (
            f"{named[how]}, {scale.new_tokens} new tokens, batch {scale.prompts}, linear average: ensemble / sum of "
            "both alone under this engine"
        )
        ratios = [a / b for a, b in zip(times[how], sums, strict=True)]
        details = {
            "ours_seconds": times[how],
            "alone_seconds": {name: times[name] for name in bench.settings.names},
            "cpu_time_ratio": median(cpu[how]) / median(cpu_sums),
        }
        figures.append(Figure(f"sampling_{how}", label, goal=goal, details=details, **spread(ratios)))
    return figures


def measure_third(bench: Bench) -> list[Figure]:
    """Measure what a third member equal to the second adds, over that member's own time as an ensemble of one."""
    scale, which = bench.scale, tuple(range(len(bench.settings.models)))
    trio, alone = bench.ensemble((*which, which[-1])), bench.ensemble(which[-1:])
    texts = prompts(bench.source, scale.prompts)
    shape = bench.shapes["arc_zero"].documents[: scale.third]
    works = {
        "scoring": (f"ARC-C, {len(shape)} documents, zero-shot", scoring(shape)),
        "generation": (f"{scale.third} new tokens, batch {len(texts)}", generation(texts, [scale.third] * len(texts))),
    }
    figures = []
    with endless(_all_models(bench, trio, alone)):
        for name, (label, asked) in works.items():
            times: list[list[float]] = [[], [], []]

            def run(at: int, model: DeepenLM, asked: list = asked, times: list = times) -> None:
                act = model.loglikelihood if asked[0].request_type == "loglikelihood" else model.generate_until
                times[at].append(bench.seconds(lambda: act(asked, disable_tqdm=True)))

            models = (bench.pair, trio, alone)
            for model in models:
                run(0, model, times=[[], [], []])
            sides = [lambda at=at, model=model: run(at, model) for at, model in enumerate(models)]
            alternate(bench, f"third_{name}", sides)
            ratios = [(three - two) / one for two, three, one in zip(*times, strict=True)]
            pair, third, own = map(median, times)
            details = {
                "pair_seconds": times[0],
                "trio_seconds": times[1],
                "member_alone_seconds": times[2],
                "ratio_of_medians": (third - pair) / own,
            }
            text = f"a third member, {label}: added time / that member alone"
            figures.append(Figure(f"third_{name}", text, goal=1.05, details=details, **spread(ratios)))
    bench.drop((*which, which[-1]))
    bench.drop(which[-1:])
    return figures
