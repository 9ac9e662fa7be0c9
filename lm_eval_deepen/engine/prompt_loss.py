"""Each member's loss on a prompt, for weights that depend on prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lm_eval_deepen.engine.evidence import Read, TokenPrefix
from lm_eval_deepen.member import Member
from lm_eval_deepen.weighting.base import PromptLoss

LOGITS_PER_CHUNK = 40_000_000  # computed at once, over all members: 128 rows of the demo pair, which fill its heads
ROWS = 16  # of log-probabilities at once


def prompt_losses(
    member: Member,
    wanted: Sequence[Sequence[Read] | None],
    states: Callable[[Sequence[TokenPrefix]], Tensor],
    step: int,
) -> list[PromptLoss | None]:
    """Return one member's loss on each prompt.

    Args:
        member: whose prompts these are.
        wanted: its tokens of every prompt that are evidence; None where it cannot take in the prompt.
        states: gives the states [n, ...] after token sequences.
        step: how many rows of logits to compute at once.
    """
    targets: dict[TokenPrefix, dict[int, float]] = {}
    for read in (read for reads in wanted for read in reads or ()):
        targets.setdefault(read.before, {})[read.token] = 0.0
    paths = list(targets)
    for start in range(0, len(paths), step):
        chunk = paths[start : start + step]
        _read(member.logits(states(chunk)), [targets[path] for path in chunk])
    pieces = member.codec.vocab.pieces
    return [
        None
        if reads is None
        else PromptLoss(
            nats=-sum(targets[read.before][read.token] for read in reads),
            tokens=len(reads),
            num_bytes=sum(len(pieces[read.token]) for read in reads),
            each=tuple((targets[read.before][read.token], len(pieces[read.token])) for read in reads),
            embedding=states([read.before for read in reads]).float().mean(0).flatten().cpu() if reads else None,
        )
        for reads in wanted
    ]


def _read(logits: Tensor, targets: Sequence[dict[int, float]]) -> None:
    """Set the log-probability of every token among a row's targets, from logits [n, V].

    The log-probabilities of a few rows at a time: all of them would take as much memory as the logits again.
    """
    for start in range(0, len(logits), ROWS):
        for row, values in zip(torch.log_softmax(logits[start : start + ROWS], dim=-1), targets[start:], strict=False):
            tokens = list(values)
            values.update(zip(tokens, row[torch.tensor(tokens, device=row.device)].tolist(), strict=True))
