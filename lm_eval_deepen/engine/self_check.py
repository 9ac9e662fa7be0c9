"""The self-check: what an evaluation reports about the ensemble itself, in the log and in the results file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lm_eval_deepen.engine.bits_per_byte import Document, Reading, Variant, ensemble_bits
from lm_eval_deepen.engine.calibration import default_text, digest, load_documents
from lm_eval_deepen.engine.ensemble import Ensemble
from lm_eval_deepen.engine.projection_loss import ProjectionLoss, losses, projections, read_with_covers
from lm_eval_deepen.errors import RequestError

FLAT = 0.8  # mean entropy of relative rows, as a share of the log of the number of anchors
UNEQUAL = 0.15  # a member needs this much more bits than the best one
LEEWAY = 0.001  # an ensemble may need this much more bits than its best member
DOCUMENTS = 12  # of the text that ships: some 600 tokens


@dataclass(frozen=True)
class Warned:
    """Something a user should know of an ensemble."""

    # ``flat_space``, ``worse_than_best_member``, ``unequal_members``, ``weights_ignore_quality`` or ``unmeasured``
    code: str
    message: str  # what, with figures, and what can be done


def flat_spaces(facts: Mapping[str, Any]) -> list[Warned]:
    """Return a warning for every relative matrix whose rows are nearly flat: they tell pieces hardly apart."""
    return [
        Warned(
            "flat_space",
            f"the relative rows of member {matrix['member']!r} have {matrix['row_entropy_share']:.3f} of the entropy "
            "of flat ones: fusion hardly sees what the members say. Use rows: canonical, or normalization: centered.",
        )
        for matrix in facts.get("matrices", ())
        if matrix.get("row_entropy_share", 0) > FLAT
    ]


def measure(ensemble: Ensemble, documents: Sequence[Document]) -> tuple[dict[str, float], list[ProjectionLoss]]:
    """Return bits per byte by system, and what every other member loses in the main member's pieces.

    The systems are every member by its name, and ``ensemble``, with the main member as it is.
    """
    num_bytes = sum(document.num_bytes for document in documents)
    reading = read_with_covers(ensemble, documents)
    # In one pass: computing the members' logits again would take longer than all that is done with them.
    projected = projections(reading.ensemble)
    fused, *through = reading.bits(reading.logp([Variant.of(ensemble), *projected.values()])).sum(1).tolist()
    if ensemble.by_stretches:
        fused = float(ensemble_bits(reading, ensemble).sum())
    bits_of = {"ensemble": fused / num_bytes}
    for m, member in enumerate(ensemble.members):
        if m:
            order = [m, *(k for k in range(len(ensemble.members)) if k != m)]
            turned = replace(ensemble, members=tuple(ensemble.members[k] for k in order))
            reading = Reading.of(turned, documents, members=1)
        bits = reading.bits(reading.own_logp((member.config.temperature,)))
        bits_of[member.name] = float(bits.sum()) / num_bytes
    own = {name: value * num_bytes for name, value in bits_of.items()}
    return bits_of, losses(ensemble.main.name, dict(zip(projected, through, strict=True)), own)


def judge(bits: Mapping[str, float], weights: Mapping[str, float]) -> list[Warned]:
    """Return warnings from bits per byte (see `measure`) and the members' weights.

    Weights are empty where they are not constant.
    """
    alone = {name: value for name, value in bits.items() if name != "ensemble"}
    best = min(alone, key=lambda name: alone[name])
    warnings = []
    share = bits["ensemble"] / alone[best] - 1
    if share > LEEWAY:
        warnings.append(
            Warned(
                "worse_than_best_member",
                f"the ensemble needs {bits['ensemble']:.4f} bits per byte of the calibration text, {100 * share:.1f} % "
                f"more than member {best!r} alone ({alone[best]:.4f}). Run `lm-eval-deepen tune`, or make {best!r} the "
                "main member and give it more weight.",
            )
        )
    for name, value in alone.items():
        gap = value / alone[best] - 1
        if gap <= UNEQUAL:
            continue
        warnings.append(
            Warned(
                "unequal_members",
                f"member {name!r} needs {100 * gap:.0f} % more bits per byte of the calibration text than {best!r}: "
                "it can add little.",
            )
        )
        if weights and weights[name] >= weights[best]:
            warnings.append(
                Warned(
                    "weights_ignore_quality",
                    f"member {name!r} has weight {weights[name]:.3g}, the much better {best!r} has "
                    f"{weights[best]:.3g}. Give {best!r} more, or run `lm-eval-deepen tune`.",
                )
            )
    return warnings


def examine(ensemble: Ensemble) -> dict[str, Any]:
    """Return what an evaluation should say of an ensemble: figures on the text that ships, and warnings.

    Without figures where no text can be scored: weights that depend on prompts, a member or a method that generates
    only. Empty where there is nothing to say then, or nothing to compare (no fusion of steps).
    """
    if ensemble.fuser is None:
        return {}
    warned = flat_spaces(getattr(ensemble.fuser, "facts", {}))
    by_prompt = ensemble.reads_prompts and not ensemble.learns
    if by_prompt or ensemble.by_words or any(member.generates_only for member in ensemble.members):
        return {"warnings": [asdict(warning) for warning in warned]} if warned else {}
    documents = load_documents([default_text()], DOCUMENTS)
    try:
        bits, lost = measure(ensemble, documents)
    except RequestError as error:  # of the text that ships, not of what is evaluated
        warned.append(Warned("unmeasured", f"the calibration text could not be read: {error}"))
        return {"warnings": [asdict(warning) for warning in warned]}
    constant = ensemble.weigher is None
    warned += judge(bits, {member.name: member.config.weight for member in ensemble.members} if constant else {})
    return {
        "text_sha256": digest(documents),
        "bits_per_byte": bits,
        "projection_loss": [one.to_dict() for one in lost],
        "warnings": [asdict(warning) for warning in warned],
    }
