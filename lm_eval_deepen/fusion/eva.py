"""EVA: align vocabularies by their output embeddings, and average over the main one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from lm_eval_deepen.config import Options, Shown
from lm_eval_deepen.errors import MatrixError
from lm_eval_deepen.fusion._linear import LinearFuser
from lm_eval_deepen.fusion._maps import stored_map
from lm_eval_deepen.fusion._rows import TINY, Roles, gather_groups, text_ids
from lm_eval_deepen.fusion.base import Fuser, MemberView, fusion
from lm_eval_deepen.relative.blocks import blocks
from lm_eval_deepen.relative.matrix import SparseMatrix
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.relative.topk import largest
from lm_eval_deepen.vocabulary.anchors import AnchorSet, find_anchors
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab

BLOCK_BYTES = 64 << 20  # cosines of one block of rows, fp32
CHECK_ROWS = 8192


@fusion("eva", paper="arXiv:2404.09492")
class Eva(Options):
    """Options of ``method: eva``, ensemble via vocabulary alignment.

    An orthogonal projection that takes the output embeddings of the common pieces of one member closest to those of
    the main member (Procrustes; section 3.1) makes all pieces comparable. A piece goes to its most similar main
    pieces in proportion to the cosines, which are taken of rows of length 1, centred, again of length 1. A map's row
    sums to 1, or is empty, and roles come from the tokenizer.

    The published run differs. Its projection is vecmap's with ``--supervised``, which whitens both sets of embeddings
    before it and re-weights and de-whitens them after it; here there is the orthogonal projection alone. It takes
    cosines corrected for hubs (CSLS) as values, not for the ranking alone, keeps those above 0.1, and drops pieces
    whose rows are flat; its rows do not sum to 1, which lowers a member's weight where its values are low. It cuts
    distributions to their top 320 first, and takes ids 0 to 2 for the control pieces of any model.
    """

    neighbours: int = Field(10, ge=1, description="The number of main pieces to which a piece is mapped.")
    similarity_floor: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="The smallest cosine of a neighbour. A piece without a neighbour is dropped, and the rest is "
        "renormalised.",
    )
    filter_top: Annotated[int | None, Shown(default="no member is left out")] = Field(
        None,
        ge=1,
        description="A member is left out of a step if its most likely piece is not among this many most likely "
        "pieces of any other member (section 3.3). If that would leave out all members, none is left out.",
    )

    def check(self, vocabularies: Sequence[ByteVocab], names: Sequence[str]) -> list[AnchorSet]:
        """Return the pieces that each other member has in common with the main one.

        Raises:
            VocabularyError: too few of them.
        """
        return [
            find_anchors([vocabulary, vocabularies[0]], names=[name, names[0]])
            for vocabulary, name in zip(vocabularies[1:], names[1:], strict=True)
        ]

    def build(self, members: Sequence[MemberView], store: MatrixStore) -> Fuser:
        """Map every vocabulary to the main one; the maps are kept in the store's folder.

        Raises:
            VocabularyError: a member without enough common pieces.
            MatrixError: unusable embeddings, a folder that cannot be written, or a damaged file.
        """
        main = members[0]
        common = self.check([member.vocabulary for member in members], [member.name for member in members])
        stored = []
        for member, anchors in zip(members[1:], common, strict=True):
            identity = {
                "tokenizer": member.vocabulary.fingerprint,
                "main": main.vocabulary.fingerprint,
                "embedding": member.fingerprint("output"),
                "main_embedding": main.fingerprint("output"),
                "neighbours": self.neighbours,
                "similarity_floor": float(self.similarity_floor),
            }
            build = partial(align, member, main, anchors, self.neighbours, self.similarity_floor, store.progress)
            stored.append(stored_map(store, member, "eva", identity, build))
        facts = [{**fact, "common_pieces": len(anchors)} for (_, fact), anchors in zip(stored, common, strict=True)]
        vocabularies, maps = [member.vocabulary for member in members], [matrix for matrix, _ in stored]
        return EvaFuser(self.filter_top, main.vocabulary, vocabularies, maps, {"maps": facts})


def _output_rows(member: MemberView) -> Tensor:
    rows = member.load_rows("output")
    size = len(member.vocabulary)
    if rows.ndim != 2 or len(rows) < size or not all(bool(x.isfinite().all()) for x in rows.split(CHECK_ROWS)):
        raise MatrixError(
            f"Member {member.name!r} has output embeddings of shape {tuple(rows.shape)} for {size} pieces: one finite "
            "row per piece is needed. Its weights are damaged, or its model and tokenizer do not belong together."
        )
    return rows[:size]


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1, eps=1e-12)


def _normalised(rows: Tensor, ids: Tensor) -> Tensor:
    """Return rows `ids` [n, d] of length 1 about their mean, fp32; a zero row stays one."""
    unit = _unit(rows[ids.to(rows.device)].to(torch.float32))
    return _unit(unit - unit.mean(0))


def procrustes(source: Tensor, target: Tensor) -> Tensor:
    """Return W [d, d'] with orthonormal rows or columns that brings source W closest to `target` [n, d']."""
    u, _, v = torch.linalg.svd(source.double().T @ target.double(), full_matrices=False)
    return (u @ v).to(torch.float32)


def chosen_ids(vocabulary: ByteVocab) -> dict[bytes, int]:
    """Return the id whose embedding stands for a piece: as for anchors, rather no ``<0xNN>`` piece."""
    return {piece: vocabulary.preferred(ids) for piece, ids in text_ids(vocabulary).items()}


@torch.no_grad()
def align(
    member: MemberView, main: MemberView, common: AnchorSet, neighbours: int, floor: float, progress: bool = False
) -> SparseMatrix:
    """Return the map of a member's pieces to their neighbours among the main member's [V_m, V_0]."""
    own, theirs = chosen_ids(member.vocabulary), chosen_ids(main.vocabulary)
    rows, targets = _output_rows(member), _output_rows(main)
    ids, others = torch.tensor(list(own.values())), torch.tensor(list(theirs.values()))
    source, target = _normalised(rows, ids), _normalised(targets, others).to(rows.device)
    place = {piece: n for n, piece in enumerate(own)}
    other_place = {piece: n for n, piece in enumerate(theirs)}
    shared = [place[piece] for piece in common.pieces], [other_place[piece] for piece in common.pieces]
    source = _unit(source @ procrustes(source[shared[0]], target[shared[1]]))

    leaders = torch.tensor([group[0] for group in text_ids(main.vocabulary).values()])  # in the order of `theirs`
    width, block = min(neighbours, len(leaders)), max(16, BLOCK_BYTES // (4 * len(target)))
    parts = []
    for part in blocks(f"alignment of {member.name}", len(source), block, progress):
        cosines, near = largest(source[part] @ target.T, width)
        parts.append((torch.where(cosines >= max(floor, 1e-6), cosines, 0.0).cpu(), leaders[near.cpu()].int()))
    groups = list(text_ids(member.vocabulary).values())  # in the order of `own`: equal bytes have equal rows
    rows_of = torch.tensor([n for n, group in enumerate(groups) for _ in group])
    every_id = torch.tensor([i for group in groups for i in group])
    values = torch.zeros(len(member.vocabulary), width)
    indices = torch.zeros(len(member.vocabulary), width, dtype=torch.int32)
    values[every_id] = torch.cat([part[0] for part in parts])[rows_of]
    indices[every_id] = torch.cat([part[1] for part in parts])[rows_of]
    if main.vocabulary.eos:
        for i in set(member.vocabulary.eos):
            values[i] = torch.tensor([1.0] + [0.0] * (width - 1))
            indices[i] = min(main.vocabulary.eos)
    return SparseMatrix(values.half(), indices, len(main.vocabulary), (values.sum(1) == 0).float())


class EvaFuser(LinearFuser):
    """Averages over the main vocabulary, without the members that no other agrees with."""

    def __init__(self, filter_top: int | None, *linear: Any) -> None:
        super().__init__(*linear)
        self.filter_top = filter_top

    def shares(self, mapped: Sequence[Tensor], shares: Tensor, roles: Roles) -> Tensor:
        """Return the shares [B, M] of the members that pass the filter; all where none does.

        A piece that several ids stand for is one piece, and counts with the mass of all of them.
        """
        if self.filter_top is None:
            return shares
        pieces = [gather_groups(rows.clone(), roles) for rows in mapped]
        best = torch.stack([rows.argmax(1) for rows in pieces], dim=1)  # [B, M]
        top = [largest(rows, min(self.filter_top, rows.shape[1]))[1] for rows in pieces]
        passed = torch.zeros_like(shares, dtype=torch.bool)
        for m in range(len(mapped)):
            for other in range(len(mapped)):
                if other != m:
                    agrees = (top[other] == best[:, m, None]).any(1) & (shares[:, other] > 0)
                    passed[:, m] |= agrees & (shares[:, m] > 0)
        left = torch.where(passed.any(1, keepdim=True), shares * passed, shares)
        return left / left.sum(1, keepdim=True).clamp(min=TINY)  # a row where nobody has text has no shares
