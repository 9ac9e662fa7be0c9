"""The outcome of ``lm-eval-deepen gate``: text, Markdown and JSON, JUnit XML, and GitHub's annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal
from xml.sax.saxutils import escape, quoteattr

from lm_eval_deepen.results.regression import GateRule, Tested
from lm_eval_deepen.results.report import number, probability, signed, with_interval
from lm_eval_deepen.results.tables import aligned, literal, markdown_table, printable

SUITE = "lm-eval-deepen gate"
Status = Literal["pass", "regressed", "too small", "not comparable"]
_HEAD = (
    "task", "metric", "documents", "baseline", "candidate", "difference [95 % interval]", "worse / better", "p",
    "p (Holm)", "detectable drop", "",
)  # fmt: skip


@dataclass(frozen=True)
class GateReport:
    """The outcome of one check: status, what was tested, why there is no verdict, and remarks."""

    status: Status
    baseline: str
    candidate: str
    rule: GateRule
    tests: Sequence[Tested]
    reasons: Sequence[str]
    notes: Sequence[str]

    @property
    def regressed(self) -> list[Tested]:
        """The tests that find the candidate worse."""
        return [test for test in self.tests if test.regressed]

    @property
    def headline(self) -> str:
        """The outcome in one sentence."""
        if self.status == "not comparable":
            return f"NOT COMPARABLE: {len(self.reasons)} reason(s)"
        if self.status == "too small":
            return (
                f"TOO SMALL: {len(self.reasons)} of {len(self.tests)} tests could not see the drop that has to be seen"
            )
        if self.regressed:
            told = ", ".join(f"{t.pair.task} {t.pair.metric} {signed(t.difference)}" for t in self.regressed)
            return f"REGRESSED: {told}"
        return f"PASS: none of {len(self.tests)} tests finds {self.candidate} worse than {self.baseline}"

    @property
    def terms(self) -> list[str]:
        """What was tested, in sentences."""
        tests, rule = " and ".join(dict.fromkeys(test.test for test in self.tests)), self.rule
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
            **asdict(self.rule),
            "tests": [_facts(test) for test in self.tests],
            "reasons": list(self.reasons),
            "notes": list(self.notes),
        }


def _facts(test: Tested) -> dict[str, Any]:
    pair, (worse, better) = test.pair, test.pair.changes
    return {
        "task": pair.task,
        "metric": pair.metric,
        "filter": pair.flt,
        "higher_is_better": pair.higher_is_better,
        "documents": pair.baseline.documents,
        "baseline": pair.baseline.score,
        "candidate": pair.candidate.score,
        "difference": test.difference,
        "interval_95": [pair.interval.low, pair.interval.high],
        "worse": worse,
        "better": better,
        "test": test.test,
        "p": test.p,
        "p_holm": test.p_holm,
        "detectable_drop": test.detectable,
        "regressed": test.regressed,
    }


def _table(tests: Sequence[Tested]) -> list[list[str]]:
    lines = [list(_HEAD)]
    for test in tests:
        pair, documents = test.pair, test.pair.baseline.documents
        seen = "unknown" if test.detectable is None else number(test.detectable)
        if test.detectable is not None and pair.binary:
            seen += f" ({test.detectable * documents:.0f} documents)"
        lines.append([
            pair.task, pair.shown_metric, str(documents), number(pair.baseline.score), number(pair.candidate.score),
            with_interval(test.difference, pair.interval.low, pair.interval.high),
            "{} / {}".format(*pair.changes), probability(test.p), probability(test.p_holm), seen,
            "REGRESSED" if test.regressed else "",
        ])  # fmt: skip
    return lines


def plain(report: GateReport) -> str:
    """Return the outcome for a terminal."""
    lines = [printable(report.headline), *(f"  - {printable(reason)}" for reason in report.reasons)]
    if report.tests:
        lines += ["", aligned(_table(report.tests), left=2), "", *report.terms]
    if report.notes:
        lines += ["", "Notes:", *(f"  - {printable(note)}" for note in report.notes)]
    return "\n".join(lines)


def markdown(report: GateReport) -> str:
    """Return the outcome for a GitHub step summary."""
    lines = ["### lm-eval-deepen gate", "", f"**{literal(report.headline)}**"]
    lines += [f"- {literal(reason)}" for reason in report.reasons]
    if report.tests:
        lines += ["", markdown_table(_table(report.tests), left=2)]
        for term in report.terms:
            lines += ["", term]
    if report.notes:
        lines += ["", *(f"- {literal(note)}" for note in report.notes)]
    return "\n".join(lines) + "\n"


def junit(report: GateReport) -> str:
    """Return a test suite: a test case for each metric of each task, and one for what prevents a verdict."""
    cases = [_case(report, test) for test in report.tests]
    if report.reasons:
        name = "there are enough documents" if report.status == "too small" else "the runs are comparable"
        told = "\n".join(map(printable, report.reasons))
        cases.append(
            f"  <testcase classname={quoteattr(SUITE)} name={quoteattr(name)}>\n"
            f"    <error message={quoteattr(printable(report.headline))}>{escape(told)}</error>\n  </testcase>"
        )
    head = f'tests="{len(cases)}" failures="{len(report.regressed)}" errors="{int(bool(report.reasons))}"'
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f"<testsuite name={quoteattr(SUITE)} {head}>", *cases]
    return "\n".join([*lines, "</testsuite>", ""])


def _case(report: GateReport, test: Tested) -> str:
    pair = test.pair
    start = f"  <testcase classname={quoteattr(printable(pair.task))} name={quoteattr(printable(pair.shown_metric))}"
    if not test.regressed:
        return f"{start}/>"
    told = printable(
        f"{report.baseline} {number(pair.baseline.score)}, {report.candidate} {number(pair.candidate.score)}: "
        f"{signed(test.difference)}, p (Holm) {probability(test.p_holm)}"
    )
    return f"{start}>\n    <failure message={quoteattr(told)}>{escape(told)}</failure>\n  </testcase>"


def github_errors(report: GateReport) -> list[str]:
    """Return GitHub's commands that put what went wrong on the page of the run, one line each."""
    said = [(f"{one.pair.task} {one.pair.metric} regressed", signed(one.difference)) for one in report.regressed]
    said += [(report.status, reason) for reason in report.reasons]
    return [f"::error title={_escaped(title, ',:')}::{_escaped(text)}" for title, text in said]


def _escaped(text: str, more: str = "") -> str:
    """Return a text in which nothing ends the command; see GitHub's "workflow commands"."""
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return printable(text)
