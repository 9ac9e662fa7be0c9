"""Matrix files: safetensors with an identity and a checksum in the metadata, written in one step."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lm_eval_deepen.errors import MatrixError, one_line
from lm_eval_deepen.relative.matrix import DenseMatrix, RelativeMatrix, SparseMatrix
from lm_eval_deepen.storage import write_tensors

FORMAT = "lm-eval-deepen-matrix-1"
CHECKSUM = "content_sha256"
IDENTITY = "identity"


@dataclass(frozen=True)
class MatrixInfo:
    """What a matrix file says of itself."""

    path: Path  # the file
    identity: dict[str, Any]  # format, fingerprints, normalization, temperature, top_m, rows, dtype
    content_sha256: str  # checksum of identity and tensors; equal for equal matrices
    num_bytes: int  # size of the file
    num_rows: int  # pieces of the member, V
    num_anchors: int  # A
    mean_dropped_mass: float  # over the rows that are described
    build_seconds: float  # wall time of the build


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Return a hex digest of an identity, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def content_hash(tensors: Mapping[str, Tensor], identity: Mapping[str, Any]) -> str:
    """Return a hex digest of names, shapes, dtypes and bytes of `tensors` and of `identity`."""
    digest = hashlib.sha256(identity_hash(identity).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_matrix(
    path: Path, matrix: RelativeMatrix, anchor_ids: list[int], identity: Mapping[str, Any], build_seconds: float
) -> None:
    """Write a matrix file in one step, under its lock: readers see the whole file or none. Raises StorageError."""
    tensors = {"anchor_ids": torch.tensor(anchor_ids, dtype=torch.int64)}
    if isinstance(matrix, SparseMatrix):
        tensors |= {"values": matrix.values.half(), "indices": matrix.indices, "dropped_mass": matrix.dropped_mass}
        described = matrix.values.sum(1) > 0
        dropped = float(matrix.dropped_mass[described].mean()) if bool(described.any()) else 0.0
    else:
        tensors["relative"], dropped = matrix.relative, 0.0
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        IDENTITY: json.dumps(dict(identity), sort_keys=True),
        CHECKSUM: content_hash(tensors, identity),
        "mean_dropped_mass": repr(dropped),
        "build_seconds": f"{build_seconds:.3f}",
        "shape": json.dumps(list(matrix.shape)),
    }
    write_tensors(path, tensors, metadata, sole=True)


def describe(path: Path) -> MatrixInfo:
    """Return what a matrix file says of itself, by its header; raises MatrixError for what is no whole matrix file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        rows, anchors = json.loads(metadata["shape"])
        identity = json.loads(metadata[IDENTITY])
        dropped, seconds = float(metadata["mean_dropped_mass"]), float(metadata["build_seconds"])
        sizes = all(type(size) is int and size >= 0 for size in (rows, anchors))
        if not (sizes and isinstance(identity, dict) and math.isfinite(dropped) and math.isfinite(seconds)):
            raise ValueError("its header says what cannot be")
        return MatrixInfo(
            path=path,
            identity=identity,
            content_sha256=metadata[CHECKSUM],
            num_bytes=path.stat().st_size,
            num_rows=rows,
            num_anchors=anchors,
            mean_dropped_mass=dropped,
            build_seconds=seconds,
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, f"it is no complete matrix file ({type(error).__name__}: {one_line(error)})") from error


def read_matrix(path: Path, wanted: Mapping[str, Any], member: str) -> RelativeMatrix:
    """Read and verify a matrix file, which must have the identity `wanted`; `member` stands in messages.

    Raises:
        MatrixError: truncated, altered, or built for something else; the message names both sides.
    """
    info = describe(path)
    if info.identity != dict(wanted):
        keys = sorted(set(info.identity) | set(wanted))
        differing = "; ".join(
            f"{key}: the file has {info.identity.get(key)!r}, member {member!r} needs {wanted.get(key)!r}"
            for key in keys
            if info.identity.get(key) != wanted.get(key)
        )
        raise MatrixError(
            f"Matrix file {path} was built for something else: {differing}. Delete it to build it anew, or "
            "give the folder that holds the matrices of this ensemble."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, f"its tensors cannot be read ({one_line(error)})") from error
    checksum = content_hash(tensors, info.identity)
    if checksum != info.content_sha256:
        raise _damaged(path, f"its content has checksum {checksum[:12]}, its header says {info.content_sha256[:12]}")
    if "relative" in tensors:
        shape = tuple(tensors["relative"].shape)
    else:  # sparse entries say no more than the least number of anchors
        indices = tensors["indices"]
        shape = len(indices), max(info.num_anchors, int(indices.max()) + 1 if indices.numel() else 0)
    if shape != (info.num_rows, info.num_anchors):
        raise _damaged(path, f"its header says {info.num_rows} x {info.num_anchors}, its tensors {shape}")
    if "relative" in tensors:
        return DenseMatrix(tensors["relative"])
    return SparseMatrix(tensors["values"], tensors["indices"], info.num_anchors, tensors["dropped_mass"])


def _damaged(path: Path, what: str) -> MatrixError:
    return MatrixError(f"Matrix file {path} is damaged: {what}. Delete it; it is built anew on the next use.")
