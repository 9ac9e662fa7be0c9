"""Building relative matrices from embedding rows, a block of vocabulary rows at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from lm_eval_deepen.config.describe import Choice
from lm_eval_deepen.errors import MatrixError
from lm_eval_deepen.relative.blocks import blocks
from lm_eval_deepen.relative.matrix import DenseMatrix, RelativeMatrix, SparseMatrix
from lm_eval_deepen.relative.normalization import NORMALIZATIONS, Shift, unit_rows
from lm_eval_deepen.relative.topk import largest
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

MAX_DROPPED_MASS = 0.05  # mean over rows; a sparse matrix that drops more does not describe the member
DENSE_LIMIT_BYTES = 5 << 30
BLOCK_BYTES = 64 << 20  # logits of one block of rows, fp32
SAMPLE_ROWS = 256  # rows tried before a long build, to refuse a hopeless one at once
BYTE_ROWS = ("prefix", "canonical")  # one-hot, from bytes alone: neither embeddings nor a temperature


@checked(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class MatrixSpec:
    """How a relative matrix is made."""

    normalization: Annotated[str, Choice(NORMALIZATIONS)] = "centered"
    temperature: Annotated[float, Field(gt=0)] = 100.0  # factor on the normalised cosines before the softmax
    top_m: Annotated[int, Field(ge=0)] = 64  # entries kept per row; 0 keeps all (dense)
    # ``text`` leaves rows of control pieces at zero, ``all`` treats them as the published code does; rows of unused ids
    # are zero in both
    rows: Literal["text", "all"] = "text"
    # what stands for a piece: its embedding (the paper); an anchor by itself, and another piece by its embedding, or by
    # the longest anchor that it begins with, or by the anchor that the members' tokenizers begin it with
    pieces: Literal["embedding", "exact", "prefix", "canonical"] = "embedding"
    # where given, the temperature of every member is chosen so that its rows have this mean entropy in nats, and
    # `temperature` is not used
    entropy: Annotated[float, Field(gt=0)] | None = None
    embeddings: Literal["input", "output"] = "input"  # the input embeddings (the paper), or the rows of the head

    @property
    def from_bytes(self) -> bool:
        """Whether rows come from bytes alone."""
        return self.pieces in BYTE_ROWS


def described_rows(vocabulary: ByteVocab, rows: str = "text") -> Tensor:
    """Return which ids [V] (bool) have a relative row: those with text, or with ``all`` every used id."""
    left_out = vocabulary.unused if rows == "all" else vocabulary.unused | vocabulary.control
    mask = torch.tensor([rows == "all" or bool(piece) for piece in vocabulary.pieces], dtype=torch.bool)
    mask[torch.tensor(sorted(left_out), dtype=torch.int64)] = False
    return mask


def duplicates_apart(vocabulary: ByteVocab, anchors: Collection[bytes], rows: str) -> list[tuple[int, ...]]:
    """Return the ids of every piece of text that has several and is no anchor; none with rows ``all``, as published.

    They have one row, that of the piece which the tokenizer uses, as the ids of an anchor have.
    """
    if rows == "all":
        return []
    return [ids for piece, ids in vocabulary.ids_of.items() if len(ids) > 1 and piece not in anchors]


@dataclass(frozen=True)
class _Job:
    """Everything a block of rows needs."""

    embeddings: Tensor  # [V, d]
    source: Tensor  # [V] the embedding row an id is described by: its own, or that of the piece it duplicates
    anchors: Tensor  # [A, d] unit rows
    shift: Shift | None
    spec: MatrixSpec
    anchor_of: Tensor  # [V] the anchor an id is, where rows of anchors are exact, else -1

    def logits(self, ids: Tensor) -> Tensor:
        block = unit_rows(self.embeddings[self.source[ids]], self.shift)
        logits = NORMALIZATIONS[self.spec.normalization].logits(block, self.anchors, self.spec.temperature)
        exact = (self.anchor_of[ids] >= 0).nonzero()[:, 0]
        logits[exact] = float("-inf")
        logits[exact, self.anchor_of[ids[exact]]] = 0.0
        return logits

    def with_entropy(self, ids: Tensor, entropy: float) -> _Job:
        """Return the job at the temperature where a sample of `ids` has this mean row entropy."""
        sample = ids[:: max(1, len(ids) // SAMPLE_ROWS)]
        cosines = replace(self, spec=replace(self.spec, temperature=1.0)).logits(sample)
        return replace(self, spec=replace(self.spec, temperature=temperature_for(cosines, entropy)))

    def top(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return kept entries [b, m] (sum 1), their anchors [b, m] and the dropped mass [b] of ids [b]."""
        logits = self.logits(ids)
        values, indices = largest(logits, min(self.spec.top_m, logits.shape[1]))
        indices, order = indices.sort(dim=1)  # ascending anchors: neighbouring reads when rows are used
        values = values.gather(1, order)
        peak = values.amax(1, keepdim=True)
        total = logits.sub_(peak).exp_().sum(1)
        values = (values - peak).exp_()
        kept = values.sum(1)
        return values / kept[:, None], indices, (1 - kept / total).clamp_(min=0)


