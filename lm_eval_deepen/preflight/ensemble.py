"""What members have in common before they are loaded: anchors, relative matrices, memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch

from lm_eval_deepen.config import EnsembleConfig
from lm_eval_deepen.engine.memory import fusion_bytes
from lm_eval_deepen.engine.self_check import FLAT
from lm_eval_deepen.errors import DeepenError
from lm_eval_deepen.preflight.members import Inspected
from lm_eval_deepen.relative.normalization import NORMALIZATIONS, unit_rows
from lm_eval_deepen.relative.rows_from_embeddings import (
    DENSE_LIMIT_BYTES,
    MAX_DROPPED_MASS,
    MatrixSpec,
    described_rows,
    temperature_for,
)
from lm_eval_deepen.relative.store import MatrixStore, explained
from lm_eval_deepen.storage import check_folder
from lm_eval_deepen.vocabulary import AnchorSet, anchor_ids

SAMPLE_ROWS = 256  # relative rows that are computed to see how flat they are


@dataclass(frozen=True)
class Overlap:
    """Pieces that two members, or all of them, have in common."""

    members: tuple[str, ...]  # their names
    common: int  # byte strings that all of them have a piece for
    shares: tuple[float, ...]  # the common ones as a share of each member's pieces


@dataclass(frozen=True)
class MatrixPlan:
    """A relative matrix that would be used."""

    member: str  # whose
    kind: str  # ``one-hot``, ``sparse`` or ``dense``
    rows: int  # V
    anchors: int  # A
    memory_bytes: int  # of its entries where fusion runs
    file_bytes: int  # of its file
    # mean entropy of a sample of rows, as a share of that of flat ones; None where it is not known
    entropy_share: float | None = None
    dropped_mass: float | None = None  # mean mass that a sample of rows loses to `top_m`; None where it is not known


def overlaps(members: Sequence[Inspected]) -> list[Overlap]:
    """Return what all members with a known vocabulary have in common, then every pair of more than two."""
    pieces = {m.name: set(m.codec.vocab.events.ids_of) for m in members if m.codec is not None}
    groups = [tuple(pieces)] if len(pieces) > 1 else []
    groups += combinations(pieces, 2) if len(pieces) > 2 else []
    found = []
    for group in groups:
        common = len(set.intersection(*(pieces[name] for name in group)))
        found.append(Overlap(group, common, tuple(common / max(1, len(pieces[name])) for name in group)))
    return found


def plan_matrices(
    config: EnsembleConfig, members: Sequence[Inspected], problems: list[str], notes: list[str]
) -> tuple[int | None, list[MatrixPlan]]:
    """Return the number of anchors and the relative matrices that the method would use; none where it uses none.

    Whatever would stop the method from being built is added to `problems`; how flat rows are, to `notes`.
    """
    method = config.options
    if any(member.codec is None for member in members):
        return None, []
    vocabularies = [member.codec.vocab.events for member in members if member.codec]
    try:
        anchors = method.check(vocabularies, [member.name for member in members]) if hasattr(method, "check") else None
    except DeepenError as error:
        problems.append(" ".join(str(error).split()))
        return None, []
    if anchors is None or not hasattr(method, "matrix_spec"):
        return None if anchors is None else len(anchors), []
    try:
        folder = MatrixStore(config.matrix_dir).folder
        with explained(folder):
            check_folder(folder)
    except DeepenError as error:
        problems.append(str(error))
    spec = method.matrix_spec()
    plans = [_plan(member, anchors, spec, problems, notes) for member in members]
    return len(anchors), plans


def _plan(member: Inspected, anchors: AnchorSet, spec: MatrixSpec, problems: list[str], notes: list[str]) -> MatrixPlan:
    assert member.codec is not None
    rows, count = len(member.codec.vocab), len(anchors)
    if spec.from_bytes:
        return MatrixPlan(member.name, "one-hot", rows, count, 8 * rows, 10 * rows, 0.0)
    if spec.top_m == 0:
        size = 4 * rows * count
        if size > DENSE_LIMIT_BYTES:
            problems.append(
                f"member {member.name!r}: its dense relative matrix ({rows} pieces x {count} anchors) would take "
                f"{size / 2**30:.1f} GiB, and the limit is {DENSE_LIMIT_BYTES / 2**30:.0f} GiB. Set max_anchors to "
                f"at most {DENSE_LIMIT_BYTES // (4 * rows)}."
            )
        plan = MatrixPlan(member.name, "dense", rows, count, size, size)
    else:
        width = min(spec.top_m, count)
        plan = MatrixPlan(member.name, "sparse", rows, count, 8 * rows * width, rows * (6 * width + 4))
    measured = row_sample(member, anchors, spec)
    if measured is None:
        notes.append(
            f"member {member.name!r}: how flat its relative rows are is known once its weights are on this machine."
        )
        return plan
    share, dropped = measured
    if dropped > MAX_DROPPED_MASS:
        problems.append(
            f"member {member.name!r}: its relative rows would lose {dropped:.3f} of their mass to top_m={spec.top_m} "
            f"(a sample of {SAMPLE_ROWS} rows; the limit is {MAX_DROPPED_MASS}). Raise top_m, use another "
            "normalization, or rows: canonical."
        )
    return replace(plan, entropy_share=share, dropped_mass=dropped)


def row_sample(member: Inspected, anchors: AnchorSet, spec: MatrixSpec) -> tuple[float, float] | None:
    """Return mean entropy (as a share of that of flat rows) and dropped mass of a sample of relative rows.

    Reads the embedding alone; None where it is not on this machine.
    """
    embeddings = member.files.load_embedding(spec.embeddings) if member.files else None
    if embeddings is None or member.codec is None or len(anchors) < 2:
        return None
    vocabulary = member.codec.vocab.events
    embeddings = embeddings[: len(vocabulary)]
    mask = described_rows(vocabulary, spec.rows)
    own = torch.tensor(anchor_ids(vocabulary, anchors))
    if spec.pieces == "exact":
        mask[own] = False  # these rows are one-hot
    ids = mask.nonzero()[:, 0]
    ids = ids[:: max(1, len(ids) // SAMPLE_ROWS)][:SAMPLE_ROWS]
    if not len(ids):
        return 0.0, 0.0
    space = NORMALIZATIONS[spec.normalization]
    with torch.no_grad():
        shift = space.shift(embeddings, described_rows(vocabulary, spec.rows))
        columns = unit_rows(embeddings[own], shift)
        logits = space.logits(unit_rows(embeddings[ids], shift), columns, 1.0)
        temperature = spec.temperature if spec.entropy is None else temperature_for(logits, spec.entropy)
        rows = torch.softmax(logits * temperature, dim=1)
        kept = rows if spec.top_m == 0 else rows.topk(min(spec.top_m, rows.shape[1]), dim=1).values
        dropped = 0.0 if spec.top_m == 0 else float((1 - kept.sum(1)).clamp(min=0).mean())
        entropy = float(-torch.xlogy(rows, rows).sum(1).mean())
        return entropy / math.log(rows.shape[1]), dropped


def flat_notes(plans: Sequence[MatrixPlan], compat: str | None) -> list[str]:
    """Return a note for every matrix whose rows are nearly flat: they tell pieces hardly apart."""
    advice = " As published; other rows are no reproduction." if compat == "reference" else " Use rows: canonical."
    return [
        f"member {plan.member!r}: its relative rows have {plan.entropy_share:.3f} of the entropy of flat ones, so that "
        f"fusion hardly sees what the members say.{advice}"
        for plan in plans
        if plan.entropy_share is not None and plan.entropy_share > FLAT
    ]


@dataclass(frozen=True)
class DeviceNeed:
    """What one device would hold."""

    device: str  # its name
    weights: int  # bytes of the members on it
    matrices: int  # bytes of relative matrices, which are where the main member is
    working: int  # bytes of keys, values and rows of logits of one batch
    available: int | None  # bytes that it has; None where that is unknown

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.matrices + self.working


def device_needs(
    members: Sequence[Inspected], plans: Sequence[MatrixPlan], batch: int, tokens: int, available: Mapping[str, int]
) -> list[DeviceNeed]:
    """Return what every device would hold with `batch` texts of `tokens` at most; `available`: bytes where known."""
    weights: Counter[str] = Counter()
    working: Counter[str] = Counter()
    for member in members:
        weights[member.device] += member.weight_bytes or 0
        working[member.device] += (member.kv_bytes(tokens) or 0) * batch
        if member.codec is not None:
            working[members[0].device] += fusion_bytes(len(member.codec.vocab), batch)
    matrices = {members[0].device: sum(plan.memory_bytes for plan in plans)}
    return [
        DeviceNeed(device, weights[device], matrices.get(device, 0), working[device], available.get(device))
        for device in weights
    ]


def too_small(needs: Sequence[DeviceNeed]) -> list[str]:
    """Return a problem for every device that has less than it would hold."""
    remedy = "Spread members over devices (a member's device, or parallelize: true), or load them in another dtype."
    return [
        f"device {need.device} would hold {need.total / 1e9:.1f} GB and has {need.available / 1e9:.1f} GB. {remedy}"
        for need in needs
        if need.available is not None and need.total > need.available
    ]


def to_json(items: Sequence[Any]) -> list[dict[str, Any]]:
    """Return dataclasses as JSON data."""
    return [{**asdict(item), **({"total": item.total} if isinstance(item, DeviceNeed) else {})} for item in items]
