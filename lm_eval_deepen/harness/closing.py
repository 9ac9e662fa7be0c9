"""What the harness's command says of the ensemble at its end: two lines, what fusion did and where everything is."""

from __future__ import annotations

import atexit
import sys

from lm_eval_deepen.engine.trace import Trace
from lm_eval_deepen.harness.command import has_failed, under_command
from lm_eval_deepen.harness.requests import RequestHandler


def tell_at_the_end(run: RequestHandler) -> None:
    """Sum up the ensemble when the harness's command line ends, in the process that shows its results.

    Elsewhere, as in a notebook, nothing is said: `DeepenLM.get_model_info` has it.
    """
    if under_command() and run.ranks.speaks:
        atexit.register(tell, run)


def tell(run: RequestHandler) -> None:
    """Print the summary, unless the command failed, whose last line is its error."""
    if not has_failed():
        for line in summary(run):
            print(line, file=sys.stderr, flush=True)


def summary(run: RequestHandler) -> list[str]:
    """Return what fusion did in a run and where results are; nothing where no step was read and no answer pooled."""
    counts = Trace.total(run.traces).summary()
    did = []
    if fused := counts["steps_fused"]:
        did.append(
            f"fusion changed the likeliest token in {counts['argmax_differs_from_main']:.1%} of {fused:,} steps, the "
            f"members agreed in {counts['members_agree']:.1%}"
        )
    if skipped := counts["steps_skipped"]:
        did.append(f"{skipped:,} steps were left to the main member")
    if stretches := counts.get("scored_by_stretches"):
        did.append(f"{stretches['texts']:,} texts were scored by stretches")
    if proposals := counts.get("proposals"):
        did.append(f"{proposals['written']:,} of {proposals['proposed']:,} proposals were written")
    if pooled := counts.get("pooled"):
        did.append(f"the answers to {pooled['requests']:,} requests were combined")
    if out := {name: steps for name, steps in counts["steps_sat_out"].items() if steps}:
        did.append(
            "steps from which a member abstained: " + ", ".join(f"{name} {steps:,}" for name, steps in out.items())
        )
    if not did:
        return []
    names = " + ".join(member.name for member in run.ensemble.members)
    codes = [one["code"] for one in (run.findings or {}).get("warnings") or []]
    warned = f"{len(codes)} warning{'s' * (len(codes) > 1)} ({', '.join(codes)})" if codes else "no warning"
    return [f"ensemble {names}: {'; '.join([*did, warned])}.", _where(run)]


def _where(run: RequestHandler) -> str:
    results, traces = run.results_in, run.step_files and run.step_files.folder
    look = f"; look at them with: lm-eval-deepen view {traces}" if traces else ""
    if results and results == traces:
        return f"results and traces: {results}{look}"
    told = [f"{what}: {place}" for what, place in (("results", results), ("traces", traces)) if place]
    return "; ".join(told) + look if told else "no results were kept: --output_path and --log_samples keep them."
