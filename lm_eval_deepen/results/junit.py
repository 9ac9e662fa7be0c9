"""The outcome of ``lm-eval-deepen gate`` for programs that show test results: JUnit XML, and GitHub's annotations."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from lm_eval_deepen.results.gate_report import GateReport
from lm_eval_deepen.results.regression import Tested
from lm_eval_deepen.results.report import number, probability, signed
from lm_eval_deepen.results.tables import printable

SUITE = "lm-eval-deepen gate"


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
