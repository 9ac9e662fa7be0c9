"""Selective fusion: steps that are left to the main member because fusing them is not worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_eval_deepen.relative.topk import argmax
from lm_eval_deepen.vocabulary import ByteVocab


@dataclass(frozen=True)
class Selective:
    """Which rows are skipped, and whether what that changes is measured.

    Attributes:
        when: ``agree``: the most likely piece of all members that take part is the same bytes, or all want to end;
            ``confident``: the main member's most likely piece has at least the probability `above`.
        above: see `when`.
        check: whether skipped rows are fused all the same, to count how often the most likely piece changes.
    """

    when: str
    above: float
    check: bool

    def rows(self, logp: Sequence[Tensor], weights: Tensor, vocabs: Sequence[ByteVocab]) -> Tensor:
        """Return rows [B] (bool) to leave to the main member.

        Args:
            logp: the members' natural log-probabilities [B, V_m].
            weights: the members' weights [B, M]; a member of weight 0 has no say.
            vocabs: the members' vocabularies.
        """
        if self.when == "confident":
            return logp[0].amax(dim=1).exp() >= self.above
        best = [argmax(rows).tolist() for rows in logp]
        takes_part = (weights > 0).tolist()
        left = [
            len({identity(vocab, ids[row]) for vocab, ids, here in zip(vocabs, best, says, strict=True) if here}) <= 1
            for row, says in enumerate(takes_part)
        ]
        return torch.tensor(left, device=weights.device)


def identity(vocab: ByteVocab, token: int) -> bytes | str:
    """Return what a token stands for in every vocabulary: its bytes, or its role."""
    return "end of text" if token in vocab.eos else vocab.pieces[token] or f"control {token}"
