"""Is a candidate worse than its baseline: what is tested, what prevents a verdict, and the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lm_eval_deepen.errors import NotPairedError, ResultError
from lm_eval_deepen.results.comparable import objections
from lm_eval_deepen.results.files import Run, find_runs
from lm_eval_deepen.results.gate_report import GateReport, Status
from lm_eval_deepen.results.pairing import wanted_columns
from lm_eval_deepen.results.regression import GateRule, Pair, Tested, decide
from lm_eval_deepen.results.report import number
from lm_eval_deepen.results.samples import common_keys


def single_run(path: Path) -> Run:
    """Return the only run in a folder; raises ResultError where there are several."""
    runs = find_runs(path)
    if len(runs) > 1:
        inside = ", ".join(str(run.folder) for run in runs)
        raise ResultError(f"{path}: holds the results of {len(runs)} models; give one of them: {inside}")
    return runs[0]


def judge(
    baseline: Run,
    candidate: Run,
    rule: GateRule,
    tasks: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    allow_config_change: bool = False,
    max_detectable: float | None = None,
) -> GateReport:
    """Return the outcome of the check; ``too small`` where a test could not see a drop of `max_detectable`."""
    chosen = list(dict.fromkeys(tasks)) if tasks else list(baseline.tasks)
    for task in chosen:
        baseline.task(task)
    columns = wanted_columns([baseline], chosen, metrics)
    objected = objections(baseline, candidate, chosen, allow_config_change)
    notes = [*baseline.notes, *candidate.notes, *objected.notes]
    pairs: list[Pair] = []
    reasons = list(objected.reasons)
    if not reasons:
        pairs, reasons = pairs_of(baseline, candidate, columns, notes, explicit=bool(metrics))
    tests = [] if reasons else decide(pairs, rule)
    status: Status = "not comparable" if reasons else "pass"
    if any(test.regressed for test in tests):
        status = "regressed"
    elif max_detectable is not None and not reasons:
        reasons = [told for test in tests if (told := _blind(test, max_detectable, rule.alpha / len(tests)))]
        status = "too small" if reasons else "pass"
    return GateReport(status, baseline.label, candidate.label, rule, tests, reasons, notes)


def _blind(test: Tested, most: float, level: float) -> str:
    """Return why a test could not see a drop of `most`; nothing where it could.

    Of two runs that are alike, a real-valued metric does not show how much it scatters. They are blind only where no
    outcome at all would be significant.
    """
    pair, seen = test.pair, test.detectable
    alike = not any(pair.changes)
    documents = pair.baseline.documents
    if seen is None and alike and 0.5**documents <= level:
        return ""
    if seen is not None and seen <= most:
        return ""
    drop = "is unknown" if seen is None else f"is {number(seen)}"
    return (
        f"{pair.column}: the detectable drop {drop} with {documents} documents, above {most:g}; evaluate "
        "more documents, test fewer metrics, or raise --max-detectable"
    )


def pairs_of(
    baseline: Run, candidate: Run, columns: Sequence[tuple[str, str, str]], notes: list[str], explicit: bool
) -> tuple[list[Pair], list[str]]:
    """Return what can be tested and why the rest prevents a verdict; what is merely left out goes to `notes`."""
    pairs: list[Pair] = []
    reasons: list[str] = []
    for task, metric, flt in columns:
        one, two = baseline.tasks[task], candidate.tasks[task]
        good = one.higher_is_better(metric)
        if (metric, flt) not in two.columns:
            reasons.append(f"{task}: {two.results_path} has no {metric},{flt}")
            continue
        values = [sum(metric in sample.values for sample in run.samples.under(flt).values()) for run in (one, two)]
        if len(set(values)) > 1:
            reasons.append(f"{task}: {metric} is given for {values[0]} and {values[1]} documents")
            continue
        try:
            if good is None:
                raise NotPairedError(f"{one.where}: it is unknown which way {metric} is good (higher_is_better)")
            keys = common_keys([one.samples, two.samples], flt, metric)
            if len(keys) < values[0]:
                reasons.append(
                    f"{task}: {metric} is given for {values[0]} documents each, {len(keys)} of them the same"
                )
                continue
            pair = Pair(task, metric, flt, good, one.scores(metric, flt, keys), two.scores(metric, flt, keys))
            doubts = [run.contradiction(metric, flt) for run in (one, two)]
        except NotPairedError as error:
            # Asked for by name, it must be tested; otherwise the other metrics still can be.
            (reasons if explicit else notes).append(f"not tested: {error}")
            continue
        notes.extend(doubt for doubt in doubts if doubt)
        pairs.append(pair)
    if not columns:
        reasons.append("the runs have no metric: with --predict_only nothing is measured; evaluate without it")
    elif not pairs and not reasons:
        reasons.append("no metric of the chosen tasks can be tested document by document, see the notes")
    return pairs, reasons
