"""Maps between vocabularies that take long to build: built once, kept in the folder of the relative matrices.

They have the file format of a sparse relative matrix: an identity that is checked, a checksum, one write.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lm_eval_deepen.errors import MatrixError, VocabularyError
from lm_eval_deepen.fusion._rows import text_ids
from lm_eval_deepen.fusion.base import MemberView
from lm_eval_deepen.relative.blocks import counted
from lm_eval_deepen.relative.files import identity_hash, write_matrix
from lm_eval_deepen.relative.matrix import SparseMatrix
from lm_eval_deepen.relative.store import explained, read_once
from lm_eval_deepen.storage import locked

if TYPE_CHECKING:
    from lm_eval_deepen.relative.store import MatrixStore

FORMAT = "lm-eval-deepen-map-1"
HASH_LENGTH = 12  # hex digits of the identity in a file name; the whole identity is checked on load


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
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", member.name).strip("._") or "member"
    short = identity_hash(identity)[:HASH_LENGTH]
    # a map does not depend on the member's name: one that was made under another name is used
    with explained(store.folder):
        path = next(iter(sorted(store.folder.glob(f"*-{short}.safetensors"))), None)
    if path is None:
        path = store.folder / f"{kind}-{slug[:80]}-{short}.safetensors"
        with contextlib.ExitStack() as stack:
            with explained(path.parent):
                stack.enter_context(locked(path.with_name(f".{path.stem}.lock")))
            if not path.exists():  # another process may have built it while this one waited
                started = time.monotonic()
                matrix = build()
                with explained(path.parent):
                    write_matrix(path, matrix, [], identity, time.monotonic() - started)
    stored = read_once(path, identity, member.name)
    if not isinstance(stored, SparseMatrix):
        raise MatrixError(f"Map file {path} holds a dense matrix. Delete it; it is built anew on the next use.")
    return stored, {"member": member.name, "file": path.name, "bytes": path.stat().st_size}


def first_pieces(member: MemberView, pieces: Sequence[bytes], progress: bool = False) -> Tensor:
    """Return the id of the first token that a member spells each of some pieces with, -1 for none [n].

    By its tokenizer; for a member without one it is the longest piece that the bytes begin with. Where several ids
    have the bytes of that token, it is the one that the tokenizer gives.
    """
    own = text_ids(member.vocabulary)
    firsts = torch.full((len(pieces),), -1, dtype=torch.int64)
    longest = max(map(len, own), default=0)
    with counted(f"spellings of {member.name}", len(pieces), progress, "piece") as advance:
        for n, piece in enumerate(pieces):
            advance(1)
            if member.spelling is None:
                beginnings = (piece[:end] for end in range(min(len(piece), longest), 0, -1))
                firsts[n] = next((own[part][0] for part in beginnings if part in own), -1)
                continue
            # some tokenizers drop characters that they have no piece for: as good as none
            with contextlib.suppress(VocabularyError):
                firsts[n] = next(iter(member.spelling.encode(piece) or ()), -1)
    return firsts


def spelling_fingerprint(member: MemberView) -> str:
    """Return what decides `first_pieces` beside the pieces."""
    return member.vocabulary.fingerprint + (f":{member.spelling.fingerprint}" if member.spelling else ":longest")
