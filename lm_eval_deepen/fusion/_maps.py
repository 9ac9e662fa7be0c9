"""Maps between vocabularies that take long to build: built once, kept in the folder of the relative matrices.

They have the file format of a sparse relative matrix: an identity that is checked, a checksum, one write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lm_eval_deepen.errors import MatrixError
from lm_eval_deepen.fusion.base import MemberView
from lm_eval_deepen.relative.blocks import counted
from lm_eval_deepen.relative.matrix import SparseMatrix
from lm_eval_deepen.relative.store import MatrixStore

FORMAT = "lm-eval-deepen-map-1"


def stored_map(
    store: MatrixStore, member: MemberView, kind: str, identity: Mapping[str, Any], build: Callable[[], SparseMatrix]
) -> tuple[SparseMatrix, dict[str, Any]]:
    """Return a map [V_m, K] and its facts; where its file is missing, build it while other processes wait.

    Args:
        store: gives the folder.
        member: whose map it is, for the file name and messages.
        kind: what the map is, for the file name.
        identity: everything that decides its content.
        build: makes it.

    Raises:
        MatrixError: a damaged file, or a folder that cannot be written.
    """
    identity = {"format": FORMAT, "kind": kind, **identity}
    stored, path = store.fetch(f"{kind}-{member.name}", identity, lambda: (build(), []))
    if not isinstance(stored, SparseMatrix):
        raise MatrixError(f"Map file {path} holds a dense matrix. Delete it; it is built anew on the next use.")
    return stored, {"member": member.name, "file": path.name, "bytes": path.stat().st_size}


def first_pieces(member: MemberView, pieces: Sequence[bytes], progress: bool = False) -> Tensor:
    """Return the id of the first token that a member spells each of some pieces with, -1 for none [n].

    By its tokenizer; for a member without one it is the longest piece that the bytes begin with. Where several ids
    have the bytes of that token, it is the one that the tokenizer gives.
    """
    firsts = []
    with counted(f"spellings of {member.name}", len(pieces), progress, "piece") as advance:
        for piece in pieces:
            advance(1)
            first = member.first_token(piece)
            firsts.append(-1 if first is None else first)
    return torch.tensor(firsts, dtype=torch.int64)