def temperature_for(cosines: Tensor, entropy: float) -> float:
    """Return the factor on normalised cosines [b, A] at which rows have this mean entropy in nats, by bisection."""
    low, high = -7.0, 14.0  # its logarithm; entropy falls as it rises
    for _ in range(40):
        middle = (low + high) / 2
        p = torch.log_softmax(cosines * math.exp(middle), dim=1).exp()
        low, high = (middle, high) if float(-torch.xlogy(p, p).sum(1).mean()) > entropy else (low, middle)
    return math.exp((low + high) / 2)


def build_matrix(
    member: str,
    vocabulary: ByteVocab,
    embeddings: Tensor,
    anchor_ids: Sequence[int],
    duplicates: Mapping[int, int],
    spec: MatrixSpec,
    *,
    progress: bool = False,
) -> RelativeMatrix:
    """Build the relative matrix of a member.

    Args:
        member: its name, for messages.
        vocabulary: its pieces [V].
        embeddings: its embedding rows [>= V, d], those that ``spec.embeddings`` names, any float dtype.
        anchor_ids: its id of every anchor [A].
        duplicates: other ids with an anchor's bytes -> that anchor's index; they get the anchor's row.
        spec: how rows are made and stored.
        progress: show a progress bar.

    Returns:
        A `DenseMatrix` where ``spec.top_m`` is 0, else a `SparseMatrix`.

    Raises:
        MatrixError: unusable embeddings, a dense matrix beyond `DENSE_LIMIT_BYTES`, or a mean dropped mass
            above `MAX_DROPPED_MASS`.
    """
    if embeddings.ndim != 2 or len(embeddings) < len(vocabulary):
        raise MatrixError(
            f"Member {member!r} has {spec.embeddings} embeddings of shape {tuple(embeddings.shape)} for "
            f"{len(vocabulary)} pieces: one row per piece is needed. Its model and tokenizer do not belong "
            "together."
        )
    if not all(bool(part.isfinite().all()) for part in embeddings.split(8192)):
        raise MatrixError(
            f"Member {member!r} has {spec.embeddings} embeddings that are not finite: its weights are damaged."
        )
    mask = described_rows(vocabulary, spec.rows)
    device = embeddings.device
    source = torch.arange(len(vocabulary))
    for alike in duplicates_apart(vocabulary, (), spec.rows):
        source[list(alike)] = vocabulary.preferred(alike)
    anchor_rows = torch.tensor(list(anchor_ids), dtype=torch.int64)
    for other, anchor in duplicates.items():
        source[other] = anchor_rows[anchor]
    anchor_of = torch.full((len(vocabulary),), -1)
    if spec.pieces == "exact":
        anchor_of[anchor_rows] = torch.arange(len(anchor_rows))
        for other, anchor in duplicates.items():
            anchor_of[other] = anchor
    shift = NORMALIZATIONS[spec.normalization].shift(embeddings[: len(vocabulary)], mask.to(device))
    anchors = unit_rows(embeddings[anchor_rows.to(device)], shift)
    job = _Job(embeddings, source.to(device), anchors, shift, spec, anchor_of.to(device))
    ids = mask.nonzero()[:, 0].to(device)
    with torch.no_grad():
        if spec.entropy is not None:
            described = ids[job.anchor_of[ids] < 0] if spec.pieces == "exact" else ids
            job = job.with_entropy(described, spec.entropy)
        return _dense(member, job, ids, progress) if spec.top_m == 0 else _sparse(member, job, ids, progress)


