"""The report of ``lm-eval-deepen inspect`` as text."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval_deepen.leaderboard.published import AS_GIVEN
from lm_eval_deepen.preflight.members import Inspected
from lm_eval_deepen.preflight.report import Report
from lm_eval_deepen.results.tables import aligned
from lm_eval_deepen.vocabulary import SAMPLE_TEXTS


def rendered(report: Report) -> str:
    """Return the report, which ends in "ready" or in numbered problems."""
    parts = [_heading(report), _members(report.members), _edges(report), _anchors(report), _matrices(report)]
    parts += [memory(report), _cost(report), _expected(report)]
    if report.notes:
        parts.append("\n".join(["notes", *(f"  - {note}" for note in report.notes)]))
    if report.problems:
        lines = [f"  {number}. {problem}" for number, problem in enumerate(report.problems, 1)]
        parts.append("\n".join(["problems", *lines]))
    else:
        parts.append("ready")
    return "\n\n".join(part for part in parts if part)


def _heading(report: Report) -> str:
    if report.recipe is None or report.config is None:
        return ""
    config, recipe = report.config, report.recipe
    lines = [recipe.title or recipe.name]
    if config.pooling is not None:
        lines.append(f"  pooling {config.pooling}")
    if config.fuses_steps:
        fields, implied = type(config.options).model_fields, config.options.profile(config.compat)
        chosen = "".join(
            f", {key} {value}"
            for key, value in config.options.to_dict().items()
            if value != implied.get(key, fields[key].get_default(call_default_factory=True))
        )
        compat = f", compat {config.compat}" if config.compat else ""
        lines.append(f"  method {config.method}{compat}{chosen}")
    if recipe.task:
        given = recipe.harness.given().items()
        flags = "".join(f" --{key}" if value is True else f" --{key} {value}" for key, value in given)
        lines.append(f"  tasks {', '.join(recipe.task)}{flags}")
    return "\n".join(lines)


def _members(members: Sequence[Inspected]) -> str:
    if not members:
        return ""
    rows = [("member", "weight", "parameters", "dtype", "weights", "logits", "pieces", "context", "device")]
    for member in members:
        files, codec = member.files, member.codec
        context = files.get("max_position_embeddings") if files else None
        size = "unknown" if member.parameters is None else _count(member.parameters)
        if member.active is not None and member.active != member.parameters:
            size += f" ({_count(member.active)} active)"
        rows.append((
            member.name, f"{member.config.weight:.4g}", size, member.dtype if files else "unknown",
            "unknown" if member.weight_bytes is None else _bytes(member.weight_bytes),
            f"{len(codec.vocab):,}" if codec else "unknown", f"{len(codec.vocab.ids_of):,}" if codec else "unknown",
            f"{context:,}" if context else "unknown", member.device,
        ))  # fmt: skip
    return aligned(rows, left=len(rows[0]), rule=False)


def _edges(report: Report) -> str:
    """Where texts begin and end, and what the sample texts showed."""
    known = [member for member in report.members if member.codec is not None]
    if not known:
        return ""
    lines = ["beginning and end of a text"]
    for member in known:
        codec = member.codec
        assert codec is not None
        begin = "nothing in front" if not codec.opening.control else "in front " + _ids(member, codec.opening.control)
        begin += ", then a space" if codec.opening.prefix_space else ""
        if member.generates_only:
            starts = _ids(member, member.start) if member.start else "nothing, which is a problem"
            begin = f"of the source {begin}; its decoder starts with {starts}"
        ends = _ids(member, member.eos) if member.eos else "nothing"
        lines.append(f"  {member.name}: {begin}; ends with {ends}")
    main = report.members[0]
    options = report.config.options_dict() if report.config else {}
    if options.get("eos") == "anchor" and main.eos and len(known) > 1:
        lines.append(f"  all ends are one role anchor, whose mass goes to {main.name}'s {_ids(main, main.eos)}")
    if any(not member.generates_only for member in known):
        lines.append(f"  round trip: {len(SAMPLE_TEXTS)} sample texts come back byte for byte from these tokenizers")
    lines += [
        f"  {member.name}: spells {member.spelt} of {len(SAMPLE_TEXTS)} sample texts exactly, and abstains for others"
        for member in known
        if member.generates_only
    ]
    return "\n".join(lines)


def _ids(member: Inspected, ids: Sequence[int]) -> str:
    return ", ".join(f"{i} ({member.labels[i]})" for i in ids)


def _anchors(report: Report) -> str:
    if not report.overlaps:
        return ""
    lines = ["anchors" if report.anchors is None else f"anchors: {report.anchors:,}"]
    for overlap in report.overlaps:
        named = zip(overlap.members, overlap.shares, strict=True)
        shares = ", ".join(f"{100 * share:.1f} % of {name}" for name, share in named)
        lines.append(f"  {overlap.common:,} common pieces: {shares}")
    lines.append("  what each member loses in another's pieces takes its weights to measure: lm-eval-deepen bpb")
    return "\n".join(lines)


def _matrices(report: Report) -> str:
    if not report.matrices:
        return ""
    lines = ["relative matrices"]
    for plan in report.matrices:
        line = f"  {plan.member}: {plan.kind}, {plan.rows:,} x {plan.anchors:,}, {_bytes(plan.memory_bytes)} in memory"
        if plan.entropy_share is not None and plan.kind != "one-hot":
            line += f", rows {100 * plan.entropy_share:.1f} % as flat as can be"
        if plan.dropped_mass is not None and plan.kind == "sparse":
            line += f", {100 * plan.dropped_mass:.1f} % of their mass dropped"
        lines.append(line)
    return "\n".join(lines)


def memory(report: Report) -> str:
    """Return what each device must hold."""
    if not any(need.total for need in report.devices):
        return ""
    lines = [f"memory, {report.batch} text{'s' if report.batch > 1 else ''} at a time"]
    for need in report.devices:
        has = "" if need.available is None else f" of {_bytes(need.available)}"
        parts = f"weights {_bytes(need.weights)}, matrices {_bytes(need.matrices)}, texts {_bytes(need.working)}"
        lines.append(f"  {need.device}: {_bytes(need.total)}{has} ({parts})")
    return "\n".join(lines)


def _cost(report: Report) -> str:
    members = report.members
    if not members or any(member.active is None for member in members):
        return ""
    flops = 2 * sum(member.active or 0 for member in members)
    read = sum(member.weight_bytes or 0 for member in members)
    passes = f"{len(members)} forward passes per token, one per member"
    lines = ["expected cost", f"  {passes}: {flops / 1e9:,.1f} GFLOP, {_bytes(read)} of weights read per step"]
    for cost in report.tasks:
        lines.append(
            f"  {cost.task}: {cost.documents:,} documents, {cost.read_tokens:,} tokens to read, at most "
            f"{cost.written_tokens:,} to write"
        )
    if report.hours is not None:
        lines.append(f"  about {report.hours:.1f} hours at the given bandwidth and TFLOPS, without loading and fusing")
    return "\n".join(lines)


def _expected(report: Report) -> str:
    if report.recipe is None or not report.recipe.expected:
        return ""
    lines = ["published"]
    for entry in report.recipe.expected:
        score = "not known here" if entry.score is None else f"{entry.score:g}"
        where = f" ({entry.table})" if entry.table else ""
        beside, row = "", report.measured.get(f"{entry.task} {entry.metric}")
        if row is not None:  # what was measured, in the unit of the published score
            unit = 1 if entry.metric.partition(",")[0] in AS_GIVEN else 100
            away = "" if row["distance"] is None else f", {row['distance']:+.1f} standard errors: {row['verdict']}"
            beside = f"; measured {unit * row['measured']:.2f}{away}"
        lines.append(f"  {entry.task}: {score}{where}{beside}")
    return "\n".join(lines)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.0f}M"


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
