"""The outcome of ``lm-eval-deepen gate`` as text, Markdown and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lm_eval_deepen.results.regression import Decision, Details, GateRule, Pair
from lm_eval_deepen.results.report import number, probability, signed, signed_interval
from lm_eval_deepen.results.tables import aligned, literal, markdown_table, printable

Status = Literal["pass", "regressed", "too small", "not comparable"]
_HEAD = (
    "task", "metric", "documents", "baseline", "candidate", "difference [95 % interval]", "worse / better", "p",
    "p (Holm)", "detectable drop", "",
)  # fmt: skip


@dataclass(frozen=True)
class Tested:
    """One metric of one task: the two runs' values, the decision, and what is shown beside it."""

    pair: Pair
    decision: Decision
    details: Details

    @property
    def difference(self) -> float:
        """Score of the candidate less that of the baseline."""
        return self.pair.candidate.score - self.pair.baseline.score

    def cells(self) -> list[str]:
        """Return one line of the table."""
        pair, decision, shown = self.pair, self.decision, self.details
        documents, detectable = pair.baseline.documents, shown.detectable
        seen = "unknown" if detectable is None else number(detectable)
        if detectable is not None and pair.baseline.binary and pair.candidate.binary:
            seen += f" ({detectable * documents:.0f} documents)"
        return [
            pair.task,
            pair.column,
            str(documents),
            number(pair.baseline.score),
            number(pair.candidate.score),
            signed(self.difference) + signed_interval(shown.low, shown.high),
            f"{shown.worse} / {shown.better}",
            probability(decision.p),
            probability(decision.p_holm),
            seen,
            "REGRESSED" if decision.regressed else "",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        pair, decision, shown = self.pair, self.decision, self.details
        return {
            "task": pair.task,
            "metric": pair.metric,
            "filter": pair.flt,
            "higher_is_better": pair.higher_is_better,
            "documents": pair.baseline.documents,
            "baseline": pair.baseline.score,
            "candidate": pair.candidate.score,
            "difference": self.difference,
            "interval_95": [shown.low, shown.high],
            "worse": shown.worse,
            "better": shown.better,
            "test": decision.test,
            "p": decision.p,
            "p_holm": decision.p_holm,
            "detectable_drop": shown.detectable,
            "regressed": decision.regressed,
        }


@dataclass(frozen=True)
class GateReport:
    """The outcome of one check: status, what was tested, why there is no verdict, and remarks."""

    status: Status
    baseline: str
    candidate: str
    rule: GateRule
    tests: tuple[Tested, ...]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def headline(self) -> str:
        """The outcome in one sentence."""
        if self.status == "not comparable":
            return f"NOT COMPARABLE: {len(self.reasons)} reason(s)"
        if self.status == "too small":
            return (
                f"TOO SMALL: {len(self.reasons)} of {len(self.tests)} tests could not see the drop that has to be seen"
            )
        worse = [test for test in self.tests if test.decision.regressed]
        if worse:
            told = ", ".join(f"{t.pair.task} {t.pair.metric} {signed(t.difference)}" for t in worse)
            return f"REGRESSED: {told}"
        return f"PASS: none of {len(self.tests)} tests finds {self.candidate} worse than {self.baseline}"

    @property
    def terms(self) -> list[str]:
        """What was tested, in sentences."""
        tests, rule = " and ".join(dict.fromkeys(test.decision.test for test in self.tests)), self.rule
        level = rule.alpha / max(1, len(self.tests))
        return [
            f"One-sided paired tests ({tests}), alpha {rule.alpha:g} over all {len(self.tests)} by Holm; minimal "
            f"effect {rule.min_effect:g}" + (": smaller observed drops do not count." if rule.min_effect else "."),
            f"Detectable drop: the smallest true drop found with chance {rule.power:g} at level {level:.3g}, given how "
            "often these two runs differ. Smaller regressions may pass; more documents see more.",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {
            "status": self.status,
            "baseline": self.baseline,
            "candidate": self.candidate,
            "alpha": self.rule.alpha,
            "min_effect": self.rule.min_effect,
            "power": self.rule.power,
            "resamples": self.rule.resamples,
            "seed": self.rule.seed,
            "tests": [test.to_dict() for test in self.tests],
            "reasons": list(self.reasons),
            "notes": list(self.notes),
        }


def plain(report: GateReport) -> str:
    """Return the outcome for a terminal."""
    lines = [printable(report.headline), *(f"  - {printable(reason)}" for reason in report.reasons)]
    if report.tests:
        lines += ["", aligned([list(_HEAD), *(test.cells() for test in report.tests)], left=2), "", *report.terms]
    if report.notes:
        lines += ["", "Notes:", *(f"  - {printable(note)}" for note in report.notes)]
    return "\n".join(lines)


def markdown(report: GateReport) -> str:
    """Return the outcome for a GitHub step summary."""
    lines = ["### lm-eval-deepen gate", "", f"**{literal(report.headline)}**"]
    lines += [f"- {literal(reason)}" for reason in report.reasons]
    if report.tests:
        lines += ["", markdown_table([list(_HEAD), *(test.cells() for test in report.tests)], left=2)]
        for term in report.terms:
            lines += ["", term]
    if report.notes:
        lines += ["", *(f"- {literal(note)}" for note in report.notes)]
    return "\n".join(lines) + "\n"