def _blocks(member: str, job: _Job, ids: Tensor, progress: bool) -> Iterator[Tensor]:
    rows = max(64, min(8192, BLOCK_BYTES // (4 * len(job.anchors))))
    for part in blocks(f"relative matrix of {member}", len(ids), rows, progress):
        yield ids[part]


def _dense(member: str, job: _Job, ids: Tensor, progress: bool) -> DenseMatrix:
    num_rows, num_anchors = len(job.source), len(job.anchors)
    size = num_rows * num_anchors * 4
    if size > DENSE_LIMIT_BYTES:
        raise MatrixError(
            f"The dense relative matrix of member {member!r} ({num_rows} pieces x {num_anchors} anchors) "
            f"would take {size / 2**30:.1f} GiB; the limit is {DENSE_LIMIT_BYTES / 2**30:.0f} GiB. Set "
            f"max_anchors to at most {DENSE_LIMIT_BYTES // (4 * num_rows)}, or keep sparse rows with top_m."
        )
    relative = torch.zeros(num_rows, num_anchors, device=job.anchors.device)
    for block in _blocks(member, job, ids, progress):
        relative[block] = torch.softmax(job.logits(block), dim=1)
    return DenseMatrix(relative)


def _sparse(member: str, job: _Job, ids: Tensor, progress: bool) -> SparseMatrix:
    num_rows, num_anchors = len(job.source), len(job.anchors)
    width = min(job.spec.top_m, num_anchors)
    if len(ids) > 4 * SAMPLE_ROWS:
        sample = ids[:: len(ids) // SAMPLE_ROWS]
        dropped = float(torch.cat([job.top(part)[2] for part in sample.split(64)]).mean())
        if dropped > 2 * MAX_DROPPED_MASS:
            raise _dropped_too_much(member, dropped, job.spec, num_anchors, f"a sample of {len(sample)} rows")
    device = job.anchors.device
    values = torch.zeros(num_rows, width, dtype=torch.float16, device=device)
    indices = torch.zeros(num_rows, width, dtype=torch.int32, device=device)
    lost = torch.zeros(num_rows, device=device)
    for block in _blocks(member, job, ids, progress):
        kept, anchors, dropped_mass = job.top(block)
        values[block], indices[block], lost[block] = kept.half(), anchors.int(), dropped_mass
    mean = float(lost[ids].mean()) if len(ids) else 0.0
    if mean > MAX_DROPPED_MASS:
        raise _dropped_too_much(member, mean, job.spec, num_anchors, "all rows")
    return SparseMatrix(values, indices, num_anchors, lost)


def _dropped_too_much(member: str, mean: float, spec: MatrixSpec, anchors: int, where: str) -> MatrixError:
    others = ", ".join(name for name in NORMALIZATIONS if name not in (spec.normalization, "reference"))
    return MatrixError(
        f"The relative matrix of member {member!r} would drop {mean:.3f} of its mass (mean over {where}; the "
        f"limit is {MAX_DROPPED_MASS}) with normalization {spec.normalization!r}, relative_temperature "
        f"{spec.temperature:g} and top_m {spec.top_m} of {anchors} anchors. Raise top_m, use another "
        f"normalization ({others}), lower max_anchors, or keep dense rows with top_m 0."
    )
