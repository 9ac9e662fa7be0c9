"""Selective fusion: steps that are left to the main member because fusing them is not worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lm_eval_deepen.engine.covers import TOKENS_READ
from lm_eval_deepen.member import TextCodec
from lm_eval_deepen.relative.topk import argmax
from lm_eval_deepen.vocabulary import ByteVocab, last_safe_cut

END = "end of text"
MAJORITY = 0.5  # mean probability above which a piece is the likeliest of the mean (SAFE, arXiv 2510.15346)


@dataclass(frozen=True)
class Selective:
    """Which rows are skipped, and whether what that changes is measured."""

    # ``agree``: the most likely piece of all members that take part is the same bytes, or all want to end;
    # ``confident``: the main member's most likely piece has at least the probability `above`; ``safe``: as in SAFE
    # (arXiv 2510.15346), without its sharpening. Some other member is `inside` one of its tokens, or all agree, or the
    # main member's most likely piece has a mean probability above `MAJORITY`
    when: str
    above: float  # see `when`
    check: bool  # whether skipped rows are fused all the same, to count how often the most likely piece changes

    def rows(
        self, logp: Sequence[Tensor], weights: Tensor, vocabs: Sequence[ByteVocab], inside: Tensor | None = None
    ) -> Tensor:
        """Return rows [B] (bool) to leave to the main member.

        A member of weight 0 in `weights` [B, M] has no say. For ``safe``, `inside` says which members are inside one of
        their tokens in each row [B, M] (bool).
        """
        if self.when == "confident":
            return logp[0].amax(dim=1).exp() >= self.above
        best = [argmax(rows).tolist() for rows in logp]
        takes_part = (weights > 0).tolist()
        left = [
            len({identity(vocab, ids[row]) for vocab, ids, here in zip(vocabs, best, says, strict=True) if here}) <= 1
            for row, says in enumerate(takes_part)
        ]
        agreed = torch.tensor(left, device=weights.device)
        if self.when == "agree":
            return agreed
        assert inside is not None
        mean = sum(
            weights[:, m] * _mass(rows, vocab, [identity(vocabs[0], token) for token in best[0]])
            for m, (rows, vocab) in enumerate(zip(logp, vocabs, strict=True))
        )
        return agreed | (mean > MAJORITY) | (inside.to(weights.device) & (weights > 0)).any(1)


def inside(codec: TextCodec, tokens: Sequence[int], following: bytes) -> bool:
    """Return whether the end of a text is inside one of a member's tokens, given the bytes that follow, if any.

    Of more `tokens` than `TOKENS_READ` the last ones serve.
    """
    pieces, data = codec.vocab.pieces, b""
    for token in reversed(tokens[-TOKENS_READ:]):
        if token < 0 or not pieces[token]:
            break
        data = pieces[token] + data
    if codec.cuts:
        text = data.decode(errors="surrogateescape")
        data = text[last_safe_cut(text) :].encode(errors="surrogateescape")
    if not data or not following:
        return False
    spelt = codec.spell(data + following)
    return spelt is None or len(data) not in accumulate(len(pieces[token]) for token in spelt)


def _mass(logp: Tensor, vocab: ByteVocab, wanted: Sequence[bytes | str]) -> Tensor:
    """Return the probability [B] that each row [B, V] gives to what a token stands for; 0 where no piece does."""
    ids = [
        vocab.ids_of.get(what, ()) if isinstance(what, bytes) else vocab.eos if what == END else () for what in wanted
    ]
    return torch.stack([row[list(own)].exp().sum() for row, own in zip(logp, ids, strict=True)])


def identity(vocab: ByteVocab, token: int) -> bytes | str:
    """Return what a token stands for in every vocabulary: its bytes, or its role."""
    return END if token in vocab.eos else vocab.pieces[token] or f"control {token}"
