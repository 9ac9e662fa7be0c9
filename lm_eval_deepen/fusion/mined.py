"""MinED: send every piece to the main member's nearest piece by edit distance, and average there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from lm_eval_deepen.config import Options
from lm_eval_deepen.fusion._edit import nearest
from lm_eval_deepen.fusion._linear import LinearFuser, one_to_one
from lm_eval_deepen.fusion._maps import stored_map
from lm_eval_deepen.fusion._rows import text_ids
from lm_eval_deepen.fusion.base import Fuser, MemberView, fusion
from lm_eval_deepen.relative.blocks import counted
from lm_eval_deepen.relative.matrix import SparseMatrix
from lm_eval_deepen.relative.store import MatrixStore
from lm_eval_deepen.vocabulary.byte_vocab import ByteVocab


@fusion("mined", paper="arXiv:2401.10491")
class Mined(Options):
    """``method: mined``, the minimum-edit-distance alignment of FuseLLM (section 3.2); it has no options.

    A piece goes to the main member's piece with the same bytes where there is one, else to the nearest one by
    edit distance over bytes; at equal distances to the lowest id. Code that follows the published one takes the first
    in the order of the vocabulary, and compares characters, with one spelling's mark of spaces ("Ġ" or "▁") replaced by
    the other's; bytes need neither. FuseLLM aligns the tokens of a text by dynamic time warping, too, before it maps
    distributions; members here stand at the same byte.
    """

    def build(self, members: Sequence[MemberView], store: MatrixStore) -> Fuser:
        """Map every vocabulary to the main one; the maps are kept in the store's folder.

        Raises:
            MatrixError: a folder that cannot be written, or a damaged file.
        """
        main = members[0].vocabulary
        stored = []
        for member in members[1:]:
            identity = {"tokenizer": member.vocabulary.fingerprint, "main": main.fingerprint}
            build = partial(nearest_pieces, member.vocabulary, main, member.name, store.progress)
            stored.append(stored_map(store, member, "mined", identity, build))
        facts = {"maps": [fact for _, fact in stored]}
        return LinearFuser(main, [member.vocabulary for member in members], [matrix for matrix, _ in stored], facts)


def nearest_pieces(vocabulary: ByteVocab, main: ByteVocab, name: str = "", progress: bool = False) -> SparseMatrix:
    """Return the map of a vocabulary's ids to the main member's [V_m, V_0]; control pieces and unused ids have none."""
    target = [-1] * len(vocabulary)
    own, places = text_ids(vocabulary), {piece: ids[0] for piece, ids in text_ids(main).items()}
    missing = [piece for piece in own if piece not in places]
    candidates = sorted(places, key=lambda piece: places[piece])
    closest = {}
    if candidates:
        with counted(f"edit distances of {name}", len(missing) * len(candidates), progress, "pair") as advance:
            closest = dict(zip(missing, nearest(missing, candidates, advance)[0].tolist(), strict=True))
    for piece, ids in own.items():
        if piece in places or piece in closest:
            near = places[piece if piece in places else candidates[closest[piece]]]
            for i in ids:
                target[i] = near
    for i in vocabulary.eos if main.eos else ():
        target[i] = min(main.eos)
    return one_to_one(torch.tensor(target, dtype=torch.int64), len(main))
